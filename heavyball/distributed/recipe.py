"""What of a recorded program is computed where: on the shards, or by whoever owns the parameter.

A program is recorded once, for the whole shape. Whole transforms are answered by the owner, and what
lies between two of them is computed there too, on whole tensors. So the state of that, such as Adam's
moments in SOAP's basis, is the owner's. Everything else is computed on the shards, where sums over
elements are completed over the processes, in rounds.
"""

import copy
import functools
import weakref
from collections.abc import Iterable, Mapping
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
    whole_keys,
)
from heavyball.compiler.passes.algebra import simplified
from heavyball.compiler.passes.axes import is_along
from heavyball.compiler.passes.segments import check_branches
from heavyball.compiler.passes.stages import REDUCTIONS
from heavyball.core.program import Program
from heavyball.distributed.recordings import Recording, recorded
from heavyball.distributed.shard import Layout
from heavyball.runtime.execute import SHARE, rotating
from heavyball.runtime.state import packed_shape
from heavyball.state.held import main_of


@dataclass(eq=False)
class Phase:
    """Values to compute in order: for each round those that its sums need, and then the others."""

    rounds: list[tuple[list[int], list[int]]]
    rest: list[int]


@dataclass(eq=False)
class Recipe:
    """A program for tensors of one shape in one layout.

    outputs: the node of each tensor that is written. until: at how many answers each of them is known.
    owned: the keys of the state that only the owner has. there, back: values for each element that
    travel to the owner and back; numbers: those that every process needs of what the owner computes.
    only: the question that alone needs a value of `there`, as its update, or that a value of `back` is
    the answer to. stages: after how many walks of a kernel each sum is known; None of a recipe that
    torch computes. like: what those have in common that differ in their shapes alone.
    """

    graph: Graph
    questions: list[Question]
    outputs: dict[str, int]
    until: dict[str, int]
    owned: frozenset[str]
    layout: Layout
    before: Phase = field(init=False)
    behind: Phase = field(init=False)
    at_owner: list[list[int]] = field(default_factory=list)
    there: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    only: dict[int, int] = field(default_factory=dict)
    stages: dict[int, int] | None = None
    like: object = field(default_factory=object, repr=False)
    # the values on shards for which a node is the last to need them, and those that are only sent
    frees: dict[int, tuple[int, ...]] = field(default_factory=dict)
    spent: list[int] = field(default_factory=list)

    def owns(self, key: str) -> bool:
        """Whether a state is at the owner only."""
        return main_of(key) in self.owned

    def rounded(self, dtype: torch.dtype, device: torch.device) -> dict[int, torch.dtype]:
        """The dtypes of fewer bits in which values travel without a loss, instead of `dtype`."""
        found = {}
        for index, k in self.only.items():
            transform = self.questions[k].node.transform
            if transform.rounds is not None:
                given = torch.Size(self.layout.shape), transform.options, dtype, device
                narrow = transform.rounds(*given)[index in self.back]
                if narrow is not None:
                    found[index] = narrow
        return found

    @functools.cached_property
    def may_end(self) -> bool:
        """Whether a step may end before its last question, which only the owner finds out."""
        return any(
            q.gate is not None or "gate" in q.node.transform.provides for q in self.questions
        )

    @functools.cached_property
    def is_hasty(self) -> bool:
        """Whether a kernel writes something before the first sum over processes is complete.

        It writes elements in its last walk, and values along some axes where they are known.
        """
        stages = self.stages
        if not self.before.rounds or not stages:
            return False
        first, written = stages[self.before.rounds[0][1][0]], []
        for name, index in self.outputs.items():
            needed = self.graph.needed([index]) & stages.keys()
            if name in self.graph.tensors:
                known = max((stages[i] for i in needed), default=0)
                written.append((self.graph.tensors[name], known))
        last = max(stages.values()) - 1
        last = max([last, *(known for _, known in written)])
        return any((known if is_along(level) else last) < first for level, known in written)

    @property
    def is_plain(self) -> bool:
        """Whether each element is computed from those at its place and from numbers of the parameter."""
        free = {v.op for v in self.graph.values}.isdisjoint(_SIZED)
        return free and not self.questions and self.graph.levels <= {"element", "scalar"}


