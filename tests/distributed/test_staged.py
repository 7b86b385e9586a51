"""Kernels step shards walk by walk; sums are completed over the processes in between."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import QUICK
from torch import Tensor

import heavyball
from distributed import processes
from distributed.engines import ENGINES, OPTIMIZERS, Model, give, on_one, placed_as, wholes
from heavyball import chainable as C
from heavyball import utils
from heavyball.compiler.cpp import toolchain
from heavyball.distributed.staged import Staging
from heavyball.numerics import Origin

STEPS = 3
ROUNDING = 1e-9  # as in test_engines.py
CHAINS: dict[str, Callable[..., Any]] = {
    **{
        name: OPTIMIZERS[name]
        for name in ("cautious AdamW", "stable_adamw", "FactoredAdamW", "AGC", "global clip")
    },
    "Prodigy": OPTIMIZERS["Prodigy"],
    "metrics": lambda p, **o: heavyball.AdamW(p, lr=1e-2, metrics=True, caution=True, **o),
    "Adafactor": lambda p, **o: heavyball.Adafactor(p, lr=1e-2, **o),
    "CAME": lambda p, **o: heavyball.CAME(p, lr=1e-2, **o),
    "largest": lambda p, **o: C.ChainOpt(p, 1e-2, C.scale_by_adamax, C.stable_adamw, **o),
}


def _compare(rank: int, engine: str, expected: dict[str, Any], without: int | None) -> dict:
    """What each chain has done, and by whom; process `without` has no compiler."""
    put, world = ENGINES[engine]
    found = {}
    if rank == without:
        Staging.built = lambda self, printed: "it has no compiler"  # type: ignore[method-assign]
    for name in expected:
        model = Model()
        options = put(model, world)
        opt = CHAINS[name](list(model.named_parameters()), **options)
        with processes.recorded() as collectives:
            for step in range(STEPS):
                give(model, step)
                opt.step()
        give(model, STEPS)
        plan, params = opt.plan(), wholes([*model.parameters()])
        here = [p for p in model.parameters() if p.to_local().numel()]  # type: ignore[operator]
        stepped = {n for k in plan.kernels if k.purpose == "step" for n in k.parameters}
        found[name] = params, processes.order(collectives), len(stepped), len(here), str(plan)
    return found


def _wrong(found: list[Tensor], expected: list[list[Tensor]]) -> float:
    first, last, _ = expected
    moved = max(float((a - b).abs().max()) for a, b in zip(last, first, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, last, strict=True)) / moved


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[Tensor]]]:
    """What the chains do as they are written; other tests compare kernels of whole tensors with it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(utils, "compile_mode", None)
        return _alone()


def _alone() -> dict[str, list[list[Tensor]]]:
    return {name: on_one(make, STEPS, torch.float64) for name, make in CHAINS.items()}


FEW = ("cautious AdamW", "CAME", "metrics", "Prodigy")


