"""Second gradients at perturbed weights: those of shards are those of one process, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn

from distributed import processes
from distributed.engines import ENGINES, Model, placed_as, whole
from heavyball import chainable as C

STEPS = 3
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sam": lambda p, **o: C.ChainOpt(p, 1e-2, C.sam, C.scale_by_adam, **o),
    "asam": lambda p, **o: C.ChainOpt(p, 1e-2, C.asam, C.exp_avg, **o),
    "looksam": lambda p, **o: C.ChainOpt(p, 1e-2, C.looksam(k=2), C.exp_avg, **o),
}


def _closure(model: nn.Module, seen: list[list[Tensor]]) -> Callable[[], None]:
    """Gradients that follow from the element and its weight, and a note of the weights they are of."""

    def closure() -> None:
        seen.append([whole(p) for p in model.parameters()])
        for p in model.parameters():
            w = whole(p).float()
            g = torch.sin(3 * w + torch.arange(w.numel()).view(w.shape)).mul(2**12).round() / 2**12
            p.grad = placed_as(p, g.to(p.dtype)) if hasattr(p, "placements") else g.to(p.dtype)

    return closure


def _run(rank: int, engine: str, dtype: torch.dtype) -> dict[str, list[list[Tensor]]]:
    found = {}
    for name, make in OPTIMIZERS.items():
        model, seen = Model(dtype), list[list[Tensor]]()
        put, world = ENGINES[engine] if engine else (lambda model, world: {}, 1)
        options = put(model, world)
        opt = make(list(model.named_parameters()), **options)
        for _ in range(STEPS):
            opt.step(_closure(model, seen))
        found[name] = [*seen, [whole(p) for p in model.parameters()]]
    return found


@pytest.mark.parametrize("engine", ["fsdp2-uneven", "columns", "replicas"])
def test_bfloat16_weights_are_perturbed_with_the_bits_of_one_process(engine: str) -> None:
    alone = _run(0, "", torch.bfloat16)
    for found in processes.run(ENGINES[engine][1], _run, engine, torch.bfloat16):
        for name, expected in alone.items():
            assert len(found[name]) == len(expected), name
            for number, (several, others) in enumerate(zip(found[name], expected, strict=True)):
                for a, b in zip(several, others, strict=True):
                    assert torch.equal(a, b), (name, number)


def _lacking(rank: int) -> str:
    model = Model()
    put, world = ENGINES["fsdp2-even"]
    put(model, world)
    opt = OPTIMIZERS["sam"](list(model.named_parameters()))
    plain, before = _closure(model, []), [whole(p) for p in model.parameters()]

    def closure() -> None:
        plain()
        if rank:
            model.first.weight.grad = None

    with pytest.raises(ValueError, match=r"first\.weight.* has a gradient on 1 of the 2") as error:
        opt.step(closure)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(p), b)
    return str(error.value)


def test_a_first_gradient_that_one_process_lacks_is_refused_on_all() -> None:
    assert len(set(processes.run(2, _lacking, limit=120))) == 1
