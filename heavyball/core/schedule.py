"""Schedules: functions of a group's step, used in place of its live hyper-parameters."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

# A function of n = 1, 2, .., and what may stand for a live number: a tuple may hold numbers as well.
Function: TypeAlias = Callable[[int], Any]
Scheduled: TypeAlias = Any

# Entries of a group: the schedules of its numbers by name, how many steps they have counted, and the
# learning rate of the last of these. `lr` itself is what its schedule multiplies.
SCHEDULES = "schedules"
COUNT = "schedule_step"
SCHEDULED_LR = "scheduled_lr"
LR = "lr"
# What `lr` was multiplied from, while a step goes on.
BASE_LR = "_base_lr"
# How far below 0 a factor of `lr` may be by rounding; it counts as 0 then.
ROUNDING = 1e-9


class Schedule:
    """A function of a group's step whose `repr` can be parsed; see `heavyball.chainable`.

    make: the function that makes it of `arguments`. share: of n = 1, 2, ..; its values are multiplied
    by `peak`. corners: the steps at which it may turn, so that its extremes are among them.
    """

    # whether the peak is what somebody asked for
    is_peak_given = True

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: Mapping[str, Any],
        share: Callable[[int], float],
        corners: tuple[float, ...],
        peak: float | None = 1.0,
    ):
        self.make, self.arguments, self.peak = make, dict(arguments), peak
        self._share = share
        turns = {1, *(max(1, whole) for c in corners for whole in (math.floor(c), math.ceil(c)))}
        self.corners = tuple(sorted(turns))

    def __call__(self, n: int) -> float:
        """Its value in the n-th step, from 1."""
        share = self._share(n)
        return share if self.peak is None else self.peak * share

    def with_peak(self, peak: float) -> "Schedule":
        """The same with another peak.

        Errors: ValueError for one that has none: its numbers are its own.
        """
        if self.peak is None:
            raise ValueError(f"{self!r} has no peak to be set")
        return self.make(**self.arguments, peak=peak)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        values = self.arguments | ({} if self.peak is None else {"peak": self.peak})
        defaults = {n: p.default for n, p in inspect.signature(self.make).parameters.items()}
        shown = ", ".join(f"{k}={v!r}" for k, v in values.items() if v != defaults[k])
        return f"{self.make.__name__}({shown})"

    def __reduce__(self) -> tuple:
        given = self.peak is not None and self.is_peak_given
        peak = {"peak": self.peak} if given else {}
        return functools.partial(self.make, **self.arguments, **peak), ()

    def __deepcopy__(self, memo: dict) -> "Schedule":
        return self


@dataclass(frozen=True)
class Followed:
    """An element at the head of a chain that makes the entry `name` of every group follow `fn`."""

    name: str
    fn: Scheduled

    def __repr__(self) -> str:
        return f"schedule({self.name!r}, {told(self.fn)})"


def schedule(name: str, fn: Scheduled) -> Followed:
    """Make a live hyper-parameter of every group follow a function of the step; at the head of a chain.

    name: of the entry in the group, "lr", "weight_decay", "momentum", "scale_by_adam.1.betas".
    fn: of n = 1, 2, .., the number of the group's step, counted by calls of `step()`. For `lr` its value
        multiplies what the group holds, which schedulers of torch may change too; any other number it
        replaces. A tuple of functions and numbers for a tuple of numbers.

    Errors: TypeError for what is no name or no function; when the optimizer is built, ValueError for a
        name that is no live number of the chain.
    """
    if not isinstance(name, str):
        raise TypeError(f"schedule: name={name!r}: expected that of a live number, such as 'lr'")
    if not follows(fn):
        raise TypeError(f"schedule({name!r}, {fn!r}): expected a function of the group's steps")
    return Followed(name, tuple(map(plain, fn)) if isinstance(fn, tuple | list) else fn)


def plain(value: Any) -> Any:
    """A plain Python number, whose text can be parsed; also several. Other values are unchanged."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    if type(value) in (int, float) or not _is_number(value):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def follows(fn: Any) -> bool:
    """Whether a number can follow it: a function, or several with numbers among them."""
    parts = fn if isinstance(fn, tuple | list) else (fn,)
    return any(map(callable, parts)) and all(callable(p) or _is_number(p) for p in parts)


def last_lr(group: Mapping[str, Any]) -> Any:
    """The learning rate of a group's last step; `lr` where that followed no schedule."""
    schedules = group.get(SCHEDULES)
    is_followed = isinstance(schedules, Mapping) and LR in schedules
    return group.get(SCHEDULED_LR, group[LR]) if is_followed else group[LR]


def is_scheduled(value: Any) -> bool:
    """Whether a value is a schedule, or a tuple or list with one."""
    if isinstance(value, tuple | list):
        return any(isinstance(part, Schedule) for part in value)
    return isinstance(value, Schedule)


def value_at(value: Scheduled, n: int) -> Any:
    """The number, or the tuple of numbers, in the n-th step."""
    if isinstance(value, tuple | list):
        return tuple(value_at(part, n) for part in value)
    return value(n) if callable(value) else value


def corners(value: Scheduled) -> Iterator[int]:
    """Steps among which the extremes of what a schedule gives are; of any other function the first."""
    parts = value if isinstance(value, tuple | list) else (value,)
    turns = {n for part in parts if isinstance(part, Schedule) for n in part.corners}
    yield from sorted(turns | {1})


def largest(value: Scheduled) -> Any:
    """The largest value of a schedule, or a number itself; None of a function that is not known."""
    if isinstance(value, Schedule):
        return max(map(value, value.corners))
    return None if callable(value) else value


def told(fn: Scheduled) -> str:
    """A schedule as text, as stored in state dicts."""
    if isinstance(fn, tuple | list):
        inner = ", ".join(map(told, fn))
        return f"({inner},)" if len(fn) == 1 else f"({inner})"
    if isinstance(fn, Schedule) or not callable(fn):
        return repr(plain(fn))
    # the address in a function's repr is another one in every process
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__
