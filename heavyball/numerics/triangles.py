"""Batches of upper triangular matrices: products without most of their zeros, and triangles as lines."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a triangle in one product: fewer leave out more of its zeros, but are slower to multiply with.
BLOCK = 128


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Where blocks of rows begin and end."""
    return ((low, min(low + BLOCK, size)) for low in range(0, size, BLOCK))


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def triangular_product(factor: Tensor, x: Tensor) -> Tensor:
    """`Q x` for upper triangular Q, a block of rows at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    if size < 2 * BLOCK:
        return factor @ x
    out = _empty(x)
    for low, high in _places(size):
        torch.bmm(factor[:, low:high, low:], x[:, low:], out=out[:, low:high])
    return out


def transposed_product(factor: Tensor, x: Tensor) -> Tensor:
    """`Q^T x` for upper triangular Q, a block of rows at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    if size < 2 * BLOCK:
        return factor.mT @ x
    out = _empty(x)
    for low, high in _places(size):
        torch.bmm(factor[:, :high, low:high].mT, x[:, :high], out=out[:, low:high])
    return out


def product_of_triangles(one: Tensor, other: Tensor) -> Tensor:
    """`T Q` for upper triangular T and Q, with less than a third of the operations of a full product."""
    size = one.shape[-1]
    if size < 2 * BLOCK:
        return one @ other
    half = size // 2
    top, low = slice(None, half), slice(half, None)
    out = torch.zeros_like(other, memory_format=torch.contiguous_format)
    out[:, top, top] = product_of_triangles(one[:, top, top], other[:, top, top])
    out[:, low, low] = product_of_triangles(one[:, low, low], other[:, low, low])
    # the other one is triangular from the right: (T Q)^T = Q^T T^T
    corner = transposed_product(other[:, low, low], one[:, top, low].mT).mT
    out[:, top, low] = corner.add_(triangular_product(one[:, top, top], other[:, top, low]))
    return out


def upper_gram(rows: Tensor) -> Tensor:
    """The upper triangle of `X X^T`, with little more than half of the operations."""
    size = rows.shape[1]
    if size < 2 * BLOCK:
        return (rows @ rows.mT).triu_()
    out = rows.new_empty(rows.shape[0], size, size)
    for low, high in _places(size):
        torch.bmm(rows[:, low:high], rows[:, low:].mT, out=out[:, low:high, low:])
    return out.triu_()


# ---- a triangle as a line


def line_length(size: int) -> int:
    """How many numbers the upper triangle of a `size` x `size` matrix has."""
    return size * (size + 1) // 2


def line_size(length: int) -> int:
    """The size of the matrix whose upper triangle has `length` numbers.

    Errors: ValueError if there is none.
    """
    size = int((2 * length) ** 0.5)
    if line_length(size) != length:
        raise ValueError(
            f"a line of {length} numbers is no upper triangle: n (n + 1) / 2 is not it"
        )
    return size


def to_line(matrix: Tensor) -> Tensor:
    """The upper triangles of a batch of matrices, row after row: (batch, n (n + 1) / 2)."""
    size = matrix.shape[-1]
    # int32 halves what the index takes, which is as much as the line
    rows, columns = torch.triu_indices(size, size, dtype=torch.int32, device=matrix.device)
    return matrix.flatten(1).index_select(1, rows.mul_(size).add_(columns))


def from_line(line: Tensor) -> Tensor:
    """The upper triangular matrices whose triangles are given row after row."""
    size = line_size(line.shape[-1])
    if line.device.type != "cpu":
        return gathered(line, size)  # a mask would take a table of 64-bit places there
    mask = torch.ones(size, size, dtype=torch.bool).triu_()
    return line.new_zeros(line.shape[0], size, size).masked_scatter_(mask, line)


def gathered(line: Tensor, size: int) -> Tensor:
    row = torch.arange(size, dtype=torch.int32, device=line.device)[:, None]
    # below the diagonal it points somewhere into the line, and triu drops what it finds there
    place = row * (2 * size - row - 1) // 2 + row.mT
    found = line.index_select(1, place.flatten())
    return found.reshape(-1, size, size).triu_()
