"""Live hyper-parameters and fixed options: values, intervals, and sharing."""

import inspect
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard

from torch import Tensor

from heavyball.core.schedule import Schedule, Scheduled, corners, is_scheduled, value_at

# A live hyper-parameter of a transform: a float (or a tuple of floats) where it is declared, a 0-d
# tensor (or a tuple of them) when the function runs.
Live: TypeAlias = Any
# A float that is fixed when the chain is built, such as one that a state begins at.
Fixed: TypeAlias = Annotated[float, "fixed"]


@dataclass(frozen=True)
class Interval:
    """The values that a live hyper-parameter may take."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = True

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        known = math.isfinite(value) or (value == self.high and not self.high_open)
        return known and above and below

    def __str__(self) -> str:
        left, right = "(["[not self.low_open], "])"[self.high_open]
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class LargestLr(Interval):
    """The interval of a number for which 0 stands for the schedule's largest learning rate."""


nonnegative = Interval(0, math.inf)
largest_lr = LargestLr(0, math.inf)
positive = Interval(0, math.inf, low_open=True)
fraction = Interval(0, 1)
open_fraction = Interval(0, 1, low_open=True)
closed_fraction = Interval(0, 1, high_open=False)
finite = Interval(-math.inf, math.inf, low_open=True)

# Of a live hyper-parameter: of all its numbers, of each, or either as a function of the options.
Intervals: TypeAlias = Interval | tuple[Interval, ...]
Domain: TypeAlias = Intervals | Callable[[Mapping[str, Any]], Intervals]


def each(domain: Intervals) -> tuple[Interval, ...]:
    """The interval of every number, or the one of all."""
    return domain if isinstance(domain, tuple) else (domain,)


@dataclass(frozen=True)
class Shared:
    """A hyper-parameter that several transforms of a chain share as one entry of the group."""

    name: str
    value: Scheduled
    index: int | None = None

    def __getitem__(self, index: int) -> "Shared":
        if self.index is not None or not isinstance(self.value, tuple):
            raise TypeError(f"shared {self.name!r} is one number, it has no element {index}")
        if not 0 <= index < len(self.value):
            raise IndexError(f"shared {self.name!r} has {len(self.value)} numbers, none is {index}")
        return replace(self, index=index)

    @property
    def item(self) -> Scheduled:
        return self.value if self.index is None else self.value[self.index]

    def __repr__(self) -> str:
        index = "" if self.index is None else f", {self.index}"
        return f"shared({self.name!r}, {self.value!r}{index})"


def shared(name: str, value: Any, index: int | None = None) -> Shared:
    """Share one hyper-parameter, or its elements, between several transforms.

    `betas = shared("betas", (0.9, 0.999))`, then `scale_by_exp_avg_sq(beta2=betas[1])` and
    `schedule_free(beta=betas[0])`: the group holds one `betas`, as in torch.

    value: a number, a schedule, or several of these.
    index: the element; `shared("betas", (0.9, 0.999), 1)` is `betas[1]`, as written in text.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"shared({name!r}, ...): expected a name such as 'betas'")
    one = is_real(value) or isinstance(value, Schedule)
    made = Shared(name, _kept(name, value) if one else _kept_all(name, value))
    return made if index is None else made[index]


def _kept(name: str, value: Any) -> Scheduled:
    return value if isinstance(value, Schedule) else checked_number(name, value)


def _kept_all(name: str, value: Any) -> tuple[Scheduled, ...]:
    if not is_sequence(value):
        raise TypeError(f"{name}={value!r}: expected a sequence of numbers")
    return tuple(_kept(name, v) for v in value)


# A shared number: its name, a value (a number, a schedule or a tuple of these), and an index.
_CALLED = r"\w*\((?:[^()]|\([^()]*\))*\)"
_SHARED = re.compile(rf"shared\('(\w+)', (?:{_CALLED}|[^(),]*)(?:, (\d+))?\)")


def by_name(text: str) -> str:
    """A chain's text with the names of shared numbers alone, for print-outs that list their values."""
    return _SHARED.sub(lambda m: m[1] if m[2] is None else f"{m[1]}[{m[2]}]", text)


def is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_number(name: str, value: Any) -> float:
    if not is_real(value):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    return float(value)


def checked_numbers(name: str, value: Any) -> tuple[float, ...]:
    if not is_sequence(value):
        raise TypeError(f"{name}={value!r}: expected a sequence of numbers")
    return tuple(checked_number(name, v) for v in value)


# What is neither in order nor numbers, although it has a length.
_NO_SEQUENCES = (str, bytes, bytearray, Mapping, Set, Tensor)


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it can hold numbers in order: a tuple, a list, an array, a configuration's own kind."""
    if isinstance(value, float):  # by far the most frequent
        return False
    if isinstance(value, tuple | list):
        return True
    ordered = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return ordered and not isinstance(value, _NO_SEQUENCES) and getattr(value, "ndim", 1) > 0


