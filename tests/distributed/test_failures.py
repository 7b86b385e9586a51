"""A process that fails in a step leaves no other waiting, and all hear of it by the next step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import heavyball
from distributed import processes
from distributed.engines import ENGINES, OPTIMIZERS, placed_as, wholes
from heavyball import chainable as C
from heavyball.distributed import cut, entire, exchange, rollcall, steps, sums

LIMIT = 200


class PlantedError(RuntimeError):
    """As what is raised for want of memory."""


@C.transform
def in_order(update: Tensor) -> Tensor:
    """No kernel has this, so the owner makes the whole step."""
    return update.flatten().cumsum(0).view(update.shape)


CHAINS: dict[str, Callable[..., Any]] = {
    **{name: OPTIMIZERS[name] for name in ("Prodigy", "Muon", "SOAP", "cautious AdamW")},
    "Adafactor": lambda p, **o: heavyball.Adafactor(p, lr=1e-2, **o),
    "an owner alone": lambda p, **o: C.ChainOpt(p, 1e-2, in_order, C.clip_by_global_norm, **o),
}


class Small(nn.Module):
    """Two matrices for two waves, and a vector; what a plan of them costs is little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6, bias=False)
        self.second = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)
        self.to(torch.float64)


def give(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = placed_as(p, g) if hasattr(p, "placements") else g


class Failing(TorchDispatchMode):
    """Counts operations that belong to no exchange, and raises at one of them.

    found: how many exchanges had begun at each.
    """

    def __init__(self, at: int | None = None):
        super().__init__()
        self.at, self.found = at, list[int]()
        self.exchanges, self.inside = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and func.namespace != "profiler":
            self.found.append(self.exchanges)
            if len(self.found) - 1 == self.at:
                raise PlantedError("planted")
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Leave out what exchanges compute for themselves: who cannot send cannot take part."""

        def apart(fn: Callable[..., Any], counts: bool) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before, self.inside = self.inside, True
                self.exchanges += counts
                try:
                    return fn(*args, **kwargs)
                finally:
                    self.inside = before

            return call

        patched = pytest.MonkeyPatch()
        for owner, name, counts in (
            (exchange.Exchange, "__init__", True),
            (exchange.Exchange, "wait", False),
            (sums, "_reduced", True),
            (rollcall.RollCall, "_call", False),
            (cut, "numbers", False),
            (entire, "numbers", False),
        ):
            patched.setattr(owner, name, apart(getattr(owner, name), counts))
        try:
            with self:
                yield
        finally:
            patched.undo()


def _chosen(found: list[int]) -> list[int]:
    """The first, the middle and the last operation between two exchanges."""
    chosen = set[int]()
    for n in set(found):
        several = [i for i, count in enumerate(found) if count == n]
        chosen |= {several[0], several[len(several) // 2], several[-1]}
    return sorted(chosen)


def _weights(model: nn.Module) -> list[Tensor]:
    return wholes([*model.parameters()])


def _put(model: nn.Module, weights: list[Tensor]) -> None:
    for p, w in zip(model.parameters(), weights, strict=True):
        here = p.to_local() if hasattr(p, "to_local") else p
        here.detach().copy_(w)


def _said(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _failed(rank: int, engine: str, name: str) -> list[tuple[int, str, str, bool]]:
    """For each place of a failure: exchanges before it, what each process says of it and then, and
    whether all is well behind a state dict that was loaded."""
    steps.WAVE = 23  # several waves
    put, world = ENGINES[engine]
    model, failing = Small(), world - 1
    options = put(model, world)  # which gives the model other parameters
    opt = CHAINS[name](list(model.named_parameters()), **options)
    for step in range(2):
        give(model, step)
        opt.step()
    here = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    start, saved = [p.detach().clone() for p in here], opt.state_dict()

    def again() -> None:
        """Back to where the step is that shall fail, with plans that all have compared."""
        _put(model, start)
        opt.load_state_dict(saved)
        give(model, 2)
        opt.step()
        give(model, 3)

    again()
    counting = Failing()
    with counting.watching():
        opt.step()
    expected, found = _weights(model), []
    places = [counting.found]
    torch.distributed.broadcast_object_list(places, src=failing)
    for at in _chosen(places[0]):
        again()
        planted = Failing(at if rank == failing else None)
        with planted.watching():
            said = _said(opt.step)
        give(model, 4)
        then = _said(opt.step)
        again()
        opt.step()
        pairs = zip(_weights(model), expected, strict=True)
        found.append((places[0][at], said, then, all(torch.equal(a, b) for a, b in pairs)))
    return found


# each way of an exchange once
CASES = (
    *[("fsdp2-even", name) for name in CHAINS],
    *[("replicas", "SOAP"), ("hsdp", "Muon"), ("fsdp2-and-tensor-parallel", "SOAP")],
)


@pytest.mark.parametrize(("engine", "name"), CASES, ids=lambda v: v)
def test_a_failure_between_two_exchanges(engine: str, name: str) -> None:
    found = processes.run(ENGINES[engine][1], _failed, engine, name, limit=LIMIT)
    *others, failing = found
    for number, (before, said, then, well) in enumerate(failing):
        assert said == "PlantedError: planted", (before, said)
        assert well, before
        for other in others:
            _, said_there, then_there, well_there = other[number]
            assert well_there, before
            if before:  # its part of what they have done was zeros
                assert "could not end a step" in then, (before, then)
                assert "could not end a step" in then_there, (before, then_there)
            else:  # nothing has been changed anywhere
                assert "another process" in said_there
                assert not then
                assert not then_there


def _failed_first(rank: int, name: str) -> list[tuple[str, str]]:
    """What is said of a first step that fails, and of the step behind it."""
    found = []
    places: list[list[int]] = [[-1]]
    for number in range(-1, 4):
        model = Small()
        options = ENGINES["fsdp2-even"][0](model, 2)
        opt = CHAINS[name](list(model.named_parameters()), **options)
        give(model, 0)
        if number > len(places[0]):
            break
        if number < 0:  # the programs are recorded then
            opt.step()
            continue
        if not number:
            counting = Failing()
            with counting.watching():
                opt.step()
            last = {n: i for i, n in enumerate(counting.found)}  # between two exchanges each
            places = [[*last.values()]]
            torch.distributed.broadcast_object_list(places, src=1)
            continue
        planted = Failing(places[0][number - 1] if rank else None)
        with planted.watching():
            said = _said(opt.step)
        found.append((said, _said(opt.step)))
    return found


@pytest.mark.parametrize("name", ["Muon", "Prodigy"])
def test_a_first_step_that_fails(name: str) -> None:
    others, failing = processes.run(2, _failed_first, name, limit=LIMIT)
    for (said, then), (said_there, then_there) in zip(failing, others, strict=True):
        assert said == "PlantedError: planted"
        told = "another process" in said_there and not then_there
        lost = "could not end" in then and "could not end" in then_there
        assert told or lost, (said_there, then, then_there)
    assert "another process" in others[0][0]


STAGED: dict[str, Callable[..., Any]] = {
    "global clip": OPTIMIZERS["global clip"],
    "Prodigy": OPTIMIZERS["Prodigy"],
    "ProdigyPlusScheduleFree": OPTIMIZERS["ProdigyPlusScheduleFree"],
}


def _failed_stage(rank: int, begun: int) -> dict[tuple[str, str], tuple[str, bool, str]]:
    """What each stage says where one of them fails, whether it has changed anything, and what then."""
    found = {}
    for name, make in STAGED.items():
        for way in ("lr", "gradient"):
            model = Small()
            params = list(model.named_parameters())[slice(0, 1) if rank else slice(1, 3)]
            opt = make(params, stages=torch.distributed.group.WORLD)
            for step in range(begun):
                give(model, step)
                opt.step()
            give(model, begun)
            lr = opt.param_groups[0]["lr"]
            if rank and way == "lr":
                opt.param_groups[0]["lr"] = float("nan")
            elif rank:
                params[0][1].grad = torch.zeros_like(params[0][1]).to_sparse()
            before = [p.detach().clone() for _, p in params]
            said = _said(opt.step)
            same = all(torch.equal(p, b) for (_, p), b in zip(params, before, strict=True))
            opt.param_groups[0]["lr"] = lr
            give(model, begun)
            found[name, way] = said, same, _said(opt.step)
    return found


@pytest.mark.parametrize("begun", [0, 2], ids=["at the first step", "later"])
def test_a_stage_that_cannot_make_a_step(begun: int) -> None:
    others, failing = processes.run(2, _failed_stage, begun, limit=LIMIT)
    for (name, way), (said, same, then) in [*others.items(), *failing.items()]:
        assert said, (name, way)
        # whose sums are taken behind the write; nobody comes up to it without a plan
        if name == "ProdigyPlusScheduleFree" and (begun or way == "gradient"):
            assert "could not end" in then, (name, way)
        else:
            assert same, (name, way)
            assert not then, (name, way, then)
    assert all("see its error" in said for said, *_ in others.values())
