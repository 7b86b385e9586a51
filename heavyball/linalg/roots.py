"""Inverse roots of positive semi-definite matrices."""

import torch
from torch import Tensor

from heavyball.errors import warn


def inverse_root(matrix: Tensor, order: int, eps: float, fallback: Tensor) -> Tensor:
    """`(S + eps I)^(-1/order)` for a batch of symmetric positive semi-definite matrices S.

    Negative eigenvalues are rounding errors and treated as zero. An eigenvalue below the rounding
    error of the largest is raised to that, so that the root does not amplify noise.

    fallback: the result for members that are not finite or whose decomposition fails, also in float64;
        with a warning.
    """
    finite = matrix.flatten(1).isfinite().all(dim=1)
    safe = torch.where(finite[:, None, None], matrix, 0)
    try:
        values, vectors = _eigh(safe)
    except torch.linalg.LinAlgError as error:
        warn(
            f"an eigen-decomposition of a {tuple(matrix.shape)} failed in float64 too, the roots of "
            f"before are kept: {error}",
            UserWarning,
        )
        return fallback
    largest = values.amax(dim=-1, keepdim=True)
    floor = largest * torch.finfo(matrix.dtype).eps * matrix.shape[-1]
    shifted = torch.maximum(values, floor).clamp(min=0) + eps
    # a matrix of zeros has no scale: without eps it is left at the fallback
    usable = finite & (shifted > 0).all(dim=-1)
    powers = torch.where(shifted > 0, shifted, 1) ** (-1 / order)
    root = (vectors * powers[:, None, :]) @ vectors.mT
    usable = usable & root.flatten(1).isfinite().all(dim=1)
    return torch.where(usable[:, None, None], root, fallback)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
