"""Refuses programs that cannot be right, with the reason."""

from heavyball.core.program import Fork, Node, RateNode, WholeNode, flatten, kind_of
from heavyball.core.transform import CONTEXT, WHOLE_CONTEXT, WRITTEN_CONTEXT, Transform

# Kinds of what takes from before a fork what may be another thing in each of its branches.
BEHIND = ("decay", "writer", "post")


def check(nodes: tuple[Node | Fork, ...]) -> None:
    """Refuse a program that cannot be right, with the reason."""
    _check_order(nodes)
    averages = [n.key for n in flatten(nodes) if n.transform.evaluate is not None]
    if len(averages) > 1:
        raise ValueError(
            f"{' and '.join(averages)}: only one can decide which weights are evaluated"
        )
    rates = [n.transform for n in flatten(nodes) if isinstance(n, RateNode)]
    common = {name for rate in rates for name in rate.numbers}
    offered = {name for n in flatten(nodes) for name in n.transform.offers}
    _check_path((), nodes, set(CONTEXT) | common | offered)


def _check_order(nodes: tuple[Node | Fork, ...]) -> None:
    writer = decay = None
    stateful: str | None = None
    for node in nodes:
        for inner in [] if isinstance(node, Node) else flatten((node,)):
            if inner.transform.kind != "transform":
                raise ValueError(
                    f"{inner.key} is a {inner.transform.kind}: it cannot be inside "
                    f"{node.merge.key}, only in the chain itself"  # type: ignore[union-attr]
                )
        leaf = node if isinstance(node, Node) else node.merge
        kind = kind_of(node)
        if kind == "writer" and writer:
            raise ValueError(f"two writers: {writer} and {leaf.key}; a chain writes once")
        if kind == "post" and not writer:
            raise ValueError(f"{leaf.key} is before the writer, but changes what was written")
        if writer and kind not in ("post", "observer"):
            raise ValueError(f"{leaf.key} is after the writer {writer}, which must be last")
        kept = (s for n in flatten((node,)) for s in n.transform.states.values())
        has_state = any(not state.passing for state in kept)
        # what excludes every decay is refused for that
        refuses = "decay" in leaf.transform.rules.excludes
        if decay and kind == "transform" and has_state and not refuses:
            raise ValueError(
                f"{leaf.key} is after the decay {decay} and would average it; put {decay} right "
                "before the write, or decay the gradient itself"
            )
        reason = leaf.transform.rules.before_state
        if reason and stateful:
            raise ValueError(f"{leaf.key} is after {stateful}: {reason}")
        writer = leaf.key if kind == "writer" else writer
        decay = leaf.key if kind == "decay" else decay
        stateful = leaf.key if has_state else stateful


def _check_path(
    before: tuple[Node, ...], nodes: tuple[Node | Fork, ...], context: set[str]
) -> tuple[Node, ...]:
    """Check the context and exclusions of each node, given the nodes before it."""
    path = before
    for place, node in enumerate(nodes):
        if isinstance(node, Fork):
            ends = [_check_path(path, branch, set(context)) for branch in node.branches]
            inner = [n for end in ends for n in end[len(path) :]]
            for n in inner:
                for name in _asked_behind(nodes[place + 1 :]) & set(n.transform.provides):
                    raise ValueError(
                        f"{n.key} decides on {name!r} for all later elements, so it cannot be in one "
                        f"branch of {node.merge.key}"
                    )
            path = (*path, *inner, node.merge)
            continue
        t = node.transform
        known = context | ({"total"} if t.over_all and not isinstance(node, RateNode) else set())
        opaque = {
            n for other in path if isinstance(other, WholeNode) for n in other.transform.opaque
        }
        known = known | set(WHOLE_CONTEXT) if isinstance(node, WholeNode) else known - opaque
        for name in t.context:
            if name not in known:
                raise ValueError(
                    f"{node.key} asks for {name!r}, which nothing before it provides; "
                    f"there is {', '.join(sorted(known))}"
                )
        for other in path:
            reason = excluded(t, other.transform) or excluded(other.transform, t)
            if reason:
                raise ValueError(f"{other.key} and {node.key} exclude each other: {reason}")
        context.update(t.provides, node.transform.opaque if isinstance(node, WholeNode) else ())
        if t.kind == "writer":
            context.update(WRITTEN_CONTEXT)
        path = (*path, node)
    if not before:
        _check_modifiers(path)
    return path


def excluded(one: Transform, other: Transform) -> str | None:
    """Why a transform excludes another one, by its name or its kind."""
    return one.rules.excludes.get(other.name) or one.rules.excludes.get(other.kind)


def _asked_behind(nodes: tuple[Node | Fork, ...]) -> set[str]:
    """What a decay or the write behind a branch takes from before it, where each branch has its own."""
    ends = [n.transform for n in nodes if isinstance(n, Node) and kind_of(n) in BEHIND]
    return {name for t in ends for name in _asks(t)} - (CONTEXT.keys() - {"lr"})


def _check_modifiers(path: tuple[Node, ...]) -> None:
    for position, node in enumerate(path):
        asked = {n for later in path[position + 1 :] for n in _asks(later.transform)}
        if node.transform.rules.modifier and not asked & set(node.transform.provides):
            raise ValueError(
                f"{node.key} has no effect: nothing after it uses "
                f"{', '.join(node.transform.provides)}"
            )


def _asks(transform: Transform) -> tuple[str, ...]:
    return transform.context + transform.optional
