"""Replaces what a graph computes by something cheaper with the same value."""

from heavyball.chain import Program
from heavyball.compiler.graph import Graph, Ref, Value

# Operations whose result is never below zero if no argument is.
KEEPING = {"add", "mul", "div", "minimum", "clamp_max", "sum", "amax", "reciprocal"}
NEVER_NEGATIVE = {"sqrt", "rsqrt", "abs", "exp", "square", "numel", "members", "to_float"}
ANY = {"maximum", "clamp_min"}  # never below zero if one argument is not


def simplified(graph: Graph, program: Program) -> Graph:
    """The same graph with `sign(a / b)` as `sign(a)` where b cannot be negative.

    A mask of signs (`cautious`) then counts without the square root and the division of the direction,
    which take longer than everything else in the pass. It is the same number unless a / b is smaller
    than any float, or b infinite or NaN.
    """
    known = frozenset(
        (key, index or 0)
        for node in program.flat
        for name, (key, index) in node.hyper.items()
        if node.transform.domain(name).low >= 0
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
    return graph.live()


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
