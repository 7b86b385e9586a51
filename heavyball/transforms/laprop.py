"""LaProp: normalize each gradient first, then average."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, ema, lerp, root, second_moment
from heavyball.state.declare import scalar, squares, zeros


@transform(
    exp_avg=zeros,
    exp_avg_sq=squares,
    grad_avg=zeros.needs("centered"),
    lr_avg=scalar(0.0, low=0.0).needs("lr_in_momentum"),
)
def scale_by_laprop(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_avg: Tensor | None,
    lr_avg: Tensor | None,
    *,
    step: Tensor,
    lr: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-15,
    eps_placement: EpsPlacement = "outside",
    centered: bool = False,
    lr_in_momentum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """LaProp: momentum of gradients that are normalized first.

    v as in `scale_by_adam`;  n = g / (sqrt(v) + eps);  u = unbiased mean of n_1..n_t with beta1

    lr_in_momentum: the mean of n also weights each step by its learning rate, as the authors' code does;
        equivalent while `lr` is constant.
    centered: after ten steps v is replaced by v - a^2 / (1 - beta2^t), with
        a <- beta2 a + (1 - beta2) g.

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Ziyin, Wang and Ueda 2020, Algorithm 1, https://arxiv.org/abs/2002.04839.
        Departure: this v is kept at zero or above.
    """
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    square = exp_avg_sq
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, update, 1 - betas[1])
        bias = 1 - betas[1] ** step
        centred = torch.clamp(square * bias - grad_avg.square(), min=0) / bias
        square = torch.where(step > 10, centred, square)
    normalized = update / root(square, eps, eps_placement, 1 - betas[1] ** step)
    if lr_avg is None:
        exp_avg = ema(exp_avg, normalized, betas[0], step)
        return exp_avg, exp_avg, exp_avg_sq, grad_avg, lr_avg
    exp_avg = lerp(exp_avg, lr * normalized, 1 - betas[0])
    lr_avg = betas[0] * lr_avg + (1 - betas[0]) * lr
    # no step has had a learning rate yet: 0 / 0
    mean = torch.where(lr_avg > 0, exp_avg / lr_avg, 0.0)
    return mean, exp_avg, exp_avg_sq, grad_avg, lr_avg
