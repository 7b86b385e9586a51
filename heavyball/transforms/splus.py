"""SPlus: the sign of the momentum in Shampoo's eigenbasis."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, nonnegative, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.eigenbasis import eigenbasis
from heavyball.linalg.matrices import Blocks, matrices, matrices_of
from heavyball.numerics import lerp
from heavyball.state.declare import State, zeros
from heavyball.transforms.muon import wrong_blocks

Matrices = tuple[Tensor, ...]


def _is_standard(shape: tuple[int, ...], limit: int) -> bool:
    """Whether both sides of a matrix are short enough for a basis."""
    rows, columns = shape[0] if shape else 1, torch.Size(shape[1:]).numel()
    return len(shape) > 1 and max(rows, columns) < limit


def _pairs(identity: bool) -> State:
    def init(param: Tensor, options: Mapping[str, Any]) -> Matrices:
        shape = tuple(param.shape)
        if not _is_standard(shape, options["max_dim"]):
            return ()
        found = []
        for sizes in matrices_of(shape, options).sizes:
            for n in sizes:
                plain = param.new_zeros(n, n)
                found.append(plain.fill_diagonal_(1.0) if identity else plain)
        return tuple(found)

    rule = "the identity" if identity else "a zero matrix"
    return State(init, f"{rule} per side of each matrix", several=True)


def _due(count: int, *, inverse_every: int) -> bool:
    return count == 1 or count % inverse_every == 0


def _refresh(
    exp_avg: Tensor,
    gram: Matrices,
    basis: Matrices,
    *,
    vectors: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    new = tuple(eigenbasis(g, q) for g, q in zip(gram, basis, strict=True))
    return exp_avg, gram, new, vectors, squares


@whole_transform(
    exp_avg=zeros,
    gram=_pairs(False),
    basis=_pairs(True),
    provides=("lr",),
    domains={"inverse_every": positive, "max_dim": positive, "nonstandard_constant": nonnegative},
    requires=lambda shape, options: wrong_blocks(shape, options) if len(shape) > 1 else None,
    after=_refresh,
    due=_due,
)
def splus(
    update: Tensor,
    exp_avg: Tensor,
    gram: Matrices,
    basis: Matrices,
    *,
    lr: Tensor,
    betas: Live = (0.9, 0.999),
    inverse_every: int = 100,
    max_dim: int = 10000,
    nonstandard_constant: Fixed = 0.001,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Matrices, Matrices, Tensor]:
    """Take the sign of the momentum in the eigenvectors of the gradients' running Gram matrices.

    m <- betas[0] m + (1 - betas[0]) g;  u = Q_L sign(Q_L^T m Q_R) Q_R^T;  lr' = 2 lr / (R + C)
    L <- betas[1] L + (1 - betas[1]) g g^T, R likewise
    after the write, at t = 1 and at every step that `inverse_every` divides: Q = eigenvectors
    vectors, and matrices with a side of max_dim or more: u = sign(m), lr' = lr nonstandard_constant

    Q is initially the identity. A later decay uses lr'. blocks, axis: as in `orthogonalize`; R + C
    is that of the whole matrix.

    Shapes: all (*); R x C as (size of axis 0, rest).
    Units: the result is dimensionless; lr is about 0.1.
    Source: Frans, Levine and Abbeel 2025, https://arxiv.org/abs/2506.07254.
    """
    shape = tuple(update.shape[1:])
    exp_avg = lerp(exp_avg, update, 1 - betas[0])
    if not _is_standard(shape, max_dim):
        return exp_avg.sign(), exp_avg, gram, basis, lr * nonstandard_constant
    view = matrices(shape, False, blocks, axis)
    parts = view.cut.parts(exp_avg.reshape(len(update), view.rows, view.columns), axis - 2)
    grads = view.cut.parts(update.reshape(len(update), view.rows, view.columns), axis - 2)
    made, new = [], []
    for k, (m, g) in enumerate(zip(parts, grads, strict=True)):
        left, right = basis[2 * k : 2 * k + 2]
        made.append(left @ (left.mT @ m @ right).sign() @ right.mT)
        for old, product in zip(gram[2 * k : 2 * k + 2], (g @ g.mT, g.mT @ g), strict=True):
            new.append(lerp(old, product, 1 - betas[1]))
    whole = view.cut.whole(made, axis - 2).reshape(update.shape)
    return whole, exp_avg, tuple(new), basis, lr * (2 / (view.rows + view.columns))
