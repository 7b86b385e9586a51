"""COCOB: steps by betting on coins, without a learning rate."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.state.declare import copy_of_param, zeros

VALUES = zeros.holding("values")


@transform(
    kind="writer",
    largest=VALUES,
    abs_sum=VALUES,
    reward=VALUES,
    theta=VALUES,
    p0=copy_of_param,
    domains={"alpha": positive, "eps": positive},
)
def cocob(
    update: Tensor,
    largest: Tensor,
    abs_sum: Tensor,
    reward: Tensor,
    theta: Tensor,
    p0: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    alpha: Live = 100.0,
    eps: Live = 1e-8,
) -> tuple[Tensor, ...]:
    """Bet a fraction of each weight's accumulated reward on the sign of its next gradient.

    L <- max(L, |u|), initially eps;  G <- G + |u|;  R <- max(R - u (p - p_1), 0);  T <- T - u
    p <- p_1 + T / (L max(G + L, alpha L)) (L + R)

    Shapes: all (*). Five states of the parameter's size.
    Units: `lr` has no effect; the first step is 1 / alpha in weight units.
    Source: Orabona and Tommasi 2017, Algorithm 2, https://arxiv.org/abs/1705.07795; optax.
    """
    size = update.abs()
    largest = torch.maximum(torch.where(step == 1, eps, largest), size)
    abs_sum = abs_sum + size
    reward = (reward - update * (param - p0)).clamp(min=0)
    theta = theta - update
    share = theta / torch.maximum(abs_sum + largest, alpha * largest)
    param = p0 + share * (1 + reward / largest)
    return param, largest, abs_sum, reward, theta, p0
