"""Adan: Adam with Nesterov momentum by the differences of gradients."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema
from heavyball.state.declare import squares, zeros


@transform(exp_avg=zeros, exp_avg_diff=zeros, exp_avg_sq=squares, last_grad=zeros)
def scale_by_adan(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    last_grad: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.98, 0.92, 0.99),
    eps: Live = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adan: means of gradients and of their differences, over the root mean square of both.

    d = g_t - g_(t-1), 0 at t = 1;  m, v = unbiased means of g with beta1, of d with beta2
    n = unbiased mean of (g + beta2 d)^2 with beta3;  u = (m + beta2 v) / (sqrt(n) + eps)

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Xie et al. 2022, Algorithm 1, https://arxiv.org/abs/2208.06677, with the authors' defaults.
        betas are the fractions kept; the paper's are 1 minus these.
    """
    change = torch.where(step == 1, 0.0, update - last_grad)
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_diff = ema(exp_avg_diff, change, betas[1], step)
    exp_avg_sq = ema(exp_avg_sq, (update + betas[1] * change).square(), betas[2], step)
    direction = (exp_avg + betas[1] * exp_avg_diff) / (exp_avg_sq.sqrt() + eps)
    return direction, exp_avg, exp_avg_diff, exp_avg_sq, update
