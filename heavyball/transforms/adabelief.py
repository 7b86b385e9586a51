"""AdaBelief: Adam that divides by how far the gradient is from its mean."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import squares, zeros


@transform(exp_avg=zeros, exp_avg_sq=squares)
def scale_by_adabelief(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale every element by the deviation of its gradient from the running mean.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) (g - m)^2 + eps, with the new m
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    m starts from zero: the residual to an unbiased mean would be 0 in the first step, and u infinite.

    Shapes: all (*).
    Units: the result is dimensionless; the first is sign(g) / beta1. `eps` is added to a square and
        to a root.
    Source: Zhuang et al. 2020, Algorithm 2, https://arxiv.org/abs/2010.07468.
    """
    exp_avg = lerp(exp_avg, update, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, (update - exp_avg).square(), 1 - betas[1]) + eps
    deviation = (exp_avg_sq / (1 - betas[1] ** step)).sqrt()
    return exp_avg / (1 - betas[0] ** step) / (deviation + eps), exp_avg, exp_avg_sq
