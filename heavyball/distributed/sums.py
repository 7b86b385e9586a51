"""Adds up what processes have of the same number: one all-reduce for all parameters of a group.

The places in the buffer follow from the plan alone. A process that holds nothing of a tensor, or is not
the first to hold it, adds zeros, and every process of the group gets the same bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heavyball.distributed.shard import Group, Layout, inside, numel
from heavyball.numerics import SCALAR


@dataclass(frozen=True, eq=False)
class Term:
    """A process's part of a sum (or of a maximum, by `op`), for each element of an array.

    layout: where in the array each process's part of the result lies. adds: whether this process has
    terms that no process before it has.
    """

    op: str
    layout: Layout
    part: Tensor
    adds: bool


def nothing(op: str, layout: Layout, device: torch.device) -> Term:
    """The term of a process that adds nothing, but gets the sum."""
    return Term(op, layout, torch.zeros(layout.mine[1], dtype=SCALAR, device=device), False)


_OPS = {"sum": (dist.ReduceOp.SUM, 0.0), "amax": (dist.ReduceOp.MAX, -math.inf)}


def completed(terms: Sequence[Term]) -> list[Tensor]:
    """The sums of all processes; of each array this process's part again."""
    kinds: dict[Any, list[int]] = {}
    for number, term in enumerate(terms):
        place = term.layout.group, term.op, term.part.device.type
        kinds.setdefault(place, []).append(number)
    found: dict[int, Tensor] = {}
    for (group, op, _), numbers in kinds.items():
        several = [terms[i] for i in numbers]
        found.update(zip(numbers, _reduced(group, op, several), strict=True))
    return [found[number] for number in range(len(terms))]


def _reduced(group: Group, op: str, terms: Sequence[Term]) -> list[Tensor]:
    how, nothing = _OPS[op]
    sizes = [math.prod(term.layout.shape) for term in terms]
    device = terms[0].part.device
    buffer = torch.full((sum(sizes),), nothing, dtype=SCALAR, device=device)
    arrays = [
        room.view(term.layout.shape) for room, term in zip(buffer.split(sizes), terms, strict=True)
    ]
    for array, term in zip(arrays, terms, strict=True):
        mine = term.layout.mine
        if term.adds and numel(mine):
            array[_here(term.layout)] = term.part.to(SCALAR).reshape(mine[1])
    if group.size > 1:
        dist.all_reduce(buffer, op=how, group=group.handle)
    return [
        array[_here(term.layout)].reshape(term.part.shape)
        for array, term in zip(arrays, terms, strict=True)
    ]


def _here(layout: Layout) -> tuple[slice, ...]:
    return inside(layout.mine, ((0,) * len(layout.shape), layout.shape))


# What a process adds to a number that others read anyway, to say that it cannot go on.
ERROR = 2.0**20
# The most shares that one element gives.
SHARES = 8


def over_stages(
    sums: Mapping[int, Sequence[Tensor]],
    groups: int,
    stages: Group,
    device: torch.device,
    failed: bool = False,
) -> dict[int, tuple[Tensor, ...]]:
    """The sums of each parameter group, by its number, added up over processes with other parameters.

    A process may have no parameter with a gradient in a group. failed: whether this one has no sums.

    Errors: ValueError on every process if one has failed.
    """
    buffer = torch.zeros(groups, SHARES + 2, dtype=SCALAR, device=device)
    for index, shares in sums.items():
        buffer[index, 0], buffer[index, 1] = 1.0, len(shares)
        for place, share in enumerate(shares, start=2):
            buffer[index, place] = share
    if failed:
        buffer[:, 0] = ERROR
    if stages.size > 1:
        dist.all_reduce(buffer, group=stages.handle)
    found = {}
    for index, (held, count) in enumerate(buffer[:, :2].tolist()):
        if held >= ERROR:
            raise ValueError("step: another stage cannot go on, see its error")
        if held:
            found[index] = tuple(buffer[index, 2 : 2 + round(count / held)].clone().unbind())
    return found
