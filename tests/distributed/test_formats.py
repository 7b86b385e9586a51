"""State in coarse formats on parameters in parts: as on one process, in checkpoints too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import QUICK, eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import heavyball
from distributed import processes
from distributed.engines import wholes

C = heavyball.chainable

# Rows of 128 are whole blocks wherever they are cut; of rows of 96 two processes have 48 blocks each,
# and three cut some; a vector.
SHAPES = ((66, 128), (128, 96), (4224,))
STEPS = 3


def _gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + shape[0]))


def _build(make: Callable[..., Any], place: Callable[[Tensor], Tensor]) -> tuple[list, Any]:
    params = [nn.Parameter(place(_gradient(shape, 99))) for shape in SHAPES]
    return params, make(params)


def _step(params: list, opt: Any, place: Callable[[Tensor], Tensor], steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = place(_gradient(tuple(p.shape), step))
        opt.step()


def _of(form: Any, **options: Any) -> Callable[..., Any]:
    return lambda params: heavyball.AdamW(
        params, 0.01, storage_dtype=form, compile=False, **options
    )


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "8bit": _of("8bit"),
    "4bit": _of("4bit"),
    "4bit to nearest": _of("4bit", stochastic_rounding=False),
    "rank1": _of("rank1"),
    "rank1, with kernels": lambda params: heavyball.AdamW(params, 0.01, storage_dtype="rank1"),
    "mixed": _of({"exp_avg": "4bit", "exp_avg_sq": "8bit"}),
    "mixed with rank one": _of({"exp_avg": "4bit", "exp_avg_sq": "rank1"}),
    "4bit, cautious": _of("4bit", caution=True),
    "Muon": lambda params: heavyball.Muon(
        params, 0.01, storage_dtype="4bit", compile=False, products="full"
    ),
}
CUTS = {"rows of 2": (2, 0), "rows of 3": (3, 0), "columns of 2": (2, -1)}


def _state(opt: Any, params: list) -> dict[str, Tensor]:
    saved = opt.state_dict()["state"]
    found = {f"{n}.{k}": t for n in range(len(params)) for k, t in saved[n].items()}
    return dict(zip(found, wholes([*found.values()]), strict=True))


def _on_parts(rank: int, cut: str, makes: list[str]) -> dict[str, Any]:
    world, axis = CUTS[cut]
    mesh = init_device_mesh("cpu", (world,))

    def place(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(axis % tensor.ndim)])

    found: dict[str, Any] = {}
    for name in makes:
        params, opt = _build(OPTIMIZERS[name], place)
        _step(params, opt, place, range(STEPS))
        state = _state(opt, params)
        again, other = _build(OPTIMIZERS[name], place)
        with torch.no_grad():
            for p, q in zip(params, again, strict=True):
                q.copy_(p)
        other.load_state_dict(opt.state_dict())
        ends = []
        for some, one in ((params, opt), (again, other)):
            _step(some, one, place, range(STEPS, STEPS + 1))
            ends.append(wholes(some))
        same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        found[name] = ends[0], state, same
    return found


def _alone(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    params, opt = _build(OPTIMIZERS[name], lambda tensor: tensor)
    _step(params, opt, lambda tensor: tensor, range(STEPS))
    state = {k: t.clone() for k, t in _state(opt, params).items()}
    _step(params, opt, lambda tensor: tensor, range(STEPS, STEPS + 1))
    return wholes(params), state


@pytest.mark.parametrize("cut", CUTS)
def test_parts_hold_what_one_process_does(cut: str) -> None:
    # in `make test` each optimizer is cut in one or two of the three ways
    names = [*OPTIMIZERS][list(CUTS).index(cut) % 2 :: 2] if QUICK else [*OPTIMIZERS]
    found = processes.run(CUTS[cut][0], _on_parts, cut, names)
    for name in names:
        weights, state = _alone(name)
        for rank, of in enumerate(found):
            ends, kept, same = of[name]
            assert same, (name, rank)
            # sums over parts, as Muon's norms, are rounded otherwise than over the whole
            exact = name not in ("Muon", "4bit, cautious", "rank1, with kernels")
            for p, q in zip(weights, ends, strict=True):
                assert torch.equal(p, q) or not exact, (name, rank, (p - q).abs().max())
                assert (p - q).abs().max() <= 2e-4, (name, rank)
            assert kept.keys() == state.keys()
            for key, tensor in state.items():
                assert kept[key].shape == tensor.shape, (name, key)
                assert torch.equal(kept[key], tensor) or not exact, (name, rank, key)


def _held(rank: int, cut: str, names: list[str]) -> dict[str, int]:
    """The bytes of state after a step."""
    world, axis = CUTS[cut]
    mesh, found = init_device_mesh("cpu", (world,)), {}

    def place(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(axis % tensor.ndim)])

    for name in names:
        params, opt = _build(OPTIMIZERS[name], place)
        _step(params, opt, place, range(1))
        found[name] = opt.state_bytes()
    return found


def test_the_bytes_of_parts_are_planned() -> None:
    for cut in ("rows of 2", "rows of 3"):
        world = CUTS[cut][0]
        names = ["4bit", "rank1", "mixed with rank one"]
        found = processes.run(world, _held, cut, names)
        for name in names:
            params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
            plan = heavyball.memory_plan(params, OPTIMIZERS[name], mesh=world)
            assert plan.per_process == tuple(of[name] for of in found), (cut, name)


def _checkpoint_of_one(rank: int, saved: dict[str, Any], name: str, form: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (3,))

    def place(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    params, opt = _build(OPTIMIZERS[form], place)
    with torch.no_grad():
        for p, q in zip(params, saved["params"], strict=True):
            p.copy_(place(q))
    opt.load_state_dict(saved["opt"])
    _step(params, opt, place, range(STEPS, STEPS + 1))
    return wholes(params)


@pytest.mark.parametrize(
    ("name", "form"), [("4bit", "4bit"), ("rank1", "rank1"), ("8bit", "4bit"), ("4bit", "rank1")]
)
def test_a_checkpoint_of_one_process_is_loaded_by_three(name: str, form: str) -> None:
    params, opt = _build(OPTIMIZERS[name], lambda tensor: tensor)
    _step(params, opt, lambda tensor: tensor, range(STEPS))
    saved = {"opt": opt.state_dict(), "params": wholes(params)}
    found = processes.run(3, _checkpoint_of_one, saved, name, form)
    alone = [nn.Parameter(p.clone()) for p in saved["params"]]
    other = OPTIMIZERS[form](alone)
    other.load_state_dict(saved["opt"])
    _step(alone, other, lambda tensor: tensor, range(STEPS, STEPS + 1))
    for of in found:
        assert all(torch.equal(p.detach(), q) for p, q in zip(alone, of, strict=True))
