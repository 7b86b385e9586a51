"""A Kronecker-factored preconditioner P = Q^T Q, Q = Q_1 x ... x Q_n, with one factor for every axis.

A tensor has the shape (batch, s_1, ..., s_n): so many parameters of one shape, each on its own. The
factor of axis i is upper triangular, (batch, s_i, s_i), or diagonal, (batch, s_i). Nothing here writes
to its arguments.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from heavyball.numerics.contract import axis_letters, contract
from heavyball.numerics.rounding import round_stochastically
from heavyball.numerics.scratch import scratch
from heavyball.numerics.triangles import (
    line_length,
    times_transposed,
    times_triangle,
    transposed_product,
    triangular_product,
)
from heavyball.numerics.whitening import whitened

MemorySaveMode = Literal["one_diag", "smart_one_diag", "all_diag", "one_triu", None]


def triangular_axes(
    shape: Sequence[int], max_size: int, min_ndim: int, mode: MemorySaveMode
) -> tuple[bool, ...]:
    """Which axes of a tensor get a triangular factor; the others get a diagonal one.

    Diagonal are axes of one element or of more than `max_size`, all axes of a tensor with fewer than
    `min_ndim` dimensions, and what the mode says:

    one_diag        the largest axis
    smart_one_diag  the largest axis, if it is larger than every other
    all_diag        all
    one_triu        all but the smallest of the axes that may be triangular

    Of equal axes the last is the largest and the first is the smallest.
    """
    allowed = [1 < size <= max_size and len(shape) >= min_ndim for size in shape]
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if mode == "all_diag":
        return (False,) * len(shape)
    if mode == "one_triu":
        smallest = next((axis for axis in order if allowed[axis]), None)
        return tuple(axis == smallest for axis in range(len(shape)))
    if mode is not None and order:
        tied = len(order) > 1 and shape[order[-1]] == shape[order[-2]]
        if mode == "one_diag" or (len(order) > 1 and not tied):
            allowed[order[-1]] = False
    return tuple(allowed)


def identity(
    size: int, triangular: bool, scale: float, like: Tensor, *, line: bool = False
) -> Tensor:
    """One factor at its beginning, `scale` times the identity, without a batch."""
    if not triangular:
        return torch.full((size,), scale, dtype=like.dtype, device=like.device)
    if not line:
        return torch.eye(size, dtype=like.dtype, device=like.device) * scale
    place = torch.arange(size, device=like.device)
    made = torch.zeros(line_length(size), dtype=like.dtype, device=like.device)
    return made.index_fill_(0, place * size - place * (place - 1) // 2, scale)


# ---- products


def _is_diagonal(factor: Tensor) -> bool:
    return factor.ndim == 2


def _spread(diagonal: Tensor, axis: int, ndim: int) -> Tensor:
    """A batch of diagonals, shaped to be multiplied with tensors of `ndim` dimensions in all."""
    return diagonal.reshape(diagonal.shape[0], *(-1 if i == axis else 1 for i in range(ndim - 1)))


def _along_matrix(x: Tensor, factor: Tensor, axis: int, transpose: bool) -> Tensor:
    """A triangle applied to rows (axis 0) or columns of a batch of matrices."""
    if axis == 0:
        return transposed_product(factor, x) if transpose else triangular_product(factor, x)
    return times_triangle(x, factor) if transpose else times_transposed(x, factor)


def _einsum_of(x: Tensor, factors: Sequence[Tensor], transpose: bool) -> Tensor:
    """Factors applied to a tensor of more than two dimensions in one contraction."""
    batch, *rest = axis_letters(2 * x.ndim)
    inner, outer = rest[: x.ndim - 1], rest[x.ndim - 1 : 2 * x.ndim - 2]
    terms, result = [], []
    for factor, old, new in zip(factors, inner, outer, strict=True):
        if _is_diagonal(factor):
            terms.append(batch + old)
            result.append(old)
        else:
            terms.append(batch + (old + new if transpose else new + old))
            result.append(new)
    equation = f"{','.join(terms)},{batch}{''.join(inner)}->{batch}{''.join(result)}"
    return contract(equation, *factors, x)


def apply(x: Tensor, factors: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """The mode products `x x_1 Q_1 ... x_n Q_n`, or those with the transposed factors.

    For a matrix: Q_1 x Q_2^T.
    """
    if x.ndim == 2:
        return apply(x[..., None], factors, transpose)[..., 0]
    if x.ndim > 3:
        return _einsum_of(x, factors, transpose)
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor):
            x = x * _spread(factor, axis, x.ndim)
        else:
            x = _along_matrix(x, factor, axis, transpose)
    return x


def precondition(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`P x` with P = Q^T Q: the mode products with every Q_i^T Q_i."""
    if x.ndim == 2:
        return precondition(x[..., None], factors)[..., 0]
    if x.ndim > 3:
        return _einsum_of(_einsum_of(x, factors, False), factors, True)
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor):
            x = x * _spread(factor.square(), axis, x.ndim)
        else:
            x = _along_matrix(_along_matrix(x, factor, axis, False), factor, axis, True)
    return x


