"""What processes tell each other at the beginning of a step: their plans, errors, and gradients.

Plans are compared once, when they are made. After that the first sums of a step carry a number for each
parameter, and one for everything else, so a step has no exchange more for it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from heavyball.distributed.agreement import Entry, compare
from heavyball.distributed.attempts import Attempts
from heavyball.distributed.parts import Part, devices_of
from heavyball.distributed.runs import Run
from heavyball.distributed.shard import ALONE, Group, replicated
from heavyball.distributed.sums import ERROR, Term, completed
from heavyball.numerics import SCALAR

# What a process adds to the first number of a roll call: that it has other parameters now, that it
# cannot make this step (ERROR), or that it could not end a step that others have made.
CHANGED, LOST = 1.0, 2.0**40
PLAN = (
    "step: another process has refused a parameter or its gradient, see its error; nothing has been "
    "changed",
    "the processes of a group of {size} have different numbers of parameters there, here {here}: build "
    "the optimizer alike on all of them",
    "would be stepped otherwise on another process: its shape, dtype, placements, transforms, or "
    "whether it has a gradient differ; nothing has been changed",
)
LOST_THERE = (
    "step: another process could not end a step, see its error, and this one has: parameters and state "
    "are those of no step any more; load a state dict of before"
)
LOST_HERE = (
    "step: this process could not end a step that others have made: parameters and state are those of "
    "no step any more; load a state dict of before"
)


class ChangedError(Exception):
    """This process has other parameters than in the step before."""


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

    The numbers ride with the first sums of a step: nothing has been changed before they are known. A
    process that cannot make the step says so there, too; one that fails later takes part in the rest
    of it, see `Attempts`, and says so in its next step.

    stages: the processes with other parameters that sums are added up over. has_loss: whether the
    processes that share a parameter share their losses. error: why this process cannot make the step.
    says: what others hear of it.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        stages: Group = ALONE,
        has_loss: bool = False,
        error: Exception | None = None,
        says: float = ERROR,
    ):
        groups = {p.layout.group: None for p in parts if p.mode != "local"}
        self._members = {
            group: [p for p in parts if p.layout.group is group]
            for group in groups
            if group.size > 1
        }
        self._asked = {p for members in self._members.values() for p in members}
        self.parts, self._stages, self._says = parts, stages, says
        self._open = bool(self._members)
        self.is_alone = not (self._members or has_loss or stages is not ALONE)
        self.attempts = Attempts(self.is_alone, error)
        self.writes = False  # whether parameters have been written, here or elsewhere
        self.went_on = False  # whether others have made a step that this process could not end
        self.absent: set[Part] = set()
        self.waiting: list[Run] = []  # for whether another process has a gradient

    def is_candidate(self, part: Part) -> bool:
        """Whether a parameter takes part in this step, as far as is known here."""
        return part.param.grad is not None or (part in self._asked and part.trains)

    def complete(self, terms: Sequence[Term]) -> list[Tensor]:
        """Sums over processes, `completed`; the first ones carry who has gradients.

        Errors: ValueError on every process if one cannot make the step, or only some have a gradient.
        """
        if not self._open:
            return completed(terms)
        self._open = False
        found = completed([*terms, *map(self._call, self._members)])
        counts = [row.tolist() for row in found[len(terms) :]]
        self._hear(lambda: self._read(counts), self._reaches_all)
        for run in self.waiting:
            run.absent = run.part in self.absent
        return found[: len(terms)]

    def told(self, terms: Sequence[Term], group: Group, device: torch.device) -> list[Tensor]:
        """Sums that come first in a step; the same where gradients are nobody else's affair.

        Errors: ValueError on every process of the group if one cannot make the step.
        """
        if self._open:
            return self.complete(terms)
        own = torch.full((1,), self._own, dtype=SCALAR, device=device)
        *found, count = completed([*terms, Term("sum", replicated((1,), group), own, True)])
        said = float(count)
        self._hear(lambda: self._refuse(said, group), self._stages is ALONE)
        return found

    def finish(self) -> None:
        """Find out, if no sum has carried it yet."""
        if self._open:
            self.complete(())

    def hear_of_stages(self, error: ValueError) -> None:
        """A stage has said that it could not come up to a sum over all of them."""

        def refuse() -> None:
            raise self.attempts.error or error

        self._hear(refuse, not (self._members or self.writes))

    def end(self) -> None:
        """The step has ended, for the others.

        Errors: what has been raised here.
        """
        if self.attempts.error is not None:
            self.went_on = True
            raise self.attempts.error

    # ---- what is said

    @property
    def _own(self) -> float:
        return 0.0 if self.attempts.error is None else self._says

    def _call(self, group: Group) -> Term:
        parts = self._members[group]
        here = [self._own, *(float(p.param.grad is not None) for p in parts)]
        part = torch.tensor(here, dtype=SCALAR, device=parts[0].here.device)
        return Term("sum", replicated((len(here),), group), part, True)

    def _hear(self, read: Callable[[], None], by_all: bool) -> None:
        """Take what others have said. An error waits for the end of the step unless all know of it."""
        try:
            read()
        except Exception as error:
            if by_all:
                raise
            self.attempts.error = error

    def _read(self, counts: Sequence[Sequence[float]]) -> None:
        for (group, parts), (said, *having) in zip(self._members.items(), counts, strict=True):
            self._refuse(said, group)
            for part, count in zip(parts, having, strict=True):
                refuse_some(part, count)
                if not count:
                    self.absent.add(part)

    def _refuse(self, said: float, group: Group) -> None:
        """Refuse a step that a process of a group cannot make.

        Errors: that of this process, ValueError on the others.
        """
        own = self.attempts.error
        if own is not None and (self._says != CHANGED or said == CHANGED * group.size):
            raise own
        if said >= LOST:
            raise ValueError(LOST_THERE)
        if said >= ERROR:
            raise ValueError(PLAN[0])
        if said:
            raise ValueError(
                "step: the parameters in the groups, or which of them require a gradient, have changed "
                f"on {round(said)} of the processes that share a group: change them alike on all of them"
            )

    @property
    def _reaches_all(self) -> bool:
        """Whether all that wait for this process in the step hear what it says here."""
        ranks = [set(dist.get_process_group_ranks(group.handle)) for group in self._members]
        return self._stages is ALONE and any(all(r <= most for r in ranks) for most in ranks)


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
