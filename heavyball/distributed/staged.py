"""Steps shards through kernels, one walk at a time: sums are completed over processes in between.

Which sums are completed when follows from the recipe alone, so a process that has no kernel for a shard,
or an empty one, computes the same recipe with torch and takes part in the same collectives. Nothing is
written before the last sum is complete but values along some axes (`Recipe.is_hasty`).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heavyball import utils
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.toolchain import ToolchainError
from heavyball.compiler.frontend.graph import NotPrintableError, Value
from heavyball.compiler.passes.lower import COUNTS
from heavyball.compiler.pipeline import Printed, print_kernel
from heavyball.compiler.run.stages import Stages
from heavyball.compiler.run.table import FUNCTION, Kernel, Table, described, hyper_values
from heavyball.distributed.evaluate import Values
from heavyball.distributed.parts import Part
from heavyball.distributed.recipe import Recipe, axes_of_level, is_share
from heavyball.distributed.sums import Term
from heavyball.errors import warn
from heavyball.numerics import SCALAR, compute_dtype
from heavyball.runtime.job import Job

_COUNT = "count "  # what numbers are called that count the elements of the whole tensor


class Walks:
    """A table of shards on its way through the walks of one kernel."""

    def __init__(self, table: Table, hyper: Tensor):
        self.stages, self._hyper, self._next = Stages(table), hyper, 0

    def until(self, stage: int) -> None:
        """Run all walks up to the one behind which the sums of a stage are known."""
        while self._next < stage:
            self.stages.run(self._next, self._hyper)
            self._next += 1

    def finish(self) -> None:
        """Run the rest, which writes."""
        self.until(len(self.stages) + 1)


@dataclass(eq=False)
class Row:
    """One shard's row of a table, in place of the `Values` that torch computes."""

    recipe: Recipe
    values: Values
    walks: Walks
    row: int

    def term(self, index: int) -> Term:
        """What this process adds to a sum."""
        assert self.recipe.stages is not None
        self.walks.until(self.recipe.stages[index])
        nodes, layout = self.recipe.graph.values, self.values.layout
        value = nodes[index]
        kept, summed = (
            layout.along(axes_of_level(level, layout))
            for level in (value.level, nodes[value.args[0].index].level)
        )
        part = self.walks.stages.at(self.row, index)
        return Term(value.op, kept, part, summed.is_first)

    def take(self, index: int, total: Tensor) -> None:
        """Put a sum in its place that all processes have completed."""
        self.walks.stages.at(self.row, index).copy_(total)

    def finish(self) -> tuple[Tensor, ...]:
        """Run what is left; gives the shares of sums over all parameters."""
        self.walks.finish()
        shares = self.walks.stages.table.shares
        return () if shares is None else shares[self.row].unbind()


@dataclass(frozen=True, eq=False)
class _Made:
    """The kernel of a recipe for shards of some dtypes; without one, why."""

    printed: Printed | None
    reason: str = ""


class Staging:
    """The kernels of the recipes of one optimizer.

    mode: the option `compile`; True raises where a kernel cannot be built, "auto" warns once.
    """

    def __init__(self, mode: str | bool):
        self._mode = mode
        self._made: dict[Any, _Made] = {}
        self._kernels: dict[Any, Kernel | str] = {}

    @property
    def is_on(self) -> bool:
        """Whether kernels are wanted."""
        return self._mode is not False and utils.compile_mode is not None

    def rows(
        self,
        given: Sequence[tuple[Part, Recipe, Job, Values]],
        totals: Mapping[str, Tensor],
    ) -> list[Row | None]:
        """A row for each shard that has a kernel, in tables of one kernel each."""
        found: list[Row | None] = [None] * len(given)
        if not self.is_on:
            return found
        asked = [self._printed(part, recipe, job) for part, recipe, job, _ in given]
        fresh = {
            _source(made.printed): None
            for made in asked
            if made.printed is not None and _place(made.printed) not in self._kernels
        }
        toolchain.prepare(fresh, FUNCTION)
        tables: dict[Any, list[int]] = {}
        for number, ((_, recipe, _, _), made) in enumerate(zip(given, asked, strict=True)):
            if made.printed is not None and not isinstance(self.built(made.printed), str):
                sums = tuple(tuple(several) for _, several in recipe.before.rounds)
                tables.setdefault((_place(made.printed), sums), []).append(number)
        for (place, _), numbers in tables.items():
            kernel = self._kernels[place]
            assert isinstance(kernel, Kernel)
            several = [given[number] for number in numbers]
            for number, row in zip(numbers, _table(kernel, several, totals), strict=True):
                found[number] = row
        return found

    def kernel(self, part: Part, recipe: Recipe, job: Job) -> Kernel | str:
        """The kernel of a shard, or why it is stepped with torch's operations."""
        if self._mode is False:
            return "compile=False"
        if not self.is_on:
            return "heavyball.utils.compile_mode is None"
        made = self._printed(part, recipe, job)
        if made.printed is None:
            return made.reason
        return self.built(made.printed)

    def _printed(self, part: Part, recipe: Recipe, job: Job) -> _Made:
        reason = _unfit(part, recipe, job)
        if reason:
            return _Made(None, reason)
        dtypes = {"param": job.param.dtype, "grad": job.grad.dtype}
        dtypes |= {name: tensor.dtype for name, tensor in job.state.items()}
        random, placed = job.stream is not None, job.origin is not None
        key = recipe.like, tuple(dtypes.items()), random, placed
        if key not in self._made:
            try:
                self._made[key] = _Made(_print(recipe, job, dtypes))
            except NotPrintableError as error:
                self._made[key] = _Made(None, str(error))
        made = self._made[key]
        reason = "" if made.printed is None else _unplaced(job, made.printed)
        return _Made(None, reason) if reason else made

    def built(self, printed: Printed) -> Kernel | str:
        """The kernel, or why it could not be built."""
        place = _place(printed)
        if place not in self._kernels:
            try:
                toolchain.load(_source(printed), FUNCTION)
                self._kernels[place] = Kernel(**described(printed), run=None)
            except ToolchainError as error:
                self._kernels[place] = str(error)
                message = f"shards are stepped without a compiled kernel: {error}"
                if self._mode is True:
                    raise RuntimeError(f"compile=True, but {message}") from None
                warn(message)
        return self._kernels[place]


