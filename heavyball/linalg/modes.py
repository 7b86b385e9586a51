"""Products of a tensor with one matrix per axis, for batches of tensors."""

import functools
from collections.abc import Callable, Sequence

import opt_einsum
import torch
from torch import Tensor

# From this size on, one product at a time runs at the floor and needs no more memory than its result;
# below it a batched product is faster on the CPU.
ONE_BY_ONE = 256
# Gram matrices of twice this size or more are made of panels of so many rows, each up to the diagonal,
# and mirrored. Measured: 0.65 to 0.8 of the time of the whole product, which makes both halves.
PANEL = 256


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for batches (B, n, k) and (B, k, m)."""
    if len(a) == 1:
        return torch.mm(a[0], b[0])[None]
    if a.is_cuda or min(a.shape[1:]) < ONE_BY_ONE:
        return torch.bmm(a, b)
    result = a.new_empty(len(a), a.shape[1], b.shape[2])
    for one, left, right in zip(result, a, b, strict=True):
        torch.mm(left, right, out=one)
    return result


def add_product(start: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """`beta start + alpha a @ b` for batches, in `start`."""
    if len(a) == 1:
        start[0].addmm_(a[0], b[0], beta=beta, alpha=alpha)
        return start
    return start.baddbmm_(a, b, beta=beta, alpha=alpha)


def rotate(x: Tensor, bases: Sequence[Tensor | None], back: bool = False) -> Tensor:
    """Multiply every axis of x by the transpose of its basis, or by the basis if `back`.

    For a matrix: Q_0^T x Q_1, and back Q_0 x Q_1^T. Axes without a basis are skipped.

    Shapes: x (B, n_0, .., n_k); bases (B, n_i, n_i) each, or None.
    """
    if all(basis is None for basis in bases):
        return x
    if len(bases) == 1:
        (basis,) = bases
        assert basis is not None
        return product(basis if back else basis.mT, x[..., None])[..., 0]
    if len(bases) == 2:
        left, right = bases
        if left is not None:
            x = product(left if back else left.mT, x)
        return x if right is None else product(x, right.mT if back else right)
    present = tuple(basis is not None for basis in bases)
    given = [basis for basis in bases if basis is not None]
    if len(x) == 1:  # without a batch axis the contraction is one matrix product per basis
        plain = _contraction(tuple(x.shape[1:]), present, False, back)
        return plain(x[0], *(basis[0] for basis in given))[None]
    return _contraction(tuple(x.shape), present, True, back)(x, *given)


@functools.lru_cache(maxsize=1024)
def _contraction(
    shape: tuple[int, ...], present: tuple[bool, ...], batched: bool, back: bool
) -> Callable[..., Tensor]:
    """The path of the products for one shape, found once."""
    axes = [opt_einsum.get_symbol(i) for i in range(len(present))]
    news = [opt_einsum.get_symbol(len(axes) + i) for i in range(len(present))]
    batch = opt_einsum.get_symbol(2 * len(axes)) if batched else ""
    sizes = shape[len(shape) - len(present) :]
    terms, shapes = [batch + "".join(axes)], [shape]
    for old, new, size, wanted in zip(axes, news, sizes, present, strict=True):
        if wanted:
            terms.append(batch + (new + old if back else old + new))
            shapes.append((*shape[:1], size, size) if batched else (size, size))
    out = "".join(new if w else old for old, new, w in zip(axes, news, present, strict=True))
    expression = opt_einsum.contract_expression(f"{','.join(terms)}->{batch}{out}", *shapes)
    return functools.partial(expression, backend="torch")


def update_gram(x: Tensor, axis: int, start: Tensor, beta: float) -> Tensor:
    """`beta start + (1 - beta) X X^T`, in `start`; X is x unfolded along an axis, 0 for the first.

    If `start` is large, only its lower triangle is read: it must be symmetric.

    Shapes: x (B, n_0, .., n_k); start and the result (B, n_axis, n_axis).
    """
    if x.ndim == 2:
        x = x[..., None]
    elif x.ndim == 3 and axis == 1:
        x = x.mT
    elif x.ndim > 3:
        x = x.movedim(axis + 1, 1).flatten(2)
    if x.is_cuda or x.shape[1] < 2 * PANEL:
        return add_product(start, x, x.mT, beta, 1 - beta)
    for one, matrix in zip(start, x, strict=True):
        _add_symmetric(one, matrix, beta)
    return start


def _add_symmetric(start: Tensor, x: Tensor, beta: float) -> None:
    """Write `beta start + (1 - beta) x x^T` over a symmetric start."""
    for low in range(0, len(x), PANEL):
        high = min(low + PANEL, len(x))
        panel = start[low:high, :high]
        panel.addmm_(x[low:high], x[:high].mT, beta=beta, alpha=1 - beta)
        start[:low, low:high].copy_(panel[:, :low].mT)
