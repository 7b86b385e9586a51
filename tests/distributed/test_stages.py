"""Processes that hold other parameters of one model: pipelines and ZeroRedundancyOptimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

import heavyball
from distributed import processes
from distributed.engines import Model, gradients, on_one, whole, wholes

STEPS = 3
CHAINS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p, **o: heavyball.AdamW(p, lr=1e-2, **o),
    "global clip": lambda p, **o: heavyball.AdamW(
        p, lr=1e-2, gradient_clipping="global_norm_clip", **o
    ),
    "Prodigy": lambda p, **o: heavyball.Prodigy(p, **o),
    "ProdigyPlusScheduleFree": lambda p, **o: heavyball.ProdigyPlusScheduleFree(p, **o),
    "Muon": lambda p, **o: heavyball.Muon(p, lr=1e-2, **o),
    "PSGDKron": lambda p, **o: heavyball.PSGDKron(p, lr=1e-2, **o),
}


def _pipeline(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for name, make in CHAINS.items():
        model = Model()
        params = list(model.named_parameters())
        low, high = (0, 3) if rank == 0 else (3, len(params))
        opt = make(params[low:high], stages=dist.group.WORLD)
        for step in range(STEPS):
            for (_, p), g in zip(params, gradients(step), strict=True):
                p.grad = g
            opt.step()
        found[name] = [whole(p) for _, p in params[low:high]]
    return found


def _zero(rank: int) -> dict[str, list[Tensor]]:
    found = {}
    for name in ("AdamW", "global clip", "Prodigy"):
        model = Model()

        class Made(heavyball.PRESETS["Prodigy" if name == "Prodigy" else "AdamW"]):  # type: ignore[misc]
            pass

        options: dict[str, Any] = {} if name == "Prodigy" else {"lr": 1e-2}
        if name == "global clip":
            options["gradient_clipping"] = "global_norm_clip"
        opt = ZeroRedundancyOptimizer(model.parameters(), Made, stages=dist.group.WORLD, **options)
        for step in range(STEPS):
            for p, g in zip(model.parameters(), gradients(step), strict=True):
                p.grad = g
            opt.step()
        found[name] = wholes([*model.parameters()])
    return found


def _check(name: str, found: list[Tensor]) -> None:
    first, last, _ = on_one(CHAINS[name], STEPS, torch.float64)
    for a, b, c in zip(found, last, first, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (b - c).abs().max(), name


def test_pipeline_stages_are_one_model() -> None:
    found = processes.run(2, _pipeline)
    for name in CHAINS:
        _check(name, [*found[0][name], *found[1][name]])


def test_zero_redundancy_optimizer_with_stages() -> None:
    for of in processes.run(2, _zero):
        for name, params in of.items():
            _check(name, params)


@pytest.mark.parametrize("given", [1, "world", [0, 1]], ids=str)
@pytest.mark.parametrize("option", ["stages", "replicas"])
def test_what_is_no_group_is_refused(option: str, given: Any) -> None:
    with pytest.raises(TypeError, match=rf"{option}=.*: expected a ProcessGroup, a DeviceMesh"):
        heavyball.AdamW(Model().parameters(), lr=1e-2, **{option: given})
