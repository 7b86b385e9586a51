"""LoRA of peft, in the Trainer and by hand: only adapters train, and a resume is bit-identical."""

import copy

import pytest
import torch
from pages import recipe

import heavyball
from heavyball import chainable as C

peft = pytest.importorskip("peft")

from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from test_transformers import Model, rows  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from heavyball.integrations.transformers import AveragedWeights  # noqa: E402

MAKE = {
    "AdamW": lambda m: heavyball.create(m, "AdamW", lr=1e-2),
    "Muon, no decay": lambda m: heavyball.create(m, "Muon", no_decay="auto", weight_decay=0.1),
    "SFAdamW": lambda m: heavyball.SFAdamW(m.parameters(), lr=1e-2),
    "SOAP, named": lambda m: heavyball.SOAP(m.named_parameters(), precondition_frequency=2),
    "chain": lambda m: heavyball.create(m, "scale_by_adam | parameter_ema", lr=1e-2),
    "fused": lambda m: heavyball.AdamW(m.parameters(), lr=1e-2, fuse_backward=True),
}


def adapted():
    model = Model()
    config = peft.LoraConfig(target_modules=["net.0", "net.2"], r=2, modules_to_save=[])
    return peft.get_peft_model(model, config)


def train(model, opt, steps):
    for number in steps:
        made = torch.Generator().manual_seed(number)
        x = torch.randn(8, 4, generator=made)
        opt.zero_grad()
        model(x=x, labels=x.sum(1, keepdim=True))["loss"].backward()
        opt.step()


@pytest.mark.parametrize("name", MAKE)
def test_adapters_train_save_and_resume(name, tmp_path):
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    opt = MAKE[name](model)
    train(model, opt, range(3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("lora_" not in key), key
    stepped = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in opt.state} == stepped  # no state for what is frozen
    with opt.averaged():
        model.save_pretrained(tmp_path)
        torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    other = MAKE[name](again)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    getattr(other, "train", lambda: None)()
    train(model, opt, range(3, 6))
    train(again, other, range(3, 6))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def trained(path, steps, resume=None):
    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizer_cls_and_kwargs=(heavyball.SFAdamW, {"lr": 0.05}),
        callbacks=[AveragedWeights()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_the_trainer_saves_the_average_of_adapters_and_resumes(tmp_path):
    whole, trainer = trained(tmp_path / "a", 6)
    trainer.save_model(str(tmp_path / "final"))
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "final")
    for name, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    again, _ = trained(tmp_path / "b", 6, resume=str(tmp_path / "a" / "checkpoint-4"))
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_different_rates_for_both_matrices_as_in_loraplus():
    model = adapted()
    opt = create_loraplus_optimizer(model, heavyball.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    train(model, opt, range(2))
    rates = [(g["lr"], len(g["params"])) for g in opt.param_groups if g["params"]]
    assert rates == [(1e-3, 2), (0.016, 2)]


def test_the_page_trains_an_adapter():
    names = recipe("peft", model=adapted())
    train(names["model"], names["opt"], range(2))
    assert isinstance(names["opt"], C.ChainOpt)
