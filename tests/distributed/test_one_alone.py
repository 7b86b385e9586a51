"""What one process alone does otherwise raises on all of them, and ends in no hang and no signal."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed import processes
from distributed.engines import OPTIMIZERS, Model, give
from heavyball import chainable as C

LIMIT = 200
NAMES = ("AdamW", "cautious AdamW", "Prodigy", "Muon", "SOAP")
Opt = Any


def _cut(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def _said(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _begun(name: str, steps: int) -> tuple[nn.Module, Opt]:
    model = _cut(Model())
    opt = OPTIMIZERS[name](list(model.named_parameters()))
    for step in range(steps):
        give(model, step)
        opt.step()
    give(model, steps)
    return model, opt


# ---- in a step


def _bad_lr(model: nn.Module, opt: Opt) -> None:
    opt.param_groups[0]["lr"] = float("nan")


def _no_number(model: nn.Module, opt: Opt) -> None:
    opt.param_groups[0]["weight_decay"] = "much"


def _lost(model: nn.Module, opt: Opt) -> None:
    opt.param_groups[0]["lr"] = None


def _frozen(model: nn.Module, opt: Opt) -> None:
    model.second.weight.requires_grad_(False)
    model.second.weight.grad = None


def _another(model: nn.Module, opt: Opt) -> None:
    other = _cut(nn.Linear(4, 4).double())
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    opt.add_param_group({"params": list(other.named_parameters())})


ALONE: dict[str, Callable[[nn.Module, Opt], None]] = {
    "lr": _bad_lr,
    "no number": _no_number,
    "lr is lost": _lost,
    "frozen": _frozen,
    "another group": _another,
}


def _stepped(rank: int, steps: int) -> dict[tuple[str, str], tuple[str, bool]]:
    found = {}
    for name in NAMES:
        for what, do in ALONE.items():
            if name == "AdamW" and steps:
                continue  # it sends nothing, so it cannot know
            model, opt = _begun(name, steps)
            before = [p.to_local().clone() for p in model.parameters()]
            if what == "another group":  # a mesh is made by all
                _cut(nn.Linear(4, 4))
            if rank:
                do(model, opt)
            elif what == "another group":
                _cut(nn.Linear(4, 4).double())
            said = _said(opt.step)
            pairs = zip(model.parameters(), before, strict=True)
            found[name, what] = said, all(torch.equal(p.to_local(), b) for p, b in pairs)
    return found


@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
def test_a_step_that_one_process_cannot_make(steps: int) -> None:
    found = processes.run(2, _stepped, steps, limit=LIMIT)
    for of in found:
        for case, (said, same) in of.items():
            assert said, case
            assert same, case


def _other_chain(rank: int) -> list[str]:
    said = []
    for one, other in (("AdamW", "Lion"), ("Muon", "SOAP"), ("cautious AdamW", "AdamW")):
        model = _cut(Model())
        opt = OPTIMIZERS[other if rank else one](list(model.named_parameters()))
        give(model, 0)
        said.append(_said(opt.step))
    return said


def test_processes_with_other_chains() -> None:
    for said in processes.run(2, _other_chain, limit=LIMIT):
        assert all("first.weight" in text for text in said), said


# ---- saving and loading


def _nothing(saved: dict) -> Any:
    return {}


def _no_dict(saved: dict) -> Any:
    return None


def _no_state(saved: dict) -> Any:
    return {"param_groups": saved["param_groups"]}


def _no_group(saved: dict) -> Any:
    return {**saved, "param_groups": []}


def _lacks(saved: dict) -> Any:
    state = dict(saved["state"])
    del state[2]
    return {**saved, "state": state}


def _other_shape(saved: dict) -> Any:
    state = copy.copy(saved["state"])
    key = next(k for k, v in state[2].items() if k != "step")
    state[2] = {**state[2], key: torch.zeros(3, 7, dtype=torch.float64)}
    return {**saved, "state": state}


def _whole(saved: dict) -> Any:
    state = copy.copy(saved["state"])
    key = next(k for k, v in state[2].items() if k != "step")
    state[2] = {**state[2], key: torch.zeros(state[2][key].shape, dtype=torch.float64)}
    return {**saved, "state": state}


def _bad_number(saved: dict) -> Any:
    return {**saved, "param_groups": [{**g, "lr": float("nan")} for g in saved["param_groups"]]}


def _text(saved: dict) -> Any:
    return {**saved, "state": {**saved["state"], 2: "none"}}


MALFORMED = (
    *(_nothing, _no_dict, _no_state, _no_group, _lacks, _other_shape, _whole, _bad_number, _text),
)


def _loaded(rank: int, name: str) -> dict[str, tuple[str, bool]]:
    found = {}
    model, opt = _begun(name, 1)
    for number, make in enumerate(MALFORMED):
        saved = opt.state_dict()
        before = [p.detach().to_local().clone() for p in model.parameters()]
        given = make(saved) if rank == number % 2 else saved
        said = _said(lambda given=given: opt.load_state_dict(given))
        after = opt.state_dict()["state"]
        same = all(
            torch.equal(_here(tensor), _here(after[n][key]))
            for n, state in saved["state"].items()
            for key, tensor in state.items()
        )
        pairs = zip(model.parameters(), before, strict=True)
        same &= all(torch.equal(p.to_local(), b) for p, b in pairs)
        found[make.__name__] = said, same
    give(model, 1)
    opt.step()  # and goes on
    return found


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "Muon", "SOAP"])
def test_a_state_dict_that_one_process_cannot_load(name: str) -> None:
    for of in processes.run(2, _loaded, name, limit=LIMIT):
        for case, (said, same) in of.items():
            assert said, case
            assert same, case


def _shapes(rank: int) -> list[str]:
    said = []
    for name in ("AdamW", "SOAP"):
        _, opt = _begun(name, 1)
        saved = opt.state_dict()
        said.append(_said(lambda saved=saved, opt=opt: opt.load_state_dict(_other_shape(saved))))
        model = _cut(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())
        other = OPTIMIZERS[name](model.parameters())
        said.append(_said(lambda saved=saved, other=other: other.load_state_dict(saved)))
    return said


def test_a_state_dict_of_other_shapes() -> None:
    for said in processes.run(2, _shapes, limit=LIMIT):
        assert all(said), said
        assert "second.weight" in said[0]
        assert "(3, 7)" in said[0]


def _forgot(rank: int) -> list[str]:
    said = []
    for name in ("FactoredAdamW", "SOAP", "8-bit AdamW"):
        model, opt = _begun(name, 1)
        if rank:
            del opt.state[model.second.weight]
        said.append(_said(opt.state_dict))
    return said


def test_state_that_one_process_has_removed() -> None:
    for said in processes.run(2, _forgot, limit=LIMIT):
        assert "second.weight" in said[1], said


def _a_schedule_fails(rank: int) -> str:
    model = _cut(Model())

    def lr(n: int) -> float:
        if n == 2 and rank:
            raise ZeroDivisionError("of one process")
        return 1.0

    opt = C.ChainOpt(
        list(model.named_parameters()), 1e-2, C.schedule("lr", lr), C.clip_by_norm, C.sign
    )
    give(model, 0)
    opt.step()
    give(model, 1)
    try:
        opt.step()
    except (ZeroDivisionError, ValueError) as error:
        return str(error)
    return ""


def test_a_function_of_a_user_that_fails_on_one_process() -> None:
    said = processes.run(2, _a_schedule_fails, limit=LIMIT)
    assert "another process" in said[0]
    assert "of one process" in said[1]


def _averages(rank: int) -> list[str]:
    said = []
    for name in ("cautious LaProp", "ProdigyPlusScheduleFree"):
        _, opt = _begun(name, 1)
        if rank and name.startswith("Prodigy"):
            opt.eval()
        elif rank:
            opt.param_groups[0]["betas"] = (2.0, 0.9)
        said.append(_said(opt.step))
    return said


def test_one_process_in_evaluation_mode() -> None:
    for said in processes.run(2, _averages, limit=LIMIT):
        assert all(said), said
