"""Contractions of many tensors along a path that is found once per shape."""

import functools
from collections.abc import Sequence

import opt_einsum
import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def _path(equation: str, shapes: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, ...], str]]:
    """Which operands to contract together, in which order, each with its own equation."""
    found = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")[1]
    return [(places, step) for places, _, step, _, _ in found.contraction_list]


def contract(equation: str, *tensors: Tensor) -> Tensor:
    """`torch.einsum`, along the cheapest path; torch would look for the path at every call.

    Two operands at a time, so each product is a matrix product and no intermediate is larger than
    the path needs.
    """
    operands = list(tensors)
    for places, step in _path(equation, tuple(tuple(t.shape) for t in tensors)):
        # in the order in which the path removes them, from the last place to the first
        taken = [operands.pop(place) for place in sorted(places, reverse=True)]
        operands.append(torch.einsum(step, *taken))
    return operands[0]


def axis_letters(count: int, skip: int = 0) -> Sequence[str]:
    """`count` different letters for the axes of a tensor, after the first `skip`."""
    letters = [opt_einsum.get_symbol(number) for number in range(skip, skip + count)]
    if skip + count > 52:
        raise ValueError(f"a tensor of {count} dimensions: einsum has no letters for so many")
    return letters
