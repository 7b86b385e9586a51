"""Records the last steps of an optimizer, writes them to a file if one fails, and replays them."""

import contextlib
import math
import numbers
import os
import statistics
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.combine import chain_repr
from heavyball.core.hyper import is_real, is_sequence
from heavyball.core.schedule import COUNT, SCHEDULED_LR, SCHEDULES
from heavyball.errors import one_line, warn
from heavyball.optim.registry import Registry
from heavyball.runtime.execute import watched
from heavyball.runtime.job import FIRST_KEY, LOSS_KEY, Job, fed_key

FORMAT = 2
# A change that is so many times the median of those before it is far too large.
JUMP = 100.0
USUAL = 50  # how many changes the median is of
FEWEST = 2

# Builds an optimizer of parameter groups and elements, without kernels.
Build = Callable[..., Any]
Step = dict[str, Any]
Output = tuple[int, str, Tensor]
# The attributes of optimizers whose steps are not recorded.
_unrecorded: list[Mapping[str, Any]] = []


@contextlib.contextmanager
def unrecorded(opt: Any) -> Iterator[None]:
    """Keep no step of an optimizer meanwhile."""
    _unrecorded.append(vars(opt))
    try:
        yield
    finally:
        _unrecorded[:] = [own for own in _unrecorded if own is not vars(opt)]