_SIZED = {*REDUCTIONS, "numel", "members", "slices", "pick"}
# Nodes that any process can compute by itself.
_FREE = {"const", "hyper", "total", "numel", "members", "slices"}


def recipe(
    program: Program,
    layout: Layout,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    share: str | None = None,
) -> Recipe:
    """Record a program for the whole of a tensor, and say what is computed where.

    state: that of the whole tensor; its values do not matter. share: the element whose share of a sum
        over all parameters is wanted instead of a step.

    Errors: NotPrintableError with the reason.
    """
    check_branches(program)
    shape = torch.Size(layout.shape)
    found = recorded(program, shape, dtype, state, group, share)
    _check_shapes(program, found.graph, torch.empty(shape, dtype=dtype, device="meta"), state)
    whole = frozenset(main_of(key) for key in whole_keys(program, state))
    # of a layout it matters only which axes are cut
    place = layout.cut, whole
    if place not in found.cuts:
        found.cuts[place] = _cut(found, layout, whole)
    made = _laid(found.cuts[place], layout)
    made.questions = found.questions
    for question in made.questions:
        turning = [key for keys in rotating(question.node, state) for key in keys]
        if question.node.transform.after is not None and not made.owned.issuperset(turning):
            raise NotPrintableError(f"{question.node.key} turns state that is not between its ends")
    return made


def _cut(found: Recording, layout: Layout, whole: frozenset[str]) -> Recipe:
    """What of a recording is computed where. whole: the states of whole transforms."""
    graph, questions, outputs = found.graph, found.questions, found.outputs
    until = {
        name: next((k for k, q in enumerate(questions) if name in q.known), len(questions))
        for name in outputs
    }
    until |= {"step": 0} if "step" in until else {}
    cutter = _Cutter(graph, questions, outputs)
    made = Recipe(graph, questions, outputs, until, whole | cutter.owned, layout)
    cutter.place(made)
    return made


def _laid(made: Recipe, layout: Layout) -> Recipe:
    """The same recipe for tensors of another layout that is cut along the same axes."""
    made = copy.copy(made)
    made.layout = layout
    return made


# The recipes for kernels, by the programs and by what recipes have in common.
_staged: "weakref.WeakKeyDictionary[Program, dict[object, Recipe]]" = weakref.WeakKeyDictionary()


def staged(made: Recipe, program: Program) -> Recipe:
    """The same for a kernel whose sums are completed between its walks; there are no whole transforms.

    A walk ends where a sum over elements is known, also one of which no process lacks a term.
    """
    known = _staged.setdefault(program, {})
    if made.like not in known:
        known[made.like] = _for_kernel(made, program)
    return _laid(known[made.like], made.layout)


def _for_kernel(made: Recipe, program: Program) -> Recipe:
    graph = made.graph.copy()
    graph.outputs = dict(made.outputs)
    graph = simplified(graph, program)
    outputs = graph.outputs
    found = Recipe(graph, [], outputs, dict.fromkeys(outputs, 0), frozenset(), made.layout)
    cutter = _Cutter(graph, [], outputs)
    found.stages = cutter.stages()
    cutter.place(found)
    return found


def _check_shapes(
    program: Program, graph: Graph, param: Tensor, state: Mapping[str, Tensor]
) -> None:
    """Refuse state whose elements are those of the parameter in another shape."""
    for name, level in graph.tensors.items():
        if name not in state or level == "slice":
            continue
        shape = packed_shape(program, name, param, state) or state[name].shape
        if len(shape) != param.ndim:
            raise NotPrintableError(f"{name} has not the parameter's axes")


