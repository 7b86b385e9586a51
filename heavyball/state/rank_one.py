"""A tensor as the product of a row and a column, with a bit for each sign; `state/packed.py` uses it.

    |x| ~ r c / s,   r = sums over rows, c = sums over columns, s = the sum of both
    held: r / d2 and c d2 / s for d2 columns, so that no sum leaves the range of float32

A tensor of another shape is seen as a matrix that is as square as its number of elements allows. It is
exact for |x| of rank one, keeps the sums over rows and columns of any |x|, and rounds nothing at random:
its error is systematic. Kernels record `product` and `renewed` (`compiler/passes/rank_one.py`), so these
are elementwise code with means over axes.

Source: SMMF, Park and Lee 2024, https://arxiv.org/abs/2412.08894. Departure: held is what stands above.

One infinity or NaN turns every value into NaN; nothing here makes a finite value infinite.
"""

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=65536)
def sides(numel: int) -> tuple[int, int]:
    """Rows and columns of the most square matrix of so many elements; never more columns than rows."""
    columns = next(n for n in range(max(math.isqrt(numel), 1), 0, -1) if numel % n == 0)
    return numel // columns, columns


def fits(numel: int) -> bool:
    """Whether rows and columns are fewer than elements."""
    return sides(numel)[1] > 1


def sign_shape(numel: int) -> tuple[int, int]:
    """The shape of the signs: the bytes of each row."""
    rows, columns = sides(numel)
    return rows, -(-columns // 8)


def means(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What is held: the means of rows (R, 1), and those of columns (1, C) over that of all.

    A mean of all below the least normal number is none, so that no quotient leaves the range.
    """
    size, dtype = matrix.abs(), matrix.dtype
    total = size.mean(dtype=torch.float64)
    total = torch.where(total < torch.finfo(dtype).tiny, 0.0, total)
    rows, columns = (size.mean(k, keepdim=True, dtype=torch.float64).to(dtype) for k in (1, 0))
    columns = torch.where(torch.isfinite(total), columns / total, torch.nan)
    return rows, torch.where(total == 0, 0.0, columns)


def product(rows: Tensor, columns: Tensor, above: Tensor | None) -> Tensor:
    """The matrix of rows (R, 1) and columns (1, C), negative where `above` is false.

    Without it no value is negative, and none is zero unless its row or column is.
    """
    info = torch.finfo(rows.dtype)
    found = (rows * columns).clamp(max=info.max)
    if above is None:
        least = (torch.where(x > 0, info.tiny, -torch.inf) for x in (rows, columns))
        return torch.maximum(found, torch.minimum(*least))
    return torch.where(above, found, -found)


def renewed(
    rows: Tensor, columns: Tensor, above: Tensor | None, matrix: Tensor
) -> tuple[Tensor, ...]:
    """What is held of a new matrix: rows, columns, and which values are above zero.

    A matrix that did not change keeps its bits, as where a step was skipped.
    """
    same = product(rows, columns, above) == matrix
    whole = same.all()
    pairs = zip((rows, columns), means(matrix), strict=True)
    kept = [torch.where(whole, old, new) for old, new in pairs]
    if above is None:
        return tuple(kept)
    return (*kept, (same & above) | (~same & (matrix > 0)))


# ---- as tensors are held: a row, a column, and the bits of signs


def factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What is held of the magnitudes, in one dimension."""
    rows, columns = means(matrix)
    return rows[:, 0], columns[0]


def packed(above: Tensor) -> Tensor:
    """A bit for each truth value: value k of a row has bit k % 8 of byte k // 8."""
    bits = torch.nn.functional.pad(above, (0, -above.shape[1] % 8)).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=above.device)
    return (bits.view(len(above), -1, 8) << places).sum(2, dtype=torch.uint8)


def unpacked(signs: Tensor, columns: int) -> Tensor:
    """The truth values that `packed` made bits of."""
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs[:, :, None] >> places) & 1).flatten(1)[:, :columns].to(torch.bool)


def sign_bits(matrix: Tensor) -> Tensor:
    """The bits of the signs, 1 where a value is above zero."""
    return packed(matrix > 0)


def values(rows: Tensor, columns: Tensor, signs: Tensor | None) -> Tensor:
    """The matrix of which `factors` and `sign_bits` were taken."""
    above = None if signs is None else unpacked(signs, len(columns))
    return product(rows[:, None], columns[None], above)
