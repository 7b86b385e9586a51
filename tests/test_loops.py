"""The loop form of a kernel: what its verifier refuses, and walks that run one at a time."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from heavyball.compiler.cpp.printer import CppPrinter
from heavyball.compiler.cpp.rows import RowPrinter
from heavyball.compiler.frontend.graph import Graph, Ref
from heavyball.compiler.frontend.symbols import Const, Op
from heavyball.compiler.passes.axes import along
from heavyball.compiler.passes.loops import (
    Kernel,
    Let,
    Load,
    LoopError,
    Reduce,
    Save,
    Store,
    verify,
)
from heavyball.compiler.passes.lower import lower
from heavyball.compiler.passes.stages import schedule
from heavyball.compiler.pipeline import Printed
from heavyball.compiler.run.kernels import build
from heavyball.compiler.run.stages import Stages
from heavyball.compiler.run.table import Table

F32, F64 = torch.float32, torch.float64


def kernel(every: int | None = None) -> Kernel:
    """`average += 0.5 grad` in a first walk, `param -= average / sum(average^2)` in a second.

    every: sum up every k-th element of the parameter too, and divide by that.
    """
    graph = Graph(every=every)

    def add(op: str, *args, level: str = "element") -> Ref:
        return Ref(graph.add(op, args, level, "float"))

    graph.tensors = dict.fromkeys(("param", "grad", "average"), "element")
    param, grad, old = (add("load", name) for name in ("param", "grad", "average"))
    average = add("add", old, add("mul", grad, 0.5))
    total = add("sum", add("square", average), level="scalar")
    if every is not None:
        picked = add("pick", "param", level="slice")
        total = add("mul", total, add("sum", picked, level="scalar"), level="scalar")
    param = add("sub", param, add("div", average, total))
    graph.outputs = {"average": average.index, "param": param.index}
    dtypes = dict.fromkeys(graph.tensors, F32)
    return lower(graph, schedule(graph, dtypes, F32), dtypes, F32)


def body(made: Kernel, walk: int = 0) -> list:
    return made.walks[walk].elements.body


def place(made: Kernel, kind: type, walk: int = 0) -> int:
    return next(i for i, s in enumerate(body(made, walk)) if isinstance(s, kind))


def without_a_let(made: Kernel) -> None:
    del body(made)[place(made, Let)]


def let_behind_its_use(made: Kernel) -> None:
    body(made).append(body(made).pop(place(made, Let)))


def loaded_after_the_store(made: Kernel) -> None:
    statements = body(made)
    load = next(s for s in statements if isinstance(s, Load) and s.column.name == "average")
    statements.append(dataclasses.replace(load))


def another_value_read_back(made: Kernel) -> None:
    at = place(made, Load, 1)
    load = next(s for s in body(made, 1) if isinstance(s, Load) and s.column.name == "average")
    grad = next(s for s in body(made) if isinstance(s, Load) and s.column.name == "grad")
    body(made, 1).insert(at, Load(grad.var, load.column))


def stored_twice(made: Kernel) -> None:
    store = next(s for s in body(made) if isinstance(s, Store))
    body(made, 1).append(store)


def stored_as_float64(made: Kernel) -> None:
    at = place(made, Store)
    store = body(made)[at]
    body(made)[at] = Store(store.column, store.expr.to(F64))


def let_of_another_type(made: Kernel) -> None:
    at = place(made, Let)
    let = body(made)[at]
    body(made)[at] = Let(let.var, let.expr.to(F64))


def sum_in_float32(made: Kernel) -> None:
    at = place(made, Reduce)
    body(made)[at] = dataclasses.replace(body(made)[at], expr=Const(1.0, F32))
    made.walks[0].sums[:] = [body(made)[at]]


def types_that_differ(made: Kernel) -> None:
    at = place(made, Let)
    let = body(made)[at]
    body(made)[at] = Let(let.var, Op("add", (let.expr, Const(1.0, F64)), F32))


def a_sum_of_no_loop(made: Kernel) -> None:
    del body(made)[place(made, Reduce)]


FAULTS: dict[Callable, str] = {
    without_a_let: "before it is known",
    let_behind_its_use: "before it is known",
    loaded_after_the_store: "average is read after it was stored",
    another_value_read_back: "average holds another value",
    stored_twice: "average is stored twice",
    stored_as_float64: "what is stored in average is torch.float64",
    let_of_another_type: "is torch.float64, expected torch.float32",
    sum_in_float32: "is torch.float32, expected torch.float64",
    types_that_differ: "types differ",
    a_sum_of_no_loop: "no loop computes the sum",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_kernel_that_cannot_be_right_is_refused(fault: Callable) -> None:
    made = kernel()
    verify(made)
    fault(made)
    with pytest.raises(LoopError, match=FAULTS[fault]):
        verify(made)


def test_what_a_slice_reads_is_saved_before_it_is_overwritten() -> None:
    made = kernel(every=3)
    verify(made)
    # the sum over the slice is known only when the parameter is written, so it needs two walks
    assert [w.slices is not None for w in made.walks].count(True) == 1
    graph = Graph(every=3)
    graph.tensors = {"param": "element"}
    param = Ref(graph.add("load", ("param",), "element", "float"))
    picked = Ref(graph.add("pick", ("param",), "slice", "float"))
    total = graph.add("sum", (picked,), "scalar", "float")
    moved = graph.add("add", (param, 1.0), "element", "float")
    graph.outputs = {"param": moved, "total": total}
    late = lower(graph, schedule(graph, {"param": F32}, F32), {"param": F32}, F32)
    verify(late)
    late.walks[0].elements.body[:] = [
        s for s in late.walks[0].elements.body if not isinstance(s, Save)
    ]
    with pytest.raises(LoopError, match="no loop saves the old values of param"):
        verify(late)


# ---- one walk at a time


def columns_kernel() -> Kernel:
    """`param -= grad / sqrt(the sum of squares of its column)` of matrices."""
    graph = Graph(wide=(0, 1))

    def add(op: str, *args, level: str = "element") -> Ref:
        return Ref(graph.add(op, args, level, "float"))

    graph.tensors = dict.fromkeys(("param", "grad"), "element")
    param, grad = add("load", "param"), add("load", "grad")
    squares = add("sum", add("square", grad), level=along([1]))
    root = add("sqrt", squares, level=along([1]))
    graph.outputs = {"param": add("sub", param, add("div", grad, root)).index}
    dtypes = dict.fromkeys(graph.tensors, F32)
    return lower(graph, schedule(graph, dtypes, F32), dtypes, F32)


def table_of(made: Kernel, tensors: list[dict[str, torch.Tensor]]) -> Table:
    """A table of these tensors, matrices where the kernel walks by rows."""
    printed = Printed(made, (CppPrinter if made.frame is None else RowPrinter)(made).source())
    table = Table(build(printed))
    for number, named in enumerate(tensors):
        later = [] if made.frame is None else [named["param"].shape[1]]
        addresses = [named[name].data_ptr() for name in table.kernel.tensors]
        table.rows.append([named["param"].numel(), 0, 0, *later, *addresses])
        table.members.append(number)
    table.finish()
    return table


def tensors_of(made: Kernel, shape: tuple) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {c.name: torch.randn(shape, generator=drawn) for c in made.tensors}


NO_HYPERS = torch.zeros(1, 1, dtype=F64)
KERNELS = {kernel: ((7,), (70_001,)), columns_kernel: ((5, 6), (300, 260))}


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
def test_one_walk_at_a_time_gives_the_bits_of_all_in_one(make: Callable[[], Kernel]) -> None:
    made = make()
    one = [tensors_of(made, shape) for shape in KERNELS[make]]
    other = copy.deepcopy(one)
    table_of(made, one).launch(NO_HYPERS)
    stages = Stages(table_of(made, other))
    for k in range(len(stages) + 1):
        stages.run(k, NO_HYPERS)
    for x, y in zip(one, other, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
def test_sums_of_parts_can_be_completed_between_two_walks(make: Callable[[], Kernel]) -> None:
    made = make()
    whole = [tensors_of(made, shape) for shape in KERNELS[make]]
    parts = [{n: x[: len(x) // 3].clone() for n, x in named.items()} for named in whole]
    rests = [{n: x[len(x) // 3 :].clone() for n, x in named.items()} for named in whole]
    table_of(made, whole).launch(NO_HYPERS)
    ranks = [Stages(table_of(made, parts)), Stages(table_of(made, rests))]
    for k in range(len(ranks[0]) + 1):
        for rank in ranks:
            rank.run(k, NO_HYPERS)
        if k < len(ranks[0]):
            for mine, theirs in zip(*(rank.left(k) for rank in ranks), strict=True):
                assert mine.how == "add"
                for x, y in zip(mine.values, theirs.values, strict=True):
                    x += y
                    y.copy_(x)
    for named, part, rest in zip(whole, parts, rests, strict=True):
        for name, x in named.items():
            found = torch.cat((part[name], rest[name]))
            torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)
