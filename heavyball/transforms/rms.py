"""Divide the gradient by its running root mean square."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, lerp, quotient, root, second_moment
from heavyball.state.declare import squares, zeros


@transform(exp_avg_sq=squares)
def scale_by_exp_avg_sq(
    update: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    beta2: Live = 0.99,
    eps: Live | None = 1e-8,
    eps_placement: EpsPlacement = "outside",
    correct_bias: bool = True,
    clip_threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adam without its first moment.

    v_t = unbiased mean of u_1^2..u_t^2 with weights beta2^(t-i);  u' = u / (sqrt(v) + eps)

    eps: None takes the arc tangent b atan2(u, b sqrt(v)) instead; b is 1, or what `prodigy_plus_d` says.
    correct_bias: False leaves out the bias correction.

    Shapes: all (*).
    Units: the result is dimensionless; on the first step it is the sign of u.
    Source: Kingma and Ba 2015 with beta1 = 0, https://arxiv.org/abs/1412.6980.
    """
    exp_avg_sq = second_moment(exp_avg_sq, update, beta2, step, scheduled_beta2, correct_bias)
    if eps is None:
        return quotient(update, exp_avg_sq.sqrt(), None, clip_threshold), exp_avg_sq
    bias = 1 - beta2**step if correct_bias else torch.ones_like(step)
    return update / root(exp_avg_sq, eps, eps_placement, bias), exp_avg_sq


@transform(exp_avg_sq=squares, grad_avg=zeros.needs("centered"))
def scale_by_rms(
    update: Tensor,
    exp_avg_sq: Tensor,
    grad_avg: Tensor | None,
    *,
    alpha: Live = 0.99,
    eps: Live = 1e-8,
    centered: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The second moment of torch's RMSprop, without bias correction.

    v <- alpha v + (1 - alpha) u^2;  u' = u / (sqrt(v) + eps)
    centered: u' = u / (sqrt(v - m^2) + eps), m <- alpha m + (1 - alpha) u

    Shapes: all (*).
    Units: the result is dimensionless; the first is sign(u) / sqrt(1 - alpha), ten times that of
        later ones.
    Source: torch.optim.RMSprop; Graves 2013, section 4.2, https://arxiv.org/abs/1308.0850.
        Departure: v - m^2, which rounding can put below zero, is kept at zero or above.
    """
    exp_avg_sq = lerp(exp_avg_sq, update.square(), 1 - alpha)
    square = exp_avg_sq
    if grad_avg is not None:
        grad_avg = lerp(grad_avg, update, 1 - alpha)
        square = torch.clamp(exp_avg_sq - grad_avg.square(), min=0)
    return update / (square.sqrt() + eps), exp_avg_sq, grad_avg
