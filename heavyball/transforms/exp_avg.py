"""The running mean of the gradient."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema
from heavyball.state.declare import zeros


@transform(exp_avg=zeros)
def exp_avg(
    update: Tensor, exp_avg: Tensor, *, step: Tensor, beta: Live = 0.9
) -> tuple[Tensor, Tensor]:
    """Replace the update by its unbiased running mean.

    m_t = sum_i beta^(t-i) u_i / sum_i beta^(t-i), i = 1..t

    Shapes: all (*).
    Source: the first moment of Kingma and Ba 2015, https://arxiv.org/abs/1412.6980. Departure: the
        state itself is unbiased, so it equals optax.ema(debias=True)'s output, not its state.
    """
    exp_avg = ema(exp_avg, update, beta, step)
    return exp_avg, exp_avg
