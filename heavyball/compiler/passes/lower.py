"""Turns a graph and its schedule into the loop form."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from heavyball.compiler.frontend.graph import Graph, Ref, Value
from heavyball.compiler.frontend.ops import NotPrintableError, expression
from heavyball.compiler.frontend.symbols import Const, Expr, Input, Var, variables
from heavyball.compiler.passes.axes import Frame, View, is_along
from heavyball.compiler.passes.loops import (
    Column,
    Fold,
    Keep,
    Kernel,
    Let,
    Load,
    Loop,
    Read,
    Reduce,
    Save,
    Statement,
    Store,
    Walk,
    expressions,
)
from heavyball.compiler.passes.stages import Pass, Schedule, summed
from heavyball.state.held import COMPANIONS, CORRECTION, SCALE, SIGNS, is_companion, word_of

BOUNDED = ("clamp_min", "clamp_max")
COUNTS = ("numel", "slices", "members")
INPUTS = ("number", "hyper", "total", *COUNTS)
READS = ("load", "pick")


def lower(
    graph: Graph,
    plan: Schedule,
    dtypes: Mapping[str, torch.dtype],
    compute: torch.dtype,
    random: bool = False,
    roots: frozenset[str] = frozenset(),
    late: bool = True,
    squares: frozenset[str] = frozenset(),
    view: View | None = None,
    passing: frozenset[str] = frozenset(),
    placed: bool = False,
) -> Kernel:
    """The loop form of a graph.

    dtypes: of all tensors and their companions. compute: of the elements. random: whether bfloat16 and
    codes are rounded stochastically. roots: tensors that hold the roots of their values. late: whether
    the loop over all elements runs ahead of that over every k-th. squares: tensors of values
    that are never negative. view: the axes of the graph, where they are not the parameter's.
    passing: states of which nothing is made, in any step. placed: whether tensors are parts of others,
    see `Kernel`.

    Errors: NotPrintableError for a tensor or an operation that no printer knows.
    """
    made = _Lowering(graph, plan, dtypes, compute, random, roots, late, squares, passing).kernel()
    return replace(made, view=view, placed=placed and made.counted is not None)


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        plan: Schedule,
        dtypes: Mapping[str, torch.dtype],
        compute: torch.dtype,
        random: bool,
        roots: frozenset[str],
        late: bool,
        squares: frozenset[str],
        passing: frozenset[str],
    ):
        self.graph, self.plan, self.dtypes, self.compute = graph, plan, dtypes, compute
        self.random, self.roots, self.late, self.squares = random, roots, late, squares
        self.values = graph.values
        lasting = [i for name, i in graph.outputs.items() if name not in passing]
        self.lasting = graph.needed(lasting, {})
        self.bounds: dict[Const, int] = {}  # the places of constants among the numbers
        self.frame = None if graph.starts is None else Frame(graph.starts, graph.levels)
        self.columns = self._columns()

    def kernel(self) -> Kernel:
        numbers = {v.args[0] for v in self.values if v.op == "number"} | set(self.plan.numbers)
        used = {v.args: None for v in self.values if v.op == "hyper"}
        totals = {v.args[0]: None for v in self.values if v.op == "total"}
        walks = [self._walk(planned) for planned in self.plan.passes]
        for bound, place in self.bounds.items():
            walks[0].numbers.append(Let(Var(place, torch.float64, "scalar"), bound))
        random = any(loop.random for w in walks for loop in self._loops(w))
        return Kernel(
            compute=self.compute,
            tensors=list(self.columns.values()),
            numbers=sorted(numbers),
            hypers=list(used),
            totals=list(totals),
            walks=walks,
            final=[self._number(i) for i in self.plan.final],
            written={name: self.number(i) for name, i in self.plan.numbers.items()},
            kept=[self.var(i) for i in self.plan.kept],
            slots=len(self.values) + len(self.bounds),
            counted=self.number(self.graph.counted) if random else None,
            frame=self.frame,
            every=self.graph.every,
        )

    @staticmethod
    def _loops(walk: Walk) -> list[Loop]:
        return [*walk.loops, *(a for a in walk.arrays if isinstance(a, Loop))]

    # ---- tensors

    def _columns(self) -> dict[str, Column]:
        names = {v.args[0] for v in self.values if v.op in READS}
        names |= {n for n in self.graph.outputs if n not in self.plan.numbers}
        names = {n + part for n in names for part in ("", *COMPANIONS) if n + part in self.dtypes}
        numbers = {name: number for number, name in enumerate(sorted(names))}
        found = {}
        for name, number in numbers.items():
            dtype, scale = self.dtypes[name], name + SCALE in self.dtypes
            if not (dtype.is_floating_point or is_companion(name) or scale):
                raise NotPrintableError(f"a tensor of {dtype}, {name}")
            correction, kept_scale = (
                Column(name + part, numbers[name + part], self.dtypes[name + part])
                if name + part in numbers
                else None
                for part in (CORRECTION, SCALE)
            )
            word = word_of(name) if self._is_random(name) else None
            signed = name not in self.squares
            found[name] = Column(
                *(name, number, dtype, correction, kept_scale, name in self.roots, word, signed),
                is_bits=name.endswith(SIGNS),
            )
        return found

    def _is_random(self, name: str) -> bool:
        """Whether a tensor is rounded stochastically when it is written."""
        corrected, coded = (name + part in self.dtypes for part in (CORRECTION, SCALE))
        narrow = self.dtypes[name] == torch.bfloat16 and not corrected
        return self.random and (narrow or coded)

    # ---- values

    def var(self, i: int, dtype: torch.dtype | None = None) -> Var:
        value = self.values[i]
        kind = torch.bool if value.kind == "bool" else dtype or self.compute
        return Var(i, kind, value.level)

    def number(self, i: int) -> Var:
        """A number per tensor among its like, which are float64."""
        return self.var(i, torch.float64)

    def _expression(self, v: Value, dtype: torch.dtype) -> Expr:
        arguments = [self.var(a.index, dtype) if isinstance(a, Ref) else a for a in v.args]
        return expression(v.op, arguments, dtype, v.kind)

    def _clamped(self, v: Value) -> Expr | None:
        """A clamp of elements at a constant as one at a number, in a kernel of the host.

        A bound that the compiler of C++ knows becomes branches, of which a loop takes every one; one
        that it does not know is one instruction.
        """
        if (
            not self.late
            or v.op not in BOUNDED
            or v.level != "element"
            or isinstance(v.args[1], Ref)
        ):
            return None
        constant = Const(float(v.args[1]), torch.float64)
        if not abs(constant.value) > 0:  # zeros of both signs are equal, and NaN to nothing
            return None
        place = self.bounds.setdefault(constant, len(self.values) + len(self.bounds))
        value, bound = self.var(v.args[0].index), Var(place, self.compute, "scalar")
        beyond = value < bound if v.op == "clamp_min" else bound < value
        return torch.where(beyond, bound, value)  # type: ignore[call-overload]

    def _number(self, i: int) -> Let:
        v, var = self.values[i], self.number(i)
        if v.op in INPUTS:
            return Let(var, Input(v.op, v.args, var.type))
        if v.op == "const":
            return Let(var, Const(v.args[0], var.type))
        return Let(var, self._expression(v, torch.float64))

    # ---- loops

    def _walk(self, planned: Pass) -> Walk:
        slices = self._slices(planned)
        elements = self._elements(planned)
        left = [i for i in planned.reductions if self._source_level(i) in ("element", "slice")]
        sums = {s.var.index: s for loop in (slices, elements) if loop for s in loop.sums}
        arrays: list[Loop | Fold] = []
        for level in self.frame.levels if self.frame else ():
            arrays += self._along(planned, level)
        return Walk(
            [self._number(i) for i in planned.scalars],
            arrays,
            slices,
            elements,
            [sums[i] for i in left],
            self.late,
        )

    def _source_level(self, reduction: int) -> str:
        return self.values[self.values[reduction].args[0].index].level

    def _reduce(self, i: int) -> Reduce:
        v, source = self.values[i], self.values[i].args[0].index
        added, var = self.values[source], self.number(i)
        if v.op == "amax":
            return Reduce(var, "max", self.var(source))
        if added.op == "to_float":
            return Reduce(var, "count", self.var(added.args[0].index))
        wide = self.var(summed(self.graph, i)).to(torch.float64)
        # squared in float64, or the sum could overflow where the elements do not
        squared = summed(self.graph, i) != source
        made = wide * wide if squared else wide
        return Reduce(var, "add", made, is_mean=v.op == "mean", passing=i not in self.lasting)

    def _let(self, i: int) -> Statement:
        v = self.values[i]
        if v.op in READS:
            step = self.graph.every if v.op == "pick" else 1
            return Load(self.var(i), self.columns[v.args[0]], step or 1)
        return Let(self.var(i), self._clamped(v) or self._expression(v, self.compute))

    def _store(self, name: str, i: int) -> Store:
        value: Expr = self.var(i)
        is_bits = self.columns[name].is_bits
        return Store(self.columns[name], value if is_bits else value.to(self.compute))

    def _read(self, body: list[Statement], level: str) -> list[Statement]:
        """A body with the values of other levels that it reads from their arrays."""
        made = {s.var for s in body if isinstance(s, Load | Let)}
        used = {v for e in expressions(body) for v in variables(e)}
        found = (v for v in used - made if is_along(v.level))
        return [*(Read(v) for v in sorted(found, key=lambda v: v.index)), *body]

    def _elements(self, planned: Pass) -> Loop:
        columns = self.columns
        body: list[Statement] = [
            Load(self.var(i), columns[name]) for i, name in planned.reloads.items()
        ]
        body += [self._let(i) for i in planned.elements]
        of_elements = [i for i in planned.reductions if self._source_level(i) == "element"]
        body += [self._reduce(i) for i in of_elements]
        body += [Save(columns[name]) for name in self._saved(planned)]
        body += [self._store(name, i) for name, i in planned.stores.items()]
        return Loop("element", self._read(body, "element"))

    def _saved(self, planned: Pass) -> list[str]:
        """The tensors that the loop over all elements overwrites before every k-th is looked at."""
        picked = {self.values[i].args[0] for i in planned.slices if self.values[i].op == "pick"}
        return sorted(picked & planned.stores.keys()) if self.late else []

    def _slices(self, planned: Pass) -> Loop | None:
        if not planned.slices:
            return None
        saved = self._saved(planned)
        body: list[Statement] = []
        for i in planned.slices:
            s = self._let(i)
            if isinstance(s, Load) and s.step > 1 and s.column.name in saved:
                s = Load(s.var, s.column, s.step, old=True)
            body.append(s)
        of_slice = [i for i in planned.reductions if self._source_level(i) == "slice"]
        body += [self._reduce(i) for i in of_slice]
        body += [self._store(name, i) for name, i in planned.slice_stores.items()]
        return Loop("slice", body)

    def _along(self, planned: Pass, level: str) -> list[Loop | Fold]:
        """The loop over the values of a level, and the sums of them that leave some of their axes."""
        tensors = self.graph.tensors
        of_level = [i for i in planned.reductions if self._source_level(i) == level]
        sums = [i for i in of_level if self.values[i].level == "scalar"]
        body: list[Statement] = []
        for i in planned.vectors:
            if self.values[i].level == level:
                body.append(self._let(i))
                body += [Keep(self.var(i))] if i in self.plan.kept else []
        body += [self._reduce(i) for i in sums]
        stores = {n: i for n, i in planned.vector_stores.items() if tensors[n] == level}
        body += [self._store(name, i) for name, i in stores.items()]
        found: list[Loop | Fold] = [Loop(level, self._read(body, level))] if body else []
        for i in of_level:
            if i not in sums:
                base = summed(self.graph, i)
                squared = base != self.values[i].args[0].index
                found.append(Fold(self.var(i), self.var(base), squared))
        return found
