"""What trainers do around a step: backward, clipping, scaling; low precision, and own chains."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import heavyball
from distributed import processes
from distributed.engines import ENGINES, Model, give, wholes
from heavyball import chainable as C

STEPS = 3
Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p, **o: heavyball.AdamW(p, lr=1e-2, **o),
    "cautious": lambda p, **o: heavyball.AdamW(p, lr=1e-2, caution=True, **o),
    "Muon": lambda p, **o: heavyball.Muon(p, lr=1e-2, **o),
}


def _batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 10, generator=generator, dtype=torch.float64)


def _train(model: nn.Module, opt: Any, part: Callable[[Tensor], Tensor], way: str) -> list[Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=way == "scaler")
    for step in range(STEPS):
        loss = model(part(_batch(step))).square().mean()
        scaler.scale(loss).backward()
        if way == "scaler":
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            continue
        if way == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
    return wholes([*model.parameters()])


WAYS = ("plain", "clip", "scaler", "fused", "meta")


def _sharded(rank: int, way: str) -> dict[str, list[Tensor]]:
    found = {}
    for name, make in OPTIMIZERS.items():
        model = Model()
        if way == "meta":
            start = [p.detach().clone() for p in model.parameters()]
            model = model.to("meta")
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if way == "meta":
            model.to_empty(device="cpu")
            for p, value in zip(model.parameters(), start, strict=True):
                p.data.copy_(torch.distributed.tensor.distribute_tensor(value, mesh, p.placements))
        options = {"fuse_backward": True} if way == "fused" else {}
        opt = make(list(model.named_parameters()), **options)
        found[name] = _train(model, opt, lambda x: x.chunk(2)[rank], way)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_training_on_two_processes_is_that_on_one(way: str) -> None:
    found = processes.run(2, _sharded, way)
    for name, make in OPTIMIZERS.items():
        model = Model()
        start = wholes([*model.parameters()])
        alone = _train(model, make(list(model.named_parameters())), lambda x: x, way)
        for of in found:
            for a, b, c in zip(of[name], alone, start, strict=True):
                assert (a - b).abs().max() <= 1e-7 * (b - c).abs().max(), (name, way)


# ---- bits


LOW: dict[str, Make] = {
    "AdamW": lambda p: heavyball.AdamW(p, lr=1e-2),
    "AdamW in bfloat16": lambda p: heavyball.AdamW(p, lr=1e-2, storage_dtype="bfloat16"),
    "Muon": lambda p: heavyball.Muon(p, lr=1e-2),
    "param_ecc": lambda p: heavyball.AdamW(p, lr=1e-2, param_ecc="bf16+8"),
}


def _rounded(rank: int, engine: str) -> dict[str, list[Tensor]]:
    put, world = ENGINES[engine]
    found = {}
    for name, make in LOW.items():
        model = Model(torch.bfloat16)
        options = put(model, world)
        opt = make(list(model.named_parameters()), **options)
        for step in range(STEPS):
            give(model, step, torch.bfloat16)
            opt.step()
        found[name] = wholes([*model.parameters()])
    return found


@pytest.mark.parametrize("engine", ["fsdp2-uneven", "columns", "fsdp2-and-tensor-parallel"])
def test_bfloat16_parameters_get_the_bits_of_one_process(engine: str) -> None:
    found = processes.run(ENGINES[engine][1], _rounded, engine)
    for name, make in LOW.items():
        model = Model(torch.bfloat16)
        opt = make(list(model.named_parameters()))
        for step in range(STEPS):
            give(model, step, torch.bfloat16)
            opt.step()
        for of in found:
            for a, b in zip(of[name], model.parameters(), strict=True):
                assert torch.equal(a, b), name


# ---- chains of a user, and what is done to an optimizer by hand


@C.transform
def strange(update: Tensor) -> Tensor:
    """Sorts the rows, which no kernel does."""
    return update.sort(0).values


@C.transform(mean=C.zeros)
def averaged_in_order(update: Tensor, mean: Tensor, *, beta: float = 0.9) -> tuple[Tensor, Tensor]:
    """An average of a cumulative sum over all elements."""
    mean = beta * mean + (1 - beta) * update.flatten().cumsum(0).view(update.shape)
    return mean, mean


OWN: dict[str, Make] = {
    "no state": lambda p: C.ChainOpt(p, 1e-2, strange),
    "state": lambda p: C.ChainOpt(p, 1e-2, averaged_in_order),
    "with an average": lambda p: C.ChainOpt(p, 1e-2, averaged_in_order, C.parameter_ema),
    "with a sum": lambda p: C.ChainOpt(p, 1e-2, averaged_in_order, C.clip_by_global_norm),
    "with a matrix method": lambda p: C.ChainOpt(p, 1e-2, strange, C.psgd_kron),
}


def _own(rank: int) -> dict[str, list[list[Tensor]]]:
    found = {}
    for name, make in OWN.items():
        model = Model()
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        opt = make(list(model.named_parameters()))
        opt.init_state()
        for step in range(STEPS):
            give(model, step)
            opt.step()
        last = wholes([*model.parameters()])
        with opt.averaged():
            evaluated = wholes([*model.parameters()])
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        give(model, STEPS)
        opt.step()
        found[name] = [last, evaluated, wholes([*model.parameters()])]
    return found


def test_what_no_kernel_does_is_stepped_by_an_owner() -> None:
    found = processes.run(3, _own)
    for name, make in OWN.items():
        model = Model()
        opt = make(list(model.named_parameters()))
        for step in range(STEPS):
            give(model, step)
            opt.step()
        expected = [wholes([*model.parameters()])]
        with opt.averaged():
            expected.append(wholes([*model.parameters()]))
        give(model, STEPS)
        opt.step()
        expected.append(wholes([*model.parameters()]))
        for of in found:
            for several, others in zip(of[name], expected, strict=True):
                for a, b in zip(several, others, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


READING: dict[str, Make] = {
    "MoMo": lambda p: heavyball.MoMo(p, lr=0.1),
    "MoMoAdam": lambda p: heavyball.MoMoAdam(p, lr=0.1),
    "ScheduleFreePlus": lambda p: heavyball.ScheduleFreePlus(p, lr=0.1),
    "blocks": lambda p: heavyball.APOLLO(p, lr=0.1, rank=1, blocks={"first.weight": 2}),
}
LOSSES = (2.0, math.nan, 1.5, -math.inf, 0.5)


def _with_losses(
    make: Make, losses: tuple[float, ...], sharded: bool, share: float = 1.0
) -> list[Tensor]:
    """Gradients go with the losses that are numbers, of which a process has a share."""
    model = Model()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt, good = make(list(model.named_parameters())), 0
    for loss in losses:
        give(model, good)
        opt.step(**({"loss": share * loss} if opt.chain.reads_loss else {}))
        good += math.isfinite(loss)
    return wholes([*model.parameters()])


def _reading(rank: int, losses: tuple[float, ...]) -> dict[str, list[Tensor]]:
    share = 0.5 + rank  # of two processes: their mean is the loss of one
    return {name: _with_losses(make, losses, True, share) for name, make in READING.items()}


def test_what_reads_a_loss_or_has_blocks_steps_as_on_one_process() -> None:
    good = tuple(loss for loss in LOSSES if math.isfinite(loss))
    alone = {name: _with_losses(make, good, False) for name, make in READING.items()}
    for losses in (LOSSES, good):
        # of these the last reads none
        expected = alone | {"blocks": _with_losses(READING["blocks"], losses, False)}
        for found in processes.run(2, _reading, losses):
            for name in READING:
                for one, other in zip(found[name], expected[name], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@C.transform
def by_loss(update: Tensor, *, loss: Tensor) -> Tensor:
    """Steps as long as the loss, which ask nothing else of other processes."""
    return update * loss


FORGETFUL: dict[str, Make] = {
    "sums": lambda p: heavyball.MoMo(p, lr=0.1),
    "none": lambda p: C.ChainOpt(p, 0.1, by_loss),
}


def _forgotten(rank: int, name: str) -> list[str]:
    """What is raised where one process gives no loss, at the first step and later; and it goes on."""
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt, said = FORGETFUL[name](list(model.named_parameters())), []
    for step, everybody in enumerate((False, True, False, True)):
        give(model, step)
        before = wholes([*model.parameters()])
        try:
            opt.step(loss=1.0 if everybody or rank == 0 else None)
        except ValueError as error:
            said.append(str(error))
        after = wholes([*model.parameters()])
        moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert any(moved) == everybody, (step, said)
    return said


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_loss_that_one_process_lacks_raises_on_all(name: str) -> None:
    one, other = processes.run(2, _forgotten, name)
    assert len(one) == len(other) == 2
    assert all("reads the loss" in text for text in other), other
