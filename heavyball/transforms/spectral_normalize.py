"""An update of a given spectral norm, which power iteration follows from step to step."""

from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices, per_row
from heavyball.transforms.muon import needs_matrix, size_of

# Shorter products say nothing of a direction.
SHORTEST = 1e-6
REASON = "an orthogonalized update has a spectral norm of 1 already"


@whole_transform(
    requires=needs_matrix,
    left=per_row("values"),
    domains={"iterations": positive},
    excludes=dict.fromkeys(("orthogonalize", "muon", "scale_by_normuon"), REASON),
)
def spectral_normalize(
    update: Tensor,
    left: Tensor,
    *,
    count: int,
    noise: Any,
    iterations: int = 1,
    stacked: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Normalize the update of an R x C matrix to the spectral norm sqrt(R / C).

    v = X^T a / ||X^T a||;  b = X v;  a <- b / ||b||;  sigma = <a, b>
    u = X sqrt(R / C) / max(sigma, 1 / (sqrt R + sqrt C))

    a is initialized with equal entries and noise from the seed. sigma increases towards the largest
    singular value and is initially too small: the first step runs `iterations` of them, later steps one.

    stacked, blocks, axis: as in `orthogonalize`.

    Shapes: two or more dimensions, R x C as in `orthogonalize`.
    Units: the result is dimensionless; lr transfers from one width to another.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Large et al. 2024, https://arxiv.org/abs/2405.14813; adv_optm 2.5.16. Departure: v is not
        stored, so a product of zero gives zero instead of the previous v.
    """
    view = matrices(update.shape[1:], stacked, blocks, axis)
    if count == 1:
        fresh = 1 + noise(tuple(left.shape))
        given = left.flatten(1).any(1).reshape(-1, *[1] * (left.ndim - 1))
        left = torch.where(given, left, fresh)

    def normalized(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape[-2:]
        size = size_of(a)
        a = torch.where(size > 0, a / size, a)
        for _ in range(iterations if count == 1 else 1):
            b = x @ _direction(x.mT @ a)
            a = torch.where(size_of(b) >= SHORTEST, _direction(b), a)
        sigma = (a * b).sum((-2, -1), keepdim=True)
        floor = 1 / (rows**0.5 + columns**0.5)
        return x * ((rows / columns) ** 0.5 / sigma.clamp(min=floor)), a

    return view.map(normalized, update, left)


def _direction(x: Tensor) -> Tensor:
    return x / size_of(x).clamp(min=1e-8)
