"""One step of a triangular factor towards whiteness, a block of its rows at a time.

With the rows A of the image and B of the inverse, T1 = A A^T and T2 = B B^T exist for one block of rows
only, so what is done to their elements is done in the cache, and the largest temporary tensor is the
new factor itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from heavyball.linalg.scratch import scratch
from heavyball.linalg.triangles import places, product, times_triangle

# Few rows are multiplied with a triangle by wider panels of columns.
PANEL = 256

Times = Callable[[Tensor], Tensor]


def whitened(
    factor: Tensor, image: Tensor, inverse: Tensor, lr: Tensor | float, out: Tensor
) -> Tensor:
    """`Q - lr triu(T1 - T2) Q / bound of ||T1 + T2||`, in `out`.

    The bound is `kron.norm_lower_bound`.

    Shapes: factor, out (batch, n, n), upper triangular; image, inverse (batch, n, rest).
    """
    tiny = torch.finfo(factor.dtype).tiny
    largest = (_row_squares(image) + _row_squares(inverse)).amax(-1)[:, None, None].clamp(min=tiny)
    squares = factor.new_zeros(factor.shape[:2])
    size, rest = image.shape[1:]
    # S = (T1 + T2) / largest is kept where it is smaller than what it is made of
    kept = torch.empty_like(out) if size < rest else None
    for low, high in places(size, factor):
        shape = len(factor), high - low, size - low
        one, two, total = scratch("whitened", factor, shape, shape, shape)
        product(image[:, low:high], image[:, low:].mT, one)
        product(inverse[:, low:high], inverse[:, low:].mT, two)
        torch.add(one, two, out=total).div_(largest)
        if kept is not None:
            kept[:, low:high, low:] = total
            kept[:, high:, low:high] = total[..., high - low :].mT
        total.square_()
        squares[:, low:high] += total.sum(-1)
        squares[:, high:] += total[..., high - low :].sum(-2)
        one.sub_(two)[..., : high - low].triu_()
        out[:, low:high, :low].zero_()
        times_triangle(one, factor[:, low:, low:], out[:, low:high, low:])
    times = _times_pair(image, inverse, largest) if kept is None else _times_matrix(kept)
    bound = (largest * _unit_bound(times, squares)).clamp(min=tiny)
    return torch.addcmul(factor, out, -lr / bound, out=out)


def _row_squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1).square_()


def _times_matrix(matrix: Tensor) -> Times:
    return lambda x: matrix @ x


def _times_pair(one: Tensor, other: Tensor, largest: Tensor) -> Times:
    """S x without S."""
    return lambda x: one @ ((one.mT @ x) / largest) + other @ ((other.mT @ x) / largest)


def _unit_bound(times: Times, squares: Tensor) -> Tensor:
    """||S x|| for S x_0 / ||S x_0||, x_0 the column of S whose norm squared is the largest."""
    tiny = torch.finfo(squares.dtype).tiny
    start = torch.zeros_like(squares).scatter_(1, squares.argmax(-1, keepdim=True), 1.0)
    x = times(times(start[..., None]))
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=tiny)
    return torch.linalg.vector_norm(times(x), dim=-2, keepdim=True)