@pytest.mark.parametrize(
    ("engine", "without", "names"),
    [
        ("fsdp2-uneven", None, CHAINS),
        ("fsdp2-and-tensor-parallel", None, FEW if QUICK else CHAINS),
        ("columns", 1, FEW),
        ("hsdp", 2, FEW),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_they_give_the_results_of_one_process(
    engine: str, without: int | None, names: Any, alone: dict[str, list[list[Tensor]]]
) -> None:
    given = {name: alone[name] for name in names}
    found = processes.run(ENGINES[engine][1], _compare, engine, given, without)
    for name, expected in given.items():
        orders = [of[name][1] for of in found]
        assert all(order == orders[0] for order in orders), name
        for rank, of in enumerate(found):
            params, _, stepped, here, plan = of[name]
            assert _wrong(params, expected) < ROUNDING, (name, rank)
            if rank == without:
                assert not stepped
                assert "it has no compiler" in plan
            else:
                assert stepped == here > 0, (name, rank, plan)


LOW: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p, **o: heavyball.AdamW(p, lr=1e-2, **o),
    "in bfloat16": lambda p, **o: heavyball.AdamW(p, lr=1e-2, storage_dtype="bfloat16", **o),
    "in 8 bits": lambda p, **o: heavyball.AdamW(p, lr=1e-2, storage_dtype="8bit", **o),
    "cautious": lambda p, **o: heavyball.AdamW(p, lr=1e-2, caution=True, **o),
    "factored": lambda p, **o: heavyball.FactoredAdamW(p, lr=1e-2, **o),
}


def _wide(dtype: torch.dtype) -> torch.nn.Module:
    """Matrices of whole blocks of codes, none even on three processes; one leaves a process nothing."""
    torch.manual_seed(0)
    sizes = ((10, True), (7, False), (2, False))
    several = (torch.nn.Linear(64, rows, bias=bias) for rows, bias in sizes)
    return torch.nn.Sequential(*several).to(dtype)


def _low(
    rank: int, engine: str, names: Iterable[str] = tuple(LOW)
) -> dict[str, tuple[list[Tensor], set[str], str]]:
    found = {}
    for name in names:
        make = LOW[name]
        model = _wide(torch.bfloat16)
        options = ENGINES[engine][0](model, ENGINES[engine][1]) if engine else {}
        opt = make(list(model.named_parameters()), **options)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                g = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = placed_as(p, g) if hasattr(p, "placements") else g
            opt.step()
        plan = opt.plan()
        stepped = {n for k in plan.kernels if k.purpose == "step" for n in k.parameters}
        found[name] = wholes([*model.parameters()]), stepped, str(plan)
    return found


@pytest.mark.parametrize("engine", ["fsdp2-uneven", "columns"])
def test_kernels_round_parts_with_the_bits_of_one_process(engine: str) -> None:
    alone = _low(0, "")
    for of in processes.run(ENGINES[engine][1], _low, engine):
        for name, (params, stepped, plan) in of.items():
            expected = alone[name][0]
            assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True)), name
            # not of codes whose blocks are cut, and of values along axes that are
            if engine != "columns" or name not in ("in 8 bits", "factored"):
                assert {"0.weight", "1.weight"} <= stepped, (name, plan)


def _without_the_place(rank: int) -> None:
    """Kernels count the elements of a part from zero."""
    before = toolchain.load

    def load(source: str, name: str | None = None) -> Any:
        return before(source.replace(" + shift", ""), name)

    toolchain.load = load
    toolchain.prepare = lambda sources, name=None: None


def _of_the_next(rank: int) -> None:
    """Every part begins one element later."""
    _steps_are(lambda first, width, jump: (first + 1, width, jump))


def _without_a_jump(rank: int) -> None:
    """The pieces of a part that is cut along an inner axis follow on each other."""
    _steps_are(lambda first, width, jump: (first, width, 0))


def _steps_are(changed: Callable[[int, int, int], tuple[int, int, int]]) -> None:
    right = Origin.steps.fget
    Origin.steps = property(lambda origin: (s := right(origin)) and changed(*s))


@pytest.mark.parametrize(
    ("engine", "plant"),
    [
        ("fsdp2-uneven", _without_the_place),
        ("fsdp2-uneven", _of_the_next),
        ("columns", _without_a_jump),
    ],
)
def test_a_mistake_in_the_numbers_of_elements_is_seen(
    engine: str, plant: Callable[[int], None]
) -> None:
    alone = _low(0, "", ["AdamW"])
    for of in processes.run(ENGINES[engine][1], _planted, engine, plant):
        params, stepped, plan = of["AdamW"]
        assert {"0.weight", "1.weight"} <= stepped, plan
        assert not all(torch.equal(a, b) for a, b in zip(params, alone["AdamW"][0], strict=True))


def _planted(rank: int, engine: str, plant: Callable[[int], None]) -> dict[str, Any]:
    plant(rank)
    return _low(rank, engine, ["AdamW"])