class _Cutter:
    def __init__(self, graph: Graph, questions: list[Question], outputs: dict[str, int]):
        self.graph, self.questions, self.outputs = graph, questions, outputs
        last = f"whole.{len(questions) - 1}."
        self.given = {i for i, v in enumerate(graph.values) if _named(v).startswith("whole.")}
        self.late = self._depends(
            {i for i in self.given if _named(graph.values[i]).startswith(last)}
        )
        self.owned: set[str] = set()
        self.own = self._own()
        while more := {n for n, i in self._states() if i in self.own} - self.owned:
            self.owned |= more
            self.own = self._own()

    def _states(self) -> Iterable[tuple[str, int]]:
        """What is written to state."""
        return ((n, i) for n, i in self.outputs.items() if n != "param" and not is_share(n))

    def _depends(self, on: set[int]) -> set[int]:
        """Nodes that are computed from some, and these."""
        found = set(on)
        for index, value in enumerate(self.graph.values):
            if any(isinstance(a, Ref) and a.index in found for a in value.args):
                found.add(index)
        return found

    def _own(self) -> set[int]:
        """The nodes that the owner computes: of answers but the last, and of its state."""
        begin = {
            i
            for i, v in enumerate(self.graph.values)
            if i in self.given - self.late or _named(v) in self.owned
        }
        return self._depends(begin) - self.late

    # ---- which value is needed where

    def place(self, made: Recipe) -> None:
        """Fill in the order in which values are computed, and what travels."""
        boundary = self.own | self.given
        there: dict[int, None] = {}
        for question in self.questions:
            there.update(dict.fromkeys(self._outside(_inputs(question), boundary)))
        rest = [i for n, i in self.outputs.items() if n not in self.owned]
        crossing = [i for i in sorted(self._reached(rest, boundary)) if i in boundary]
        made.back = [i for i in crossing if self._travels(i)]
        made.numbers = [i for i in crossing if not self._travels(i)]
        mine = [*(i for _, i in self._states() if i in self.own), *crossing]
        there.update(dict.fromkeys(self._outside(mine, boundary)))
        made.there = [i for i in there if self._travels(i)]
        scalars = [i for i in there if not self._travels(i)]
        known = set(there) | self.given
        made.at_owner = [
            self._order([i for i in roots if i in self.own], known)
            for roots in (*map(_inputs, self.questions), mine)
        ]
        known = set(boundary)
        first = [i for i in rest if i not in self.late] if not self.questions else []
        early = [i for i in rest if i not in self.late and self._level(i) == "scalar"]
        roots = [*made.there, *scalars, *first, *early]
        sums = self._sums(self._reached([*roots, *rest], boundary), made.layout)
        depth = self._depth(sums) if made.stages is None else made.stages
        made.before = self._phase([i for i in sums if i not in self.late], depth, roots, known)
        made.behind = self._phase([i for i in sums if i in self.late], depth, rest, known)
        made.frees = self._frees(made)
        made.only = self._only(made, mine)

    def _only(self, made: Recipe, mine: list[int]) -> dict[int, int]:
        """The values that travel for one question alone, or as one answer, and the number of that."""
        found: dict[int, int] = {}
        needed = [*mine, *(a for order in made.at_owner for i in order for a in self._arguments(i))]
        told = [i for question in self.questions for i in _inputs(question)]
        for k, question in enumerate(self.questions):
            update = question.update
            if update in made.there and told.count(update) == 1 and update not in needed:
                found[update] = k
            for index in made.back:
                if _named(self.graph.values[index]) == f"whole.{k}.update":
                    found[index] = k
        return found

    def _frees(self, made: Recipe) -> dict[int, tuple[int, ...]]:
        """For each node on the shards what it is the last to need; numbers take no room."""
        last: dict[int, int] = {}
        behind = {i for order, sums in made.behind.rounds for i in (*order, *sums)}
        behind |= {*made.behind.rest}
        for phase in (made.before, made.behind):
            rounds = [order + sums for order, sums in phase.rounds]
            for index in [i for several in rounds for i in several] + phase.rest:
                value = self.graph.values[index]
                needed = [*self._arguments(index)]
                if value.op in REDUCTIONS:  # what is squared there
                    needed += self._arguments(needed[0])
                last.update(dict.fromkeys(needed, index))
        outputs = {*self.outputs.values()}
        made.spent = [i for i in made.there if last.get(i) not in behind and i not in outputs]
        stay = outputs | {*made.there}
        found: dict[int, tuple[int, ...]] = {}
        for needed_last, by in last.items():
            if needed_last not in stay and self._level(needed_last) != "scalar":
                found[by] = (*found.get(by, ()), needed_last)
        return found

    def _travels(self, index: int) -> bool:
        level = self._level(index)
        if level not in ("element", "scalar"):
            raise NotPrintableError(f"values that are one per {level} beside whole tensors")
        return level == "element"

    def _level(self, index: int) -> str:
        return self.graph.values[index].level

    def _arguments(self, index: int) -> list[int]:
        return [a.index for a in self.graph.values[index].args if isinstance(a, Ref)]

    def _reached(self, roots: Iterable[int], boundary: set[int]) -> set[int]:
        """What some nodes are computed from, up to the boundary."""
        return self.graph.needed(roots, boundary)

    def _outside(self, roots: Iterable[int], boundary: set[int]) -> list[int]:
        """What the owner needs of others for these nodes."""
        found, todo, seen = [], list(roots), set[int]()
        while todo:
            index = todo.pop()
            if index in seen:
                continue
            seen.add(index)
            if index in self.own:
                todo += self._arguments(index)
            elif index not in boundary:
                found.append(index)
        return sorted(found)

    def _order(self, roots: list[int], known: set[int]) -> list[int]:
        """The nodes to compute for these that are not known yet; then they are."""
        found = sorted(i for i in self.graph.needed(roots, known) if i not in known)
        known.update(found)
        return found

    def stages(self) -> dict[int, int]:
        """How many sums follow each other up to each sum, as `passes/stages.py` counts them."""
        values = self.graph.values
        reductions = [i for i, value in enumerate(values) if value.op in REDUCTIONS]
        return self._depth(reductions)

    def _depth(self, sums: list[int]) -> dict[int, int]:
        """How many of these sums follow each other up to each of them, itself counted."""
        depth: dict[int, int] = {}
        for index in range(len(self.graph.values)):
            below = max((depth[a] for a in self._arguments(index)), default=0)
            depth[index] = below + (index in sums)
        return {index: depth[index] for index in sums}

    def _phase(
        self, sums: list[int], depth: Mapping[int, int], roots: list[int], known: set[int]
    ) -> Phase:
        rounds: dict[int, list[int]] = {}
        for index in sums:
            rounds.setdefault(depth[index], []).append(index)
        found = []
        for _, several in sorted(rounds.items()):
            order = self._order([a for i in several for a in self._arguments(i)], known)
            known.update(several)
            found.append((order, several))
        return Phase(found, self._order(roots, known))

    def _sums(self, nodes: set[int], layout: Layout) -> list[int]:
        """The sums of which no process has all terms."""
        found = []
        for index in sorted(nodes):
            value = self.graph.values[index]
            if value.op in REDUCTIONS:
                source = self.graph.values[self._arguments(index)[0]]
                summed = axes_of_level(source.level, layout) - axes_of_level(value.level, layout)
                if any(layout.cut[axis] for axis in summed):
                    found.append(index)
        return found


def _named(value: Any) -> str:
    return value.args[0] if value.op in ("load", "number", "pick") else ""


def _inputs(question: Question) -> list[int]:
    """The nodes that a whole transform is told."""
    told = [question.update, question.step, *question.context.values(), question.gate]
    return [i for i in told if i is not None and not isinstance(i, Opaque)]


def axes_of_level(level: str, layout: Layout) -> set[int]:
    """The axes along which values of a level differ."""
    if level in ("element", "slice"):
        return set(range(len(layout.shape)))
    if is_along(level):
        return {int(axis) for axis in level.removeprefix("along ").split(",") if axis}
    return set()


def is_share(name: str) -> bool:
    """Whether an output is a share of a sum over all parameters."""
    return name.startswith(SHARE)
