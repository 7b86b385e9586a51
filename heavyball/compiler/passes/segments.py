"""Cuts a recorded program where it needs the whole tensor: a graph for each part between the cuts.

The program is recorded once. Where a whole transform stands, its input is an output of the segment
before, and its result an input of the segment behind; each segment is a graph like any other, with one
kernel over all tensors. What crosses a cut besides is, in this order:

- read back, if it was stored as a state without rounding;
- computed again, if that takes no sum and none of its inputs has been overwritten meanwhile;
- kept in a temporary tensor or number (`carry.<node>`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import (
    Graph,
    NotPrintableError,
    Opaque,
    Question,
    Ref,
    Value,
    trace,
)
from heavyball.compiler.passes.stages import REDUCTIONS
from heavyball.core.program import Fork, Program, WholeNode, flatten
from heavyball.runtime.execute import SHARE
from heavyball.runtime.step import compute_dtype
from heavyball.state.held import is_packed

INPUTS = ("load", "pick", "number")
FREE = ("const", "hyper", "total", "numel", "members", "slices")


@dataclass
class Told:
    """Where a whole transform finds its arguments: names of temporary tensors and numbers.

    "param" and "grad" are the parameter and the gradient themselves.
    """

    question: Question
    update: str
    context: "dict[str, str | Opaque | None]"
    step: str
    gate: str | None


@dataclass
class Segment:
    """The part between two cuts: a graph, or None if nothing is computed, and the request after it."""

    graph: Graph | None
    told: Told | None


@dataclass
class Segments:
    """A program in parts. `levels` says what each temporary tensor has a value for."""

    parts: list[Segment]
    levels: dict[str, str] = field(default_factory=dict)
    numbers: list[str] = field(default_factory=list)
    sized: bool = False


def cut(
    program: Program,
    shape: torch.Size,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
) -> Segments:
    """Record a program that has whole transforms, and cut it.

    Errors: NotPrintableError, as `record`.
    """
    check_branches(program)
    recorder, tensors = trace(program, shape, dtype, state, group)
    graph = recorder.graph
    graph.outputs = {name: recorder.find(t) for name, t in tensors.items()}
    compute = compute_dtype(dtype)
    exact = {n for n, t in state.items() if t.dtype == compute and not is_packed(state, n)}
    found = _Cutter(graph, recorder.questions, exact).segments()
    found.sized = recorder.watch.looked
    return found


def check_branches(program: Program) -> None:
    """Refuse a step that may end in one branch of a fork while the others still see the gradient."""
    for fork in program.nodes:
        if not isinstance(fork, Fork):
            continue
        for node in flatten((fork,)):
            if isinstance(node, WholeNode) and "gate" in node.transform.provides:
                name = fork.merge.key
                raise NotPrintableError(f"{node.key} may end the step in one branch of {name}")


class _Cutter:
    def __init__(self, graph: Graph, questions: list[Question], exact: set[str]):
        self.graph, self.questions = graph, questions
        self.exact = exact  # tensors that are stored without rounding
        self.last = len(questions)
        self.placed = {name: self._place(name) for name in graph.outputs}
        # the nodes to store at the end of each segment, by name
        self.roots: list[dict[str, int]] = [{} for _ in range(self.last + 1)]
        for name, place in self.placed.items():
            self.roots[place][name] = graph.outputs[name]
        self.told: list[Told] = []
        self.told_numbers: set[str] = set()
        self.reached: list[set[int]] = []

    def _place(self, name: str) -> int:
        """The segment that writes an output: that of its transform; for the parameter, the last."""
        if name == "step":
            return 0
        known = (k for k, question in enumerate(self.questions) if name in question.known)
        return self.last if name == "param" else next(known, self.last)

    def segments(self) -> Segments:
        self.told = [self._tell(k, question) for k, question in enumerate(self.questions)]
        self.reached = [set() for _ in self.roots]
        for k in range(len(self.roots)):
            for index in list(self.roots[k].values()):
                self._reach(index, k)
        graphs = [self._build(k) for k in range(len(self.roots))]
        parts = [
            Segment(graph, self.told[k] if k < self.last else None)
            for k, graph in enumerate(graphs)
        ]
        levels = {
            n: v for g in graphs if g is not None for n, v in g.tensors.items() if _is_temporary(n)
        }
        numbers = {n for k in range(len(graphs)) for n in self._numbers(graphs[k])}
        return Segments(parts, levels, sorted(numbers | self.told_numbers))

    # ---- what a whole transform is told

    def _tell(self, k: int, question: Question) -> Told:
        place = f"call.{k}"
        context: dict[str, str | Opaque | None] = {}
        for name, index in question.context.items():
            context[name] = (
                self._named(f"{place}.{name}", index, k) if isinstance(index, int) else index
            )
        gate = None
        if question.gate is not None:
            gate = self._named(f"{place}.gate", question.gate, k)
        update = self._named(f"{place}.update", question.update, k)
        return Told(question, update, context, self._named(f"{place}.step", question.step, k), gate)

    def _named(self, name: str, index: int, k: int) -> str:
        """The name under which a node is found after segment k; stored where it has none."""
        value = self.graph.values[index]
        if value.op in ("load", "number") and self._untouched(value.args[0], k + 1):
            name = value.args[0]
        elif value.level == "scalar" and self._stored(index, k + 1):
            name = self._stored(index, k + 1)  # type: ignore[assignment]
        else:
            self.roots[k][name] = index
        if value.level == "scalar" and _is_temporary(name):
            self.told_numbers.add(name)  # perhaps no kernel reads it
        return name

    # ---- what is where

    def _untouched(self, name: str, k: int) -> bool:
        """Whether an input is available and unchanged when segment k starts."""
        if name.startswith("whole."):
            return int(name.split(".")[1]) < k
        return self.placed.get(name, k) >= k

    def _stored(self, index: int, k: int) -> str | None:
        """Where a node was stored without rounding before segment k."""
        scalar = self.graph.values[index].level == "scalar"
        for j in range(k):
            for name, root in self.roots[j].items():
                if root == index and (scalar or name in self.exact or _is_temporary(name)):
                    return name
        return None

    def _cheap(self, index: int, k: int) -> bool:
        """Whether segment k can compute a node again from what it may read anyway."""
        value = self.graph.values[index]
        if value.op in INPUTS:
            return self._untouched(value.args[0], k)
        if value.op in REDUCTIONS:
            return False
        return value.op in FREE or all(
            self._stored(a.index, k) or self._cheap(a.index, k)
            for a in value.args
            if isinstance(a, Ref)
        )

    def _possible(self, index: int, k: int) -> bool:
        """Whether segment k can compute a node at all, sums included."""
        value = self.graph.values[index]
        if value.op in INPUTS:
            return self._untouched(value.args[0], k)
        return all(self._possible(a.index, k) for a in value.args if isinstance(a, Ref))

    def _before(self, index: int, k: int) -> int | None:
        """The last segment before k that computes or could compute a node."""
        done = [j for j in range(k) if index in self.reached[j]]
        could = [j for j in range(k) if self._possible(index, j)]
        return max(done or could, default=None)

    def _reach(self, index: int, k: int) -> None:
        """Walk from a node of segment k to its inputs; carry those that are not available."""
        if index in self.reached[k] or self._stored(index, k):
            return
        value = self.graph.values[index]
        if not self._cheap(index, k):
            before = self._before(index, k)
            if before is not None:
                self.roots[before][f"carry.{index}"] = index
                self._reach(index, before)
                return
        self.reached[k].add(index)
        for argument in value.args:
            if isinstance(argument, Ref):
                self._reach(argument.index, k)

    # ---- graphs

    def _build(self, k: int) -> Graph | None:
        roots = self.roots[k]
        if not roots:
            return None
        part = Graph(wide=self.graph.wide, every=self.graph.every)
        moved: dict[int, int] = {}
        for name, index in roots.items():
            made = self._copy(index, k, part, moved)
            value = part.values[made]
            if value.kind == "bool" and value.level != "scalar":
                made = part.add("to_float", (Ref(made),), value.level, "float")
            if name in self.graph.tensors:
                part.tensors[name] = self.graph.tensors[name]
            elif value.level != "scalar":
                part.tensors[name] = value.level
            part.outputs[name] = made
        if k > 0:  # what is rounded at random takes its bits from the step
            part.step = self._copy(self.graph.outputs["step"], k, part, moved)
        return part

    def _copy(self, index: int, k: int, part: Graph, moved: dict[int, int]) -> int:
        if index in moved:
            return moved[index]
        value = self.graph.values[index]
        stored = self._stored(index, k)
        if stored is not None:
            moved[index] = self._read(stored, value, part)
            return moved[index]
        if value.op in ("load", "pick"):
            part.tensors[value.args[0]] = self.graph.tensors[value.args[0]]
        args = tuple(
            Ref(self._copy(a.index, k, part, moved)) if isinstance(a, Ref) else a
            for a in value.args
        )
        moved[index] = part.add(value.op, args, value.level, value.kind)
        return moved[index]

    def _read(self, name: str, value: Value, part: Graph) -> int:
        op = "number" if value.level == "scalar" else "load"
        if op == "load":
            part.tensors[name] = self.graph.tensors.get(name, value.level)
        if value.kind == "bool":
            plain = part.add(op, (name,), value.level, "float")
            return part.add("to_bool", (Ref(plain),), value.level, "bool")
        return part.add(op, (name,), value.level, "float")

    def _numbers(self, graph: Graph | None) -> list[str]:
        """The temporary numbers that a segment reads or writes."""
        if graph is None:
            return []
        read = [v.args[0] for v in graph.values if v.op == "number"]
        written = [n for n in graph.outputs if n not in graph.tensors]
        return [n for n in (*read, *written) if _is_temporary(n)]


def _is_temporary(name: str) -> bool:
    return name.startswith(("call.", "carry.", "whole.", SHARE))
