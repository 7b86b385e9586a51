"""One parameter's way through a step, and the sums of many that are completed together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Opaque
from heavyball.distributed.attempts import Attempts
from heavyball.distributed.evaluate import Values
from heavyball.distributed.parts import Part
from heavyball.distributed.recipe import Phase, Recipe, axes_of_level
from heavyball.distributed.shard import Layout, replicated
from heavyball.distributed.staged import Row, Staging
from heavyball.distributed.sums import Term, nothing
from heavyball.numerics import SCALAR, compute_dtype
from heavyball.runtime.job import Call, Job

Shares = tuple[Tensor, ...]
# Completes sums over the processes.
Completes = Callable[[Sequence[Term]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Owned:
    """What the owner of a parameter has in a step."""

    values: Values
    job: Job


@dataclass(eq=False)
class Run:
    """One parameter's way through a step, or through the shares of a sum over all parameters.

    What goes where follows from the part and its recipe; only what is computed needs the job and the
    values, which a process lacks that has failed before it had them.
    """

    part: Part
    share: str | None = None  # the element whose share is wanted
    fresh: bool = False  # whether the parameter had no state before this step
    absent: bool = False  # whether no process has a gradient of it, so that nothing is written
    job: Job = field(init=False)
    values: Values = field(init=False)
    owned: Owned | None = None
    answered: int = 0
    ended: bool = False
    opaque: dict[Opaque, Any] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Call] = field(default_factory=list)
    shares: Shares | None = None
    row: Row | None = None  # where a kernel computes what `values` would

    def prepare(self, job: Job, totals: Mapping[str, Tensor]) -> None:
        """Take what is computed with."""
        recipe = None if self.part.mode == "entire" else self.recipe
        self.job, self.values = job, Values(recipe, job, self.part.layout, totals)

    @property
    def recipe(self) -> Recipe:
        """What is computed where."""
        recipe = self.part.step if self.share is None else self.part.shares[self.share]
        assert recipe is not None
        return recipe

    @property
    def whole(self) -> Values:
        """The values that this process computes as the owner."""
        assert self.owned is not None
        return self.owned.values

    @property
    def call(self) -> Job:
        """The parameter as whole transforms see it."""
        assert self.owned is not None
        return self.owned.job

    def dtype(self, index: int) -> torch.dtype:
        """In which a value travels."""
        if self.recipe.graph.values[index].kind == "bool":
            return torch.bool
        return self.part.rounded.get(index, compute_dtype(self.part.here.dtype))

    # ---- sums

    def terms(self, order: Iterable[int], sums: Iterable[int]) -> list[Term]:
        """What this process adds to sums, for which the others of a round are computed first."""
        if self.row is not None:
            return [self.row.term(index) for index in sums]
        self.values.compute(order)
        return [self.values.term(index) for index in sums]

    def no_terms(self, sums: Iterable[int]) -> list[Term]:
        """The same of a process that adds nothing."""
        nodes, layout, device = self.recipe.graph.values, self.part.layout, self.part.here.device
        levels = [(nodes[index].op, axes_of_level(nodes[index].level, layout)) for index in sums]
        return [nothing(op, layout.along(axes), device) for op, axes in levels]

    def take(self, sums: Iterable[int], totals: Iterable[Tensor]) -> None:
        """Take sums that all processes have completed."""
        worker = self.values if self.row is None else self.row
        for index, total in zip(sums, totals, strict=True):
            worker.take(index, total)


def give_rows(staging: Staging, runs: Sequence[Run], totals: Mapping[str, Tensor]) -> None:
    """Let kernels compute what they can of these."""
    given = [(run.part, run.recipe, run.job, run.values) for run in runs]
    for run, row in zip(runs, staging.rows(given, totals), strict=True):
        run.row = row


def advance(runs: Sequence[tuple[Run, Phase]], complete: Completes, attempts: Attempts) -> None:
    """Go through the rounds of a phase, all parameters together."""
    for k in range(max((len(phase.rounds) for _, phase in runs), default=0)):
        several = [(run, *phase.rounds[k]) for run, phase in runs if k < len(phase.rounds)]
        terms: list[Term] = []
        for run, order, sums in several:
            found = attempts(run.terms, order, sums)
            terms += run.no_terms(sums) if found is None else found
        totals = complete(terms)
        for run, _, sums in several:
            attempts(run.take, sums, totals[: len(sums)])
            del totals[: len(sums)]


def numbers(
    found: Sequence[tuple[Layout, bool, Sequence[float | Tensor]]], device: torch.device
) -> list[Term]:
    """Terms that give every process of a group what one of them knows; a device is not waited for."""

    def placed(values: Sequence[float | Tensor]) -> Tensor:
        return torch.stack([as_number(value, device).to(device, SCALAR) for value in values])

    return [
        Term("sum", replicated((len(values),), layout.group), placed(values), adds)
        for layout, adds, values in found
    ]


def as_number(value: Any, device: torch.device) -> Tensor:
    """A number of a parameter as a tensor."""
    if isinstance(value, Tensor):
        return value.reshape(())
    if isinstance(value, bool):
        return torch.tensor(value, device=device)
    return torch.full((), float(value), dtype=SCALAR, device=device)
