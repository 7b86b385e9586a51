"""The matrices in a parameter: a flattened kernel, stacked experts, blocks of rows or columns.

A matrix method works on batches (n, rows, columns); `Matrices` splits a tensor into them and
assembles the results.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heavyball.state.declare import Holds, State

# None: one matrix. h: so many blocks of equal size. (n_1, .., n_k): blocks of these sizes.
# ("interleaved", groups, (n_1, .., n_k)): the axis is `groups` times (n_1 + .. + n_k) long, and block k
# has the k-th part of every group, as the rows of a fused q, k and v with grouped heads.
Blocks = int | tuple | Mapping | None


@dataclass(frozen=True)
class Cut:
    """The lengths of the blocks along one axis, and the number of groups of their parts."""

    sizes: tuple[int, ...]
    groups: int = 1

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(n * self.groups for n in self.sizes)

    def parts(self, x: Tensor, dim: int) -> list[Tensor]:
        """The blocks of x along a dimension counted from the end."""
        if len(self.sizes) == 1:
            return [x]
        if self.groups == 1:
            return list(x.split(self.sizes, dim))
        spread = x.unflatten(dim, (self.groups, -1))
        return [part.flatten(dim - 1, dim) for part in spread.split(self.sizes, dim)]

    def whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The inverse of `parts`."""
        if self.groups == 1:
            return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]
        spread = [part.unflatten(dim, (self.groups, -1)) for part in parts]
        return torch.cat(spread, dim).flatten(dim - 1, dim)


