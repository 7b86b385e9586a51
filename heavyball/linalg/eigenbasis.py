"""Bases of eigenvectors, refreshed incrementally, and the transfer of moments to a new basis.

All functions take batches (B, n, n). A matrix with entries that are not finite is never used: its basis
does not change.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.errors import warn
from heavyball.linalg.modes import product, rotate
from heavyball.linalg.orthogonalize import newton_schulz
from heavyball.linalg.scratch import scratch

Refresh = str
REFRESHES = ("qr", "newtonschulz", "svd", "eigh")

# Added to the diagonal, so that the eigenvectors of a zero matrix are those of the identity.
TINY = 1e-30
# Newton-Schulz steps to full precision for singular values from 1e-3 on; here they are 1 or more.
POLAR_STEPS = 8


def checked_refresh(way: Any, name: str = "zeroth_power_mode") -> Refresh:
    """One of `REFRESHES`, or "newtonschulz" with a number of steps.

    Errors: ValueError naming the value.
    """
    plain = way.removeprefix("newtonschulz") if isinstance(way, str) else ""
    counted = plain != way and plain.isascii() and plain.isdigit() and 1 <= int(plain[:4]) <= 100
    if way in REFRESHES or counted:
        return way
    raise ValueError(
        f"{name}={way!r}: expected one of {', '.join(map(repr, REFRESHES))}, or 'newtonschulz' with a "
        "number of steps from 1 to 100"
    )


def eigenbasis(matrix: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Eigenvectors as columns, by descending eigenvalue.

    A decomposition that does not converge is retried in float64; if that fails too, the result is
    `fallback` (the identity if None), with one warning.
    """
    return _decomposed(
        _by_eigh, matrix, lambda: _identity(matrix) if fallback is None else fallback
    )


def refreshed(
    matrix: Tensor, basis: Tensor, way: Refresh, sort: bool = True
) -> tuple[Tensor, Tensor]:
    """A basis closer to the eigenvectors of `matrix`, and the order of the old columns in it.

    With e_i = q_i^T A q_i, the columns are first sorted by descending e (`order`); then

    qr            the orthogonal factor of A Q: one power iteration.
    newtonschulz  the polar factor of Q (I + L - L^T), with L the strictly lower triangle of Q^T A Q,
                  its columns over their norms in Q^T A Q: the iteration of qr to first order, with
                  products only. "newtonschulz5" makes 5 steps for the polar factor instead of 8, with a
                  correspondingly less orthogonal basis.
    svd           the left singular vectors of A Q: all the way to the eigenvectors.
    eigh          the eigenvectors of A.

    sort: False keeps the order of the columns.

    The polar factor of A Q itself is Q for any positive definite A, so it would not refresh the basis.

    Shapes: matrix, basis (B, n, n); order (B, n).
    """
    # the image transposed: sorting rows is copying them, and LAPACK wants columns one after the other;
    # fastest where the columns of the old basis are so too
    image = _product_in_scratch(basis.mT, matrix)
    sizes = (basis.mT * image).sum(-1)
    # a matrix that cannot be used must not reorder its basis; stable, so that ties stay in place
    known = _usable(matrix)
    sizes = torch.where(known[:, 0, 0, None], sizes, 0)
    if not sort:
        sizes = torch.zeros_like(sizes)
    order = sizes.argsort(dim=-1, descending=True, stable=True)
    if way == "eigh":
        return _decomposed(_by_eigh, matrix, lambda: _columns(basis, order)), order
    image = _columns(image.mT, order)
    steps = int(way.removeprefix("newtonschulz") or POLAR_STEPS) if way.startswith("n") else 0
    if way == "svd":
        return _decomposed(_by_svd, image, lambda: _columns(basis, order)), order
    new = _by_qr(image) if way == "qr" else _by_polar(_columns(basis, order), image, steps)
    return _where(known & _usable(new), new, lambda: _columns(basis, order)), order


def followed(factor: Tensor, basis: Tensor) -> Tensor:
    """A basis closer to the eigenvectors of Q^T Q, given the factor Q.

    B' = orthogonal factor of Q^T Q B, its columns b by descending ||Q b||, each with the sign that makes
    its product with the old column at its place positive. A basis stays where B' is not finite.

    Shapes: factor, basis and the result (B, n, n).
    """
    # in the unit of the largest entry, since squares of 1e30 would not be finite
    factor = _over(factor, factor.abs().amax((-2, -1), keepdim=True))
    image = product(factor.mT, product(factor, basis))
    known = _usable(image)
    new = _by_qr(_where(known, image, lambda: basis))
    sizes = product(factor, new).square().sum(-2)
    new = _columns(new, sizes.argsort(dim=-1, descending=True, stable=True))
    same = (basis * new).sum(-2, keepdim=True)
    new = torch.where(same < 0, -new, new)
    return _where(known & _usable(new), new, lambda: basis)


