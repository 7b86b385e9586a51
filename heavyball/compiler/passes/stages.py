"""When each part of a graph runs: passes over the elements, with numbers per tensor between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from heavyball.compiler.frontend.graph import Graph, NotPrintableError, Ref, Value
from heavyball.compiler.passes.axes import is_along

REDUCTIONS = ("sum", "mean", "amax")


@dataclass
class Pass:
    """One walk over the elements of a tensor."""

    scalars: list[int] = field(default_factory=list)  # numbers to compute before it, in order
    vectors: list[int] = field(default_factory=list)  # then values along some of the axes
    loads: list[str] = field(default_factory=list)  # tensors that it reads
    reloads: dict[int, str] = field(
        default_factory=dict
    )  # nodes read back from where they were stored
    elements: list[int] = field(default_factory=list)  # nodes computed for each element, in order
    reductions: list[int] = field(default_factory=list)  # sums that it leaves behind
    stores: dict[str, int] = field(default_factory=dict)  # tensors that it writes
    vector_stores: dict[str, int] = field(default_factory=dict)  # tensors along some axes
    slices: list[int] = field(default_factory=list)  # nodes for every k-th element
    slice_stores: dict[str, int] = field(default_factory=dict)  # and the tensors made of them


@dataclass
class Schedule:
    """The passes over the elements, the numbers to compute after the last, and where numbers go.

    kept: values along some of the axes that something later reads, so they need memory of their own.
    """

    passes: list[Pass]
    final: list[int]
    numbers: dict[str, int]
    kept: list[int]


class _Planner:
    def __init__(self, graph: Graph, exact: set[str], slices_wait: bool, early: bool):
        self.graph, self.exact, self.slices_wait, self.early = graph, exact, slices_wait, early
        self.sliced = 0  # the pass in which every k-th element is looked at
        self.stage = self._stages()
        outputs = graph.outputs.items()
        tensors = graph.tensors
        self.numbers = {n: i for n, i in outputs if n not in tensors}
        self.elements = {n: i for n, i in outputs if tensors.get(n) == "element"}
        self.vectors = {n: i for n, i in outputs if is_along(tensors.get(n, ""))}

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
        """Whether only scalars depend on the slice of every k-th element."""
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
        # the last walk over the elements; what belongs to some of the axes may come behind it
        of_elements = [i for i in reduced if self._level(self._source(i)) in ("element", "slice")]
        last = max(
            [self.stage[i] for i in self.elements.values()]
            + [self.stage[i] - 1 for i in of_elements],
            default=0,  # numbers alone
        )
        if slices and self.slices_wait and self._slices_can_wait():
            # the last pass reads the parameter and the gradient in any case
            self.sliced = last
            self.stage = self._stages()
        end = max(
            [self.stage[i] for i in self.vectors.values()] + [self.stage[i] - 1 for i in reduced],
            default=0,
        )
        end = max(end, last)
        last = last if self.early else end
        picked = {self.graph.values[i].args[0] for i in slices if self.graph.values[i].op == "pick"}
        # Storing a state as soon as it is known saves computing it again in a later pass. It must
        # wait if it would be rounded, or if something later needs the old one.
        early = {
            name: self.stage[i]
            for name, i in self.elements.items()
            if name in self.exact and self.stage[i] < last
        }
        while True:
            passes = [self._pass(k, last, early, reduced) for k in range(end + 1)]
            clash = {n for k, p in enumerate(passes) for n in p.loads if early.get(n, last) < k}
            clash |= {n for n in picked if early.get(n, last) < self.sliced}
            if not clash:
                break
            early = {n: k for n, k in early.items() if n not in clash}
        for k, planned in enumerate(passes):
            planned.scalars = self._scalars(k)
            planned.vectors = self._vectors(k)
            planned.vector_stores = {n: i for n, i in self.vectors.items() if self.stage[i] == k}
        passes[self.sliced].slices = slices
        passes[self.sliced].slice_stores = {
            n: i for n, i in self.graph.outputs.items() if self.graph.tensors.get(n) == "slice"
        }
        after = [i for k in range(end + 1, max(self.stage) + 1) for i in self._scalars(k)]
        return Schedule(passes, after, self.numbers, self._kept())

    def _vectors(self, k: int) -> list[int]:
        """The values along some axes to compute in stage k; sums over elements are there already."""
        return [
            i
            for i, v in enumerate(self.graph.values)
            if is_along(v.level) and self.stage[i] == k and v.op not in REDUCTIONS
        ]

    def _kept(self) -> list[int]:
        values, kept = self.graph.values, set[int]()
        for i, v in enumerate(values):
            reduced = v.op in REDUCTIONS
            if is_along(v.level) and reduced:
                kept.add(i)
                if is_along(self._level(added := summed(self.graph, i))):
                    kept.add(added)
            for a in v.args if not reduced else ():
                # in the same stage and at the same level it is still at hand
                if isinstance(a, Ref) and (self.stage[i], v.level) != (
                    self.stage[a.index],
                    self._level(a.index),
                ):
                    kept.add(a.index)
        for name, i in {**self.elements, **self.vectors}.items():
            if self._level(i) != self.graph.tensors[name]:
                kept.add(i)
        return sorted(i for i in kept if is_along(self._level(i)))

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


def summed(graph: Graph, reduction: int) -> int:
    """The node that a sum adds up: of a square what is squared, to be squared in float64."""
    source = graph.values[reduction].args[0].index
    value = graph.values[source]
    if value.op == "square" and graph.values[value.args[0].index].level == value.level:
        return value.args[0].index
    return source


def schedule(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    compute: torch.dtype,
    slices_wait: bool = True,
    early: bool = True,
) -> Schedule:
    """Assign every node of a graph to a pass.

    dtypes: what each tensor is stored as; one that differs from `compute` is rounded when stored.
    slices_wait: whether every k-th element may be looked at in the last pass, not in the first.
    early: whether elements are written before the last sums are complete that they do not need.
    """
    exact = {n for n, d in dtypes.items() if d == compute}
    return _Planner(graph, exact, slices_wait, early).plan()
