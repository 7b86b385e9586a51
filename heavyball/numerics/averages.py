"""Running averages, and the root of a second moment with its epsilon."""

from typing import Literal

import torch
from torch import Tensor

EpsPlacement = Literal["outside", "maximum", "inside", "biased"]


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """`start + weight * (end - start)`, exact at the weights 0 and 1 for finite values."""
    # torch.lerp refuses a weight of another dtype, and scalars are float64 here
    return torch.lerp(start, end, torch.as_tensor(weight, dtype=start.dtype, device=start.device))


def debiased_weight(beta: Tensor, step: Tensor) -> Tensor:
    """The weight `(1 - beta) / (1 - beta^t)` that keeps a running mean unbiased.

    Averaging with it gives at every step the weighted mean of all values so far with weights
    `beta^(t-i)`: the plain average divided by `1 - beta^t`, without the division. It is 1 at t = 1.
    """
    return (1 - beta) / (1 - beta**step)


def ema(average: Tensor, value: Tensor, beta: Tensor, step: Tensor, debias: bool = True) -> Tensor:
    """One step of the exponential moving average, unbiased by default; `step` counts from 1."""
    return lerp(average, value, debiased_weight(beta, step) if debias else 1 - beta)


def second_weight(
    beta2: Tensor, step: Tensor, scheduled_beta2: Tensor | None, debias: bool = True
) -> Tensor:
    """The weight of the newest value in a second moment: the chain's `scheduled_beta2` rules."""
    if scheduled_beta2 is not None:
        return 1 - scheduled_beta2
    return debiased_weight(beta2, step) if debias else 1 - beta2


def second_moment(
    average: Tensor,
    value: Tensor,
    beta2: Tensor,
    step: Tensor,
    scheduled_beta2: Tensor | None,
    debias: bool = True,
) -> Tensor:
    """One step of the mean of `value^2`, unbiased by default."""
    return lerp(average, value.square(), second_weight(beta2, step, scheduled_beta2, debias))


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


def quotient(
    update: Tensor, deviation: Tensor, eps: Tensor | None, bound: Tensor | None = None
) -> Tensor:
    """`update / (deviation + eps)`; with eps None the arc tangent `b atan2(update, b deviation)`.

    bound: b, by default 1. The arc tangent stays below b pi / 2, and is 0 at 0 / 0.
    """
    if eps is not None:
        return update / (deviation + eps)
    if bound is None:
        return torch.atan2(update, deviation)
    return bound * torch.atan2(update, bound * deviation)