def squares(factors: Sequence[Tensor]) -> list[Tensor]:
    """`Q_i^T Q_i` for every factor, what `precondition_with` takes."""
    return [q.square() if _is_diagonal(q) else transposed_product(q, q) for q in factors]


def precondition_with(x: Tensor, squared: Sequence[Tensor]) -> Tensor:
    """`P x` from the stored `Q_i^T Q_i`: half the products of `precondition`."""
    if x.ndim == 2:
        return precondition_with(x[..., None], squared)[..., 0]
    if x.ndim > 3:
        return _einsum_of(x, squared, False)
    for axis, square in enumerate(squared):
        if _is_diagonal(square):
            x = x * _spread(square, axis, x.ndim)
        else:
            x = square @ x if axis == 0 else x @ square
    return x


def solve_transposed(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`x x_1 Q_1^(-T) ... x_n Q_n^(-T)`; for a matrix Q_1^(-T) x Q_2^(-1). In float32 or better."""
    for axis, factor in enumerate(factors, start=1):
        if _is_diagonal(factor):
            x = x / _spread(factor, axis - 1, x.ndim)
            continue
        # rows y with y Q = x: torch solves them in place of their own layout, without a transposition
        rows = x.movedim(axis, -1)
        flat = rows.reshape(x.shape[0], -1, x.shape[axis])
        flat = torch.linalg.solve_triangular(factor, flat, upper=True, left=False)
        x = flat.reshape(rows.shape).movedim(-1, axis)
    return x


def unfolded(x: Tensor, axis: int) -> Tensor:
    """The matrix whose rows are the slices of x along one axis."""
    rows = x if x.ndim == 3 and axis == 0 else x.movedim(axis + 1, 1)
    return rows.reshape(x.shape[0], x.shape[axis + 1], -1)


def gram(x: Tensor, axis: int, diagonal: bool) -> Tensor:
    """`X X^T` for the unfolding X of x along one axis, or only its diagonal."""
    if diagonal:
        others = tuple(d for d in range(1, x.ndim) if d != axis + 1)
        return x.square() if not others else x.square().sum(dim=others)
    rows = unfolded(x, axis)
    return rows @ rows.mT


# ---- fitting


def norm_lower_bound(matrix: Tensor) -> Tensor:
    """A cheap lower bound of the spectral norm of symmetric matrices, (batch, 1, 1).

    With S' = S / M, M = max |S|, and the column x of S' with the largest norm:
    x <- S' x / ||S' x||, bound = M ||S' x||. It is at least ||S x_0|| / ||x_0|| for the column x_0, and
    so never below ||S||_F / sqrt(n); the division by M keeps squares from overflowing.

    Source: psgd_torch's norm_lower_bound for symmetric matrices, as in the Kron optimizer.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    largest = largest_entry(matrix)[:, None, None]
    matrix = matrix / largest.clamp(min=tiny)
    norms = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    place = norms.argmax(dim=-1, keepdim=True).expand(-1, matrix.shape[-2], 1)
    x = matrix @ matrix.gather(-1, place)
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=tiny)
    return largest * torch.linalg.vector_norm(matrix @ x, dim=-2, keepdim=True)