def cut_of(blocks: Any, size: int, axis: int = 0) -> Cut:
    """An axis of `size` in blocks.

    Errors: ValueError where they do not add up.
    """
    cut = _cut(blocks)
    total = cut.groups * sum(cut.sizes)
    if isinstance(blocks, int) and size % blocks == 0:
        return Cut((size // blocks,) * blocks)
    if blocks is None:
        return Cut((size,))
    if isinstance(blocks, int) or total != size:
        expected = "a divisor of it" if isinstance(blocks, int) else f"blocks that add up to {size}"
        raise ValueError(
            f"has blocks={blocks!r}, but axis {axis} has {size} elements: expected {expected}"
        )
    return cut


def _cut(blocks: Any) -> Cut:
    def counts(values: Any) -> bool:
        return bool(values) and all(type(n) is int and n > 0 for n in values)

    if blocks is None or (type(blocks) is int and blocks > 0):
        return Cut(())
    if isinstance(blocks, tuple) and counts(blocks):
        return Cut(blocks)
    if isinstance(blocks, tuple) and len(blocks) == 3 and blocks[0] == "interleaved":
        _, groups, sizes = blocks
        if type(groups) is int and groups > 0 and isinstance(sizes, tuple) and counts(sizes):
            return Cut(sizes, groups)
    raise ValueError(
        f"has blocks={blocks!r}: expected None, a number of blocks, a tuple of their sizes, "
        '("interleaved", groups, sizes), or names of parameters with one of these'
    )


@dataclass(frozen=True)
class Matrices:
    """A tensor of `shape` as matrices of (rows, columns), one axis of which is cut into blocks.

    stack: the leading axes that count the matrices. of: the numbers of the blocks, those of one size
        together.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: int
    columns: int
    cut: Cut
    axis: int
    of: tuple[tuple[int, ...], ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one number per row of every block."""
        across = 1 if self.axis == 0 else len(self.cut.sizes)
        return (*self.stack, self.rows, across)

    @property
    def column_shape(self) -> tuple[int, ...]:
        """The shape of one number per column of every block."""
        across = len(self.cut.sizes) if self.axis == 0 else 1
        return (*self.stack, across, self.columns)

    @property
    def number_shape(self) -> tuple[int, ...]:
        """The shape of one number per block."""
        return (*self.stack, len(self.cut.sizes), 1)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The rows and columns of every block."""
        if self.axis == 0:
            return tuple((n, self.columns) for n in self.cut.lengths)
        return tuple((self.rows, n) for n in self.cut.lengths)

    def batches(self, x: Tensor) -> list[Tensor]:
        """The blocks of x (B, *shape) as a batch (n, rows, columns) for each size.

        x may also have a number per row, per column or per block: (B, *row_shape) and so on.
        """
        x, cut, dim = self._flat(x)
        parts = cut.parts(x, dim)
        return [
            torch.cat([parts[k] for k in ks]) if len(ks) > 1 else parts[ks[0]] for ks in self.of
        ]

    def whole(self, batches: Sequence[Tensor], like: Tensor) -> Tensor:
        """The tensor of the shape of `like` that has these batches: the inverse of `batches`."""
        flat, cut, dim = self._flat(like)
        parts: list[Any] = [None] * len(self.cut.sizes)
        for ks, batch in zip(self.of, batches, strict=True):
            for k, part in zip(ks, batch.split(len(flat)), strict=True):
                parts[k] = part
        return cut.whole(parts, dim).reshape(like.shape)

    def map(self, fn: Callable[..., Any], *tensors: Tensor, more: Sequence[Tensor] = ()) -> Any:
        """Assemble the results of `fn` for the batches of each size.

        fn: gets a batch of every tensor and of every one in `more`, and returns one for every tensor.
        """
        given = zip(*(self.batches(t) for t in (*tensors, *more)), strict=True)
        made = [fn(*batch) for batch in given]
        if len(tensors) == 1:
            return self.whole(made, tensors[0])
        return tuple(
            self.whole(m, t) for m, t in zip(zip(*made, strict=True), tensors, strict=True)
        )

    def _flat(self, x: Tensor) -> tuple[Tensor, Cut, int]:
        """x as matrices, and how these are cut."""
        shape, each = tuple(x.shape[1:]), (1,) * len(self.cut.sizes)
        number = len(x) * math.prod(self.stack)
        if shape == self.shape:
            return x.reshape(number, self.rows, self.columns), self.cut, self.axis - 2
        if shape == self.row_shape:
            flat = x.reshape(number, *shape[-2:])
            return (flat, self.cut, -2) if self.axis == 0 else (flat, Cut(each), -1)
        if shape == self.column_shape:
            flat = x.reshape(number, *shape[-2:])
            return (flat, Cut(each), -2) if self.axis == 0 else (flat, self.cut, -1)
        if shape == self.number_shape:
            return x.reshape(number, *shape[-2:]), Cut(each), -2
        raise ValueError(f"a tensor of shape {shape}, expected matrices of {self.shape}")


@functools.lru_cache(maxsize=4096)
def matrices(
    shape: tuple[int, ...], stacked: bool = False, blocks: Any = None, axis: int = 0
) -> Matrices:
    """The matrices in a tensor of this shape: kernels are (size of axis 0, rest).

    stacked: the tensor is a batch of matrices in its last two axes.
    blocks, axis: the rows (0) or columns (1) of each matrix that are a matrix of their own.
    Errors: ValueError for blocks that do not add up to the axis.
    """
    rows, columns = shape[-2:] if stacked else (shape[0], math.prod(shape[1:]))
    cut = cut_of(blocks, (rows, columns)[axis], axis)
    together: dict[int, list[int]] = {}
    for k, size in enumerate(cut.sizes):
        together.setdefault(size, []).append(k)
    stack = shape[:-2] if stacked else ()
    of = tuple(map(tuple, together.values()))
    return Matrices(shape, stack, rows, columns, cut, axis, of)


def matrices_of(shape: Sequence[int], options: Mapping[str, Any]) -> Matrices:
    """The same from a transform's options, of which it may not have all."""
    names = {"stacked": False, "blocks": None, "axis": 0}
    return matrices(tuple(shape), *(options.get(n, default) for n, default in names.items()))


def packed(parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
    """Tensors (B, ...) of several shapes as one (B, numbers), or in the shape of `like`."""
    several = [part.flatten(1) for part in parts]
    flat = torch.cat(several, 1) if len(several) > 1 else several[0]
    return flat if like is None else flat.reshape(like.shape)


def unpacked(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The inverse of `packed`: tensors (B, *shape)."""
    parts = x.flatten(1).split([math.prod(shape) for shape in shapes], 1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def _per(what: str) -> Callable[..., State]:
    def declare(holds: Holds = "values", start: float = 0.0) -> State:
        def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
            return param.new_full(
                getattr(matrices_of(param.shape, options), f"{what}_shape"), start
            )

        return State(init, f"{start:g} per {what} of each matrix", holds=holds)

    return declare


# A state with a number per row, per column, or for each block.
per_row, per_column, per_matrix = map(_per, ("row", "column", "number"))
