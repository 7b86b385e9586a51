"""The dtypes of the mathematics, and what else a tensor is to it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SCALAR = torch.float64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the mathematics: float64 stays, everything lower is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def working(tensor: Tensor) -> Tensor:
    """A tensor as the mathematics sees it: promoted, and never without a dimension.

    0-d tensors are scalars to torch's type promotion, so a 0-d parameter works as a vector of one.
    """
    tensor = tensor.detach().to(compute_dtype(tensor.dtype))
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def version_of(tensor: Tensor) -> int | None:
    """The version counter of a tensor; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Create tensors that can be written after the caller's inference mode has ended."""
    with torch.inference_mode(False), torch.no_grad():  # the first alone would record gradients
        yield
