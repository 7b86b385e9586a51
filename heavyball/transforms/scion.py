"""Scion's linear minimization oracles: updates of norm 1 in the norm that a layer asks for."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from heavyball.core.hyper import Live, check_live, positive
from heavyball.core.transform import transform
from heavyball.numerics import norm

Norm = Literal["spectral", "row", "column", "sign"]


def _columns(x: Tensor) -> int:
    return max(1, math.prod(x.shape[1:]))


def _row_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


@transform()
def scale_update(update: Tensor, *, factor: Live = 1.0) -> Tensor:
    """Multiply the update, and not the decay as `scale_lr` does.

    u' = factor u

    Shapes: all (*).
    """
    return factor * update


@transform()
def row_normalize(update: Tensor, *, normalized: bool = True, eps: Live = 1e-8) -> Tensor:
    """Normalize every row of an R x C matrix.

    u' = u / (||row|| sqrt(C) + eps);  normalized=False: u / (||row|| + eps)

    Shapes: all (*), rows over axis 0; a vector has rows of one entry.
    Units: the result is dimensionless.
    Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529, RowNorm.
    """
    axes = _row_axes(update)
    size = norm(update, axes) if axes else update.abs()
    return update / (size * (_columns(update) ** 0.5 if normalized else 1.0) + eps)


@transform()
def column_normalize(
    update: Tensor, *, normalized: bool = False, eps: Live = 1e-8, axis: Literal[0, 1] = 0
) -> Tensor:
    """Normalize every column of an R x C matrix to root mean square 1.

    u' = u / (sqrt(mean of u^2 over the rows) + eps);  normalized: also divided by C

    axis: 1 takes the mean over the columns instead, for example for an embedding of shape vocabulary x
        width, whose tokens are rows.

    Shapes: all (*), rows over axis 0.
    Units: the result is dimensionless.
    Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529, ColNorm.
    """
    axes = _row_axes(update) if axis else (0,)
    other = len(update) if axis else _columns(update)
    size = update.square().mean(axes, keepdim=True).sqrt() if axes else update.abs()
    update = update / (size + eps)
    return update / other if normalized else update


@transform()
def sign_normalize(update: Tensor, *, normalized: bool = True) -> Tensor:
    """Replace every entry with its sign, divided by the number of columns.

    u' = sign(u) / C;  normalized=False: sign(u)

    Shapes: all (*), rows over axis 0; C = 1 for vectors.
    Units: the result is dimensionless.
    Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529, Sign.
    """
    return update.sign() / _columns(update) if normalized else update.sign()


@torch.no_grad()
def scion_init_(
    params: Iterable[Tensor] | Tensor, norm: Norm = "spectral", radius: float = 1.0
) -> None:
    """Put weights on the sphere of a norm, where constrained Scion's steps keep them.

    "spectral": all singular values radius sqrt(R / C);  "row": normal rows of norm radius / sqrt(C);
    "column": normal columns of root mean square radius;  "sign": radius / C with random signs

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Errors: ValueError for a parameter of fewer than two dimensions, before any is changed.
    Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529, `init` of the authors' scion.py.
    """
    given = [params] if isinstance(params, Tensor) else list(params)
    check_live("radius", radius, 1.0, positive)
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(map(repr, get_args(Norm)))}")
    for p in given:
        if p.ndim < 2:
            raise ValueError(
                f"scion_init_: a parameter of shape {tuple(p.shape)} is not a matrix; leave it out"
            )
    for p in given:
        rows, columns = len(p), _columns(p)
        flat = torch.empty(rows, columns, dtype=torch.float64, device=p.device)
        if norm == "spectral":
            torch.nn.init.orthogonal_(flat).mul_((rows / columns) ** 0.5)
        elif norm == "sign":
            flat.bernoulli_().mul_(2).sub_(1).div_(columns)
        else:
            flat.normal_()
            dim, goal = (1, columns**-0.5) if norm == "row" else (0, rows**0.5)
            flat.mul_(goal / torch.linalg.vector_norm(flat, dim=dim, keepdim=True))
        p.copy_(flat.mul_(radius).reshape(p.shape))
