"""Second gradients at perturbed weights: those of shards are those of one process, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn

from distributed import processes
from distributed.engines import ENGINES, Model, placed_as, wholes
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
        seen.append(wholes([*model.parameters()]))
        for p, found in zip(model.parameters(), seen[-1], strict=True):
            w = found.float()
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
        found[name] = [*seen, wholes([*model.parameters()])]
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


def _gradients_of(params: list[tuple[str, nn.Parameter]], lacks: str = "") -> Callable[[], None]:
    """Gradients that follow from the element and its weight; one parameter may have none."""

    def closure() -> None:
        for name, p in params:
            w = p.detach().float()
            g = torch.sin(3 * w + torch.arange(w.numel()).view(w.shape)).mul(2**12).round() / 2**12
            p.grad = None if name == lacks else g.to(p.dtype)

    return closure


def _stage(rank: int, dtype: torch.dtype, cut: int, lacks: str) -> dict[str, list[Tensor]]:
    """Weights after some steps of the parameters up to a number, or of those from it on."""
    found = {}
    for name, make in OPTIMIZERS.items():
        several = list(Model(dtype).named_parameters())
        params, options = several, {}
        if dist.is_initialized():
            params = several[cut:] if rank else several[:cut]
            options = {"stages": dist.group.WORLD}
        opt = make(params, **options)
        for _ in range(STEPS):
            opt.step(_gradients_of(params, lacks))
        found[name] = [p.detach() for _, p in params]
    return found


@pytest.mark.parametrize("lacks", ["", "norm.weight"], ids=["all gradients", "one has none"])
@pytest.mark.parametrize("cut", [3, 6], ids=["halves", "one alone"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_stages_have_one_norm(dtype: torch.dtype, cut: int, lacks: str) -> None:
    alone = _stage(0, dtype, cut, lacks)
    start = [p.detach() for p in Model(dtype).parameters()]
    first, other = processes.run(2, _stage, dtype, cut, lacks)
    for name, expected in alone.items():
        for a, b, c in zip([*first[name], *other[name]], expected, start, strict=True):
            if dtype == torch.bfloat16:
                assert torch.equal(a, b), name
            else:  # the sum of squares rounds otherwise
                assert (a - b).abs().max() <= 1e-9 * (b - c).abs().max(), name


def _no_part(rank: int) -> list[Tensor]:
    """A stage of which no parameter takes a second gradient, beside one of which all do."""
    params, options = list(Model().named_parameters()), {}
    if dist.is_initialized():
        params = params[3:] if rank else params[:3]
        options = {"stages": dist.group.WORLD}
    routed = C.route(C.when(C.sam, name="first.*"), otherwise=())
    opt = C.ChainOpt(params, 1e-2, routed, C.exp_avg, **options)
    for _ in range(STEPS):
        opt.step(_gradients_of(params))
    return [p.detach() for _, p in params]


def test_a_stage_without_a_second_gradient() -> None:
    expected, start = _no_part(0), [p.detach() for p in Model().parameters()]
    first, other = processes.run(2, _no_part)
    for a, b, c in zip([*first, *other], expected, start, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (b - c).abs().max()


def _lacking(rank: int) -> str:
    model = Model()
    put, world = ENGINES["fsdp2-even"]
    put(model, world)
    opt = OPTIMIZERS["sam"](list(model.named_parameters()))
    plain, before = _closure(model, []), wholes([*model.parameters()])

    def closure() -> None:
        plain()
        if rank:
            model.first.weight.grad = None

    with pytest.raises(ValueError, match=r"first\.weight.* has a gradient on 1 of the 2") as error:
        opt.step(closure)
    for p, b in zip(wholes([*model.parameters()]), before, strict=True):
        assert torch.equal(p, b)
    return str(error.value)


def test_a_first_gradient_that_one_process_lacks_is_refused_on_all() -> None:
    assert len(set(processes.run(2, _lacking, limit=120))) == 1
