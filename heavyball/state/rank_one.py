"""A tensor as the product of a row and a column, with a bit for each sign; `state/packed.py` uses it.

    |x| ~ r c / s,   r = sums over rows, c = sums over columns, s = the sum of both
    held: r / d2 and c d2 / s for d2 columns, so that no sum leaves the range of float32

A tensor of another shape is seen as a matrix that is as square as its number of elements allows. It is
exact for |x| of rank one, keeps the sums over rows and columns of any |x|, and rounds nothing at random:
its error is systematic.

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


def factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What is held of the magnitudes: the means of rows, and those of columns over the mean of all."""
    size = matrix.abs()
    total = size.sum(dtype=torch.float64)
    rows = size.mean(1, dtype=torch.float64)
    columns = size.sum(0, dtype=torch.float64) * (matrix.shape[1] / total)
    columns = torch.where(torch.isfinite(total), columns, torch.nan)
    columns = torch.where(total == 0, 0, columns)
    return rows.to(matrix.dtype), columns.to(matrix.dtype)


def sign_bits(matrix: Tensor) -> Tensor:
    """A bit for each value, 1 where it is above zero: value k of a row has bit k % 8 of byte k // 8."""
    above = torch.nn.functional.pad(matrix > 0, (0, -matrix.shape[1] % 8)).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=matrix.device)
    return (above.view(len(matrix), -1, 8) << places).sum(2, dtype=torch.uint8)


def values(rows: Tensor, columns: Tensor, signs: Tensor | None) -> Tensor:
    """The matrix of which `factors` and `sign_bits` were taken.

    Without signs no value is negative, and none is zero unless its row or column is.
    """
    product = torch.outer(rows, columns)
    info = torch.finfo(product.dtype)
    known = torch.isfinite(rows)[:, None] & torch.isfinite(columns)
    product = torch.where(known, product.clamp(max=info.max), torch.nan)
    if signs is None:
        some = (rows > 0)[:, None] & (columns > 0)
        return torch.where(some & (product < info.tiny), info.tiny, product)
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)
    above = ((signs[:, :, None] >> places) & 1).flatten(1)[:, : len(columns)]
    return torch.where(above > 0, product, -product)
