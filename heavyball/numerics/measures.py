"""Sizes of a tensor, summed in float64 so that no sum of float32 squares overflows."""

import math

import torch
from torch import Tensor


def norm(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Euclidean norm: of the whole tensor (0-d), or over `dim` with the dimensions kept."""
    if dim is None:
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """Root mean square of the whole tensor; 0 for an empty one."""
    return norm(x) / math.sqrt(max(x.numel(), 1))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two tensors of one shape."""
    return (x * y).sum(dtype=torch.float64)


def saturate(x: Tensor) -> Tensor:
    """Clamp to +-2^56 (float64: +-2^504), so that the square of a sum of several stays finite.

    A gradient of 1e30 would otherwise make a float32 second moment infinite for good. An infinite
    entry becomes the bound; NaN stays.
    """
    bound = 2.0**504 if x.dtype == torch.float64 else 2.0**56
    return x.clamp(-bound, bound)
