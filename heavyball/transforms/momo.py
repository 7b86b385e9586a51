"""MoMo: momentum whose step is bounded by what is left of the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, finite
from heavyball.core.rate import rate
from heavyball.numerics import dot, lerp, norm
from heavyball.state.declare import zeros
from heavyball.transforms.dog import Numbers, for_pools


def _mean(exp_avg: Tensor, update: Tensor, beta: Tensor, step: Tensor, from_zero: bool) -> Tensor:
    mean = lerp(exp_avg, update, 1 - beta)
    return mean if from_zero else torch.where(step == 1, update, mean)


def _shares(
    update: Tensor,
    *,
    exp_avg: Tensor,
    param: Tensor,
    step: Tensor,
    beta: Tensor,
    bias_correction: bool,
) -> tuple[Tensor, ...]:
    mean = _mean(exp_avg, update, beta, step, bias_correction)
    return dot(mean, param), norm(mean).square(), dot(update, param)


def _renew(v: Mapping[str, Any], sums: Sequence[Tensor], bias_correction: bool) -> Numbers:
    along, size, now = sums
    first = v["momo_steps"] == 1 and not bias_correction
    weight = 1.0 if first else 1 - v["beta"]
    return {
        "momo_loss": v["momo_loss"] + weight * (v["loss"] - v["momo_loss"]),
        "momo_slope": v["momo_slope"] + weight * (now - v["momo_slope"]),
        "momo_along": along,
        "momo_size": size,
    }


@rate(
    kind="writer",
    provides=(),
    exp_avg=zeros,
    domains={"lower_bound": finite},
    numbers={
        **{"momo_loss": 0.0, "momo_slope": 0.0, "momo_along": 0.0, "momo_size": 0.0},
        "momo_steps": 0,
    },
    from_sums=_shares,
    finish=lambda members, options: for_pools(
        members, False, lambda v, *sums: _renew(v, sums, options["bias_correction"])
    ),
    shared=True,
)
def momo(
    update: Tensor,
    exp_avg: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    lr: Tensor,
    loss: Tensor,
    momo_loss: Tensor,
    momo_slope: Tensor,
    momo_along: Tensor,
    momo_size: Tensor,
    beta: Live = 0.9,
    lower_bound: Live = 0.0,
    bias_correction: bool = False,
    weight_decay: Live = 0.0,
) -> tuple[Tensor, Tensor]:
    """Momentum with a Polyak step size, at most `lr`; `step(loss=...)` or a closure gives the loss.

    f, d, c = means with beta of the loss, u and <u, p>, begun with the first;  k = 1 + lr weight_decay
    tau = min(lr / rho, max(k (f - rho lower_bound - c) + <d, p>, 0) / ||d||^2), rho = 1
    p <- (p - tau d) / k; products and norms over all parameters

    bias_correction: the means begin at zero, and rho = 1 - beta^t.

    Shapes: all (*).
    Units: `lr` is the largest step size, 1 or more; `lower_bound` has the loss's unit.
    Errors: ValueError at a step without a loss.
    Source: Schaipp et al. 2023, Algorithm 1, https://arxiv.org/abs/2305.07583; fabian-sp/MoMo.
    """
    exp_avg = _mean(exp_avg, update, beta, step, bias_correction)
    rho = 1 - beta**step if bias_correction else torch.ones_like(beta)
    shrink = 1 + lr * weight_decay
    left = shrink * (momo_loss - rho * lower_bound - momo_slope) + momo_along
    polyak = torch.where(momo_size > 0, left.clamp(min=0) / momo_size, 0.0)
    return (param - torch.minimum(lr / rho, polyak) * exp_avg) / shrink, exp_avg