def _said(rank: int) -> list[heavyball.diagnostics.plan.StepPlan]:
    plans = []
    for dtype, make in (
        (torch.float32, CHAINS["cautious AdamW"]),
        (torch.float32, lambda p: heavyball.AdamW(p, lr=1e-2, caution=True, compile=False)),
        (torch.float32, OPTIMIZERS["ProdigyPlusScheduleFree"]),
        (torch.bfloat16, CHAINS["cautious AdamW"]),
        (torch.float32, OPTIMIZERS["Muon"]),
    ):
        model = Model(dtype)
        ENGINES["fsdp2-even"][0](model, 2)
        opt = make(list(model.named_parameters()))
        give(model, 0, dtype)
        plans.append(opt.plan())
    return plans


def test_a_plan_says_what_runs_where() -> None:
    compiled, eager, sliced, rounded, muon = processes.run(2, _said)[0]
    (kernel,) = compiled.kernels
    assert (kernel.purpose, kernel.processes, kernel.passes) == ("step", 2, 2)
    assert "2 passes" in str(compiled)
    assert "sums over 2 processes" in str(compiled)
    assert len(kernel.parameters) == 7
    assert not compiled.eager
    assert {*eager.reasons.values()} == {"compile=False"}
    assert len(eager.reasons) == 7
    assert {*sliced.reasons.values()} == {
        "sums over every k-th element of a tensor that is in parts"
    }
    assert not rounded.eager
    matrices = {"first.weight", "second.weight", "third.weight"}
    assert {name for part in muon.owned for name in part.parameters} == matrices
    assert {part.owner for part in muon.owned} == {0, 1}
    assert {part.calls for part in muon.owned} == {("muon",)}
    assert "at process 1 of 2: muon for" in str(muon)


def _one_lacks(rank: int, name: str) -> tuple[str, bool]:
    model = Model()
    ENGINES["fsdp2-even"][0](model, 2)
    opt = CHAINS[name](list(model.named_parameters()))
    for step in range(2):
        give(model, step)
        opt.step()
    before = [p.detach().to_local().clone() for p in model.parameters()]
    states = [dict(zip(s, wholes([*s.values()]), strict=True)) for s in _states(model, opt)]
    give(model, 2)
    if rank == 0:
        model.third.weight.grad = None
    try:
        opt.step()
    except ValueError as error:
        said = str(error)
    same = all(
        torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)
    )
    for now, state in zip(_states(model, opt), states, strict=True):
        pairs = zip(now, wholes([*now.values()]), strict=True)
        same &= all(torch.equal(t, state[k]) for k, t in pairs)
    return said, same


def _states(model: torch.nn.Module, opt: Any) -> list[dict[str, Tensor]]:
    return [opt.state[p] for p in model.parameters()]


@pytest.mark.parametrize("name", ["cautious AdamW", "FactoredAdamW", "metrics", "global clip"])
def test_nothing_is_written_before_all_gradients_are_known(name: str) -> None:
    for said, same in processes.run(2, _one_lacks, name):
        assert "a gradient on 1 of the 2 processes" in said
        assert "third.weight" in said
        assert same


def _halves(rank: int, name: str) -> list[Tensor]:
    """Weights of which one has no gradient on any process in a step."""
    model = Model(torch.float32)
    ENGINES["fsdp2-even"][0](model, 2)
    opt = CHAINS[name](list(model.named_parameters()))
    for step in range(3):
        give(model, step, torch.float32)
        if step == 1:
            model.second.weight.grad = None
        opt.step()
    return wholes([*model.parameters()])


@pytest.mark.parametrize("name", ["cautious AdamW", "FactoredAdamW"])
def test_float32_and_a_step_without_a_gradient(name: str) -> None:
    model = Model(torch.float32)
    opt = CHAINS[name](list(model.named_parameters()))
    for step in range(3):
        give(model, step, torch.float32)
        if step == 1:
            model.second.weight.grad = None
        opt.step()
    for of in processes.run(2, _halves, name):
        for found, expected in zip(of, model.parameters(), strict=True):
            # a few roundings of weights of about 0.3; sums of multiples of 2^-20 are nearly exact
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=8 * 2**-24)
