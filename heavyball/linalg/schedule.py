"""When to refresh a preconditioner: at a decreasing rate, or at equal intervals.

A schedule is a pure function of the step. It needs no state, resumed runs continue exactly, and all
parameters and ranks make the same decision.
"""

import functools
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from heavyball.core.hyper import check_live, is_sequence, positive
from heavyball.numerics.late import sum_between

# Steps per table of sums: one table is made at once, and a handful of them is kept.
BLOCK = 4096
# Tables whose starts are found by adding up all steps before them. A later one starts at an integral.
ADDED_UP = 64
# Where a running sum of probabilities is rounded down to a count. Any value between 1.3e-4 and .358
# gives the published counts of `PrecondSchedule()`.
OFFSET = 0.25


@runtime_checkable
class Schedule(Protocol):
    """The interface of a schedule; steps count from 1.

    phase: the share of an interval by which to be early, in [0, 1). Things that need not be refreshed
        together take different phases, so that no step has all of the work.
    """

    def interval(self, step: int) -> float:
        """The mean number of steps between refreshes around this step."""

    def fires(self, step: int, phase: float = 0.0) -> bool:
        """Whether this step refreshes."""

    def total(self, step: int) -> int:
        """How many of the steps 1..step refresh."""


@dataclass(frozen=True)
class Every:
    """Refresh every `frequency` steps: at `frequency`, `2 frequency`, and so on."""

    frequency: int

    def __post_init__(self) -> None:
        if not isinstance(self.frequency, int) or isinstance(self.frequency, bool):
            raise TypeError(f"frequency={self.frequency!r}: expected a whole number")
        if self.frequency < 1:
            raise ValueError(f"frequency={self.frequency}: expected at least 1")

    def interval(self, step: int) -> float:
        """The frequency."""
        _checked(step)
        return float(self.frequency)

    def fires(self, step: int, phase: float = 0.0) -> bool:
        """Whether the step is a multiple of the frequency, or a phase before one."""
        return _checked(step) > 0 and (step + int(phase * self.frequency)) % self.frequency == 0

    def total(self, step: int) -> int:
        """How many of the steps 1..step refresh."""
        return _checked(step) // self.frequency


@dataclass(frozen=True)
class PrecondSchedule:
    """Refresh in nearly every step at first, and less and less often later.

    interval(n) = 1 + (a log10(n))^b, and 1 at n = 0
    S(n) = 1 / interval(1) + .. + 1 / interval(n); the schedule has fired floor(S(n) + 1/4) times by
    step n, and fires in the steps in which that number grows.

    a: 1 / a is the logarithm of the step at which the interval has grown to 2.
    b: how steeply it grows there.

    Source: HeavyBall's `precond_scheduler` and the table in its documentation, which this rule
        reproduces. Departure: no random numbers, so the counts are the same in every run.
    """

    a: float = 1 / 3
    b: float = 9.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            object.__setattr__(self, name, check_live(name, getattr(self, name), 0.0, positive))

    def interval(self, step: int) -> float:
        """The mean number of steps between refreshes around this step."""
        try:
            return 1 + (self.a * math.log10(max(_checked(step), 1))) ** self.b
        except OverflowError:
            return math.inf

    def fires(self, step: int, phase: float = 0.0) -> bool:
        """Whether this step refreshes."""
        if _checked(step) < 1:
            return False
        return self._count(step, phase) > self._count(step - 1, phase)

    def total(self, step: int) -> int:
        """How many of the steps 1..step refresh."""
        return self._count(_checked(step), 0.0)

    def _count(self, step: int, phase: float) -> int:
        if step == 0:
            return math.floor(OFFSET + phase)
        block, place = divmod(step - 1, BLOCK)
        whole, sums = _sums(self, block)
        return whole + math.floor(sums[place] + OFFSET + phase)


def as_schedule(frequency: int | None, scheduler: object) -> Schedule:
    """The schedule for a pair of options; `scheduler` takes precedence unless it is None.

    scheduler: a pair of numbers (a, b) for `PrecondSchedule`, or a schedule.
    """
    if scheduler is None:
        if frequency is None:
            raise ValueError("neither a frequency nor a refresh schedule was given")
        return Every(frequency)
    if isinstance(scheduler, Schedule):
        return scheduler
    if is_sequence(scheduler) and len(scheduler) == 2:
        return PrecondSchedule(*scheduler)
    raise TypeError(
        f"precond_scheduler={scheduler!r}: expected two numbers (a, b) or a heavyball.PrecondSchedule"
    )


def _checked(step: int) -> int:
    # 2^53: beyond it steps could not be told apart in float64
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError(f"step={step!r}: expected a whole number from 0")
    return step


@functools.lru_cache(maxsize=64)
def _sums(schedule: PrecondSchedule, block: int) -> tuple[int, list[float]]:
    """S after each step of a block, as an integer and the rest."""
    if block < ADDED_UP:
        return 0, running_sums(schedule, block, _starts(schedule)[block]).tolist()
    first = ADDED_UP * BLOCK
    late = sum_between(schedule.a, schedule.b, first, block * BLOCK)
    start = Decimal(_starts(schedule)[ADDED_UP]) + late
    whole = math.floor(start)
    return whole, running_sums(schedule, block, float(start - whole)).tolist()


@functools.lru_cache(maxsize=64)
def _starts(schedule: PrecondSchedule) -> list[float]:
    """S before each of the first blocks."""
    starts = [0.0]
    for block in range(ADDED_UP):
        starts.append(running_sums(schedule, block, starts[-1])[-1].item())
    return starts


def running_sums(schedule: PrecondSchedule, block: int, start: float) -> Tensor:
    first = block * BLOCK + 1
    steps = torch.arange(first, first + BLOCK, dtype=torch.float64, device="cpu")
    shares = 1 / (1 + (schedule.a * steps.log10()) ** schedule.b)
    before = torch.tensor([start], dtype=torch.float64, device="cpu")
    return torch.cat([before, shares]).cumsum(0)[1:]
