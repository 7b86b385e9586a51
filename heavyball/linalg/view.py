"""The shape in which a matrix method works on a tensor: adjacent axes merged, long ones split.

A `WorkingShape` is computed once from a shape. `blocks_of` returns the pieces of a tensor, as views
if its strides allow, and `whole_of` assembles pieces; leading batch axes are preserved.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.linalg.matrices import Cut, cut_of

# How axes are merged: "right" HeavyBall's, "left" that of SOAP's authors, "two" PSGD Kron's.
Merging = Literal["none", "right", "left", "two"]


def merged_from_left(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Multiply axes from left to right for as long as the product is at most `limit`.

    (64, 3, 3, 3) at most 200: (192, 9).
    """
    return _merged(shape, limit)


def merged_from_right(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Multiply axes from right to left while the product is at most `limit`; the first stays alone.

    (128, 64, 3, 3) at most 2048: (128, 576).
    """
    if len(shape) < 2:
        return tuple(shape)
    return (shape[0], *_merged(shape[:0:-1], limit)[::-1])


def _merged(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    sizes: list[int] = []
    for size in shape:
        # a product with 1 is no longer than the axis was
        if sizes and sizes[-1] * size <= max(limit, sizes[-1], size):
            sizes[-1] *= size
        else:
            sizes.append(size)
    return tuple(sizes)


def merged_to_two(shape: Sequence[int]) -> tuple[int, ...]:
    """The more square of (all but the last, last) and (first, all but the first).

    (64, 32, 3, 3): (64, 288) and not (6144, 3). Two axes or fewer stay as they are.
    """
    if len(shape) <= 2:
        return tuple(shape)
    *head, last = shape
    first, *tail = shape
    pairs = (math.prod(head), last), (first, math.prod(tail))
    return min(pairs, key=lambda pair: abs(pair[0] - pair[1]))


def merge(shape: Sequence[int], merging: Merging, limit: int) -> tuple[int, ...]:
    """The shape after merging; `limit` is the largest product of merged axes."""
    if merging == "right":
        return merged_from_right(shape, limit)
    if merging == "left":
        return merged_from_left(shape, limit)
    return merged_to_two(shape) if merging == "two" else tuple(shape)


def cuts(size: int, limit: int | None) -> tuple[int, ...]:
    """An axis in pieces of `limit`, the last one shorter; whole without a limit."""
    if limit is None or size <= limit:
        return (size,)
    full, rest = divmod(size, limit)
    return (limit,) * full + ((rest,) if rest else ())


@dataclass(frozen=True)
class WorkingShape:
    """A tensor's own shape, the shape after merging, and the pieces that each axis is cut into.

    mixed: the axis whose blocks lie in groups of their parts, and how.
    """

    shape: tuple[int, ...]
    merged: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    mixed: tuple[int, Cut] | None = None

    @functools.cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every block, the last axis' pieces following each other."""
        return tuple(itertools.product(*self.pieces))

    @property
    def is_cut(self) -> bool:
        return len(self.blocks) > 1

    def blocks_of(self, x: Tensor) -> list[Tensor]:
        """The blocks of a tensor (..., *shape), each (..., *block shape).

        Views where the strides of `x` allow; only merging axes that do not follow each other in
        memory takes a copy.
        """
        batch = x.ndim - len(self.shape)
        self._check(x.shape[batch:], self.shape)
        x = x.reshape((*x.shape[:batch], *self.merged))
        if self.mixed is not None:
            axis, cut = self.mixed
            x = torch.cat(cut.parts(x, axis - len(self.merged)), axis - len(self.merged))
        parts = [x]
        for axis, sizes in enumerate(self.pieces):
            if len(sizes) > 1:
                parts = [block for part in parts for block in part.split(sizes, batch + axis)]
        return parts

    def whole_of(self, blocks: Sequence[Tensor]) -> Tensor:
        """The tensor (..., *shape) made of its blocks: the inverse of `blocks_of`."""
        if len(blocks) != len(self.blocks):
            raise ValueError(f"{len(blocks)} blocks given, {self} has {len(self.blocks)}")
        batch = blocks[0].ndim - len(self.merged)
        for block, shape in zip(blocks, self.blocks, strict=True):
            self._check(block.shape[batch:], shape)
        parts = list(blocks)
        for axis in reversed(range(len(self.pieces))):
            count = len(self.pieces[axis])
            if count > 1:
                starts = range(0, len(parts), count)
                parts = [torch.cat(parts[i : i + count], batch + axis) for i in starts]
        (whole,) = parts
        if self.mixed is not None:
            axis, cut = self.mixed
            dim = axis - len(self.merged)
            whole = cut.whole(whole.split(cut.lengths, dim), dim)
        return whole.reshape((*whole.shape[:batch], *self.shape))

    def _check(self, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise ValueError(
                f"a tensor of shape {tuple(found)}, expected {tuple(expected)}: {self}"
            )

    def __str__(self) -> str:
        return f"{self.shape} as {self.merged} in {len(self.blocks)} block(s)"


@functools.lru_cache(maxsize=4096)
def working_shape(
    shape: tuple[int, ...],
    merging: Merging = "none",
    limit: int = 2048,
    split: bool = False,
    blocks: Any = None,
    axis: int = 0,
) -> WorkingShape:
    """The working shape of a tensor of this shape.

    limit: the largest product of merged axes and, with `split`, the largest piece of an axis.
    blocks, axis: the axis that is cut into blocks, see `matrices.Blocks`.
    Errors: ValueError for blocks that do not add up, or of an axis that is merged with others.
    """
    merged = merge(shape, merging, limit)
    most = limit if split else None
    pieces = [cuts(size, most) for size in merged]
    mixed = None
    if blocks is not None:
        if axis >= len(shape):
            raise ValueError(f"has blocks={blocks!r} of axis {axis}, which it does not have")
        if merged[: axis + 1] != shape[: axis + 1]:
            raise ValueError(f"has blocks={blocks!r} of axis {axis}, which is merged with others")
        cut = cut_of(blocks, shape[axis], axis)
        pieces[axis] = tuple(n for length in cut.lengths for n in cuts(length, most))
        mixed = (axis, cut) if cut.groups > 1 else None
    return WorkingShape(tuple(shape), merged, tuple(pieces), mixed)
