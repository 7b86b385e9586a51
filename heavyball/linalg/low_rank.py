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


def channels(x: Tensor, wide: bool, scale_type: str) -> Tensor:
    """The norm of every column of a wide image, of every row of a tall one, or of each tensor."""
    # torch's norm along an axis that is not the last takes ten times as long
    dim = -2 if wide else -1
    square = torch.linalg.vecdot(x, x, dim=dim).unsqueeze(dim)
    if scale_type == "tensor":
        square = square.sum((-2, -1), keepdim=True, dtype=torch.float64)
    return square.sqrt().to(x.dtype)


def scaled_length(x: Tensor, ratio: Tensor, wide: bool) -> Tensor:
    """The norm, in float64, of each of the matrices x * ratio, without making them.

    ratio: a factor for each channel, or for each matrix.
    """
    # on the CPU a norm in float64 copies x first: sums of squares in its own dtype are enough where
    # none is infinite, and where what is lost below the least normal number is nothing beside the rest
    if x.device.type == "cpu":
        dim = -2 if wide else -1
        square = torch.linalg.vecdot(x, x, dim=dim).to(torch.float64)
        factor = ratio.flatten(1).to(torch.float64).square()
        total = (square * factor).sum(-1)
        lost = x.shape[dim] * torch.finfo(x.dtype).tiny * factor.expand_as(square).sum(-1)
        if bool((torch.isfinite(total) & (lost <= 1e-12 * total)).all()):
            return total.sqrt()
    return torch.linalg.vector_norm(x * ratio, dim=(-2, -1), dtype=torch.float64)


def limit(size: Tensor, last: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What matrices of these lengths are divided by to be at most GROWTH times as long as before.

    last: the lengths of the step before, one for each matrix; 0 at first. Returns the divisors
    (B, 1, 1), and how long the matrices then are.
    """
    before = last.reshape(-1)
    excess = (size / (before + 1e-8)).clamp(min=GROWTH) / GROWTH
    excess = torch.where(before > 0, excess, 1.0)
    return excess.to(dtype)[:, None, None], size / excess
