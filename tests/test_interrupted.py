"""What an exception at any operation leaves behind: no memory, or Ctrl-C."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    all_params,
    assert_same_optimizers,
    averages,
    clones,
    copies,
    differences,
    parameters,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import heavyball
from heavyball import chainable as C


class Interrupting(TorchDispatchMode):
    """Raises at the n-th operation on tensors, or at each from there on."""

    def __init__(self, n: int, again: bool = False):
        super().__init__()
        self.left, self.again, self.raised = n, again, False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 or (self.again and self.left < 0):
            self.raised = True
            raise KeyboardInterrupt
        return op(*args, **(kwargs or {}))


def interruptions(
    make: Callable[[], Any], act: Callable[[Any], object], again: bool = False, by: int = 1
):
    """What `make` gives after `act` on it was interrupted at its 1st, 2nd, .. operation, to the last.

    by: 2 takes every other one.
    """
    for n in range(1, 10_000, by):
        made, mode = make(), Interrupting(n, again)
        try:
            with mode:
                act(made)
        except KeyboardInterrupt:
            yield made
        if not mode.raised:
            assert n > 1
            return


def low_precision(params: list[nn.Parameter]) -> C.ChainOpt:
    low = [nn.Parameter(p.detach().bfloat16()) for p in params]
    return heavyball.SFAdamW(low, 0.1, compile=False, param_ecc="bf16+16", storage_dtype="bfloat16")


AVERAGING: dict[str, Callable[[Any], C.ChainOpt]] = {
    "SFAdamW": lambda ps: heavyball.SFAdamW(ps, 0.1, compile=False),
    "parameter_ema": lambda ps: C.ChainOpt(
        [{"params": ps[:1]}, {"params": ps[1:]}],
        0.1,
        C.scale_by_adam,
        C.parameter_ema,
        compile=False,
    ),
    "param_ecc": low_precision,
    "ProdigyPlus": lambda ps: heavyball.ProdigyPlusScheduleFree(ps, d0=0.1, compile=False),
}
every_average = pytest.mark.parametrize("name", AVERAGING)
interrupted_average = pytest.mark.parametrize("name", ["SFAdamW", "parameter_ema", "param_ecc"])


@functools.cache
def _trained(name: str) -> C.ChainOpt:
    # one parameter where each takes many operations
    opt = AVERAGING[name](parameters((3,), *([(4,)] if name != "param_ecc" else [])))
    assert averages(opt)
    train(opt, range(3))
    return opt


def trained(name: str) -> C.ChainOpt:
    return copy.deepcopy(_trained(name))


def switches() -> Iterator[tuple[str, Callable[[C.ChainOpt], object], bool]]:
    def inside(opt: C.ChainOpt) -> None:
        with opt.averaged():
            pass

    yield "eval", lambda opt: opt.eval(), False
    yield "train", lambda opt: opt.train(), True
    yield "averaged", inside, False


@interrupted_average
@pytest.mark.parametrize(
    ("act", "evaluating"), [p[1:] for p in switches()], ids=["eval", "train", "averaged"]
)
def test_an_interrupted_switch_loses_nothing(name, act, evaluating):
    want, right = trained(name), snapshot(trained(name))
    shown = clones(all_params(trained(name).eval()))
    train(want, [3])

    made = trained(name).train(not evaluating)
    for number, opt in enumerate(interruptions(lambda: copy.deepcopy(made), act)):
        # wherever it ended: nothing has happened, or all of it
        if opt.param_groups[0]["train_mode"]:
            assert not differences(snapshot(opt), right)
        else:
            assert differences(right, snapshot(opt))
        evaluated = clones(all_params(opt.eval()))
        assert all(torch.equal(e, s) for e, s in zip(evaluated, shown, strict=True))
        assert not differences(snapshot(opt.train()), right)
        if number % 4 == 0:
            train(opt, [3])
            assert_same_optimizers(opt, want)


@pytest.mark.parametrize("name", ["SFAdamW", "parameter_ema"])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_switch_that_cannot_go_back_either_is_made_good_by_the_next(name, evaluating):
    right, shown = snapshot(trained(name)), clones(all_params(trained(name).eval()))
    made = trained(name).train(not evaluating)
    for next_mode in (True, False):
        for opt in interruptions(
            lambda: copy.deepcopy(made), lambda o: o.train(evaluating), again=True
        ):
            if not all(g["train_mode"] for g in opt.param_groups):
                with pytest.raises(RuntimeError, match="evaluation mode"):
                    opt.step()
            opt.train(next_mode)
            if not next_mode:
                evaluated = clones(all_params(opt))
                assert all(torch.equal(e, s) for e, s in zip(evaluated, shown, strict=True))
            assert not differences(snapshot(opt.train()), right)


# ---- parameters listed twice


@every_average
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_stands_twice_keeps_its_training_weights(name):
    params = parameters((3,), (2,))
    opt = AVERAGING[name]([params[0], params[1], params[1]])
    train(opt, range(3))
    before = snapshot(opt)
    with opt.averaged():
        assert differences(before, snapshot(opt))
    assert not differences(before, snapshot(opt))
    loaded = AVERAGING[name]([(c := copies(params))[0], c[1], c[1]])
    loaded.load_state_dict(opt.eval().state_dict())
    loaded.train()
    assert not differences(before, snapshot(loaded))


# ---- weights written in evaluation mode


def overwrite(param: Tensor) -> None:
    with torch.no_grad():
        param.copy_(torch.full_like(param, 42.0))


def replace(param: Tensor) -> None:
    param.data = torch.full_like(param, 42.0)


def write_unseen(param: Tensor) -> None:
    param.data.fill_(42.0)


def load_model(param: Tensor) -> None:
    model = nn.Module()
    model.register_parameter("weight", param)
    model.load_state_dict({"weight": torch.full_like(param, 42.0)})


def in_averaged(opt: C.ChainOpt, write: Callable[[Tensor], None]) -> None:
    with opt.averaged():
        write(all_params(opt)[-1])


def between_calls(opt: C.ChainOpt, write: Callable[[Tensor], None]) -> None:
    opt.eval()
    write(all_params(opt)[-1])
    opt.train()


def began_at(opt: C.ChainOpt, before: dict[str, Tensor], place: int) -> None:
    """The parameter at this place began at 42, in every state that holds weights; the others go on."""
    now = snapshot(opt)
    changed = differences(before, now)
    assert str(place) in changed
    assert {key.split(".")[0] for key in changed} == {str(place)}
    assert not any(key.endswith("train_param") for key in now)
    for key in changed:
        if not key.endswith(":correction"):
            assert torch.equal(now[key], torch.full_like(now[key], 42.0)), key
    assert torch.equal(all_params(opt.eval())[place], now[str(place)])
    opt.train()


@every_average
@pytest.mark.parametrize("write", [overwrite, replace, write_unseen, load_model])
@pytest.mark.parametrize("writing", [in_averaged, between_calls])
def test_weights_written_in_evaluation_mode_are_trained_from(name, write, writing):
    opt = trained(name)
    before, place = snapshot(opt), len(all_params(opt)) - 1
    with pytest.warns(UserWarning, match=r"parameter . of group . .* other weights") as found:
        writing(opt, write)
    assert found[0].filename == __file__
    began_at(opt, before, place)
    train(opt, [3])


NOTICED: dict[str, Callable[[C.ChainOpt], object]] = {
    "train": lambda opt: opt.train(),
    "eval": lambda opt: opt.eval().train(),
    "state_dict": lambda opt: opt.state_dict(),
}


@every_average
@pytest.mark.parametrize("write", [overwrite, load_model])
@pytest.mark.parametrize("look", NOTICED)
def test_weights_written_in_training_mode_are_trained_from(name, write, look):
    opt = trained(name)
    train(opt, [3])
    before, place = snapshot(opt), len(all_params(opt)) - 1
    write(all_params(opt)[-1])
    with pytest.warns(UserWarning, match=r"parameter . of group . .* other weights") as found:
        NOTICED[look](opt)
    assert found[0].filename == __file__
    began_at(opt, before, place)


@every_average
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_begins_at_weights_that_were_loaded(name, fused):
    if fused and name == "ProdigyPlus":
        return  # its own way, see test_driven.py
    ends = []
    for by_hand in (False, True):
        opt = trained(name)
        train(opt, [3])
        if fused:
            heavyball.fuse_backward(opt)
        params, before = all_params(opt), copy.deepcopy(opt.state_dict())
        load_model(params[0])
        if by_hand:  # with its own state, so nothing is noticed
            saved = copy.deepcopy(before)
            for key, value in saved["state"][0].items():
                if key.endswith((".z", "parameter_ema")):
                    value.fill_(42.0)
                elif key == "param:correction":
                    value.zero_()
            opt.load_state_dict(saved)

        def step(opt=opt, params=params):
            if fused:
                sum((p.float() * (i + 1)).sum() for i, p in enumerate(params)).backward()
                opt.step()
            else:
                train(opt, [4])

        if by_hand:
            step()
        else:
            with pytest.warns(UserWarning, match="other weights"):
                step()
        ends.append(snapshot(opt))
    assert not differences(*ends)


@every_average
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("stepped", [False, True])
def test_weights_that_come_with_their_state_are_no_replacement(name, evaluating, order, stepped):
    opt = trained(name)
    train(opt, [3])
    opt.train(not evaluating)
    saved, weights = copy.deepcopy(opt.state_dict()), clones(all_params(opt))
    other = trained(name)
    if stepped:
        train(other, [7])

    def load_weights():
        with torch.no_grad():
            for p, w in zip(all_params(other), weights, strict=True):
                p.copy_(w)

    for part in order.split()[0], ("optimizer", "model")[order.startswith("optimizer")]:
        load_weights() if part == "model" else other.load_state_dict(saved)
    opt.train()
    other.train()
    train(opt, [5])
    train(other, [5])
    assert_same_optimizers(opt, other)


@every_average
@pytest.mark.filterwarnings("error")
def test_plain_evaluation_says_nothing(name):
    opt = trained(name)
    opt.eval().eval().train().train()
    with opt.averaged():
        for group in opt.param_groups:
            group["lr"] = 0.5
    saved = opt.eval().state_dict()
    weights = clones(all_params(opt))
    for first in ("model", "optimizer"):
        other = trained(name)
        if first == "optimizer":
            other.load_state_dict(saved)
        with torch.no_grad():
            for p, w in zip(all_params(other), weights, strict=True):
                p.copy_(w)
        if first == "model":
            other.load_state_dict(saved)
        other.train()


@every_average
def test_weights_that_are_no_average_are_seen_after_a_state_was_loaded(name):
    opt = trained(name)
    opt.load_state_dict(opt.eval().state_dict())
    overwrite(all_params(opt)[0])
    with pytest.warns(UserWarning, match="parameter 0 of group 0"):
        opt.train()


# ---- a step that an exception ends

PREPARED: dict[str, Callable[[list[nn.Parameter]], C.ChainOpt]] = {
    "AdamW": lambda ps: heavyball.AdamW(ps, 0.1, compile=False, foreach=False),
    "together": lambda ps: C.ChainOpt(
        ps, 0.1, C.clip_by_global_norm, C.scale_by_adam, compile=False
    ),
    "8bit": lambda ps: heavyball.AdamW(ps, 0.1, compile=False, storage_dtype="8bit"),
    "4bit": lambda ps: heavyball.AdamW(ps, 0.1, compile=False, storage_dtype="4bit"),
    "rank1": lambda ps: heavyball.AdamW(ps, 0.1, compile=False, storage_dtype="rank1"),
    "param_ecc": low_precision,
    "Prodigy": lambda ps: heavyball.Prodigy(ps, d0=0.1, compile=False),
    "SOAP": lambda ps: heavyball.SOAP(ps, 0.1, compile=False, precondition_frequency=2),
    "Muon": lambda ps: heavyball.Muon(ps, 0.1, compile=False),
}


def in_place(key: str) -> bool:
    """Whether a matrix method averages this state where it lies, before anything is written."""
    return "gram" in key


@pytest.mark.parametrize("name", PREPARED)
def test_a_step_that_is_interrupted_leaves_no_parameter_half_written(name):
    """Each parameter and its state are of before the step or of after it, and the next step works."""
    # from 4,096 elements on tensors are kept in coarse formats
    first = (64, 64) if name in ("8bit", "4bit", "rank1") else (3, 2)
    opt = PREPARED[name](parameters(first, (4,)))
    train(opt, range(3))
    fill = functools.partial(train, steps=[3])
    before, done = snapshot(opt), copy.deepcopy(opt)
    fill(done)
    after = snapshot(done)
    ends = set()
    many = {"param_ecc": 41, "8bit": 19, "4bit": 41, "rank1": 19, "SOAP": 7, "Muon": 7}.get(name, 3)
    for made in interruptions(lambda: copy.deepcopy(opt), fill, by=many):
        now = snapshot(made)
        for place in ("0", "1"):
            own = {k for k in now if k.split(".")[0] == place and not in_place(k)}
            old, new = (own & set(differences(now, those)) for those in (before, after))
            assert not old or not new, (place, sorted(old), sorted(new))
            ends.add((place, bool(old)))
        train(made, [4])
        assert all(p.isfinite().all() for p in all_params(made))
        if averages(made):
            trained_at = snapshot(made)
            assert not differences(trained_at, snapshot(made.eval().train()))
    assert {("0", False), ("0", True)} <= ends
