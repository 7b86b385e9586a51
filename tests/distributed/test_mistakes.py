"""Mistakes that are planted in the library are seen by the comparison with one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, what is wrong here is wrong without kernels
from torch import Tensor

import heavyball
from distributed import processes
from distributed.engines import ENGINES, Model, give, wholes
from heavyball import chainable as C
from heavyball.distributed import evaluate, exchange, parts, plan, rollcall, shard

Make = Callable[..., Any]


def _no_sum(rank: int) -> None:
    def alone(terms: Any) -> list[Tensor]:
        return [term.part.to(torch.float64) for term in terms]

    rollcall.completed = alone  # type: ignore[attr-defined]


def _local_count(rank: int) -> None:
    def count(self: Any, value: Any) -> float:
        return float(max(self.job.param.numel(), 1))

    evaluate.Values._count = count  # type: ignore[method-assign]


def _local_index(rank: int) -> None:
    parts.Part.origin = lambda self, key: None  # type: ignore[method-assign]


def _counted_twice(rank: int) -> None:
    shard.Layout.is_first = property(lambda self: True)  # type: ignore[assignment]


def _own_view_of_owners(rank: int) -> None:
    def mine(several: Any, before: Any) -> None:
        for part in several:
            part.owner = rank

    plan.owners = mine  # type: ignore[attr-defined]


def _something_else(rank: int) -> None:
    before = exchange.Exchange.wait
    exchange.Exchange.wait = lambda self: [torch.ones_like(t) for t in before(self)]  # type: ignore[method-assign]


def _clipped(p: Any, **options: Any) -> Any:
    return heavyball.AdamW(p, lr=1e-2, gradient_clipping="rms_clip", **options)


def _factored(p: Any, **options: Any) -> Any:
    return heavyball.FactoredAdamW(p, lr=1e-2, **options)


def _muon(p: Any, **options: Any) -> Any:
    return heavyball.Muon(p, lr=1e-2, **options)


def _rounded(p: Any, **options: Any) -> Any:
    return C.ChainOpt(p, 1e-2, C.scale_by_adam, **options)


DOUBLE, LOW = torch.float64, torch.bfloat16
# what is planted, the engine and the optimizer that it is planted in, and the dtype
MISTAKES: dict[str, tuple[Callable[[int], None], str, Make, torch.dtype]] = {
    "no sum over the processes": (_no_sum, "fsdp2-even", _clipped, DOUBLE),
    "the local count in a mean": (_local_count, "fsdp2-even", _clipped, DOUBLE),
    "the local count in means over rows": (_local_count, "fsdp2-even", _factored, DOUBLE),
    "the local index in the rounding": (_local_index, "fsdp2-even", _rounded, LOW),
    "copies counted twice": (_counted_twice, "hsdp", _clipped, DOUBLE),
    "owners from one process's view": (_own_view_of_owners, "fsdp2-even", _muon, DOUBLE),
    "what was sent is not what arrives": (_something_else, "fsdp2-even", _muon, DOUBLE),
}


def _train(rank: int, name: str, planted: bool) -> list[Tensor] | str:
    plant, engine, make, dtype = MISTAKES[name]
    if planted:
        plant(rank)
    put, world = ENGINES[engine]
    model = Model(dtype)
    options = put(model, world)  # which gives the model other parameters
    opt = make(list(model.named_parameters()), **options)
    try:
        for step in range(2):
            give(model, step, dtype)
            opt.step()
    except ValueError as error:
        return str(error)
    return wholes([*model.parameters()])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name: str) -> None:
    _, engine, make, dtype = MISTAKES[name]
    model = Model(dtype)
    start = wholes([*model.parameters()])
    opt = make(list(model.named_parameters()))
    for step in range(2):
        give(model, step, dtype)
        opt.step()
    alone = wholes([*model.parameters()])

    def equal(found: list[Tensor]) -> bool:
        bound = 0.0 if dtype == LOW else 1e-7
        return all(
            bool((a - b).abs().max() <= bound * (b - c).abs().max())
            for a, b, c in zip(found, alone, start, strict=True)
        )

    for found in processes.run(ENGINES[engine][1], _train, name, True):
        assert isinstance(found, str) or not equal(found)
    for found in processes.run(ENGINES[engine][1], _train, name, False):
        assert not isinstance(found, str)
        assert equal(found)
