"""Which branch of its switches a chain takes for one parameter."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from heavyball.core.program import Fork, Node, Switch


def every_node(nodes: tuple[Any, ...]) -> Iterator[Node]:
    """The nodes of all branches, in the order in which a program that had them would run them."""
    for node in nodes:
        if isinstance(node, Node):
            yield node
        elif isinstance(node, Fork):
            for branch in node.branches:
                yield from every_node(branch)
            yield node.merge
        else:
            for branch in branches_of(node):
                yield from every_node(branch)


def branches_of(switch: Switch) -> list[tuple[Any, ...]]:
    rest = [] if switch.otherwise is None else [switch.otherwise]
    return [branch for _, branch in switch.rules] + rest


def picks_of(nodes: tuple[Any, ...], name: str | None, param: Tensor) -> Iterator[int]:
    """The choices that the switches make for one parameter, in the order of the chain."""
    for node in nodes:
        if isinstance(node, Fork):
            for branch in node.branches:
                yield from picks_of(branch, name, param)
        elif isinstance(node, Switch):
            matching = (i for i, (rule, _) in enumerate(node.rules) if rule.matches(name, param))
            pick = next(matching, len(node.rules))
            if pick == len(node.rules) and node.otherwise is None:
                label = "a parameter" if name is None else repr(name)
                rules = ", ".join(repr(rule) for rule, _ in node.rules)
                raise ValueError(
                    f"route: no rule matches {label} of shape {tuple(param.shape)} (rules: {rules}); "
                    "add a rule, or otherwise=..."
                )
            yield pick
            yield from picks_of(branches_of(node)[pick], name, param)


def reasons_of(
    nodes: tuple[Any, ...], picks: Iterator[int], name: str | None, param: Tensor
) -> Iterator[str]:
    """Why the switches of a chain have chosen so for one parameter, in the order of the chain."""
    for node in nodes:
        if isinstance(node, Fork):
            for branch in node.branches:
                yield from reasons_of(branch, picks, name, param)
        elif isinstance(node, Switch):
            pick, rules = next(picks), [rule for rule, _ in node.rules]
            if pick < len(rules):
                yield from rules[pick].reasons(name, param)
            else:
                told = [rule.told(name, param) for rule in rules]
                yield from [reason for reason in told if reason] or ["no rule matches"]
            yield from reasons_of(branches_of(node)[pick], picks, name, param)


def resolved(nodes: tuple[Any, ...], picks: Iterator[int]) -> Iterator[Node | Fork]:
    """The nodes with every switch replaced by the branch that was picked."""
    for node in nodes:
        if isinstance(node, Switch):
            yield from resolved(branches_of(node)[next(picks)], picks)
        elif isinstance(node, Fork):
            yield Fork(tuple(tuple(resolved(b, picks)) for b in node.branches), node.merge)
        else:
            yield node
