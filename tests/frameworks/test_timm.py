"""timm's factory, schedulers, groups and checkpoints with optimizers of this library."""

import copy

import pytest
import torch
from pages import recipe
from torch import nn

import heavyball
from heavyball import chainable as C

timm = pytest.importorskip("timm")

from timm.models import resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402
from timm.optim._optim_factory import OptimInfo, default_registry  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

for info in (
    OptimInfo("hbsf", heavyball.SFAdamW, has_betas=True),
    OptimInfo("hbsoap", "heavyball.SOAP", has_betas=True, defaults={"precondition_frequency": 2}),
    OptimInfo("hbmuon", heavyball.Muon, has_eps=False, has_momentum=True),
    OptimInfo(
        "hbchain", C.optimizer_class("exp_avg | scale_by_adam", name="OfText"), has_eps=False
    ),
):
    default_registry.register(info)


def net():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


def step(model, opt, number):
    made = torch.Generator().manual_seed(number)
    images = torch.randn(4, 3, 8, 8, generator=made)
    labels = torch.randint(0, 5, (4,), generator=made)
    opt.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    opt.step()


def schedule(opt, **more):
    return CosineLRScheduler(
        opt, 10, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-5, t_in_epochs=False, **more
    )


def test_the_page_registers_a_chain_and_a_preset():
    names = recipe("timm", model=net())
    opt = names["opt"]
    assert type(opt).__name__ == "CautiousAdam"
    step(names["model"], opt, 0)
    factors = {g["lr_scale"] for g in opt.param_groups}
    assert len(factors) > 1
    for group in opt.param_groups:  # timm's schedulers multiply, the optimizer does not
        assert group["lr"] == pytest.approx(names["scheduler"].warmup_lr_init * group["lr_scale"])


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("name", ["hbsf", "hbsoap", "hbmuon", "hbchain", "lookahead_hbsoap"])
def test_training_goes_on_where_it_was_saved(name, layer_decay):
    def made():
        model = net()
        fallback = {"fallback_list": ("head*",)}  # entries of timm's own in the groups
        return model, create_optimizer_v2(
            model, name, lr=1e-2, weight_decay=0.05, layer_decay=layer_decay, **fallback
        )

    model, opt = made()
    scheduler = schedule(opt)
    for number in range(4):
        step(model, opt, number)
        scheduler.step_update(number + 1)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    again, other = made()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    scheduler_again = schedule(other, initialize=False)
    scheduler_again.step_update(4)
    assert any(group.get("use_fallback") for group in other.param_groups)
    for number in range(4, 7):
        step(model, opt, number)
        step(again, other, number)
        scheduler.step_update(number + 1)
        scheduler_again.step_update(number + 1)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_the_saver_holds_the_average(tmp_path):
    model = net()
    opt = create_optimizer_v2(model, "hbsf", lr=1e-2, weight_decay=0.05)
    saver = CheckpointSaver(model, opt, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    for number in range(3):
        step(model, opt, number)
    with opt.averaged():
        saver.save_checkpoint(0, metric=1.0)
        x = copy.deepcopy(model.state_dict())
    again = net()
    other = create_optimizer_v2(again, "hbsf", lr=1e-2, weight_decay=0.05)
    resume_checkpoint(again, str(tmp_path / "last.pth.tar"), other)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in x.items())
    other.train()
    for number in range(3, 6):
        step(model, opt, number)
        step(again, other, number)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


MODELS = ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"]


@pytest.mark.parametrize("wrap", [None, "compile", "DataParallel"])
@pytest.mark.parametrize("name", MODELS)
def test_layer_decay_is_that_of_timm(name, wrap):
    model = timm.create_model(name)
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = {
        id(p): (0.1 * group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.05, kept, layer_decay=0.75)
        for p in group["params"]
    }
    given = model
    if wrap is not None:
        given = torch.compile(model) if wrap == "compile" else nn.DataParallel(model)
    opt = heavyball.create(
        given, "AdamW", lr=0.1, layer_decay=0.75, no_decay="auto", weight_decay=0.05
    )
    ours = {
        id(p): (pytest.approx(group["lr"], rel=1e-12), group["weight_decay"])
        for group in opt.param_groups
        for p in group["params"]
    }
    assert theirs == ours
