"""AdEMAMix: Adam with a second, much slower mean of the gradient."""

import math

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, ema, lerp, root, second_moment
from heavyball.state.declare import squares, zeros


@transform(
    exp_avg=zeros,
    exp_avg_slow=zeros,
    exp_avg_sq=squares,
    domains={"alpha_warmup": positive, "beta3_warmup": positive},
)
def scale_by_ademamix(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.999, 0.9999),
    alpha: Live = 2.0,
    eps: Live = 1e-8,
    alpha_warmup: int | None = None,
    beta3_warmup: int | None = None,
    eps_placement: EpsPlacement = "outside",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AdEMAMix: a fast and a slow mean of the gradient over its root mean square.

    m1, v as in `scale_by_adam`;  m2 <- beta3 m2 + (1 - beta3) g, not bias-corrected
    u = (m1 + alpha m2) / (sqrt(v) + eps)

    alpha_warmup: use alpha min(1, t / T) instead of alpha.
    beta3_warmup: while t < T, the half-life of beta3 grows linearly from beta1's to its own.

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Pagliardini, Ablin and Grangier 2024, Algorithm 1, https://arxiv.org/abs/2409.03137.
    """
    beta3 = betas[2]
    if alpha_warmup:
        alpha = alpha * (step / alpha_warmup).clamp(max=1)
    if beta3_warmup:
        share = step / beta3_warmup
        half_life = (1 - share) * _half_life(betas[0]) + share * _half_life(beta3)
        beta3 = torch.where(step < beta3_warmup, 0.5 ** (1 / (half_life + 1)), beta3)
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_slow = lerp(exp_avg_slow, update, 1 - beta3)
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    denominator = root(exp_avg_sq, eps, eps_placement, 1 - betas[1] ** step)
    return (exp_avg + alpha * exp_avg_slow) / denominator, exp_avg, exp_avg_slow, exp_avg_sq


def _half_life(beta: Tensor) -> Tensor:
    # 1e-8, as in the authors' code, keeps the logarithm of beta = 0 finite
    return math.log(0.5) / (beta + 1e-8).log() - 1
