"""A Kronecker-factored preconditioner P = Q^T Q, Q = Q_1 x ... x Q_n, with one factor for every axis.

Tensors have the shape (batch, s_1, ..., s_n): independent parameters of the same shape. The
factor of axis i is upper triangular, (batch, s_i, s_i), or diagonal, (batch, s_i). Functions do not
write to their arguments.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor

from heavyball.linalg.scratch import scratch
from heavyball.linalg.triangles import (
    line_length,
    times_transposed,
    times_triangle,
    transposed_product,
    triangular_product,
)
from heavyball.linalg.whitening import whitened
from heavyball.numerics.random import round_stochastically

# Neighbouring axes of so many elements together are one axis in products. The kernel of a convolution
# is then three axes, and what is done along the last two is done once.
JOINT = 64
# Multiply with Q^T Q, rather than with Q and Q^T, from so many columns for each row on.
SQUARED = 3

MemorySaveMode = Literal["one_diag", "smart_one_diag", "all_diag", "one_triu", None]


def triangular_axes(
    shape: Sequence[int], max_size: int, min_ndim: int, mode: MemorySaveMode
) -> tuple[bool, ...]:
    """Which axes of a tensor get a triangular factor; the others get a diagonal one.

    Axes of one element or of more than `max_size`, and all axes of a tensor with fewer than `min_ndim`
    dimensions, are diagonal, and so are, depending on the mode:

    one_diag        the largest axis
    smart_one_diag  the largest axis, if it is larger than every other
    all_diag        all
    one_triu        all but the smallest of the axes that may be triangular

    Among equal axes, the last counts as the largest and the first as the smallest.
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


def _along(
    x: Tensor,
    axis: int,
    from_left: Callable[[Tensor], Tensor],
    from_right: Callable[[Tensor], Tensor],
) -> Tensor:
    """A product along one axis: of columns (s, rest), or of rows (rest, s) if it is the innermost.

    Matrices are multiplied from either side without a copy.
    """
    places = _by_stride(x)
    axis += 1
    others = [place for place in places if place != axis]
    innermost = others and places[-1] == axis
    order = [0, *others, axis] if innermost else [0, axis, *others]
    moved = x.permute(order)
    size = x.shape[axis]
    if innermost:
        made = from_right(moved.reshape(len(x), -1, size))
    else:
        made = from_left(moved.reshape(len(x), size, -1))
    return made.reshape(moved.shape).permute([order.index(place) for place in range(x.ndim)])


def _swapped(product: Callable[[Tensor, Tensor], Tensor], q: Tensor, y: Tensor) -> Tensor:
    return product(y, q)


def _both_left(q: Tensor, y: Tensor) -> Tensor:
    return transposed_product(q, triangular_product(q, y))


def _both_right(q: Tensor, y: Tensor) -> Tensor:
    return times_triangle(times_transposed(y, q), q)


def _by_stride(x: Tensor) -> list[int]:
    """The axes of a tensor after the batch, the outermost in memory first."""
    return sorted(range(1, x.ndim), key=x.stride().__getitem__, reverse=True)


def apply(x: Tensor, factors: Sequence[Tensor], transpose: bool = False) -> Tensor:
    """The mode products `x x_1 Q_1 ... x_n Q_n`, or those with the transposed factors.

    For a matrix: Q_1 x Q_2^T.
    """
    left = transposed_product if transpose else triangular_product
    right = times_triangle if transpose else times_transposed
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor):
            x = x * _spread(factor, axis, x.ndim)
        else:
            x = _along(x, axis, partial(left, factor), partial(_swapped, right, factor))
    return x


