"""The running mean of the gradient."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema, lerp
from heavyball.state.declare import scalar, zeros


@transform(exp_avg=zeros, lr_avg=scalar(0.0, low=0.0).needs("lr_in_momentum"))
def exp_avg(
    update: Tensor,
    exp_avg: Tensor,
    lr_avg: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    beta: Live = 0.9,
    correct_bias: bool = True,
    lr_in_momentum: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replace the update with its unbiased running mean.

    m_t = sum_i beta^(t-i) u_i / sum_i beta^(t-i), i = 1..t

    correct_bias: False starts at zero: m <- beta m + (1 - beta) u.
    lr_in_momentum: average lr u instead of u, m <- beta m + (1 - beta) lr u from zero, and u' = m / lr;
        with bias correction, m is divided by the same mean of lr instead.

    Shapes: all (*).
    Source: the first moment of Kingma and Ba 2015, https://arxiv.org/abs/1412.6980. Departure: the
        state itself is unbiased, so it equals optax.ema(debias=True)'s output, not its state.
    """
    if lr_avg is None:
        exp_avg = ema(exp_avg, update, beta, step, correct_bias)
        return exp_avg, exp_avg, None
    exp_avg = lerp(exp_avg, lr * update, 1 - beta)
    lr_avg = beta * lr_avg + (1 - beta) * lr
    size = lr_avg if correct_bias else lr
    # at a rate of zero nothing moves
    return torch.where(size > 0, exp_avg / size, 0.0), exp_avg, lr_avg
