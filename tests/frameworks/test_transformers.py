"""AveragedWeights and Metrics in transformers' Trainer; `make test-frameworks` runs it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import heavyball
from heavyball.integrations.transformers import AveragedWeights, Metrics


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen = []

    def forward(self, x, labels):
        if not self.training:
            self.seen.append([p.detach().clone() for p in self.parameters()])
        loss = (self.net(x) - labels).square().mean()
        return {"loss": loss, "logits": self.net(x)}


def rows():
    made = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=made)
    return [{"x": r, "labels": r.sum()[None]} for r in x]


def train(path, steps, optimizer=heavyball.SFAdamW, resume=None, **options):
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    opt = optimizer(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=(opt, schedule),
        callbacks=[AveragedWeights(), Metrics()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, opt, trainer


def weights(path):
    return list(load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("best", [False, True])
def test_what_is_evaluated_saved_and_left_is_the_average(tmp_path, best):
    model, opt, trainer = train(tmp_path, 6, load_best_model_at_end=best)
    left = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    shown = dict(zip(left, model.seen[-1], strict=True))
    for name, x in shown.items():
        assert torch.equal(saved[name], x)
    chosen = trainer.state.best_model_checkpoint if best else str(tmp_path / "checkpoint-6")
    for name, x in load_file(f"{chosen}/model.safetensors").items():
        assert torch.equal(left[name], x)
    if not best:
        opt.train()
        assert any(not torch.equal(p, left[n]) for n, p in model.named_parameters())


def test_a_resume_is_bit_identical(tmp_path):
    whole, *_ = train(tmp_path / "a", 6)
    train(tmp_path / "b", 4)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        again, *_ = train(tmp_path / "c", 6, resume=str(tmp_path / "b" / checkpoint))
        for p, q in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q)


def test_other_optimizers_are_left_alone_and_metrics_are_plain_numbers(tmp_path):
    train(tmp_path / "a", 2, torch.optim.AdamW)
    _, _, trainer = train(tmp_path / "b", 3, heavyball.AdamW)
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert all(isinstance(e["optimizer/group_0/update_norm"], float) for e in logged)
    assert logged[-1]["optimizer/group_0/update_norm"] > 0
