"""What methods with a low-rank image of the gradient share: its shape, its channels, their limiter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.linalg.matrices import Matrices, matrices_of

# By so much a step may be longer than the one before.
GROWTH = 1.01


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: the size of axis 0, and the rest."""
    return shape[0], math.prod(shape[1:])


def image_shape(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """The shape of the image: the shorter side becomes `rank`; of a square matrix the columns do."""
    rows, columns = matrix_shape(shape)
    return (rank, columns) if rows < columns else (rows, rank)


def image_shapes(view: Matrices, rank: int) -> list[tuple[int, int]]:
    """The shape of every block's image."""
    return [image_shape(sizes, rank) for sizes in view.sizes]


def images_shape(shape: Sequence[int], options: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of what holds the images of all blocks: that of one, or a vector for several."""
    shapes = image_shapes(matrices_of(shape, options), options["rank"])
    return shapes[0] if len(shapes) == 1 else (sum(map(math.prod, shapes)),)


def wrong_rank(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    """Why a parameter of this shape has no image of the rank that is asked for."""
    rank = options["rank"]
    if len(shape) < 2:
        return (
            "is for two dimensions or more; route the parameter to another chain: "
            "route(when(apollo, min_ndim=2), otherwise=scale_by_adam)"
        )
    try:
        sizes = matrices_of(shape, options).sizes
    except ValueError as error:
        return str(error)
    least = min(map(min, sizes))
    if rank > least:
        what = "the matrix" if options["blocks"] is None else "a block"
        return f"has rank={rank}, which is larger than the shorter side of {what}, {least}"
    return None


def squares(x: Tensor, wide: bool, scale_type: str) -> Tensor:
    """The squared norm of every column of wide matrices, of every row of tall ones, or of each matrix.

    Shapes: x (B, R, C); the result (B, 1, C), (B, R, 1) or (B, 1, 1).
    """
    # norms along an axis that is not the last take torch ten times as long
    if scale_type == "tensor":
        return torch.linalg.vecdot(x.flatten(1), x.flatten(1))[:, None, None]
    dim = -2 if wide else -1
    return torch.linalg.vecdot(x, x, dim=dim).unsqueeze(dim)


def channels(x: Tensor, wide: bool, scale_type: str) -> Tensor:
    """The norm of every column of a wide image, of every row of a tall one, or of each tensor."""
    return squares(x, wide, scale_type).sqrt()


def limit(size: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """What matrices are divided by to be at most GROWTH times as long as those of the step before.

    size: how long they are. last: the lengths of before, one for each; 0 at first. Returns the divisors
    (B, 1, 1), and how long the matrices then are.
    """
    before = last.reshape(-1)
    excess = (size / (before + 1e-8)).clamp(min=GROWTH) / GROWTH
    excess = torch.where(before > 0, excess, 1.0)
    return excess[:, None, None], size / excess


def limited(x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices behind their `limit`, and how long they are."""
    excess, size = limit(torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64), last)
    return x / excess.to(x.dtype), size
