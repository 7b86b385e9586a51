"""When each part of a graph runs: passes over the elements, with numbers per tensor between them."""

from dataclasses import dataclass, field

import torch

from heavyball.compiler.graph import Graph, NotPrintableError, Ref, Value

REDUCTIONS = ("sum", "amax")


@dataclass
class Pass:
    """One walk over the elements of a tensor."""

    scalars: list[int] = field(default_factory=list)  # numbers to compute before it, in order
    rows: list[int] = field(default_factory=list)  # then one per row,
    cols: list[int] = field(default_factory=list)  # and one per column
    loads: list[str] = field(default_factory=list)  # tensors that it reads
    reloads: dict[int, str] = field(
        default_factory=dict
    )  # nodes read back from where they were stored
    elements: list[int] = field(default_factory=list)  # nodes computed for each element, in order
    reductions: list[int] = field(default_factory=list)  # sums that it leaves behind
    stores: dict[str, int] = field(default_factory=dict)  # tensors that it writes
    vector_stores: dict[str, int] = field(default_factory=dict)  # tensors of a row or a column
    slices: list[int] = field(default_factory=list)  # nodes for every k-th element
    slice_stores: dict[str, int] = field(default_factory=dict)  # and the tensors made of them


@dataclass
class Schedule:
    """The passes over the elements, the numbers to compute after the last, and where numbers go.

    kept: values per row or column that something later reads, so they need memory of their own.
    """

    passes: list[Pass]
    final: list[int]
    numbers: dict[str, int]
    kept: list[int]


class _Planner:
    def __init__(self, graph: Graph, exact: set[str]):
        self.graph, self.exact = graph, exact
        self.sliced = 0  # the pass in which every k-th element is looked at
        self.stage = self._stages()
        outputs = graph.outputs.items()
        tensors = graph.tensors
        self.numbers = {n: i for n, i in outputs if n not in tensors}
        self.elements = {n: i for n, i in outputs if tensors.get(n) == "element"}
        self.vectors = {n: i for n, i in outputs if tensors.get(n) in ("row", "col")}

    def _stages(self) -> list[int]:
        """The first pass in which each element can be computed, or before which each number can."""
        stage: list[int] = []
        for value in self.graph.values:
            before = max((stage[a.index] for a in value.args if isinstance(a, Ref)), default=0)
            if value.level == "scalar" and value.op in REDUCTIONS and self._of_slice(value):
                before = max(before, self.sliced)
            stage.append(before + (value.op in REDUCTIONS))
        return stage

    def _of_slice(self, value: Value) -> bool:
        return self._level(value.args[0].index) == "slice"

    def _slices_can_wait(self) -> bool:
        """Whether nothing but numbers is made of what is found by looking at every k-th element."""
        found: set[int] = set()
        for i, v in enumerate(self.graph.values):
            arguments = [a.index for a in v.args if isinstance(a, Ref)]
            if v.level == "slice" or any(a in found for a in arguments):
                found.add(i)
        return all(self._level(i) in ("slice", "scalar") for i in found)

    def plan(self) -> Schedule:
        reduced = [i for i, v in enumerate(self.graph.values) if v.op in REDUCTIONS]
        slices = [i for i, v in enumerate(self.graph.values) if v.level == "slice"]
        if any(self.stage[i] for i in slices):
            raise NotPrintableError("a slice that depends on a sum over the elements")
        last = max(
            [self.stage[i] for i in [*self.elements.values(), *self.vectors.values()]]
            + [self.stage[i] - 1 for i in reduced],
            default=0,  # numbers alone
        )
        if slices and self._slices_can_wait():
            # the last pass reads the parameter and the gradient in any case
            self.sliced = last
            self.stage = self._stages()
        picked = {self.graph.values[i].args[0] for i in slices if self.graph.values[i].op == "pick"}
        # Storing a state as soon as it is known saves computing it again in a later pass. It must
        # wait if it would be rounded, or if something later needs the old one.
        early = {
            name: self.stage[i]
            for name, i in self.elements.items()
            if name in self.exact and self.stage[i] < last
        }
        while True:
            passes = [self._pass(k, last, early, reduced) for k in range(last + 1)]
            clash = {n for k, p in enumerate(passes) for n in p.loads if early.get(n, last) < k}
            clash |= {n for n in picked if early.get(n, last) < self.sliced}
            if not clash:
                break
            early = {n: k for n, k in early.items() if n not in clash}
        for k, planned in enumerate(passes):
            planned.scalars = self._scalars(k)
            planned.rows, planned.cols = self._along("row", k), self._along("col", k)
            planned.vector_stores = {n: i for n, i in self.vectors.items() if self.stage[i] == k}
        passes[self.sliced].slices = slices
        passes[self.sliced].slice_stores = {
            n: i for n, i in self.graph.outputs.items() if self.graph.tensors.get(n) == "slice"
        }
        after = [i for k in range(last + 1, max(self.stage) + 1) for i in self._scalars(k)]
        return Schedule(passes, after, self.numbers, self._kept())

    def _along(self, level: str, k: int) -> list[int]:
        """The values per row or column to compute in stage k; sums over elements are there already."""
        return [
            i
            for i, v in enumerate(self.graph.values)
            if v.level == level and self.stage[i] == k and v.op not in REDUCTIONS
        ]

    def _kept(self) -> list[int]:
        values = self.graph.values
        kept = {i for i, v in enumerate(values) if v.level in ("row", "col") and v.op in REDUCTIONS}
        for i, v in enumerate(values):
            for a in v.args:
                if isinstance(a, Ref) and values[a.index].level in ("row", "col"):
                    later = v.level == "element" or self.stage[i] > self.stage[a.index]
                    if later and v.op not in REDUCTIONS:
                        kept.add(a.index)
        return sorted(
            kept | {i for i in self.elements.values() if values[i].level in ("row", "col")}
        )

    def _scalars(self, k: int) -> list[int]:
        return [
            i
            for i, v in enumerate(self.graph.values)
            if v.level == "scalar" and self.stage[i] == k and v.op not in REDUCTIONS
        ]

    def _pass(self, k: int, last: int, early: dict[str, int], reduced: list[int]) -> Pass:
        result = Pass(
            reductions=[i for i in reduced if self.stage[i] - 1 == k],
            stores={n: i for n, i in self.elements.items() if early.get(n, last) == k},
        )
        stored = {self.elements[n]: n for n, when in early.items() if when < k}
        roots = [*result.stores.values()]
        roots += [a for i in result.reductions if self._level(a := self._source(i)) == "element"]
        self._visit(roots, stored, result)
        return result

    def _source(self, reduction: int) -> int:
        return self.graph.values[reduction].args[0].index

    def _level(self, index: int) -> str:
        return self.graph.values[index].level

    def _visit(self, roots: list[int], stored: dict[int, str], result: Pass) -> None:
        seen: set[int] = set()

        def visit(index: int) -> None:
            value = self.graph.values[index]
            if index in seen or value.level != "element":
                return
            seen.add(index)
            if index in stored:
                result.reloads[index] = stored[index]
                return
            for argument in value.args:
                if isinstance(argument, Ref):
                    visit(argument.index)
            if value.op == "load":
                result.loads.append(value.args[0])
            result.elements.append(index)

        for root in roots:
            visit(root)
        result.elements.sort()


def schedule(graph: Graph, dtypes: dict[str, torch.dtype], compute: torch.dtype) -> Schedule:
    """Assign every node of a graph to a pass.

    dtypes: what each tensor is stored as; one that differs from `compute` is rounded when stored.
    """
    return _Planner(graph, {n for n, d in dtypes.items() if d == compute}).plan()
