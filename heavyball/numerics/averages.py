"""Running averages, and the root of a second moment with its epsilon."""

from typing import Literal

import torch
from torch import Tensor

EpsPlacement = Literal["outside", "maximum", "inside", "biased"]


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """`start + weight * (end - start)`, exact at the weights 0 and 1 for finite values."""
    # torch.lerp refuses a weight of another dtype, and scalars are float64 here
    return torch.lerp(start, end, torch.as_tensor(weight).to(start))


def debiased_weight(beta: Tensor, step: Tensor) -> Tensor:
    """The weight `(1 - beta) / (1 - beta^t)` that keeps a running mean unbiased.

    Averaging with it gives at every step the weighted mean of all values so far with weights
    `beta^(t-i)`: the plain average divided by `1 - beta^t`, without the division. It is 1 at t = 1.
    """
    return (1 - beta) / (1 - beta**step)


def ema(average: Tensor, value: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    """One step of the unbiased exponential moving average; `step` counts from 1."""
    return lerp(average, value, debiased_weight(beta, step))


def second_weight(beta2: Tensor, step: Tensor, scheduled_beta2: Tensor | None) -> Tensor:
    """The weight of the newest value in a second moment: the chain's `scheduled_beta2` rules."""
    return debiased_weight(beta2, step) if scheduled_beta2 is None else 1 - scheduled_beta2


def second_moment(
    average: Tensor, value: Tensor, beta2: Tensor, step: Tensor, scheduled_beta2: Tensor | None
) -> Tensor:
    """One step of the unbiased mean of `value^2`."""
    return lerp(average, value.square(), second_weight(beta2, step, scheduled_beta2))


def root(
    square: Tensor, eps: Tensor, placement: EpsPlacement, bias: Tensor | None = None
) -> Tensor:
    """The denominator made of an unbiased second moment `v`, in the four published forms.

    outside  sqrt(v) + eps       torch, schedule-free
    maximum  max(sqrt(v), eps)   HeavyBall, ADOPT
    inside   sqrt(v + eps^2)
    biased   sqrt(v) + eps / sqrt(bias), with bias = 1 - beta2^t: eps beside the root of the
             average before its bias correction, as in the last paragraph of section 2 of Adam
    """
    if placement == "maximum":
        return torch.maximum(square.sqrt(), eps)
    if placement == "inside":
        return (square + eps**2).sqrt()
    if placement == "biased":
        assert bias is not None
        return square.sqrt() + eps / bias.sqrt()
    return square.sqrt() + eps
