"""Norms and counts, summed in float64 so that sums of float32 squares do not overflow."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Answers for `count` and `is_single`, so that one recorded graph serves every size."""

    count: Callable[[Tensor], int | Tensor]
    is_single: Callable[[Tensor], bool]
    shape: Callable[[Tensor], torch.Size]
    every: Callable[[Tensor, int], Tensor]


_sizes: contextvars.ContextVar[Sizes | None] = contextvars.ContextVar("sizes", default=None)


def count(x: Tensor) -> int | Tensor:
    """The number of elements, at least 1.

    Use it in place of `x.numel()` in arithmetic: a compiled kernel then serves tensors of all sizes.
    """
    sizes = _sizes.get()
    return max(x.numel(), 1) if sizes is None else sizes.count(x)


def is_single(x: Tensor) -> bool:
    """Whether a tensor has one element; in place of `x.numel() == 1`, for the same reason."""
    sizes = _sizes.get()
    return x.numel() == 1 if sizes is None else sizes.is_single(x)


def shape_of(x: Tensor | None) -> torch.Size | None:
    """The shape, to compare with another one without making it part of a compiled kernel."""
    if x is None:
        return None
    sizes = _sizes.get()
    return x.shape if sizes is None else sizes.shape(x)


def mean_like(x: Tensor, like: Tensor) -> Tensor:
    """The mean over the axes along which `like`, of as many dimensions, has one element.

    Where a state says by its shape what to take a mean over, that shape need not be looked at: a
    compiled kernel depends on the axes that its states have, but not on their sizes.
    """
    axes = [axis for axis, n in enumerate(shape_of(like) or ()) if n == 1]
    return x.mean(axes, keepdim=True) if axes else x


def every(x: Tensor, k: int) -> Tensor:
    """Every k-th element, in the order of the dimensions, beginning with the first."""
    sizes = _sizes.get()
    if k == 1:
        return x
    return x.flatten()[::k] if sizes is None else sizes.every(x, k)


@contextlib.contextmanager
def answering(sizes: Sizes) -> Iterator[None]:
    """Let `sizes` answer while a program is recorded."""
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def norm(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Euclidean norm: of the whole tensor (0-d), or over `dim` with the dimensions kept."""
    if dim is None:
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """Root mean square of the whole tensor; 0 for an empty one."""
    return norm(x) / count(x) ** 0.5


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two tensors of one shape."""
    return (x * y).sum(dtype=torch.float64)


def saturate(x: Tensor, narrow: bool = False) -> Tensor:
    """Clamp to +-2^56 (float64: +-2^504), so that the square of a sum of several stays finite.

    narrow: float64 values are stored in fewer bits, with the range of float32.

    A gradient of 1e30 would otherwise make a float32 second moment infinite for good. An infinite
    entry becomes the bound; NaN stays.
    """
    bound = 2.0**504 if x.dtype == torch.float64 and not narrow else 2.0**56
    return x.clamp(-bound, bound)
