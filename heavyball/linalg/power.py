"""Leading singular values and vectors of batches of matrices, by power iteration."""

import torch
from torch import Tensor


def leading_triple(x: Tensor, right: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, a, b) with x b = sigma a, after `steps` iterations from the row vector `right`.

    Shapes: x (n, R, C); right and b (n, 1, C); a (n, R, 1); sigma (n, 1, 1).
    """
    b = unit(right)
    for _ in range(steps):
        b = unit((x @ b.mT).mT @ x)
    image = x @ b.mT
    sigma = torch.linalg.vector_norm(image, dim=(-2, -1), keepdim=True)
    return sigma, unit(image), b


def unit(x: Tensor) -> Tensor:
    """Each of a batch of vectors over its norm; zero stays zero."""
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / size.clamp(min=torch.finfo(x.dtype).tiny)