def precondition(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`P x` with P = Q^T Q: the mode products with every Q_i^T Q_i."""
    shape = x.shape
    x, factors = _joined(x, factors)
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor):
            x = x * _spread(factor.square(), axis, x.ndim)
        elif x[0].numel() >= SQUARED * factor.shape[-1] ** 2:
            x = _times_square(x, axis, transposed_product(factor, factor))
        else:
            x = _along(x, axis, partial(_both_left, factor), partial(_both_right, factor))
    return x.reshape(shape)


def squares(factors: Sequence[Tensor]) -> list[Tensor]:
    """`Q_i^T Q_i` for every factor, what `precondition_with` takes."""
    return [q.square() if _is_diagonal(q) else transposed_product(q, q) for q in factors]


def precondition_with(x: Tensor, squared: Sequence[Tensor]) -> Tensor:
    """`P x` from the stored `Q_i^T Q_i`: half the products of `precondition`."""
    for axis, square in enumerate(squared):
        diagonal = _is_diagonal(square)
        x = x * _spread(square, axis, x.ndim) if diagonal else _times_square(x, axis, square)
    return x


def _times_square(x: Tensor, axis: int, square: Tensor) -> Tensor:
    return _along(x, axis, lambda y: square @ y, lambda y: y @ square)


def solve_transposed(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`x x_1 Q_1^(-T) ... x_n Q_n^(-T)`; for a matrix Q_1^(-T) x Q_2^(-1). In float32 or better."""
    for axis, factor in enumerate(factors):
        if _is_diagonal(factor):
            x = x / _spread(factor, axis, x.ndim)
            continue
        # rows y with y Q = x: torch solves them in their own layout, columns it would transpose
        order = [0, *(place for place in _by_stride(x) if place != axis + 1), axis + 1]
        moved = x.permute(order)
        rows = moved.reshape(len(x), -1, x.shape[axis + 1])
        rows = torch.linalg.solve_triangular(factor, rows, upper=True, left=False)
        x = rows.reshape(moved.shape).permute([order.index(place) for place in range(x.ndim)])
    return x


# ---- axes taken together


def _runs(shape: Sequence[int]) -> list[list[int]]:
    """Neighbouring axes to be taken as one: as many as have at most `JOINT` elements together.

    The matrix of such an axis has no more elements than the tensor.
    """
    most = min(JOINT, math.isqrt(math.prod(shape)))
    found: list[list[int]] = []
    size = most + 1
    for axis, here in enumerate(shape):
        if size * here > most:
            found.append([])
            size = 1
        found[-1].append(axis)
        size *= here
    return found


def _joined(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same tensor with its short axes taken together, and the factors of that: Q_i x Q_(i+1)."""
    runs = _runs(x.shape[1:])
    shape = [math.prod(x.shape[1 + axis] for axis in run) for run in runs]
    return x.reshape(len(x), *shape), [reduce(_outer, (factors[i] for i in run)) for run in runs]


def _outer(one: Tensor, other: Tensor) -> Tensor:
    """The Kronecker product of two factors, upper triangular if both are, diagonal if both are."""
    if _is_diagonal(one) and _is_diagonal(other):
        return (one[:, :, None] * other[:, None]).flatten(1)
    one, other = (torch.diag_embed(q) if _is_diagonal(q) else q for q in (one, other))
    size = one.shape[-1] * other.shape[-1]
    return (one[:, :, None, :, None] * other[:, None, :, None]).reshape(len(one), size, size)


def _parts(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each of the axes that are one here, the sum over what is the diagonal of the others."""
    found = []
    for place, size in enumerate(sizes):
        before, after = math.prod(sizes[:place]), math.prod(sizes[place + 1 :])
        split = matrix.reshape(len(matrix), before, size, after, before, size, after)
        found.append(torch.einsum("bisjitj->bst", split))
    return found


def unfolded(x: Tensor, axis: int) -> Tensor:
    """The matrix whose rows are the slices of x along one axis, each in the order of memory."""
    others = [place for place in _by_stride(x) if place != axis + 1]
    return x.permute(0, axis + 1, *others).reshape(x.shape[0], x.shape[axis + 1], -1)


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

    x' is x with noise of relative size sqrt(2^-23). The factors of a member of the batch do not change
    if x is zero, which does not determine its scale, or if a new factor would not be finite.
    passing: new triangles are valid only until the next fit, see `scratch`.

    Shapes: x, noise (batch, s_1, ..., s_n).
    Source: Li 2015, https://arxiv.org/abs/1512.04202, and 2024, https://arxiv.org/abs/2402.11858,
        for the group of Kronecker products of triangular matrices.
    """
    runs = _runs(x.shape[1:])
    seen, joint = _joined(x, factors)
    image = apply(damped(x, noise).reshape(seen.shape), joint)
    inverse = solve_transposed(noise.reshape(image.shape), joint)
    shapes = [factor.shape for factor in factors]
    room = scratch("fitted", x, *shapes) if passing else [x.new_empty(shape) for shape in shapes]
    new: list[Tensor] = []
    for axis, run in enumerate(runs):
        if len(run) > 1:
            own = [factors[i] for i in run]
            new += _fitted_together(own, gram(image, axis, False), gram(inverse, axis, False), lr)
        elif _is_diagonal(joint[axis]):
            one, two = gram(image, axis, True), gram(inverse, axis, True)
            new.append(_diagonal_step(joint[axis], one, two, lr))
        else:
            one, two = unfolded(image, axis), unfolded(inverse, axis)
            new.append(whitened(joint[axis], one, two, lr, room[run[0]]))
    informative = largest_entry(x) > 0
    return usable(new, factors, informative)


def _diagonal_step(factor: Tensor, one: Tensor, two: Tensor, lr: Tensor | float) -> Tensor:
    tiny = torch.finfo(factor.dtype).tiny
    bound = (one + two).amax(dim=-1, keepdim=True).clamp(min=tiny)
    return factor - factor * (one - two) * (lr / bound)


def _fitted_together(
    factors: Sequence[Tensor], one: Tensor, two: Tensor, lr: Tensor | float
) -> list[Tensor]:
    """New factors of axes that are taken as one, from the Gram matrices of that one."""
    sizes = [factor.shape[-1] for factor in factors]
    new = []
    for factor, t1, t2 in zip(factors, _parts(one, sizes), _parts(two, sizes), strict=True):
        if _is_diagonal(factor):
            t1, t2 = (t.diagonal(dim1=-2, dim2=-1) for t in (t1, t2))
            new.append(_diagonal_step(factor, t1, t2, lr))
        else:
            bound = norm_lower_bound(t1 + t2).clamp(min=torch.finfo(factor.dtype).tiny)
            new.append(factor - (t1 - t2).triu() @ factor * (lr / bound))
    return new


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
