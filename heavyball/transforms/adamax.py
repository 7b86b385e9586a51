"""Adamax: Adam with the infinity norm in place of the root mean square."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema
from heavyball.state.declare import zeros


@transform(exp_avg=zeros, exp_inf=zeros.holding("values"))
def scale_by_adamax(
    update: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adamax: scale every element by its decayed maximum gradient.

    m as in `scale_by_adam`;  n <- max(beta2 n, |u| + eps);  u' = m / n

    Shapes: all (*).
    Units: the result is dimensionless and its magnitude stays below 1.
    Source: Kingma and Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980; eps inside the maximum as
        in torch.optim.Adamax.
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_inf = torch.maximum(betas[1] * exp_inf, update.abs() + eps)
    return exp_avg / exp_inf, exp_avg, exp_inf
