"""Replaces what a graph computes by something cheaper with the same value."""

from heavyball.compiler.frontend.graph import Graph, Ref, Value
from heavyball.compiler.frontend.ops import TABLE
from heavyball.core.hyper import each
from heavyball.core.program import Program

# Besides those of the table: sums, and counts.
KEEPING = {"sum", "amax"} | {o.name for o in TABLE if o.positive == "all"}
NEVER_NEGATIVE = {"numel", "members"} | {o.name for o in TABLE if o.positive == "always"}
ANY = {o.name for o in TABLE if o.positive == "any"}


def simplified(graph: Graph, program: Program) -> Graph:
    """The same graph with fewer divisions: `sign(a / b)` is `sign(a)` where b cannot be negative.

    A mask of signs (`cautious`) then counts without the square root and the division of the direction,
    which take longer than everything else in the pass. It is the same number unless a / b is smaller
    than any float, or b infinite or NaN.
    """
    known = frozenset(
        (key, index or place)
        for node in program.flat
        for name, (key, index) in node.hyper.items()
        for place, interval in enumerate(each(node.transform.domain(name)))
        if interval.low >= 0
    )
    found: list[bool] = []
    for v in graph.values:
        found.append(_never_negative(v, found, known))
    for place, v in enumerate(graph.values):
        if v.op == "sign" and isinstance(v.args[0], Ref):
            source = v.args[0].index
            while (inner := _numerator(graph, source, found)) is not None:
                source = inner
            if graph.values[source].level == v.level:
                graph.values[place] = Value(v.op, (Ref(source),), v.level, v.kind)
    return _with_one_division(graph.live())


def _with_one_division(graph: Graph) -> Graph:
    """`(a / b) / c` as `a / (b c)` for a number c of 1 or more, such as the scale of a clip.

    Rounded twice either way, and what a pass computes again after the sum that c is made of is one
    division, which takes as long as a dozen other operations.
    """
    made = Graph(every=graph.every, wide=graph.wide, tensors=graph.tensors)
    moved: dict[int, int] = {}
    for index, v in enumerate(graph.values):
        args = tuple(Ref(moved[a.index]) if isinstance(a, Ref) else a for a in v.args)
        if v.op == "div" and all(isinstance(a, Ref) for a in args):
            inner, scale = (made.values[a.index] for a in args)
            if inner.op == "div" and inner.level == v.level != "scalar" and _one_or_more(scale):
                by = made.add("mul", (inner.args[1], args[1]), v.level, "float")
                args = (inner.args[0], Ref(by))
        moved[index] = made.add(v.op, args, v.level, v.kind)
    made.outputs = {name: moved[i] for name, i in graph.outputs.items()}
    made.step = None if graph.step is None else moved[graph.step]
    return made.live()


def _one_or_more(v: Value) -> bool:
    bound = v.args[1] if v.op == "clamp_min" and v.level == "scalar" else None
    return isinstance(bound, float) and bound >= 1


def _numerator(graph: Graph, index: int, found: list[bool]) -> int | None:
    v = graph.values[index]
    if v.op != "div" or not all(isinstance(a, Ref) for a in v.args):
        return None
    return v.args[0].index if found[v.args[1].index] else None


def _never_negative(v: Value, found: list[bool], known: frozenset[tuple[str, int]]) -> bool:
    if v.op in NEVER_NEGATIVE:
        return True
    if v.op == "hyper":
        return v.args in known
    if v.op == "const":
        return v.args[0] >= 0
    if v.op not in KEEPING | ANY:
        return False
    arguments = [found[a.index] if isinstance(a, Ref) else a >= 0 for a in v.args]
    return all(arguments) if v.op in KEEPING - ANY else any(arguments)
