"""Sums over parameters: what several of them give is added up here, in the order of the parameters."""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.numerics import SCALAR, host

# What one parameter gives, or what several give together: 0-d float64 tensors.
Shares = tuple[Tensor, ...]
# The sums of each group, by the group's identity; those on the host are plain numbers.
Sums = Mapping[int, tuple[Tensor | float, ...]]


def stacked(given: Sequence[Shares]) -> Tensor:
    """What parameters give as rows of one tensor, on the device of the first."""
    home = given[0][0].device
    rows = [torch.stack([s.detach().to(home, SCALAR).reshape(()) for s in row]) for row in given]
    return torch.stack(rows)


def over_all(rows: Tensor) -> Tensor:
    """The sum of the rows. A device adds them in its own order, and nothing waits for it."""
    if not host.on_host(rows):
        return rows.sum(0)
    return torch.tensor(_added(rows.tolist()), dtype=SCALAR, device="cpu")


def by_group(groups: Iterable[Any], rows: Tensor) -> Sums:
    """The sums of the rows of each group; the rows of one group follow each other."""
    sums, first = dict[int, Any](), 0
    numbers: list[list[float]] | None = rows.tolist() if host.on_host(rows) else None
    for group, members in itertools.groupby(map(id, groups)):
        end = first + sum(1 for _ in members)
        if numbers is None:
            sums[group] = rows[first:end].sum(0).unbind()
        else:
            sums[group] = tuple(_added(numbers[first:end]))
        first = end
    return sums


def _added(rows: list[list[float]]) -> list[float]:
    """The sums of the columns, one row after the other; `sum` would add to other digits."""
    return [functools.reduce(operator.add, column) for column in zip(*rows, strict=True)]
