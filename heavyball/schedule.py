"""When to refresh a preconditioner: often at first, ever more rarely later, or at equal intervals.

A schedule is a value: a pure function of the step, so it needs no state, a resumed run goes on as
if it had not stopped, and all parameters and all ranks decide alike.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from heavyball.transform import check_live, positive

# Steps per table of sums: one table is made at once, and a handful of them is kept.
BLOCK = 4096
# Where a running sum of probabilities is rounded down to a count. Any value between 1.3e-4 and .358
# gives the published counts of `PrecondSchedule()`.
OFFSET = 0.25


@runtime_checkable
class Schedule(Protocol):
    """What a transform asks of a schedule; steps count from 1.

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
    """Refresh at nearly every step at first and ever more rarely later.

    interval(n) = 1 + (a log10(n))^b, and 1 at n = 0
    S(n) = 1 / interval(1) + .. + 1 / interval(n); the schedule has fired floor(S(n) + 1/4) times by
    step n, and fires at the steps at which that number grows.

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
        return 1 + (self.a * math.log10(max(_checked(step), 1))) ** self.b

    def fires(self, step: int, phase: float = 0.0) -> bool:
        """Whether this step refreshes."""
        if _checked(step) < 1:
            return False
        block, place = divmod(step - 1, BLOCK)
        before, after = _sums(self, block)[place : place + 2]
        return math.floor(after + OFFSET + phase) > math.floor(before + OFFSET + phase)

    def total(self, step: int) -> int:
        """How many of the steps 1..step refresh."""
        if _checked(step) < 1:
            return 0
        block, place = divmod(step - 1, BLOCK)
        return math.floor(_sums(self, block)[place + 1] + OFFSET)


def as_schedule(frequency: int | None, scheduler: object) -> Schedule:
    """The schedule that a pair of options asks for; `scheduler` rules where it is not None.

    scheduler: a pair of numbers (a, b) for `PrecondSchedule`, or a schedule.
    """
    if scheduler is None:
        if frequency is None:
            raise ValueError("neither a frequency nor a schedule of refreshes was given")
        return Every(frequency)
    if isinstance(scheduler, Schedule):
        return scheduler
    if isinstance(scheduler, (tuple, list)) and len(scheduler) == 2:
        return PrecondSchedule(*scheduler)
    raise TypeError(
        f"precond_scheduler={scheduler!r}: expected two numbers (a, b) or a heavyball.PrecondSchedule"
    )


def _checked(step: int) -> int:
    # 2^53: beyond it steps could not be told apart in float64
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError(f"step={step!r}: expected a whole number from 0")
    return step


# The sums before each block, by schedule: a jump to a late step adds up each block once.
_starts: dict[PrecondSchedule, list[float]] = {}


@functools.lru_cache(maxsize=64)
def _sums(schedule: PrecondSchedule, block: int) -> list[float]:
    """S before the first step of a block and after each of its steps."""
    starts = _starts.setdefault(schedule, [0.0])
    while len(starts) <= block:
        starts.append(_running(schedule, len(starts) - 1, starts[-1])[-1].item())
    return _running(schedule, block, starts[block]).tolist()


def _running(schedule: PrecondSchedule, block: int, start: float) -> Tensor:
    first = block * BLOCK + 1
    steps = torch.arange(first, first + BLOCK, dtype=torch.float64)
    shares = 1 / (1 + (schedule.a * steps.log10()) ** schedule.b)
    return torch.cat([torch.tensor([start], dtype=torch.float64), shares]).cumsum(0)
