"""Keep only what agrees with the gradient (cautious), or give everything its sign (grams)."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.transform import transform
from heavyball.numerics import count

CautiousScale = Literal["mean", "sum_plus_one", "none"]
BOTH = "both decide by the sign of the gradient what becomes of an entry"


def mask_disagreeing(
    update: Tensor, grad: Tensor, scale: CautiousScale = "mean", strict: bool = True
) -> Tensor:
    """`update` where its sign is that of `grad`, and 0 elsewhere, times the chosen scale."""
    # signs, because the product of two small numbers may be zero
    signs = update.sign() * grad.sign()
    mask = (signs > 0 if strict else signs >= 0).to(update.dtype)
    if scale == "none":
        return update * mask
    size, kept = count(update), mask.sum(dtype=torch.float64)
    factor = size / (kept + 1) if scale == "sum_plus_one" else 1 / (kept / size).clamp(min=1e-3)
    return update * mask * factor


@transform(excludes={"grams": BOTH})
def cautious(
    update: Tensor, *, grad: Tensor, scale: CautiousScale = "mean", strict: bool = True
) -> Tensor:
    """Zero the entries of the update whose sign differs from the gradient's.

    u' = u mask / max(mean(mask), 1e-3), mask = 1 where u g > 0, g the raw gradient

    scale: "sum_plus_one" is n / (sum(mask) + 1), the paper's; "none" does not scale.
    strict: False keeps entries with u g = 0.

    Shapes: all (*); the mean is over the tensor. A tensor that disagrees everywhere gives 0.
    Source: Liang et al. 2024, Algorithm 1, https://arxiv.org/abs/2411.16085, with the scale of the
        authors' current code.
    """
    return mask_disagreeing(update, grad, scale, strict)


@transform(excludes={"cautious": BOTH})
def grams(update: Tensor, *, grad: Tensor) -> Tensor:
    """Combine the magnitude of the update with the sign of the gradient.

    u' = sign(g) |u|, g the raw gradient; sign(0) = 0

    Shapes: all (*).
    Source: Cao et al. 2024, Algorithm 1, https://arxiv.org/abs/2412.17107.
    """
    return grad.sign() * update.abs()