def largest_entry(x: Tensor) -> Tensor:
    """max |x| of each member of a batch; NaN where there is one."""
    # on a CPU twenty times as fast as the infinity norm
    rows = x.reshape(x.shape[0], -1)
    return torch.maximum(rows.amax(1), -rows.amin(1))


def damped(x: Tensor, noise: Tensor) -> Tensor:
    """`x + sqrt(2^-23) mean|x| noise`, a new tensor, so that no noise reaches the update."""
    size = torch.linalg.vector_norm(x.flatten(1), ord=1, dim=1) / max(x[0].numel(), 1)
    return torch.addcmul(x, noise, (size * 2.0**-11.5).reshape(-1, *[1] * (x.ndim - 1)))


def fitted(
    factors: Sequence[Tensor],
    x: Tensor,
    noise: Tensor,
    lr: Tensor | float,
    passing: bool = False,
) -> list[Tensor]:
    """New factors, one step nearer to whitening x: E[P x x^T P] = I.

    With A = x' x_i Q_i, B = noise x_i Q_i^(-T), their Gram matrices T1, T2 along axis i:

    triangular  Q_i <- Q_i - lr triu(T1 - T2) Q_i / bound of ||T1 + T2||
    diagonal    q_i <- q_i - lr (t1 - t2) q_i / max(t1 + t2)

    x' is x with noise of relative size sqrt(2^-23). The factors of a member of the batch stay what
    they were where x is zero, which says nothing about its scale, or where a new factor would not
    be finite. passing: new triangles are good until the next fit only, see `scratch`.

    Shapes: x, noise (batch, s_1, ..., s_n).
    Source: Li 2015, https://arxiv.org/abs/1512.04202, and 2024, https://arxiv.org/abs/2402.11858,
        for the group of Kronecker products of triangular matrices.
    """
    image = apply(damped(x, noise), factors)
    inverse = solve_transposed(noise, factors)
    shapes = [factor.shape for factor in factors]
    room = scratch("fitted", x, *shapes) if passing else [x.new_empty(shape) for shape in shapes]
    new = []
    for axis, factor in enumerate(factors):
        tiny = torch.finfo(factor.dtype).tiny
        if _is_diagonal(factor):
            one, two = gram(image, axis, True), gram(inverse, axis, True)
            bound = (one + two).amax(dim=-1, keepdim=True).clamp(min=tiny)
            new.append(factor - factor * (one - two) * (lr / bound))
        else:
            rows = (unfolded(y, axis) for y in (image, inverse))
            new.append(whitened(factor, *rows, lr, room[axis]))
    informative = largest_entry(x) > 0
    return usable(new, factors, informative)


def usable(
    new: Sequence[Tensor], old: Sequence[Tensor], condition: Tensor | None = None
) -> list[Tensor]:
    """The new factors where all of them are finite (and the condition holds), else all old ones."""
    good = torch.stack([largest_entry(q).isfinite() for q in new]).all(dim=0)
    if condition is not None:
        good = good & condition
    if good.device.type == "cpu" and bool(good.all()):
        return list(new)  # reading it costs nothing there, and spares copies
    return [
        torch.where(good.reshape(-1, *[1] * (q.ndim - 1)), q, before)
        for q, before in zip(new, old, strict=True)
    ]


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors scaled to one and the same largest entry, their geometric mean, so P is unchanged."""
    sizes = torch.stack([largest_entry(q) for q in factors])
    sizes = sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    scales = sizes.log().mean(dim=0).exp() / sizes
    new = [q * s.reshape(-1, *[1] * (q.ndim - 1)) for q, s in zip(factors, scales, strict=True)]
    return usable(new, factors)


def rounded(factor: Tensor, bits: Tensor) -> Tensor:
    """A factor with the precision of bfloat16, stochastically rounded; its dtype stays."""
    value = round_stochastically(factor.to(torch.float32), bits)
    return value.to(factor.dtype)
