"""The arguments of a race, and the race that they describe, checked before it begins."""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from heavyball.errors import RaceError, one_line, shown, unknown
from heavyball.metrics import NAMES, PROBED
from heavyball.race.contenders import (
    Contender,
    ablations,
    distinct,
    from_chain,
    from_optimizer,
    from_recipe,
)
from heavyball.race.tasks import Task, open_task
from heavyball.race.training import Settings, rehearse

LARGEST_SEED = 2**31 - 1
# The largest value of each number that an option gives: a run has generators of its own for so many
# steps, torch starts every thread that it is asked for, and a batch is held at once.
LARGEST = {
    "steps": 2**31 - 1,
    "epochs": 2**31 - 1,
    "batch_size": 2**16,
    "eval_every": 2**31 - 1,
    "threads": 1024,
    "grid_seeds": 2**31 - 1,
}
DEVICES = ("cpu", "cuda")
KINDS = ("race", "ablate")


@dataclass(frozen=True)
class Plan:
    """The arguments of a race, complete enough to repeat it. None stands for the default."""

    kind: Literal["race", "ablate"] = "race"
    task: str = "digits"
    data: str | None = None
    optimizers: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    grid_seeds: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    eval_every: int | None = None
    target: float | str | None = None
    weight_decay: float | None = None
    threads: int | None = None
    device: str = "cpu"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        if self.kind == "ablate" and (self.optimizers or self.recipes or len(self.chains) != 1):
            raise RaceError("an ablation needs a chain: heavyball ablate 'exp_avg | sign'")
        if not (self.optimizers or self.chains or self.recipes):
            raise RaceError("nothing to race: give --optimizer or --chain, once or more")
        if self.steps is not None and self.epochs is not None:
            raise RaceError("--steps and --epochs exclude each other")
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= largest:
                expected = "at least 1" if value < 1 else f"at most {largest}"
                raise RaceError(f"{flag(name)} {shown(value)}: expected {expected}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RaceError("--device cuda: torch sees no CUDA device")
        decay = self.weight_decay
        if decay is not None and not (math.isfinite(decay) and decay >= 0):
            raise RaceError(f"--weight-decay {decay}: expected a finite number, 0 or more")
        for name in self.metrics:
            check_metric(name)
        check_seeds(self.seeds)
        if self.grid_seeds is not None and self.grid_seeds > len(self.seeds):
            raise RaceError(f"--grid-seeds {self.grid_seeds}: there are {len(self.seeds)} seeds")

    def _check_types(self) -> None:
        """Refuse what is of another type, as a file that was edited by hand may hold it."""
        for field in fields(self):
            value, (expected, fits) = getattr(self, field.name), TYPES[field.name]
            if not (value is None and field.default is None) and not fits(value):
                raise RaceError(f"{flag(field.name)} {shown(value)}: expected {expected}")

    @classmethod
    def from_json(cls, saved: Any) -> "Plan":
        """The plan that `to_json` wrote.

        Errors: RaceError if it is none, or an entry is missing, unknown or of another type.
        """
        if not isinstance(saved, dict):
            raise RaceError(f"the saved arguments are {shown(saved)}, expected names with values")
        # of before there was a choice
        saved = {"device": "cpu", "grid_seeds": None, "metrics": [], "recipes": [], **saved}
        known = {f.name for f in fields(cls)}
        if set(saved) != known:
            names = ", ".join(map(shown, sorted(set(saved) ^ known)))
            raise RaceError(f"the saved arguments are not those of this version: {names}")
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The arguments as plain values."""
        values = asdict(self)
        # as before there was a choice, so that races of then can be finished
        unasked = {name for name in ("metrics", "recipes") if not values[name]}
        return {name: value for name, value in values.items() if name not in unasked}

    def command(self) -> str:
        """The command line that asks for this race."""
        words = ["heavyball", self.kind, *(self.chains if self.kind == "ablate" else ())]
        words += ["--task", self.task]
        for text in self.optimizers:
            words += ["--optimizer", text]
        for text in () if self.kind == "ablate" else self.chains:
            words += ["--chain", text]
        for text in self.recipes:
            words += ["--recipe", text]
        if self.lrs:
            words += ["--lr", ",".join(map(repr, self.lrs))]
        words += ["--seeds", ",".join(map(str, self.seeds)) + "," * (len(self.seeds) == 1)]
        for name in ("grid_seeds", "data", "steps", "epochs", "batch_size", "eval_every", "target"):
            words += self._option(name)
        words += self._option("weight_decay") + self._option("threads")
        words += self._option("device") if self.device != "cpu" else []
        for name in self.metrics:
            words += ["--metric", name]
        return shlex.join(words)

    def _option(self, name: str) -> list[str]:
        value = getattr(self, name)
        return [] if value is None else [flag(name), str(value)]


def flag(name: str) -> str:
    """How an option is written on the command line."""
    words = {"optimizers": "optimizer", "chains": "chain", "recipes": "recipe", "lrs": "lr"}
    words |= {"metrics": "metric"}
    return "--" + words.get(name, name).replace("_", "-")


def check_metric(name: str) -> None:
    """Refuse what no optimizer can measure: see `heavyball.metrics`."""
    *place, last = name.split("/")
    if place and place[0].startswith("group_"):
        place = place[1:]
    if (last not in NAMES or place) and (last not in PROBED or not place):
        raise RaceError(f"--metric: {unknown('metric', name, NAMES)}, or PROBE/{'|'.join(PROBED)}")


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Refuse seeds that are invalid, repeated or out of range."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise RaceError(f"--seeds {shown(seeds)}: expected one or more, each once")
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise RaceError(f"--seeds {shown(seed)}: expected 0 to {LARGEST_SEED}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # an int that float() cannot hold is none
    return isinstance(value, float) or (_is_whole(value) and abs(value) < 2**1023)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(fits, value))


# What each argument must be: in words, and the test.
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": (f"one of {', '.join(KINDS)}", lambda value: _is_text(value) and value in KINDS),
    "task": ("the name of a task", _is_text),
    "data": ("a path", _is_text),
    "optimizers": ("a list of texts", _each(_is_text)),
    "chains": ("a list of texts", _each(_is_text)),
    "recipes": ("a list of texts", _each(_is_text)),
    "metrics": ("a list of texts", _each(_is_text)),
    "lrs": ("a list of finite numbers", _each(lambda v: _is_number(v) and math.isfinite(v))),
    "seeds": ("a list of whole numbers", _each(_is_whole)),
    "target": ("a number or a contender", lambda value: _is_text(value) or _is_number(value)),
    "weight_decay": ("a number", _is_number),
    "device": (f"one of {', '.join(DEVICES)}", lambda value: _is_text(value) and value in DEVICES),
    **dict.fromkeys(LARGEST, ("a whole number", _is_whole)),
}

Run = tuple[Contender, float, int]


@dataclass(frozen=True)
class Race:
    """A plan with its task opened, its contenders found and its defaults filled in.

    target: None until the runs of the contender are done whose final loss is to be reached.
    """

    plan: Plan
    task: Task
    contenders: tuple[Contender, ...]
    left_out: tuple[tuple[str, str], ...]
    settings: Settings
    target: float | None
    target_on: Literal["accuracy", "loss"]

    @property
    def grid_seeds(self) -> tuple[int, ...]:
        """The seeds that choose the learning rates."""
        return self.plan.seeds[: self.plan.grid_seeds]

    def runs(self) -> list[Run]:
        """The runs over the grids; seed by seed, so that a race cut short has compared everyone."""
        return [
            (contender, lr, seed)
            for seed in self.grid_seeds
            for contender in self.contenders
            for lr in contender.lrs
        ]

    def runs_at(self, chosen: Mapping[str, float | None]) -> list[Run]:
        """The runs of the other seeds, at the learning rates that were chosen, by label."""
        later = [seed for seed in self.plan.seeds if seed not in self.grid_seeds]
        return [
            (contender, lr, seed)
            for seed in later
            for contender in self.contenders
            if (lr := chosen[contender.label]) is not None
        ]

    def count(self) -> int:
        """How many runs there are, if no contender diverges at all its learning rates."""
        later = len(self.plan.seeds) - len(self.grid_seeds)
        return len(self.runs()) + later * len(self.contenders)


def open_race(plan: Plan) -> Race:
    """Read the data and try one step of every contender.

    Errors: RaceError for what cannot be raced. A shortened chain of an ablation that is refused is
        left out of the race, with the reason.
    """
    contenders = _contenders(plan)
    task = open_task(plan.task, None if plan.data is None else Path(plan.data))
    task.move(torch.device(plan.device))
    settings = _settings(plan, task)
    target, target_on = _target(plan, task, [contender.label for contender in contenders])
    taking_part, left_out, measured = [], [], set()
    for contender in contenders:
        try:
            measured |= rehearse(task, contender, plan.seeds[0], settings)
            taking_part.append(contender)
        except RaceError as error:
            if plan.kind != "ablate" or contender is contenders[0]:
                raise
            reason = one_line(error).removeprefix(contender.label).lstrip(": ")
            left_out.append((contender.label, reason))
    for name in plan.metrics:
        if name not in measured:
            raise RaceError(
                f"--metric {name}: no contender has it, only optimizers of heavyball with it"
            )
    parts = tuple(taking_part), tuple(left_out)
    return Race(plan, task, *parts, settings, target, target_on)


def _target(
    plan: Plan, task: Task, labels: list[str]
) -> tuple[float | None, Literal["accuracy", "loss"]]:
    """What is to be reached, None for the final loss of a contender."""
    target = task.target if plan.target is None else plan.target
    if isinstance(target, str):
        if target not in labels:
            raise RaceError(f"--target: {unknown('contender', target, labels)}, or give a number")
        return None, "loss"
    if task.target_on == "accuracy" and not 0 < target <= 1:
        raise RaceError(f"--target {target}: an accuracy, expected above 0 and at most 1")
    if not math.isfinite(target):
        raise RaceError(f"--target {target}: expected a finite loss")
    return target, task.target_on


def _contenders(plan: Plan) -> list[Contender]:
    if plan.kind == "ablate":
        return distinct(ablations(plan.chains[0], plan.lrs))
    named = [from_optimizer(text, plan.lrs) for text in plan.optimizers]
    named += [from_chain(text, plan.lrs) for text in plan.chains]
    return distinct(named + [from_recipe(name, plan.lrs) for name in plan.recipes])


def _settings(plan: Plan, task: Task) -> Settings:
    batch_size = plan.batch_size or task.batch_size
    epoch = task.steps_per_epoch(batch_size)
    if plan.epochs is None and task.steps is not None:
        steps = plan.steps or task.steps
    else:
        steps = plan.steps or (plan.epochs or task.epochs) * epoch
        if steps > LARGEST["steps"]:
            raise RaceError(
                f"--epochs {plan.epochs}: {steps} steps, expected at most {LARGEST['steps']}"
            )
    eval_every = plan.eval_every or max(1, steps // task.evaluations)
    return Settings(steps, batch_size, eval_every, plan.weight_decay, plan.metrics)
