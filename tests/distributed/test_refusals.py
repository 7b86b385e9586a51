"""What cannot be right raises on every process, before anything has been changed, and nothing hangs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import heavyball
from distributed import processes
from distributed.engines import Model, give

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p: heavyball.AdamW(p, lr=1e-2),
    "cautious": lambda p: heavyball.AdamW(p, lr=1e-2, caution=True),
    "Prodigy": lambda p: heavyball.Prodigy(p),
    "Muon": lambda p: heavyball.Muon(p, lr=1e-2),
    "SOAP": lambda p: heavyball.SOAP(p, lr=1e-2),
}


def _model() -> Model:
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def _said(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def _missing(rank: int, first: bool) -> dict[str, tuple[str, bool]]:
    found = {}
    for name, make in OPTIMIZERS.items():
        if name == "AdamW" and not first:
            continue  # it sends nothing, so it cannot know
        model = _model()
        opt = make(list(model.named_parameters()))
        if not first:
            give(model, 0)
            opt.step()
        give(model, 1)
        if rank:
            model.second.weight.grad = None
        before = [p.to_local().clone() for p in model.parameters()]
        said = _said(opt.step)
        same = all(
            torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)
        )
        give(model, 1)
        opt.step()  # and goes on
        found[name] = said, same
    return found


@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "later"])
def test_a_gradient_that_one_process_lacks(first: bool) -> None:
    for of in processes.run(2, _missing, first):
        for name, (said, same) in of.items():
            assert "second.weight" in said, name
            assert same, name


def _unused(rank: int) -> None:
    for make in OPTIMIZERS.values():
        model = _model()
        opt = make(list(model.named_parameters()))
        before = model.second.weight.to_local().clone()
        for step in range(2):
            give(model, step)
            model.second.weight.grad = None
            opt.step()
        assert torch.equal(model.second.weight.to_local(), before)
        assert not opt.state.get(model.second.weight)


def test_what_no_process_has_a_gradient_of_is_left_alone() -> None:
    processes.run(2, _unused)


def _bad(rank: int) -> dict[str, str]:
    found = {}
    for name, make in OPTIMIZERS.items():
        model = _model()
        opt = make(list(model.named_parameters()))
        give(model, 0)
        if rank == 0:
            model.second.weight.grad = None
            model.second.weight.requires_grad_(False)
        found[name] = _said(opt.step)
    return found


def test_processes_that_would_do_something_else() -> None:
    for of in processes.run(2, _bad):
        for name, said in of.items():
            assert "second.weight" in said, name


def _placements(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    said = [_said(lambda: heavyball.AdamW([("p", torch.nn.Parameter(partial))], lr=1e-2))]
    # shards of sizes that torch does not give make up another tensor
    ragged = DTensor.from_local(
        torch.ones(1 + 2 * rank, 2), mesh, [Shard(0)], run_check=False, shape=(4, 2), stride=(2, 1)
    )
    said.append(_said(lambda: heavyball.AdamW([("p", torch.nn.Parameter(ragged))], lr=1e-2)))
    model = _model()
    opt = heavyball.AdamW(list(model.named_parameters()), lr=1e-2)
    give(model, 0)
    opt.step()
    p = model.first.weight
    moved = torch.nn.Parameter(p.detach().redistribute(placements=[Replicate()]))
    p.data = moved.data
    p.grad = None
    said.append(_said(opt.step))
    return said


def test_placements_that_cannot_be_stepped() -> None:
    for partial, ragged, moved in processes.run(2, _placements):
        assert "'p'" in partial
        assert "yet to be reduced" in partial
        assert "'p'" in ragged
        assert "holds" in ragged
        assert moved == "" or "first.weight" in moved
