"""Stable-SPAM: clip entries and norms by their own means."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction, nonnegative
from heavyball.core.transform import transform
from heavyball.numerics import ema, norm
from heavyball.state.declare import scalar

NUMBER = scalar(0.0, low=0.0)


@transform(
    max_avg=NUMBER,
    norm_avg=NUMBER,
    square_avg=NUMBER,
    provides=("step",),
    domains={"gamma1": fraction, "gamma2": fraction, "theta": fraction, "every": nonnegative},
)
def stable_spam(
    update: Tensor,
    max_avg: Tensor,
    norm_avg: Tensor,
    square_avg: Tensor,
    *,
    step: Tensor,
    gamma1: Live = 0.7,
    gamma2: Live = 0.9,
    theta: Live = 0.999,
    eps: Live = 1e-8,
    every: int = 1000,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clip the largest entries, normalize to the usual norm, and restart moments periodically.

    M = unbiased mean with theta of max|u|;  entries with |u| > M are scaled by M / max|u|
    a, c = unbiased means with gamma1, gamma2 of n = ||u|| and n^2;  u' = u / n a / (sqrt(c) + eps)
    t' = t, restarted from 1 in every step that `every` divides; 0 never restarts

    Shapes: all (*); max and norms over the tensor. State is three numbers.
    Units: the norm of the result is about 1.
    Source: Huang et al. 2025, https://arxiv.org/abs/2502.17055. At a restart, the authors' code
        corrects old moments as if in step 1; here they are reset.
    """
    largest = update.abs().amax()
    max_avg = ema(max_avg, largest.to(max_avg.dtype), theta, step)
    scale = max_avg / largest
    update = torch.where(update.abs() > max_avg, update * scale, update)
    size = norm(update)
    norm_avg = ema(norm_avg, size, gamma1, step)
    square_avg = ema(square_avg, size.square(), gamma2, step)
    usual = norm_avg / (square_avg.sqrt() + eps)
    # by its own norm first: the usual one over a tiny norm leaves the range of the dtype
    update = torch.where(size > 0, update / size, 0.0) * usual
    since = torch.where(step < every, step, step % every + 1) if every else step
    return update, max_avg, norm_avg, square_avg, since
