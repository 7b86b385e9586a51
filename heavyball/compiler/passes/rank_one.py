"""State of rank one in a graph: rows, columns and signs in place of the values.

A program is recorded as if its state were plain. Here a value that is loaded becomes the product of a
row and a column, and one that is written the means that are held, so that a kernel needs nothing of its
own but the bits of signs. What is done is recorded from `state/rank_one.py`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Graph, NotPrintableError, Recorder, Ref
from heavyball.compiler.passes.axes import MATRIX, View, along, is_along, numbers_of, view_of
from heavyball.state import rank_one
from heavyball.state.held import COLUMNS, SIGNS

# Any matrix: no size is looked at.
SHAPE = torch.Size([3, 5])
ROW, COLUMN = along([0]), along([1])
GIVEN = {"per_row": ROW, "per_column": COLUMN, "above": "element", "matrix": "element"}


def expanded(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    shape: tuple[int, ...],
) -> tuple[Graph, View | None]:
    """A graph with what is held in place of the values, and the view that it is for.

    dtypes: of all tensors and their companions; a graph without state of rank one stays as it is.

    Errors: NotPrintableError where rows and columns cross those of something else.
    """
    names = [name for name in sorted(graph.tensors) if name + COLUMNS in dtypes]
    if not names:
        return graph, None
    if graph.every is not None:
        raise NotPrintableError(f"rank-one state ({names[0]}) beside every k-th element")
    for name in names:
        if graph.tensors[name] != "element":
            raise NotPrintableError(
                f"rank-one state ({name}) of another shape than the parameter's"
            )
    view = MATRIX if graph.starts is None else view_of(shape)
    if view is None:
        what = "whose rows and columns cross those of the parameter"
        raise NotPrintableError(
            f"rank-one state ({names[0]}), {what}, in a chain with sums over some axes"
        )
    return _Expansion(graph, view, len(view.of(shape)), names, dtypes).made(), view


class _Expansion:
    def __init__(
        self,
        graph: Graph,
        view: View,
        axes: int,
        names: list[str],
        dtypes: Mapping[str, torch.dtype],
    ):
        self.graph, self.view, self.names = graph, view, names
        self.signed = {name: name + SIGNS in dtypes for name in names}
        self.result = Graph(wide=self._wide(axes), every=graph.every)
        self.rows = along(a for a in self.result.wide if a < view.rows)
        self.columns = along(a for a in self.result.wide if a >= view.rows)
        self.levels = {ROW: self.rows, COLUMN: self.columns}
        self.result.tensors = {n: self._level(v) for n, v in graph.tensors.items()}
        for name in names:
            parts = {name: self.rows, name + COLUMNS: self.columns}
            parts |= {name + SIGNS: "element"} if self.signed[name] else {}
            self.result.tensors |= parts

    def _wide(self, axes: int) -> tuple[int, ...]:
        if self.view.plain:
            return (0, 1)
        return tuple(itertools.chain.from_iterable(map(self.view.axes, self.graph.wide)))

    def _level(self, level: str) -> str:
        if not is_along(level):
            return level
        return along(itertools.chain.from_iterable(map(self.view.axes, sorted(numbers_of(level)))))

    def made(self) -> Graph:
        moved: dict[int, Ref] = {}
        for index, v in enumerate(self.graph.values):
            if v.op == "load" and v.args[0] in self.signed:
                moved[index] = self._loaded(v.args[0])
                continue
            args = [moved[a.index] if isinstance(a, Ref) else a for a in v.args]
            if v.op == "members":
                args = [self._level(level) for level in v.args]
            moved[index] = Ref(self.result.add(v.op, tuple(args), self._level(v.level), v.kind))
        for name, index in self.graph.outputs.items():
            if name in self.signed:
                self._store(name, moved[index])
            else:
                self.result.outputs[name] = moved[index].index
        self.result.step = None if self.graph.step is None else moved[self.graph.step].index
        return self.result.live()

    def _held(self, name: str) -> dict[str, Ref]:
        add = self.result.add
        found = {
            "per_row": add("load", (name,), self.rows, "float"),
            "per_column": add("load", (name + COLUMNS,), self.columns, "float"),
        }
        if self.signed[name]:
            found["above"] = add("load", (name + SIGNS,), "element", "bool")
        return {n: Ref(index) for n, index in found.items()}

    def _loaded(self, name: str) -> Ref:
        return self._insert(_loading(self.signed[name]), self._held(name))["values"]

    def _store(self, name: str, new: Ref) -> None:
        made = self._insert(_storing(self.signed[name]), {**self._held(name), "matrix": new})
        self.result.outputs[name] = made["per_row"].index
        self.result.outputs[name + COLUMNS] = made["per_column"].index
        if self.signed[name]:
            self.result.outputs[name + SIGNS] = made["above"].index

    def _insert(self, recorded: Graph, given: Mapping[str, Ref]) -> dict[str, Ref]:
        """Put in what was recorded of a matrix; gives its outputs."""
        moved: list[Ref] = []
        for v in recorded.values:
            if v.op == "load":
                moved.append(given[v.args[0]])
                continue
            args = [moved[a.index] if isinstance(a, Ref) else a for a in v.args]
            if v.op == "members":
                args = [self.levels.get(level, level) for level in v.args]
            level = self.levels.get(v.level, v.level)
            moved.append(Ref(self.result.add(v.op, tuple(args), level, v.kind)))
        return {name: moved[index] for name, index in recorded.outputs.items()}


@functools.cache
def _loading(signed: bool) -> Graph:
    def values(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = rank_one.product(given["per_row"], given["per_column"], given.get("above"))
        return {"values": found}

    return _recorded(values, ("per_row", "per_column", *(("above",) if signed else ())))


@functools.cache
def _storing(signed: bool) -> Graph:
    names = "per_row", "per_column", *(("above",) if signed else ())

    def held(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        above = given.get("above")
        found = rank_one.renewed(given["per_row"], given["per_column"], above, given["matrix"])
        return dict(zip(names, found, strict=True))

    return _recorded(held, (*names, "matrix"))


def _recorded(
    function: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], names: Sequence[str]
) -> Graph:
    recorder = Recorder(SHAPE, torch.float32, narrow_means=True)
    shapes = {ROW: (3, 1), COLUMN: (1, 5), "element": (3, 5)}
    given = {}
    for name in names:
        dtype = torch.bool if name == "above" else torch.float32
        empty = torch.empty(shapes[GIVEN[name]], dtype=dtype, device="meta")
        given[name] = recorder.tensor(empty, name)
    with torch.no_grad(), recorder:
        made = function(given)
    recorder.graph.outputs = {name: recorder.find(t) for name, t in made.items()}
    return recorder.graph.live()
