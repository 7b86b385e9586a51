"""Values along some of a tensor's axes: their levels, and where each value lies in its array.

A tensor of which some values belong to rows and others to columns is seen with two axes, a convolution
kernel (out, in, 3, 3) with means over the inputs and means over the outputs with three: neighbouring
axes that no level tells apart are merged, and axes of one element are left out. What is left are the
runs, numbered from 0. An array of values along some runs lies in memory as a contiguous tensor would.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from heavyball.compiler.frontend.symbols import Var
from heavyball.state import rank_one

Runs = tuple[int, ...]
_PREFIX = "along "


def along(axes: Iterable[int]) -> str:
    """The level of values that differ along these axes of the tensor."""
    return _PREFIX + ",".join(map(str, axes))


def is_along(level: str) -> bool:
    """Whether a level is one of values along some of the axes."""
    return level.startswith(_PREFIX)


def axes_of(shape: Sequence[int], of: Sequence[int]) -> str | int:
    """Which axes of another shape a state's has: "=" all, "1" none and "-" something else for each.

    Where their numbers of dimensions differ, the state's.
    """
    if shape == of:
        return "="
    if len(shape) != len(of):
        return len(shape)
    return "".join(
        "1" if n == 1 else "=" if n == m else "-" for n, m in zip(shape, of, strict=True)
    )


def numbers_of(level: str) -> set[int]:
    """The axes of a level."""
    return {int(axis) for axis in level.removeprefix(_PREFIX).split(",")}


def first_axes(levels: Iterable[str], wide: Sequence[int]) -> Runs | None:
    """The axis with which each run begins; None if no level asks for runs.

    wide: the axes with more than one element.
    """
    found = [numbers_of(level) for level in sorted(set(levels)) if is_along(level)]
    if not found:
        return None
    starts: list[int] = []
    before: list[bool] | None = None
    for axis in wide:
        member = [axis in axes for axes in found]
        if member != before:
            starts.append(axis)
        before = member
    return tuple(starts)


def run_sizes(starts: Runs | None, shape: Sequence[int]) -> list[int]:
    """The sizes of all runs but the first, which is what is left of the number of elements."""
    later = starts[1:] if starts else ()
    ends = [*later[1:], len(shape)]
    return [math.prod(shape[low:high]) for low, high in zip(later, ends, strict=bool(later))]


@dataclass(frozen=True)
class View:
    """The axes with which a kernel sees a tensor: rows and columns of state of rank one among them.

    split: the axis of which a part belongs to the rows and the rest to the columns; it becomes two. None
    where rows end with an axis. plain: there is a matrix and nothing else, since no other value belongs
    to some of the axes.
    """

    rows: int = 1
    split: int | None = None
    plain: bool = False

    def of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes of a tensor."""
        sides = rank_one.sides(math.prod(shape))
        if self.plain:
            return sides
        if self.split is None:
            return tuple(shape)
        behind = math.prod(shape[self.split + 1 :])
        inner = sides[1] // behind
        before, after = shape[: self.split], shape[self.split + 1 :]
        return (*before, shape[self.split] // inner, inner, *after)

    def axes(self, axis: int) -> tuple[int, ...]:
        """What has become of an axis."""
        if self.split is None or axis < self.split:
            return (axis,)
        return (axis, axis + 1) if axis == self.split else (axis + 1,)


MATRIX = View(plain=True)


@functools.lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...]) -> View | None:
    """How the axes of a tensor and its matrix of rank one go together; None where they cross.

    A byte of signs must not lie in two rows of a kernel.
    """
    columns = rank_one.sides(math.prod(shape))[1]
    behind = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(n % 8 for n in behind if 1 < n < columns):
        return None
    if columns in behind:
        return View(behind.index(columns) + 1)
    for axis, n in enumerate(behind):
        if columns % n == 0 and shape[axis] % (columns // n) == 0:
            return View(axis + 1, axis)
    return None


class Frame:
    """A tensor as rows: its runs and levels.

    outer: the runs that number the rows. lane: the run along which a row is walked. period: the run
    behind it, or None; its elements lie next to each other in a row, so that a row has lane x period
    elements. There is one where some values are the same along the lane and differ along the period:
    rows of a 3 x 3 kernel's nine elements would be too short. rows: all runs but the lane. starts: the
    axis with which each run begins, and later those behind the first.
    """

    def __init__(self, starts: Runs, levels: Iterable[str]):
        self.starts, self.later = starts, starts[1:]
        self.all = tuple(range(len(starts)))
        self._runs = {
            level: tuple(k for k in self.all if starts[k] in numbers_of(level))
            for level in sorted(set(levels))
            if is_along(level)
        }
        self.levels = sorted(self._runs, key=lambda level: (len(self._runs[level]), level))
        *_, lane, last = (-1, *self.all)
        found = self._runs.values()
        repeats = any(last in runs and lane not in runs for runs in found)
        apart = any(lane in runs and last not in runs for runs in found)
        self.period = last if repeats and not apart and len(self.all) > 2 else None
        self.lane = last if self.period is None else lane
        self.outer = tuple(k for k in self.all if k < self.lane)
        self.rows = tuple(k for k in self.all if k != self.lane)

    def runs(self, level: str) -> Runs:
        """The runs of a level."""
        return self._runs.get(level, ())

    def without_lane(self, level: str) -> Runs:
        """The runs of a level but for the lane."""
        return tuple(k for k in self.runs(level) if k != self.lane)

    def missing(self, level: str, inside: Runs) -> Runs:
        """The runs of `inside` along which values of a level are the same."""
        return tuple(k for k in inside if k not in self.runs(level))

    def has_lane(self, level: str) -> bool:
        """Whether values of a level differ along a row."""
        return self.lane in self.runs(level)


class FrameText:
    """The index arithmetic of a frame as a language spells it.

    size: how the text calls the size of a run. over: the sign of an integer division. kept: the values
    whose arrays lie one after the other.
    """

    def __init__(
        self, frame: Frame, size: Callable[[int], str], over: str, kept: Sequence[Var] = ()
    ):
        self.frame, self._size, self._over, self._kept = frame, size, over, kept

    def size(self, runs: Iterable[int]) -> str:
        """How many values there are along these runs."""
        text = " * ".join(self._size(k) for k in runs)
        return f"({text})" if text else "1"

    def level(self, level: str) -> str:
        """How many values there are of a level."""
        return self.size(self.frame.runs(level))

    def levels(self, levels: Iterable[str]) -> str:
        """How many values there are of these levels together."""
        found = list(levels)
        counts = {level: found.count(level) for level in self.frame.levels if level in found}
        return " + ".join(f"{n} * {self.level(level)}" for level, n in counts.items()) or "0"

    def before(self, var: Var | None) -> str:
        """The size of the kept arrays that lie before that of a value, or of all."""
        indices = [v.index for v in self._kept]
        end = len(indices) if var is None else indices.index(var.index)
        return self.levels(v.level for v in self._kept[:end])

    def members(self, before: str, level: str) -> str:
        """How many values of one level ("element" for all) a sum to another adds up."""
        inside = self.frame.all if before == "element" else self.frame.runs(before)
        return self.size(self.frame.missing(level, inside))

    def place(self, at: str, source: Runs, target: Runs) -> str:
        """The part that a place in an array along `source` has in one along `target`.

        Where all runs of the target are among the source's, that is the place of the value itself.
        """
        terms = []
        for low, high in _shared(source, target):
            text, behind, above = at, source[high:], target[target.index(source[high - 1]) + 1 :]
            text += f" {self._over} {self.size(behind)}" if behind else ""
            text += f" % {self.size(source[low:high])}" if low else ""
            text += f" * {self.size(above)}" if above else ""
            terms.append(text)
        return " + ".join(terms) or "0"


def _shared(source: Runs, target: Runs) -> Iterable[tuple[int, int]]:
    """Slices of the source whose runs follow each other in the target too."""
    low = 0
    while low < len(source):
        if source[low] not in target:
            low += 1
            continue
        high, place = low + 1, target.index(source[low])
        while high < len(source) and source[high : high + 1] == target[place + high - low :][:1]:
            high += 1
        yield low, high
        low = high