def in_tuples(value: Any) -> Any:
    """A value of an option with every sequence in it as a tuple, whatever it was read from."""
    if isinstance(value, Mapping):
        return {key: in_tuples(part) for key, part in value.items()}
    if hasattr(value, "tolist") and not isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return tuple(map(in_tuples, value))
    return value


def check_live(
    name: str, value: Any, like: Any, domain: Intervals, index: int | None = None
) -> Any:
    """A live hyper-parameter's value as floats, or an error that names it and what was expected.

    `like` gives the kind: one number, or so many. `index`: only this one must lie in `domain`, which
    may be a tuple of one interval for each number.
    """
    if isinstance(like, tuple):
        value = checked_numbers(name, value)
        if len(value) != len(like):
            raise ValueError(f"{name}={value!r}: expected {len(like)} numbers, got {len(value)}")
        parts = value
    else:
        value = checked_number(name, value)
        parts = (value,)
    for position, part in enumerate(parts):
        several = isinstance(domain, tuple)
        allowed = domain[position] if isinstance(domain, tuple) else domain
        if index in (None, position) and part not in allowed:
            each = index is None and not several
            which = "" if len(parts) == 1 else "each " if each else f"number {position} "
            raise ValueError(f"{name}={value!r}: expected {which}in {allowed}")
    return value


def check_scheduled(
    name: str, value: Scheduled, like: Any, domain: Intervals, index: int | None = None
) -> Any:
    """A schedule's first value, or the value of a number, checked as by `check_live`.

    Errors: those of `check_live`, of any value that the schedule will take as far as it is known.
    """
    if not is_scheduled(value):
        return check_live(name, value, like, domain, index)
    for n in corners(value):
        try:
            check_live(name, value_at(value, n), like, domain, index)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, in step {n} of {value!r}") from None
    return check_live(name, value_at(value, 1), like, domain, index)


def allows_none(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def check_option(name: str, value: Any, default: Any, annotation: Any) -> Any:
    """The value of a fixed option, checked against its annotation or the type of its default."""
    if value is None and (default is None or allows_none(annotation)):
        return value
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
        return value
    accepted: Any = type(default)
    annotation = float if annotation is Fixed else annotation
    if annotation is not inspect.Parameter.empty:
        parts = typing.get_args(annotation) if is_union(annotation) else (annotation,)
        words = [c for p in parts if typing.get_origin(p) is Literal for c in typing.get_args(p)]
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, str) and words:
            others = [p.__name__ for p in parts if p in (int, float)]
            known = ", ".join([*map(repr, words), *others])
            raise ValueError(f"{name}={value!r}: expected one of {known}")
        accepted = tuple(typing.get_origin(p) or p for p in parts)
        accepted = tuple(p for p in accepted if p is not Literal)
    if isinstance(value, bool) and accepted not in (bool, (bool,)):
        raise TypeError(f"{name}={value!r}: expected {annotation}, got a bool")
    names = accepted if isinstance(accepted, tuple) else (accepted,)
    if tuple in names or dict in names:
        value = in_tuples(value)
    if not isinstance(value, accepted):
        if str in names and isinstance(value, os.PathLike):
            return os.fspath(value)
        # numbers of numpy
        if int in names and isinstance(value, numbers.Integral):
            return int(value)
        if float in names and is_real(value):
            return float(value)
        expected = " or ".join(getattr(t, "__name__", str(t)) for t in names)
        raise TypeError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")
    return value


def is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def may_be_live(annotation: Any) -> bool:
    """Whether the annotation is `Live | None`, of a hyper-parameter that is None unless given."""
    return Any in typing.get_args(annotation) and allows_none(annotation)


def is_live(default: Any, annotation: Any) -> bool:
    """Whether a hyper-parameter goes to the parameter group: floats and tuples of floats do."""
    if annotation is Fixed:
        return False
    return isinstance(default, float) or (
        isinstance(default, tuple) and bool(default) and all(isinstance(v, float) for v in default)
    )


@dataclass(frozen=True)
class Hyper:
    """One entry of the parameter group: its default and where it may lie.

    given: the default, or the schedule that it is the first value of.
    """

    default: Any
    domains: tuple[tuple[int | None, Intervals], ...]
    owner: str
    given: Scheduled

    def check(self, key: str, value: Any) -> Any:
        """The value as floats; raises where one of the transforms that use it would not take it."""
        for index, domain in self.domains:
            checked = check_live(key, value, self.default, domain, index)
        return checked


def frozen(value: Any) -> Any:
    """A copy that does not change with a sequence in the group, and that can be compared."""
    if isinstance(value, float | tuple):
        return value
    return tuple(value) if is_sequence(value) else value
