"""The states that kernels for sums over all parameters store, in addition to their shares.

A program with such sums is one kernel for the shares of each, and the step. A state is written by the
first of them that knows its new value, if every tensor that the value is made of is read there in any
case. The kernels behind read it back: they neither compute it again nor read what it was made of.
"""

from collections.abc import Mapping
from typing import Any

from heavyball.compiler.frontend.graph import Graph, Ref, Value
from heavyball.compiler.passes.stages import REDUCTIONS
from heavyball.core.program import Program

READS = ("load", "pick")


def with_final_states(
    graphs: Mapping[str | None, Graph], program: Program, exact: set[str]
) -> dict[str | None, Graph]:
    """A program's graphs, each state written by the first of their kernels that can.

    graphs: by the element whose sum they are for, in their order, and by None the step, the last.
    exact: tensors that are stored without rounding.
    """
    kernels = [_Kernel(key, graph, program) for key, graph in graphs.items()]
    step = graphs[None]
    first: dict[str, int] = {}  # the kernel that writes a state before the step does
    for name, index in step.outputs.items():
        if name != "param" and step.values[index].level == step.tensors.get(name):
            able = [k for k, kernel in enumerate(kernels[:-1]) if kernel.find(step, index)]
            if able:
                first[name] = able[0]
    while True:
        made = [kernel.arranged(k, step, first) for k, kernel in enumerate(kernels)]
        wrong = set[str]().union(*(kernel.wrong(exact) for kernel in kernels))
        if not wrong:
            return dict(zip(graphs, made, strict=True))
        first = {name: k for name, k in first.items() if name not in wrong}


class _Kernel:
    """One of a program's graphs, and which of the step's values it has."""

    def __init__(self, key: str | None, graph: Graph, program: Program):
        self.graph, self.own = graph.copy(), graph.outputs
        self.reads = {v.args[0] for v in graph.values if v.op in READS}
        self.reductions = {v for v in graph.values if v.op in REDUCTIONS}
        keys = [*program.total_keys, None]
        self.totals = keys[: keys.index(key)]
        # what a number of the group is called before the sum that makes a new one
        self.names: dict[str, str | None] = {}
        rate = program.rate
        if rate is not None and rate.transform.over_all and rate.key not in self.totals:
            self.names = {**dict.fromkeys(rate.transform.numbers), **rate.transform.past}
        self.before: dict[int, str] = {}

    def find(self, step: Graph, index: int) -> Ref | None:
        """A node of the step in this graph, computed from what the kernel reads anyway; or None."""
        moved: dict[int, Ref | None] = {}
        for i in sorted(step.needed([index])):
            moved[i] = self._find(step.values[i], moved)
        return moved[index]

    def _find(self, value: Value, moved: dict[int, Ref | None]) -> Ref | None:
        args: list[Any] = [moved[a.index] if isinstance(a, Ref) else a for a in value.args]
        if value.op == "hyper":
            args[0] = self.names.get(args[0], args[0])
        unknown = value.op == "total" and args[0] not in self.totals
        unread = value.op in READS and args[0] not in self.reads
        if unknown or unread or any(a is None for a in args):
            return None
        there = Value(value.op, tuple(args), value.level, value.kind)
        if value.op in REDUCTIONS and there not in self.reductions:
            return None
        return Ref(self.graph.add(there.op, there.args, there.level, there.kind))

    def arranged(self, place: int, step: Graph, first: Mapping[str, int]) -> Graph:
        """The graph of this kernel, which is the place-th, where states are written as `first` says."""
        graph, self.before = self.graph, {}
        graph.outputs, graph.step = dict(self.own), None
        for name, k in first.items():
            there = self.find(step, step.outputs[name])
            if k < place:
                graph.outputs.pop(name, None)
                if there is not None:
                    self.before[there.index] = name
            elif k == place:
                assert there is not None
                graph.outputs[name] = there.index
                # what is rounded at random takes its bits from the step
                counted = self.find(step, step.outputs["step"])
                graph.step = None if counted is None else counted.index
        self.written = {name for name, k in first.items() if k < place}
        return graph.live(self.before)

    def wrong(self, exact: set[str]) -> set[str]:
        """What was written too early: its old value is read here, or its new one was rounded."""
        needed = self.graph.needed(self.graph.roots, self.before)
        values = [self.graph.values[i] for i in needed if i not in self.before]
        old = {v.args[0] for v in values if v.op in READS and v.args[0] in self.written}
        return old | {self.before[i] for i in needed if i in self.before} - exact
