"""What is asked of an optimizer around its steps: on shards it answers as on one process."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

import heavyball
from distributed import processes
from distributed.engines import OPTIMIZERS, Model, give, wholes
from heavyball import chainable as C

STEPS = 3
Make = Callable[..., Any]
MAKE: dict[str, Make] = {
    **{name: OPTIMIZERS[name] for name in ("AdamW", "cautious AdamW", "Prodigy", "Muon", "SOAP")},
    "ProdigyPlusScheduleFree": OPTIMIZERS["ProdigyPlusScheduleFree"],
    "by name": lambda p: C.ChainOpt(
        p,
        1e-2,
        C.route(
            C.when((C.exp_avg, C.muon), predicate=lambda name, p: "second" in name and p.ndim == 2),
            otherwise=C.scale_by_adam,
        ),
    ),
    "bfloat16 state": lambda p: heavyball.AdamW(p, lr=1e-2, storage_dtype="bfloat16", ecc=None),
    "corrected state": lambda p: heavyball.AdamW(p, lr=1e-2, ecc="bf16+16"),
}


def _asked(model: nn.Module, opt: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    give(model, 0)
    plan = opt.plan()
    assert not plan.without_gradient
    described = str(plan)
    if isinstance(model.first.weight, DTensor) and name in ("Muon", "SOAP", "Prodigy"):
        assert "first.weight" in described
    assert type(opt).__name__ in repr(opt)
    for step in range(STEPS):
        give(model, step)
        if step == 1:
            before = wholes([*model.parameters()])
            changes = wholes([*opt.updates().values()])
            now = wholes([*model.parameters()])
            assert all(torch.equal(p, b) for p, b in zip(now, before, strict=True))
        opt.step()
        if step == 1:
            now = wholes([*model.parameters()])
            made = [p - b for p, b in zip(now, before, strict=True)]
            found["updates"] = changes
            for one, other in zip(changes, made, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    found["params"] = wholes([*model.parameters()])
    with opt.averaged():
        found["averaged"] = wholes([*model.parameters()])
    if "Prodigy" in name:
        found["d"] = [torch.as_tensor(opt.d, dtype=torch.float64)]
    return found


def _engine(rank: int, way: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, make in MAKE.items():
        model = Model()
        if way:
            mesh = init_device_mesh("cpu", (2,))
            policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
            fully_shard(model, mesh=mesh, **(policy if way == "offloaded" else {}))
        found[name] = _asked(model, make(list(model.named_parameters())), name)
    return found


def _close(found: dict, alone: dict) -> None:
    for name, expected in alone.items():
        start = [p.detach() for p in Model().parameters()]
        for what, several in expected.items():
            for number, (a, b) in enumerate(zip(found[name][what], several, strict=True)):
                least = (b - start[number]).abs().max() if len(several) == len(start) else b.abs()
                assert (a - b).abs().max() <= 1e-7 * least + 1e-12, (name, what)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return _engine(0, "")


def test_plans_changes_averages_and_estimates(alone: dict[str, dict[str, Any]]) -> None:
    for found in processes.run(2, _engine, "cut"):
        _close(found, alone)


def test_parameters_that_are_offloaded(alone: dict[str, dict[str, Any]]) -> None:
    """Of a policy that keeps parameters, gradients and state on the CPU; here the mesh is there too."""
    for found in processes.run(2, _engine, "offloaded"):
        _close(found, alone)


# ---- real backward passes


def _batches(rank: int, world: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    return [half.chunk(world)[rank] for half in x.chunk(2)]


def _accumulated(rank: int, world: int) -> dict[str, list[Tensor]]:
    found = {}
    for name in ("AdamW", "cautious AdamW", "Muon", "Prodigy"):
        model = Model()
        if world > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        for step in range(STEPS):
            for part in _batches(rank, world, step):
                (model(part).square().mean() / 2).backward()
            opt.step()
            opt.zero_grad()
        found[name] = wholes([*model.parameters()])
    return found


def test_accumulated_gradients() -> None:
    alone, start = _accumulated(0, 1), [p.detach() for p in Model().parameters()]
    for found in processes.run(2, _accumulated, 2):
        for name, expected in alone.items():
            for a, b, c in zip(found[name], expected, start, strict=True):
                assert (a - b).abs().max() <= 1e-7 * (b - c).abs().max(), name


def _not_finite(rank: int) -> dict[str, list[bool]]:
    found = {}
    for name, chain in {
        "elements": (C.skip_not_finite, C.scale_by_adam),
        "owned": (C.skip_not_finite, C.psgd_kron),
    }.items():
        model = Model()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        opt = C.ChainOpt(list(model.named_parameters()), 1e-2, *chain)
        give(model, 0)
        opt.step()
        before = wholes([*model.parameters()])
        give(model, 1)
        if rank:  # in the part of one process
            model.second.weight.grad.to_local()[0, 0] = torch.inf
        opt.step()
        pairs = zip(wholes([*model.parameters()]), before, strict=True)
        found[name] = [torch.equal(p, b) for p, b in pairs]
        give(model, 2)
        opt.step()
        assert all(bool(p.isfinite().all()) for p in wholes([*model.parameters()]))
    return found


def test_all_processes_skip_what_is_not_finite_on_one() -> None:
    for found in processes.run(2, _not_finite):
        for name, same in found.items():
            assert all(same), name


def _warned(rank: int, world: int) -> list[str]:
    model = Model()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opt = heavyball.Prodigy(list(model.named_parameters()), lr=1e-3)
        for step in range(2):
            give(model, step)
            opt.step()
    return sorted({str(w.message) for w in said if "heavyball" in str(w.filename)})


def test_warnings_are_those_of_one_process() -> None:
    alone = _warned(0, 1)
    for found in processes.run(2, _warned, 2):
        assert found == alone


def _grown(rank: int) -> bool:
    model, other = Model(), Model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    fully_shard(other, mesh=mesh)
    opt = OPTIMIZERS["SOAP"](list(model.third.named_parameters()))
    give(model, 0)
    opt.step()
    opt.add_param_group({"params": [("a", other.first.weight), ("b", other.second.weight)]})
    give(model, 1)
    give(other, 1)
    opt.step()
    changes = wholes([*opt.updates().values()])
    params = [p for group in opt.param_groups for p in group["params"]]
    before = wholes(params)
    opt.step()
    return all(
        torch.allclose(change, p - b, rtol=1e-9, atol=1e-12)
        for change, p, b in zip(changes, wholes(params), before, strict=True)
    )


def test_a_copy_has_the_owners_of_what_it_is_a_copy_of() -> None:
    """Parameters that came later are not who decides who owns those of before."""
    assert processes.run(2, _grown) == [True, True]


def _asked_for(rank: int, world: int) -> tuple[list[Tensor], list[set[str]]]:
    """Weights and keys of state where momentum begins after a step, and its state with it."""
    model, keys = Model(), []
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    opt = heavyball.SGD(list(model.named_parameters()), lr=1e-2)
    for step, momentum in enumerate((0.0, 0.9, 0.9)):
        opt.param_groups[0]["momentum"] = momentum
        give(model, step)
        opt.step()
        keys.append({*opt.state[model.second.weight]})
    return wholes([*model.parameters()]), keys


def test_state_that_a_hyper_parameter_asks_for_later() -> None:
    alone, keys = _asked_for(0, 1)
    assert len(keys[0]) < len(keys[1])
    for found, keys_there in processes.run(2, _asked_for, 2):
        assert keys_there == keys
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