class Recorder:
    """The options of `flight_recorder`.

    build: makes the optimizer with which a step is computed again.
    """

    def __init__(self, chain: Chain, registry: Registry, build: Build, rounds: bool):
        nodes = [node for program in chain.programs for node in program.flat]
        asked = [n.transform.options for n in nodes if n.transform.name == "flight_recorder"]
        asked = [options for options in asked if options["dir"]]
        self.active = bool(asked)
        self._chain, self._registry, self._build, self._rounds = chain, registry, build, rounds
        if asked:
            self._folder, self._keep = Path(asked[0]["dir"]), asked[0]["keep"]
            self._steps: deque[Step] = deque(maxlen=self._keep)
            self._changes: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=USUAL))
        self._written = self._count = 0
        self._last_was_wrong = False

    def on(self, registry: Registry) -> "Recorder":
        """The same recorder, of parameters that have another registry now."""
        self._registry = registry
        return self

    def refuse(self, what: str) -> None:
        """Refuse a way of stepping in which no moment has all gradients.

        Errors: ValueError saying what was asked for.
        """
        if self.active:
            raise ValueError(
                f"flight_recorder with {what}: it needs all gradients and state at once"
            )

    @contextlib.contextmanager
    def over_step(self) -> Iterator[None]:
        """Keep a step, and write the last ones if it goes wrong.

        In it the groups hold the numbers of the step, and what the step was given.
        """
        if any(own is self._registry.attributes for own in _unrecorded):
            yield
            return
        if self._registry.parts is not None:
            self.refuse("parameters in parts")
        taken = _taken(self._registry)
        yield  # a step that is refused is none
        self._steps.append(taken)
        self._count += 1
        wrong = self._wrong()
        if wrong and not self._last_was_wrong and self._written < self._keep:
            try:
                self._write(wrong)
            except (
                Exception
            ) as error:  # a full disk, or anything else that is no matter of the step
                warn(f"flight_recorder: {self._folder} has no file of this step: {one_line(error)}")
            self._written += 1
        self._last_was_wrong = bool(wrong)

    def _wrong(self) -> list[str]:
        """Which parameters have changed by what cannot be right."""
        before = self._steps[-1]["params"]
        places = [p for p in self._registry.places() if p.number in self._steps[-1]["grads"]]
        changes = [(p.param.detach() - before[p.number]).double().norm() for p in places]
        sizes = torch.stack(changes).tolist() if changes else []
        wrong = []
        for place, size in zip(places, sizes, strict=True):
            name = place.name or str(place.number)
            known = self._changes[name]
            usual = statistics.median(known) if len(known) >= FEWEST else 0.0
            if not math.isfinite(size) or (usual > 0 and size > JUMP * usual):
                wrong.append(name)
            elif size > 0:
                known.append(size)
        return wrong

    def _write(self, wrong: list[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        storage = self._chain.storage
        options = {
            "storage_dtype": storage.storage_dtype,
            "ecc": storage.ecc,
            "param_ecc": storage.param_ecc,
            "stochastic_rounding": self._rounds,
        }
        steps = []
        for step in self._steps:
            outputs = replayed(self._build, self._chain.elements, step, options)
            steps.append({**step, "outputs": [list(output) for output in outputs]})
        names = {p.number: p.name or str(p.number) for p in self._registry.places()}
        content = {
            "flight": FORMAT,
            "chain": repr(self._chain),
            "elements": chain_repr(self._chain.completed),
            "options": options,
            "names": names,
            "wrong": wrong,
            "count": self._count,
            "steps": steps,
        }
        path = self._folder / f"step-{self._count:09}-{os.getpid()}-{id(self):x}.pt"
        aside = path.with_suffix(".part")
        try:
            torch.save(content, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        warn(
            f"step {self._count}: the change of {', '.join(wrong[:4])} is not finite or {JUMP:g} times "
            f"its usual size; see it with: heavyball replay {path}"
        )


def _taken(registry: Registry) -> Step:
    """A copy of all that a step is made of, in values that can be read from a file.

    Numbers that follow schedules are those of this step.
    """
    places = list(registry.places())
    states = registry.state
    groups = [_copied(group) for group in registry.groups]
    numbers = iter(range(len(places)))
    for group, given in zip(registry.groups, groups, strict=True):
        given["params"] = [next(numbers) for _ in group["params"]]
    given = {name: value for group in registry.groups for name, value in group.items()}
    firsts = [group.get(FIRST_KEY, {}) for group in registry.groups]
    return {
        "groups": groups,
        "loss": _copy(given.get(LOSS_KEY)),
        "fed": {
            name: _copy(given[fed_key(name)])
            for name in registry.chain.signals
            if fed_key(name) in given
        },
        "first_grads": {n: _copy(grad) for first in firsts for n, grad in first.items()},
        "params": {p.number: p.param.detach().clone() for p in places},
        "grads": {p.number: p.param.grad.clone() for p in places if p.param.grad is not None},
        "state": {
            p.number: {key: _copy(value) for key, value in states.get(p.param, {}).items()}
            for p in places
        },
    }


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a group that a chain reads; others may be anything."""
    others = ("params", SCHEDULES, COUNT, SCHEDULED_LR)
    return {
        name: _copy(value)
        for name, value in group.items()
        if name not in others and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, Tensor | str | bool) or is_real(value):
        return True
    return is_sequence(value) and all(map(_is_plain, value))


def _copy(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, str):
        return str(value)
    if is_real(value):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return [_copy(v) for v in value] if isinstance(value, list) else tuple(map(_copy, value))


def replayed(
    build: Build, elements: Any, step: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Output]:
    """The outputs of each element in a recorded step: the parameter's number, the key, the update."""
    params = {n: torch.nn.Parameter(tensor.clone()) for n, tensor in step["params"].items()}
    groups = [{"params": [params[n] for n in g["params"]], **_given(g)} for g in step["groups"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the original
        return _stepped(build(groups, 0.0, *elements, compile=False, **options), params, step)


def _stepped(opt: Any, params: Mapping[int, Tensor], step: Mapping[str, Any]) -> list[Output]:
    """Repeat a recorded step, and record the output of each element."""
    for index, (group, kept) in enumerate(zip(opt.param_groups, step["groups"], strict=True)):
        group.pop(SCHEDULES, None)
        opt.registry.schedules.settle(index, opt.param_groups)
        group.update({name: _copy(value) for name, value in kept.items() if name != "params"})
    for number, state in step["state"].items():
        if state:
            opt.state[params[number]] = {key: _copy(value) for key, value in state.items()}
    for name, value in step["fed"].items():
        opt.feed(name, value)
    second: Mapping[int, Tensor] = step["grads"]
    calls = iter((second | step["first_grads"], second))

    def closure() -> None:
        for number, grad in next(calls).items():
            params[number].grad = grad.clone()

    numbers = {id(param): number for number, param in params.items()}
    found: list[Output] = []

    def note(job: Job, key: str, update: Any) -> None:
        if id(job.param) in numbers and isinstance(update, Tensor):
            found.append((numbers[id(job.param)], key, update.detach().clone()))

    with watched(note), unrecorded(opt):
        opt.step(closure, loss=step["loss"])
    return found


def _given(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group is built with; everything else is put into it afterwards."""
    return {name: group[name] for name in ("lr", "param_names") if name in group}


@dataclass(frozen=True)
class Flight:
    """A file of `flight_recorder`; see `heavyball.optim.flight.read`.

    elements: the chain without the schedules at its head, for `replayed`.
    """

    chain: str
    elements: str
    options: dict[str, Any]
    names: dict[int, str]
    wrong: list[str]
    count: int
    steps: list[Step]


def read(path: str | os.PathLike) -> Flight:
    """A file that a recorder has written.

    Errors: OSError where it cannot be read; ValueError where it is none.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a file of flight_recorder: {one_line(error)}") from None
    if not isinstance(content, dict) or content.pop("flight", None) != FORMAT:
        raise ValueError(f"{path} is not a file of flight_recorder in format {FORMAT}")
    return Flight(**content)
