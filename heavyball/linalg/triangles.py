"""Batches of upper triangular matrices: products without most of their zeros, and triangles as lines."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a triangle in one product: fewer leave out more of its zeros, but are slower to multiply with.
BLOCK = 128


def places(size: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """The bounds of blocks of rows; a single block if blocks do not help."""
    block = size if _at_once(size, like) else BLOCK
    return ((low, min(low + block, size)) for low in range(0, size, block))


def _at_once(size: int, like: Tensor) -> bool:
    # for a device the zeros are less work than the launches
    return like.is_cuda or size < 2 * BLOCK


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write `a @ b` for batches of matrices."""
    if len(a) == 1:  # a batch of one is slower than a matrix by a twentieth
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def triangular_product(factor: Tensor, x: Tensor) -> Tensor:
    """`Q x` for upper triangular Q, a block of rows at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    if _at_once(size, factor):
        return factor @ x
    out = _empty(x)
    for low, high in places(size, factor):
        product(factor[:, low:high, low:], x[:, low:], out[:, low:high])
    return out


def transposed_product(factor: Tensor, x: Tensor) -> Tensor:
    """`Q^T x` for upper triangular Q, a block of rows at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    if _at_once(size, factor):
        return factor.mT @ x
    out = _empty(x)
    for low, high in places(size, factor):
        product(factor[:, :high, low:high].mT, x[:, :high], out[:, low:high])
    return out


def times_transposed(x: Tensor, factor: Tensor) -> Tensor:
    """`x Q^T` for upper triangular Q, a block of columns at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    if _at_once(size, factor):
        return x @ factor.mT
    out = _empty(x)
    for low, high in places(size, factor):
        product(x[..., low:], factor[:, low:high, low:].mT, out[..., low:high])
    return out


def times_triangle(
    x: Tensor, factor: Tensor, out: Tensor | None = None, panel: int = BLOCK
) -> Tensor:
    """`x Q` for upper triangular Q, a panel of columns at a time, without most of Q's zeros."""
    size = factor.shape[-1]
    out = _empty(x) if out is None else out
    panel = size if _at_once(size, factor) else panel
    for low in range(0, size, panel):
        high = min(low + panel, size)
        product(x[..., :high], factor[:, :high, low:high], out[..., low:high])
    return out


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
            f"a line of {length} numbers is not an upper triangle of n (n + 1) / 2 numbers"
        )
    return size


def to_line(matrix: Tensor) -> Tensor:
    """The upper triangles of a batch of matrices, row after row: (batch, n (n + 1) / 2)."""
    size = matrix.shape[-1]
    if matrix.device.type == "cpu" and size >= 2 * BLOCK:
        line = matrix.new_empty(len(matrix), line_length(size))
        _copy_rows(line, matrix.contiguous(), opening=False)
        return line
    # int32 halves what the index takes, which is as much as the line
    rows, columns = torch.triu_indices(size, size, dtype=torch.int32, device=matrix.device)
    return matrix.flatten(1).index_select(1, rows.mul_(size).add_(columns))


def from_line(line: Tensor, out: Tensor | None = None) -> Tensor:
    """The upper triangular matrices whose triangles are given row after row, in `out` if given."""
    size = line_size(line.shape[-1])
    if line.device.type != "cpu":
        return gathered(line, size)  # a mask would take a table of 64-bit places there
    out = line.new_empty(len(line), size, size) if out is None else out
    out.zero_()
    if size >= 2 * BLOCK:
        _copy_rows(line.contiguous(), out, opening=True)
        return out
    return out.masked_scatter_(torch.ones(size, size, dtype=torch.bool, device="cpu").triu_(), line)


def _copy_rows(line: Tensor, matrix: Tensor, opening: bool) -> None:
    """Copy every row of contiguous triangles: a tenth of the time of an index for long ones."""
    size, item = matrix.shape[-1], matrix.element_size()
    for short, square in zip(line, matrix, strict=True):
        near, far = short.data_ptr(), square.data_ptr()
        for length in range(size * item, 0, -item):
            ctypes.memmove(*((far, near) if opening else (near, far)), length)
            near, far = near + length, far + (size + 1) * item


def gathered(line: Tensor, size: int) -> Tensor:
    row = torch.arange(size, dtype=torch.int32, device=line.device)[:, None]
    # below the diagonal it points somewhere into the line, and triu drops what it finds there
    place = row * (2 * size - row - 1) // 2 + row.mT
    found = line.index_select(1, place.flatten())
    return found.reshape(-1, size, size).triu_()
