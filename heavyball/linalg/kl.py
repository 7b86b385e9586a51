"""Kronecker factors that are whitened by each other, which fits their product in the KL sense."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heavyball.linalg.modes import rotate, update_gram

# The floor of an eigenvalue of an axis of n elements is 1 / max(10, min(n, 4000))^2.
SMALLEST, LARGEST = 10, 4000


def floor_of(size: int) -> float:
    """The least that an eigenvalue of an axis of this size can be."""
    return 1 / max(SMALLEST, min(size, LARGEST)) ** 2


def whitened_grams(
    turned: Tensor,
    grams: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    beta: float,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """One step of the factors of a tensor and of their eigenvalues, both with those of before.

    S_i <- beta S_i + (1 - beta) Q_i (Y_(i) D_i^-1 Y_(i)^T / n_i) Q_i^T, D_i the products of the other
        axes' eigenvalues, n_i the number of columns of the unfolding Y_(i)
    l_i <- beta l_i + (1 - beta) mean over the other axes of Y^2 D_i^-1, not below the floor

    Shapes: turned, in the basis (B, n_0, .., n_k); per axis grams, bases (B, n_i, n_i), values (B, n_i).
    """
    new, new_values = list(grams), list(values)
    for axis, (gram, value) in enumerate(zip(grams, values, strict=True)):
        if gram is None or value is None:
            continue
        whitened = turned
        for other, by in enumerate(values):
            if other != axis and by is not None:
                whitened = whitened * _along(by, other, turned.ndim).rsqrt()
        size = turned.shape[axis + 1]
        only = [q if k == axis else None for k, q in enumerate(bases)]
        columns = turned[0].numel() // size
        new[axis] = update_gram(rotate(whitened, only, back=True) / columns**0.5, axis, gram, beta)
        square = whitened.square()
        rest = tuple(k for k in range(1, turned.ndim) if k != axis + 1)
        mean = square.mean(rest) if rest else square
        new_values[axis] = (beta * value + (1 - beta) * mean).clamp(min=floor_of(size))
    return new, new_values


def over_roots(turned: Tensor, values: Sequence[Tensor | None], eps: Tensor | float) -> Tensor:
    """y / (sqrt(l_i r_j ..) + eps), in the basis."""
    product: Tensor | float = 1.0
    for axis, value in enumerate(values):
        if value is not None:
            product = product * _along(value, axis, turned.ndim)
    return turned / (
        torch.as_tensor(product, dtype=turned.dtype, device=turned.device).sqrt() + eps
    )


def _along(value: Tensor, axis: int, ndim: int) -> Tensor:
    shape = [len(value), *[1] * (ndim - 1)]
    shape[axis + 1] = -1
    return value.reshape(shape)
