"""ADOPT's order for a second moment alone: divide by that of the gradients before, then renew it."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import quotient, second_weight
from heavyball.transforms.factored import COL, FULL, ROW, factored_root, next_square


@transform(row=ROW, col=COL, exp_avg_sq=FULL, provides=("gate",), opens_once=True)
def delayed_rms(
    update: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    unit_change: Tensor | None = None,
    clip_threshold: Tensor | None = None,
    beta2: Live = 0.99,
    eps: Live | None = 1e-8,
    min_dim: int = 32,
    min_dim_mode: Literal["second", "any"] = "any",
    correct_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """`factored_rms` with the second moment before the current step, as in ADOPT.

    t = 1:  v <- u^2, and later elements do not change
    t > 1:  u' = u / (sqrt(v) + eps), with row and column means of v if factored; then
            v <- beta2 v + (1 - beta2) u^2

    After `prodigy_plus_d`, the divisor is v in the unit of the step it comes from. A large `min_dim`
    stores v unfactored. `eps` None and `correct_bias`: as in `scale_by_exp_avg_sq`.

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: `use_adopt` of prodigy-plus-schedule-free 1.9.0, after Taniguchi et al. 2024,
        https://arxiv.org/abs/2411.02853, without its momentum and its clip. Departure: the step
        that is skipped is each parameter's own first.
    """
    first, old = step == 1, (row, col, exp_avg_sq)
    weight = torch.where(first, 1.0, second_weight(beta2, step, scheduled_beta2, correct_bias))
    new = next_square(update, old, weight)
    deviation = factored_root(old)
    if unit_change is not None:
        deviation = deviation / unit_change
    return quotient(update, deviation, eps, clip_threshold), *new, ~first
