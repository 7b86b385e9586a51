"""Adam without an epsilon: an arc tangent bounds the quotient."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import ema, second_moment
from heavyball.state.declare import squares, zeros

BOUNDED = "atan2 already bounds every element of the update"


@transform(
    exp_avg=zeros,
    exp_avg_sq=squares,
    domains={"a": positive, "b": positive},
    excludes={"clip_update_rms": BOUNDED, "stable_adamw": BOUNDED},
)
def scale_by_adam_atan2(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.99),
    a: Live = 1.27,
    b: Live = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam with an arc tangent: bounded, and independent of the gradient's scale.

    u = a atan2(m, b sqrt(v)), m and v as in `scale_by_adam`

    Shapes: all (*).
    Units: |u| <= a pi / 2; atan2(0, 0) = 0, so a zero gradient gives a zero update.
    Source: Everett et al. 2024, appendix on Adam-atan2, https://arxiv.org/abs/2407.05872; a = 1.27
        as there, the rounded 4 / pi that makes u = 1 for m = sqrt(v).
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    return a * torch.atan2(exp_avg, b * exp_avg_sq.sqrt()), exp_avg, exp_avg_sq
