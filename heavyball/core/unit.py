"""The unit of moments after a gate, which do not change in steps in which a rate's own state does."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Fork, HiddenNode, Node, RateNode, WholeNode, flatten
from heavyball.core.rate import Rate
from heavyball.core.transform import Rules, Signature, Transform
from heavyball.state.declare import scalar


def own_unit(update: Tensor, last: Tensor, /, **present: Any) -> tuple[Tensor, ...]:
    """Keep the unit of the last step that a gate let through, and provide what it has changed by."""
    (unit,) = present.values()
    return update, unit, torch.where(last > 0, last / unit, 1.0)


def with_units(nodes: tuple[Node | Fork, ...]) -> tuple[Node | Fork, ...]:
    """Give the moments after each gate that follows a rate their own unit.

    A gate that is closed in a parameter's first steps alone needs none: what is behind it is still
    zero then.
    """
    for place, node in enumerate(nodes):
        if isinstance(node, RateNode) and node.transform.moment_unit:
            return (*nodes[: place + 1], *_placed(nodes[place + 1 :], node.transform))
    return nodes


def _placed(nodes: tuple[Node | Fork, ...], rate: Rate) -> Iterator[Node | Fork]:
    for place, node in enumerate(nodes):
        if isinstance(node, Fork):
            yield Fork(tuple(tuple(_placed(b, rate)) for b in node.branches), node.merge)
        else:
            yield node
        gated = any(map(_closes, flatten((node,))))
        if gated and any(has_unit(n) for n in flatten(nodes[place + 1 :])):
            yield _unit_node(node.merge.key if isinstance(node, Fork) else node.key, rate)


def _closes(node: Node) -> bool:
    """Whether a node may leave out steps after a parameter's first ones."""
    return "gate" in node.transform.provides and not node.transform.rules.opens_once


def has_unit(node: Node) -> bool:
    """Whether a node keeps something in the unit of the gradient that a rate changes."""
    states = node.transform.states.values()
    return not isinstance(node, WholeNode) and any(s.holds in ("moment", "square") for s in states)


def _unit_node(key: str, rate: Rate) -> HiddenNode:
    made = Transform(
        "own_unit",
        own_unit,
        Signature({}, {}, (rate.moment_unit,), ()),
        {"moment_unit": scalar(0.0, low=0.0)},
        {},
        {},
        (rate.moment_change,),
        "transform",
        Rules({}, {}, "", False, None, False),
    )
    return HiddenNode(made, key, {})
