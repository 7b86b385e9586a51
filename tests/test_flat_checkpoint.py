"""The dicts of torch.distributed.checkpoint, flat and nested, of one process without a group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed.engines import OPTIMIZERS, Model, give
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import heavyball
from heavyball import chainable as C

STEPS = 3
Make = Callable[..., Any]


def _stepped(model: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        give(model, step)
        opt.step()
    opt.zero_grad()


def _copied(model: nn.Module) -> Model:
    other = Model()
    other.load_state_dict(model.state_dict())
    return other


def _same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("begun", [True, False], ids=["init_state", "by a step of zeros"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name: str, flat: bool, begun: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat, cpu_offload=begun)
    model = Model()
    opt = OPTIMIZERS[name](list(model.named_parameters()))
    _stepped(model, opt, range(STEPS))
    saved = get_optimizer_state_dict(model, opt, options=options)
    other = _copied(model)
    again = OPTIMIZERS[name](list(other.named_parameters()))
    if begun:
        again.init_state()
    set_optimizer_state_dict(other, again, saved, options=options)
    for each, stepping in ((model, opt), (other, again)):
        _stepped(each, stepping, range(STEPS, STEPS + 2))
    _same(model, other)


def _groups(model: Model) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": named[:3], "weight_decay": 0.2, "owner": "trainer", "betas": (0.8, 0.99)},
        {"params": named[3:], "lr": C.cosine(100, peak=1e-2)},
    ]


MAKE: dict[str, Make] = {
    "AdamW": lambda g: heavyball.AdamW(g, lr=1e-2),
    "SFAdamW": lambda g: heavyball.SFAdamW(g, lr=1e-2),
    "Prodigy": lambda g: heavyball.Prodigy(g),
}


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("name", MAKE)
def test_groups_with_entries_of_their_own(name: str, flat: bool) -> None:
    """Schedules, tuples, text and entries that only one group has."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Model()
    groups = _groups(model)
    if name == "Prodigy":  # all groups have one d
        groups = [{k: v for k, v in g.items() if k != "lr"} for g in groups]
    opt = MAKE[name](groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.5, total_iters=10)
    _stepped(model, opt, range(STEPS))
    scheduler.step()
    saved = get_optimizer_state_dict(model, opt, options=options)
    other = _copied(model)
    groups = [
        {k: v for k, v in g.items() if k in ("params", "owner", "lr")} for g in _groups(other)
    ]
    if name == "Prodigy":
        groups = [{k: v for k, v in g.items() if k != "lr"} for g in groups]
    again = MAKE[name](groups).init_state()
    torch.optim.lr_scheduler.LinearLR(again, 0.5, total_iters=10)
    set_optimizer_state_dict(other, again, saved, options=options)
    derived = ("params", "scheduled_lr")  # of the last step, and of what comes after a load
    for found, expected in zip(again.param_groups, opt.param_groups, strict=True):
        assert found.keys() == expected.keys()
        assert all(found[key] == expected[key] for key in found if key not in derived)
    for each, stepping in ((model, opt), (other, again)):
        _stepped(each, stepping, range(STEPS, STEPS + 2))
    _same(model, other)


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_other_order_and_other_groups(flat: bool, named: bool) -> None:
    """State goes to the parameter that it was saved for, wherever that stands now."""

    def params(model: nn.Module) -> list[Any]:
        return list(model.named_parameters() if named else model.parameters())

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Model()
    first = params(model)
    opt = heavyball.AdamW([{"params": first[:4]}, {"params": first[4:]}], lr=1e-2)
    _stepped(model, opt, range(STEPS))
    saved = get_optimizer_state_dict(model, opt, options=options)
    other = _copied(model)
    second = params(other)[::-1]
    again = heavyball.AdamW([{"params": second[:5]}, {"params": second[5:]}], lr=1e-2).init_state()
    set_optimizer_state_dict(other, again, saved, options=options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == again.state[q].keys()
        for key, value in opt.state[p].items():
            assert torch.equal(value, again.state[q][key]), key


@pytest.mark.parametrize("name", ["AdamW", "SOAP", "Muon"])
def test_parameters_without_state(name: str) -> None:
    """A flat dict says nothing of a parameter that never had a gradient, or that is frozen."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Model()
    model.norm.bias.requires_grad_(False)
    opt = OPTIMIZERS[name](list(model.named_parameters()))

    def step(each: nn.Module, stepping: Any, number: int) -> None:
        give(each, number)
        each.norm.bias.grad = each.third.weight.grad = None
        stepping.step()

    step(model, opt, 0)
    saved = get_optimizer_state_dict(model, opt, options=options)
    assert not any(key.startswith("state.third") for key in saved)
    other = _copied(model)
    other.norm.bias.requires_grad_(False)
    again = OPTIMIZERS[name](list(other.named_parameters())).init_state()
    set_optimizer_state_dict(other, again, saved, options=options)
    assert not again.state.get(other.third.weight)
    for each, stepping in ((model, opt), (other, again)):
        step(each, stepping, 1)
        give(each, 2)
        each.norm.bias.grad = None
        stepping.step()
    _same(model, other)


def test_weights_that_are_evaluated() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Model()
    opt = heavyball.SFAdamW(list(model.named_parameters()), lr=1e-2)
    _stepped(model, opt, range(STEPS))
    opt.eval()
    saved = get_optimizer_state_dict(model, opt, options=options)
    other = _copied(model)
    again = heavyball.SFAdamW(list(other.named_parameters()), lr=1e-2).init_state()
    with pytest.raises(ValueError, match="train_param"):
        set_optimizer_state_dict(other, again, dict(saved), options=options)
    again.eval()
    set_optimizer_state_dict(other, again, saved, options=options)
    for each, stepping in ((model, opt), (other, again)):
        stepping.train()
        _stepped(each, stepping, range(STEPS, STEPS + 2))
    _same(model, other)


def test_a_state_that_is_missing_is_named() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Model()
    opt = heavyball.AdamW(list(model.named_parameters()), lr=1e-2).init_state()
    saved = get_optimizer_state_dict(model, opt, options=options)
    del saved["state.first.weight.scale_by_adam.exp_avg_sq"]
    before: list[Tensor] = [v.clone() for s in opt.state.values() for v in s.values()]
    with pytest.raises(ValueError, match=r"first\.weight.*missing state.*exp_avg_sq"):
        set_optimizer_state_dict(model, opt, saved, options=options)
    after = [v for s in opt.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_of_companions_and_of_a_number_that_looks_like_a_state() -> None:
    """Keys with dots and colons, of which one begins as another does."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def make(model: nn.Module) -> Any:
        chain = (C.exp_avg, C.exp_avg, C.scale_by_adam)
        return C.ChainOpt(list(model.named_parameters()), 1e-2, *chain, ecc="bf16+8")

    model = Model()
    opt = make(model)
    _stepped(model, opt, range(STEPS))
    saved = get_optimizer_state_dict(model, opt, options=options)
    assert any(key.endswith(":correction") for key in saved)
    other = _copied(model)
    again = make(other).init_state()
    set_optimizer_state_dict(other, again, saved, options=options)
    for each, stepping in ((model, opt), (other, again)):
        _stepped(each, stepping, range(STEPS, STEPS + 2))
    _same(model, other)