def _source(printed: Printed) -> str:
    return "#define ONE_WALK\n" + printed.source


def _place(printed: Printed) -> Any:
    return printed.source, printed.names


def _unfit(part: Part, recipe: Recipe, job: Job) -> str:
    """Why this shard has no kernel, whatever the chain's is."""
    if job.param.device.type != "cpu":
        return f"a kernel runs one walk at a time on the CPU alone, not on {job.param.device.type}"
    if recipe.graph.every is not None:
        return "sums over every k-th element of a tensor that is in parts"
    if not job.param.numel():
        return "this process has no elements of it"
    if part.param.grad is None:
        return "it has no gradient"
    tensors = (job.param, job.grad, *job.state.values())
    if not all(t.is_contiguous() and not t.is_neg() for t in tensors):
        return "a parameter, gradient or state that is not contiguous"
    return "" if recipe.stages is not None else "no kernels were wanted when the plan was made"


def _print(recipe: Recipe, job: Job, dtypes: Mapping[str, torch.dtype]) -> Printed:
    """A recipe's kernel, which is told counts of the whole tensor as numbers."""
    graph = recipe.graph.copy()
    for index, value in enumerate(graph.values):
        if value.op in COUNTS:
            graph.values[index] = Value("number", (f"{_COUNT}{index}",), value.level, value.kind)
    compute, program, device = compute_dtype(job.param.dtype), job.program, job.param.device
    random, placed = job.stream is not None, job.origin is not None
    return print_kernel(
        graph,
        dtypes,
        compute,
        program.holds_of,
        random,
        device,
        passing=program.passing,
        early=False,
        placed=placed,
    )


def _unplaced(job: Job, made: Printed) -> str:
    """Why a kernel cannot number the elements of a part as in the whole."""
    if not made.kernel.placed:
        return ""
    assert job.origin is not None
    origin = job.origin("param")
    steps = None if origin is None else origin.steps
    if steps is None or (made.kernel.frame is not None and steps[2]):
        return "random bits of a tensor that is cut along inner axes"
    return "random bits, and sums over every k-th element" if made.kernel.every is not None else ""


def _table(
    kernel: Kernel,
    given: Sequence[tuple[Part, Recipe, Job, Values]],
    totals: Mapping[str, Tensor],
) -> list[Row]:
    """A table of these shards, and the row of each."""
    table, groups = Table(kernel), list[Mapping[str, Any]]()
    for number, (_, _, job, values) in enumerate(given):
        if not any(job.group is group for group in groups):
            groups.append(job.group)
        place = next(i for i, group in enumerate(groups) if group is job.group)
        table.add(number, job, place, functools.partial(_address, values))
    table.finish()
    sums = {key: totals[key].item() for key in kernel.totals}
    walks = Walks(table, hyper_values(kernel, groups, sums))
    rows = {number: row for row, number in enumerate(table.members)}
    return [
        Row(recipe, values, walks, rows[number])
        for number, (_, recipe, _, values) in enumerate(given)
    ]


def _address(values: Values, name: str) -> int:
    """Where a tensor or a number is."""
    job = values.job
    if name.startswith(_COUNT):
        index = int(name.removeprefix(_COUNT))
        values.compute([index])
        known = values.known[index]
        assert known.dtype == SCALAR
        return known.data_ptr()
    if is_share(name):
        return 0  # it gets room later
    tensor = {"param": job.param, "grad": job.grad}.get(name)
    return (job.state[name] if tensor is None else tensor).data_ptr()
