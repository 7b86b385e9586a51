"""Metrics and probes over parameters in parts are those of the whole, on every process."""

import math
from typing import Any

import pytest
from helpers import eager  # noqa: F401, kernels are tried where they matter

import heavyball
from distributed import processes
from distributed.engines import ENGINES, Model, give
from heavyball import chainable as C

STEPS = 2
MAKE: dict[str, Any] = {
    "AdamW": lambda p, **o: heavyball.AdamW(p, lr=1e-2, weight_decay=0.1, metrics=True, **o),
    "Muon": lambda p, **o: heavyball.Muon(p, lr=1e-2, metrics=True, **o),
    "SOAP": lambda p, **o: heavyball.SOAP(p, lr=1e-2, metrics=True, **o),
    "PSGDKron": lambda p, **o: heavyball.PSGDKron(p, lr=1e-2, metrics=True, **o),
    "probes": lambda p, **o: C.ChainOpt(
        p,
        1e-2,
        C.clip_by_norm,
        C.probe("clipped"),
        C.scale_by_adam,
        C.probe("adam"),
        metrics=True,
        **o,
    ),
}


def _measured(rank: int, engine: str) -> dict[str, dict[str, float]]:
    put, world = ENGINES[engine] if engine else (lambda model, world: {}, 1)
    found = {}
    for name, make in MAKE.items():
        model = Model()
        options = put(model, world)
        opt = make(list(model.named_parameters()), **options)
        for step in range(STEPS):
            give(model, step)
            opt.step()
        found[name] = {key: float(value) for key, value in opt.metrics().items()}
    return found


@pytest.mark.parametrize("engine", ["fsdp2-uneven", "replicas", "hsdp"])
def test_metrics_of_several_processes_are_those_of_one(engine: str) -> None:
    alone = _measured(0, "")
    for found in processes.run(ENGINES[engine][1], _measured, engine):
        for name, numbers in alone.items():
            assert found[name].keys() == numbers.keys()
            for key, value in numbers.items():
                assert math.isfinite(value)
                assert found[name][key] == pytest.approx(value, rel=1e-6), (name, key)
