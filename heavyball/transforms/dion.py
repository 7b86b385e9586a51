"""Dion: an orthonormal low-rank update, with what it has left out fed back into the momentum."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Interval, Live, fraction, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, Matrices, matrices, matrices_of, packed, unpacked
from heavyball.linalg.orthogonalize import Products
from heavyball.state.declare import State, zeros
from heavyball.transforms.muon import Method, needs_matrix, orthogonal

share = Interval(0, 1, low_open=True, high_open=False)


def ranks_of(view: Matrices, options: Mapping[str, Any]) -> list[int]:
    """The rank of every block's update: as given, or a share of the shorter side, rounded up."""
    rank, multiple = options["rank"], options["rank_multiple"]
    found = []
    for sizes in view.sizes:
        wanted = math.ceil(options["rank_fraction"] * min(sizes) / multiple) * multiple
        found.append(min(wanted, min(sizes)) if rank is None else rank)
    return found


def _shapes(view: Matrices, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The shape of every block's Q."""
    ranks = ranks_of(view, options)
    return [(min(sizes), rank) for sizes, rank in zip(view.sizes, ranks, strict=True)]


def _directions(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    shapes = _shapes(matrices_of(param.shape, options), options)
    if len(shapes) == 1:
        return param.new_zeros(shapes[0])
    return param.new_zeros(sum(map(math.prod, shapes)))


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    rank = options["rank"]
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank!r}: expected at least 1, or None")
    wrong = needs_matrix(shape, options)
    if wrong is not None:
        return wrong
    least = min(min(sizes) for sizes in matrices_of(shape, options).sizes)
    if rank is not None and rank > least:
        what = "the matrix" if options["blocks"] is None else "a block"
        return f"has rank={rank}, which is larger than the shorter side of {what}, {least}"
    return None


@whole_transform(
    requires=_problem,
    momentum_buffer=zeros,
    directions=State(_directions, "initially noise from the seed"),
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
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalize a low-rank approximation of the momentum by one power iteration per step.

    M <- M + g;  B = M, or its transpose where R < C
    W = qr(B Q);  Z = B^T W;  M <- M - (1 - momentum) W Z^T;  Q <- Z over its columns' norms + eps
    u = sqrt(R / C) W Q^T;  where M = 0: u = 0, and Q stays

    rank: None is `rank_fraction` of the shorter side, rounded up to a multiple of `rank_multiple`.
    blocks, axis: as in `orthogonalize`; each block has its own Q and rank.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest); Q: shorter side x rank, and with
        blocks one vector that contains all of them.
    Units: the result is dimensionless; lr is about 0.01.
    Errors: ValueError for a rank that is larger than the matrix, and for fewer than two dimensions.
    Source: Ahn et al. 2025, Algorithm 1, https://arxiv.org/abs/2504.05295; microsoft/dion.
    """
    options = {"rank": rank, "rank_fraction": rank_fraction, "rank_multiple": rank_multiple}
    view = matrices(update.shape[1:], False, blocks, axis)
    shapes = _shapes(view, options)
    if count == 1:
        fresh = [noise((len(update), *shape), k) for k, shape in enumerate(shapes)]
        given = directions.flatten(1).any(1).reshape(-1, *[1] * (directions.ndim - 1))
        directions = torch.where(given, directions, packed(fresh, directions))
    new = unpacked(directions, shapes)
    results, kept = [], []
    for numbers, m in zip(view.of, view.batches(momentum_buffer + update), strict=True):
        q = torch.cat([new[k] for k in numbers])
        result, left, q = _iterated(m, q, momentum, eps)
        results.append(result)
        kept.append(left)
        for k, part in zip(numbers, q.split(len(update)), strict=True):
            new[k] = part
    return view.whole(results, update), view.whole(kept, update), packed(new, directions)


def _iterated(
    m: Tensor, directions: Tensor, momentum: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The updates of momenta (n, R, C), what is left of these, and the new Q."""
    rows, columns = m.shape[-2:]
    turned = rows < columns
    b = m.mT if turned else m
    image = b @ directions
    usable = torch.isfinite(image).all(-1, keepdim=True).all(-2, keepdim=True)
    w = torch.linalg.qr(torch.where(usable, image, 0.0))[0]
    z = b.mT @ w
    # factors go to the narrow sides, so that nothing of the size of b is made but the results
    left = torch.baddbmm(b, w * (momentum - 1), z.mT)
    new = z / (torch.linalg.vector_norm(z, dim=-2, keepdim=True) + eps)
    moves = b.flatten(1).any(1)[:, None, None]
    result = torch.where(moves, w * (rows / columns) ** 0.5, 0.0) @ new.mT
    result, left = (x.mT if turned else x for x in (result, left))
    return result, left, torch.where(moves, new, directions)


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
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Orthogonalize only some slices of the momentum, and decay only those.

    M <- M + g;  slices: of the n rows where R <= C, else of the columns, ceil(fraction n) of the largest
    1-norm, or at random;  O = NS(M[slices]);  M[slices] <- momentum M[slices]
    u = sqrt(R / C) O in these slices, 0 elsewhere

    method, steps, eps, products, blocks, axis: as in `orthogonalize`; every block has its own slices.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Units: the result is dimensionless; lr is about 0.01.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: https://arxiv.org/abs/2512.16928; dion2.py of microsoft/dion.
    """
    view = matrices(update.shape[1:], False, blocks, axis)
    random = iter(_random_scores(view, len(update), noise)) if select == "random" else None

    def taken(m: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = m.shape[-2:]
        x = m if rows <= columns else m.mT
        number = math.ceil(fraction * x.shape[1])
        scores = x.abs().sum(-1) if random is None else next(random)
        index = scores.topk(number, dim=-1).indices[..., None].expand(-1, -1, x.shape[2])
        chosen = x.gather(1, index)
        part = orthogonal(chosen, method, steps, eps, "none", products) * (rows / columns) ** 0.5
        result = torch.zeros_like(x).scatter(1, index, part)
        kept = x.scatter(1, index, (momentum * chosen).to(x.dtype))
        return (result, kept) if rows <= columns else (result.mT, kept.mT)

    made = [taken(m) for m in view.batches(momentum_buffer + update)]
    results, kept = zip(*made, strict=True)
    return view.whole(results, update), view.whole(kept, update)


def _random_scores(view: Matrices, count: int, noise: Any) -> list[Tensor]:
    """A number for every slice of the shorter side, in the batches of `view`."""
    found = []
    for numbers in view.of:
        rows, columns = view.sizes[numbers[0]]
        drawn = [noise((count, min(rows, columns)), k) for k in numbers]
        found.append(torch.cat(drawn))
    return found