def carry(x: Tensor, old: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> Tensor:
    """Transform coordinates x in the old bases to the new ones, exactly."""
    return rotate(rotate(x, old, back=True), new)


def carry_square(x: Tensor, old: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> Tensor:
    """Mean squares in new bases, from those in old ones, as if old coordinates were uncorrelated.

    With R = Q_old^T Q_new per axis, every new mean square is the mean of the old ones with the weights
    R_ij^2, whose rows and columns add up to 1.
    """
    overlaps = [
        None if before is None or after is None else product(before.mT, after).square()
        for before, after in zip(old, new, strict=True)
    ]
    return rotate(x, overlaps).clamp(min=0)


def reorder(x: Tensor, orders: Sequence[Tensor | None]) -> Tensor:
    """Permute every axis of x (B, n_0, .., n_k) by its order (B, n_i); None does not permute."""
    for axis, order in enumerate(orders, start=1):
        if order is not None and len(x) == 1:
            x = x.index_select(axis, order[0])
        elif order is not None:
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[axis] = -1
            x = x.gather(axis, order.reshape(shape).expand_as(x))
    return x


def _product_in_scratch(a: Tensor, b: Tensor) -> Tensor:
    if len(a) > 1:
        return product(a, b)
    (out,) = scratch("eigenbasis", b, b.shape)
    torch.mm(a[0], b[0], out=out[0])
    return out


def _columns(x: Tensor, order: Tensor) -> Tensor:
    """The columns of matrices in an order of their own each."""
    if len(x) == 1:
        return x[0].mT.index_select(0, order[0]).mT[None]
    return x.gather(-1, order[:, None, :].expand_as(x))


def _where(wanted: Tensor, x: Tensor, other: Callable[[], Tensor]) -> Tensor:
    """x where it is wanted, else `other()`. On the CPU looking costs less than choosing."""
    if not wanted.is_cuda and bool(wanted.all()):
        return x
    return torch.where(wanted, x, other())


def _identity(like: Tensor) -> Tensor:
    n = like.shape[-1]
    return torch.eye(n, dtype=like.dtype, device=like.device).expand(len(like), n, n)


def _usable(matrix: Tensor) -> Tensor:
    """Whether all entries are finite, per matrix (B, 1, 1); no value comes back from the device."""
    # in the order of memory: a transposed one takes ten times as long
    matrix = matrix if matrix.is_contiguous() else matrix.mT
    # twenty times as fast as the infinity norm on a CPU
    high, low = (f(matrix, (-2, -1), keepdim=True) for f in (torch.amax, torch.amin))
    return torch.isfinite(high) & torch.isfinite(low)


def _by_eigh(matrix: Tensor) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(TINY)
    return torch.linalg.eigh(shifted)[1].flip(-1)


def _by_svd(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix)[0]


def _by_qr(matrix: Tensor) -> Tensor:
    """The orthogonal factor. A single matrix with columns in order is written over."""
    # 1.15 to 1.3 times faster than linalg.qr, which gives R as well
    if len(matrix) == 1 and matrix.mT.is_contiguous():
        reflectors, sizes = matrix[0], matrix.new_empty(matrix.shape[-1])
        torch.geqrf(reflectors, out=(reflectors, sizes))
        return torch.linalg.householder_product(reflectors, sizes, out=reflectors)[None]
    return torch.linalg.householder_product(*torch.geqrf(matrix))


def _by_polar(basis: Tensor, image: Tensor, steps: int) -> Tensor:
    rotated = product(basis.mT, image)
    # over the largest first, since the squares of 1e30 would not be finite
    rotated = _over(rotated, rotated.abs().amax((-2, -1), keepdim=True))
    lower = _over(rotated, torch.linalg.vector_norm(rotated, dim=-2, keepdim=True)).tril(-1)
    # I + (L - L^T) has no singular value below 1, so the polar factor is well conditioned
    turned = basis + product(basis, lower - lower.mT)
    return newton_schulz(turned, "polar_express", steps)


def _over(x: Tensor, size: Tensor) -> Tensor:
    """x / size, and x where the size is zero: what has no size is not turned."""
    return x / torch.where(size > 0, size, 1.0)


def _decomposed(
    fn: Callable[[Tensor], Tensor], matrix: Tensor, fallback: Callable[[], Tensor]
) -> Tensor:
    """`fn` of every matrix that it can be had of, and `fallback()` elsewhere."""
    known = _usable(matrix)
    # LAPACK raises on NaN, and with one matrix the whole batch would be lost
    found = _attempt(fn, _where(known, matrix, lambda: _identity(matrix)))
    if found is not None:
        return _where(known & _usable(found), found, fallback)
    if len(matrix) > 1:
        rows = zip(matrix.split(1), fallback().split(1), strict=True)
        parts = [_decomposed(fn, one, functools.partial(_self, old)) for one, old in rows]
        return torch.cat(parts)
    report_once(fn.__name__.removeprefix("_by_"))
    return fallback()


def _self(x: Tensor) -> Tensor:
    return x


def _attempt(fn: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor | None:
    for x in (matrix, matrix.double()):
        try:
            return fn(x).to(matrix.dtype)
        except torch.linalg.LinAlgError:
            continue
    return None


@functools.cache
def report_once(name: str) -> None:
    warn(
        f"{name} did not converge for a preconditioner, in float64 either: its old basis is kept. "
        "This is reported once.",
    )
