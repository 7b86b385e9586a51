"""Optimizers on every way to put a model on several processes equal themselves on one."""

from typing import Any

import pytest
import torch
from helpers import QUICK, eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor

from distributed import processes
from distributed.engines import ENGINES, OPTIMIZERS, Model, give, on_one, wholes

STEPS = 4
# A sum over parts rounds otherwise: parts of the largest movement.
ROUNDING = 1e-9


def _worst(found: list[Tensor], expected: list[Tensor], first: list[Tensor]) -> float:
    moved = max(float((a - b).abs().max()) for a, b in zip(expected, first, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / moved


# Here all optimizers are tried, elsewhere one for each way to step a shard.
THOROUGH = ("fsdp2-uneven", "fsdp2-and-tensor-parallel")
WAYS = (
    *("AdamW", "cautious AdamW", "global clip", "FactoredAdamW", "ProdigyPlusScheduleFree"),
    *("SOAP", "Muon"),
)


REST = tuple(name for name in OPTIMIZERS if name not in WAYS)


def _tried(engine: str) -> dict[str, Any]:
    names = WAYS
    if engine in THOROUGH:  # in `make test` each of the rest is tried on one of the two
        names += REST[THOROUGH.index(engine) :: 2] if QUICK else REST
    return {name: OPTIMIZERS[name] for name in names}


def _compare(rank: int, engine: str, expected: dict[str, list[list[Tensor]]]) -> dict[str, tuple]:
    put, world = ENGINES[engine]
    found = {}
    for name, make in _tried(engine).items():
        model = Model()
        options = put(model, world)
        opt = make(list(model.named_parameters()), **options)
        with processes.recorded() as collectives:
            for step in range(STEPS):
                give(model, step)
                opt.step()
        first, last, evaluated = expected[name]
        error = _worst(wholes([*model.parameters()]), last, first)
        opt.eval()
        error_of_average = _worst(wholes([*model.parameters()]), evaluated, first)
        found[name] = error, error_of_average, processes.order(collectives)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[Tensor]]]:
    return {name: on_one(make, STEPS, torch.float64) for name, make in OPTIMIZERS.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_engine(engine: str, alone: dict[str, list[list[Tensor]]]) -> None:
    found = processes.run(ENGINES[engine][1], _compare, engine, alone)
    wrong = {
        (name, rank): errors
        for rank, of in enumerate(found)
        for name, (*errors, _) in of.items()
        if not max(errors) < ROUNDING
    }
    assert not wrong
    for name in _tried(engine):
        orders = [of[name][2] for of in found]
        assert all(order == orders[0] for order in orders), name
