"""Dion: an orthonormal low-rank update, with what it has left out fed back into the momentum."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Interval, Live, fraction, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.low_rank import matrix_shape
from heavyball.linalg.orthogonalize import Products
from heavyball.state.declare import State, zeros
from heavyball.transforms.muon import Method, needs_matrix, orthogonal

share = Interval(0, 1, low_open=True, high_open=False)


def rank_of(shape: Any, options: Mapping[str, Any]) -> int:
    """The rank of an update: as given, or a share of the shorter side, rounded up to a multiple."""
    least = min(matrix_shape(shape))
    if options["rank"] is not None:
        return options["rank"]
    multiple = options["rank_multiple"]
    wanted = math.ceil(options["rank_fraction"] * least / multiple) * multiple
    return min(wanted, least)


def _directions(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    return param.new_zeros(min(matrix_shape(param.shape)), rank_of(param.shape, options))


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    rank = options["rank"]
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank!r}: expected at least 1, or None")
    if len(shape) < 2:
        return needs_matrix(shape, options)
    least = min(matrix_shape(shape))
    if rank is not None and rank > least:
        return f"has rank={rank}, which is larger than the shorter side of the matrix, {least}"
    return None


@whole_transform(
    requires=_problem,
    momentum_buffer=zeros,
    directions=State(_directions, "noise of the seed, at first"),
    domains={"momentum": fraction, "rank_fraction": share, "rank_multiple": positive},
    excludes=dict.fromkeys(
        ("muon_momentum", "muon", "exp_avg", "heavyball_momentum", "nesterov_momentum"),
        "dion has its own momentum, which keeps what the update has left out",
    ),
)
def dion(
    update: Tensor,
    momentum_buffer: Tensor,
    directions: Tensor,
    *,
    count: int,
    noise: Any,
    rank: int | None = None,
    rank_fraction: Fixed = 1.0,
    rank_multiple: int = 1,
    momentum: Live = 0.95,
    eps: Live = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalize a low-rank approximation of the momentum by one power iteration per step.

    M <- M + g;  B = M, or its transpose where R < C
    W = qr(B Q);  Z = B^T W;  M <- M - (1 - momentum) W Z^T;  Q <- Z over its columns' norms + eps
    u = sqrt(R / C) W Q^T;  where M = 0: u = 0, and Q stays

    rank: None is `rank_fraction` of the shorter side, rounded up to a multiple of `rank_multiple`.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest); Q: shorter side x rank.
    Units: the result has none; lr is about 0.01.
    Errors: ValueError for a rank that is larger than the matrix, and for fewer than two dimensions.
    Source: Ahn et al. 2025, Algorithm 1, https://arxiv.org/abs/2504.05295; microsoft/dion.
    """
    rows, columns = matrix_shape(update.shape[1:])
    turned = rows < columns
    m = (momentum_buffer + update).reshape(len(update), rows, columns)
    b = m.mT if turned else m
    if count == 1:
        given = directions.flatten(1).any(1)[:, None, None]
        directions = torch.where(given, directions, noise(tuple(directions.shape)))
    usable = torch.isfinite(b).all(-1, keepdim=True).all(-2, keepdim=True)
    w = torch.linalg.qr(torch.where(usable, b, 0.0) @ directions)[0]
    z = b.mT @ w
    left = b - (1 - momentum) * (w @ z.mT)
    new = z / (torch.linalg.vector_norm(z, dim=-2, keepdim=True) + eps)
    moves = b.flatten(1).any(1)[:, None, None]
    result = torch.where(moves, (rows / columns) ** 0.5 * (w @ new.mT), 0.0)
    result, left = (x.mT if turned else x for x in (result, left))
    shape = update.shape
    return result.reshape(shape), left.reshape(shape), torch.where(moves, new, directions)


@whole_transform(
    requires=needs_matrix,
    momentum_buffer=zeros,
    domains={"momentum": fraction, "fraction": share},
    excludes=dict.fromkeys(
        ("muon_momentum", "muon", "exp_avg", "heavyball_momentum", "nesterov_momentum"),
        "partial_orthogonalize has its own momentum, which grows where it is not taken",
    ),
)
def partial_orthogonalize(
    update: Tensor,
    momentum_buffer: Tensor,
    *,
    noise: Any,
    momentum: Live = 0.95,
    fraction: Fixed = 0.25,
    select: Literal["top", "random"] = "top",
    method: Method = "polar_express",
    steps: int = 5,
    eps: Live = 1e-7,
    products: Products = "auto",
) -> tuple[Tensor, Tensor]:
    """Orthogonalize only some slices of a growing momentum, and let only those decay.

    M <- M + g;  slices: of the n rows where R <= C, else of the columns, ceil(fraction n) of the largest
    1-norm, or at random;  O = NS(M[slices]);  M[slices] <- momentum M[slices]
    u = sqrt(R / C) O in these slices, 0 elsewhere

    method, steps, eps, products: as in `orthogonalize`.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Units: the result has none; lr is about 0.01.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: https://arxiv.org/abs/2512.16928; dion2.py of microsoft/dion.
    """
    rows, columns = matrix_shape(update.shape[1:])
    m = (momentum_buffer + update).reshape(len(update), rows, columns)
    x = m if rows <= columns else m.mT
    number = math.ceil(fraction * x.shape[1])
    scores = noise((len(x), x.shape[1])) if select == "random" else x.abs().sum(-1)
    index = scores.topk(number, dim=-1).indices[..., None].expand(-1, -1, x.shape[2])
    chosen = x.gather(1, index)
    part = orthogonal(chosen, method, steps, eps, "none", products) * (rows / columns) ** 0.5
    result = torch.zeros_like(x).scatter(1, index, part)
    kept = x.scatter(1, index, (momentum * chosen).to(x.dtype))
    if rows > columns:
        result, kept = result.mT, kept.mT
    return result.reshape(update.shape), kept.reshape(update.shape)
