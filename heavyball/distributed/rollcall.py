"""What processes tell each other at the beginning of a step: their plans, errors, and gradients.

Plans are compared once, when they are made. After that the first sums of a step carry a number for each
parameter, and one for everything else, so a step has no exchange more for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heavyball.distributed.agreement import Entry, compare
from heavyball.distributed.parts import Part, devices_of
from heavyball.distributed.shard import Group, replicated
from heavyball.distributed.sums import Term, completed
from heavyball.distributed.waves import Run
from heavyball.numerics import SCALAR

# What a process adds to the first number of a roll call: an error, or that it has other parameters now.
ERROR, CHANGED = 2.0**20, 1.0
PLAN = (
    "step: another process has refused a parameter or its gradient, see its error; nothing has been "
    "changed",
    "the processes of a group of {size} have different numbers of parameters there, here {here}: build "
    "the optimizer alike on all of them",
    "would be stepped otherwise on another process: its shape, dtype, placements, transforms, or "
    "whether it has a gradient differ; nothing has been changed",
)


# ---- plans


def compare_plans(parts: Sequence[Part]) -> None:
    """Refuse to go on if other processes would do something else.

    Errors: ValueError on every process, naming the first parameter that differs.
    """
    asked: dict[Group, list[Entry]] = {}
    for part in parts:
        asked.setdefault(part.layout.group, []).append((part.place.label, _described(part)))
    compare(asked, devices_of(parts), PLAN)


def refuse_plans(devices: Mapping[Group, torch.device], error: Exception) -> None:
    """Say to those that compare their plans that there is none here.

    devices: the groups, each with a device that its processes can gather from.
    """
    compare(dict.fromkeys(devices, ()), devices, PLAN, error)


def _described(part: Part) -> str:
    """What must be the same on all processes."""
    recipes = [r.graph.key() for r in (part.step, *part.shares.values()) if r is not None]
    layout = part.layout
    has = part.param.grad is not None
    return repr(
        (part.place.number, layout.shape, part.here.dtype, layout.boxes, part.mode, part.owner)
        + (sorted((i, str(dtype)) for i, dtype in part.rounded.items()),)
        + (repr(part.program), recipes, part.param.requires_grad, has)
    )


# ---- errors and gradients


class RollCall:
    """Finds out which parameters have a gradient on every process; it costs a number a parameter.

    The numbers ride with the first sums of a step: nothing has been changed before they are known.
    """

    def __init__(self, parts: Sequence[Part], begins: "Callable[[First], None]"):
        self._begins = begins
        groups = {p.layout.group: None for p in parts if p.mode != "local"}
        self._members = {
            group: [p for p in parts if p.layout.group is group]
            for group in groups
            if group.size > 1
        }
        self._asked = {p for members in self._members.values() for p in members}
        self._error: Exception | None = None
        self._open = bool(self._members)
        self.absent: set[Part] = set()
        self.waiting: list[Run] = []  # for whether another process has a gradient

    def is_candidate(self, part: Part) -> bool:
        """Whether a parameter takes part in this step, as far as is known here."""
        if part.param.grad is not None:
            return True
        return part in self._asked and part.param.requires_grad

    def check(self, parts: Sequence[Part], check: Callable[[Part], None]) -> bool:
        """Look at all gradients; whether something is wrong, which waits until others hear of it."""
        try:
            for part in parts:
                if part.param.grad is not None:
                    check(part)
        except (TypeError, ValueError) as error:
            if not self._open:
                raise
            self._error = error
        return self._error is not None

    def complete(self, terms: Sequence[Term]) -> list[Tensor]:
        """Sums over processes, `completed`; the first ones carry who has gradients.

        Errors: ValueError on every process if one has refused its gradients, or only some have one.
        """
        if not self._open:
            return completed(terms)
        self._open = False
        calls = [*map(self._call, self._members)]
        self._begins(First.of([*terms, *calls], calls))
        found = completed([*terms, *calls])
        for parts, counts in zip(self._members.values(), found[len(terms) :], strict=True):
            self._read(parts, counts.tolist())
        for run in self.waiting:
            run.absent = run.part in self.absent
        return found[: len(terms)]

    def told(self, terms: Sequence[Term], group: Group, device: torch.device) -> list[Tensor]:
        """Sums that come first in a step; the same where gradients are nobody else's affair.

        Errors: ValueError on every process of the group if one could not begin the step.
        """
        if self._open:
            return self.complete(terms)
        call = Term(
            "sum", replicated((1,), group), torch.zeros(1, dtype=SCALAR, device=device), True
        )
        self._begins(First.of([*terms, call], [call]))
        *found, count = completed([*terms, call])
        refuse_told(float(count))
        return found

    def finish(self) -> None:
        """Find out, if no sum has carried it yet."""
        if self._open:
            self.complete(())

    def _call(self, group: Group) -> Term:
        parts = self._members[group]
        here = [
            ERROR * (self._error is not None),
            *(float(p.param.grad is not None) for p in parts),
        ]
        device = parts[0].here.device
        part = torch.tensor(here, dtype=SCALAR, device=device)
        return Term("sum", replicated((len(here),), group), part, True)

    def _read(self, parts: Sequence[Part], counts: list[float]) -> None:
        if self._error is not None:
            raise self._error
        refuse_told(counts[0])
        for part, count in zip(parts, counts[1:], strict=True):
            refuse_some(part, count)
            if not count:
                self.absent.add(part)


def refuse_some(part: Part, count: float) -> None:
    """Refuse a gradient that this many processes have, unless those are all or none.

    Errors: ValueError naming the parameter.
    """
    size = part.layout.group.size
    if count not in (0, size):
        raise ValueError(
            f"{part.place.label} has a gradient on {int(count)} of the {size} processes that "
            "hold it, expected all or none; nothing has been changed"
        )


def refuse_told(count: float) -> None:
    """Refuse a step of which another process has said that it cannot be.

    Errors: ValueError for the sum of what the processes of a group have said, if that is not 0.
    """
    if count >= ERROR:
        raise ValueError(PLAN[0])
    if count:
        raise ValueError(
            "step: the parameters in the groups, or which of them require a gradient, have changed on "
            f"{round(count)} of the processes that share a group: change them alike on all of them"
        )


@dataclass(frozen=True)
class First:
    """The first sums of a step: who takes part, how, of how many numbers, and where the calls begin."""

    sums: tuple[tuple[Group, str, torch.device, int, int | None], ...]

    @staticmethod
    def of(terms: Sequence[Term], calls: Sequence[Term]) -> "First":
        """How `completed` adds up these terms, of which the calls are the last."""
        kinds: dict[Any, list[Term]] = {}
        for term in terms:
            place = term.layout.group, term.op, term.part.device.type
            kinds.setdefault(place, []).append(term)
        sums = []
        for (group, op, _), several in kinds.items():
            size = sum(math.prod(term.layout.shape) for term in several)
            called = size - several[-1].part.numel() if several[-1] in calls else None
            sums.append((group, op, several[0].part.device, size, called))
        return First(tuple(sums))

    def say(self, what: float) -> list[tuple[Group, float]]:
        """Take part in it, adding nothing but this; returns what all have said, group by group."""
        told = []
        for group, op, device, size, called in self.sums:
            # up to the call, its first number, and the rest of it
            sizes = (size, 0, 0) if called is None else (called, 1, size - called - 1)
            terms = [
                Term(
                    op,
                    replicated((n,), group),
                    torch.full((n,), what, dtype=SCALAR, device=device),
                    place == 1,
                )
                for place, n in enumerate(sizes)
            ]
            found = completed(terms)
            if called is not None:
                told.append((group, float(found[1])))
        return told
