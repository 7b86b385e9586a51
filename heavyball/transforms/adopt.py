"""ADOPT: Adam with the second moment of the steps before, which makes it converge for any beta2."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import squares, zeros


@transform(exp_avg=zeros, exp_avg_sq=squares, provides=("gate", "step"), opens_once=True)
def scale_by_adopt(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.9999),
    eps: Live = 1e-6,
    clip_exponent: Live | None = 0.25,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ADOPT: momentum of gradients, each divided by the root mean square of earlier gradients.

    t = 1:  v <- g^2, and neither the parameter nor any later element changes
    t > 1:  s = t - 1;  n = clip(g / max(sqrt(v), eps), -s^clip_exponent, s^clip_exponent)
            u = m <- beta1 m + (1 - beta1) n;  then v <- beta2 v + (1 - beta2) g^2

    There is no bias correction. `clip_exponent=None` does not clip.

    Shapes: all (*).
    Units: the result is dimensionless; |u| <= s^clip_exponent.
    Source: Taniguchi et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.02853, and the authors'
        code. The step that is skipped is each parameter's own first.
    """
    first, calls = step == 1, step - 1
    normalized = update / torch.maximum(exp_avg_sq.sqrt(), eps)
    if clip_exponent is not None:
        bound = calls**clip_exponent
        normalized = torch.clamp(normalized, -bound, bound)
    exp_avg = torch.where(first, exp_avg, lerp(exp_avg, normalized, 1 - betas[0]))
    weight = 1 - (betas[1] if scheduled_beta2 is None else scheduled_beta2)
    square = lerp(exp_avg_sq, update.square(), torch.where(first, 1.0, weight))
    return exp_avg, exp_avg, square, ~first, calls.clamp(min=1)
