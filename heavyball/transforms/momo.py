"""MoMo: momentum whose step is bounded by what is left of the loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, finite
from heavyball.core.rate import rate
from heavyball.numerics import dot, lerp, norm
from heavyball.state.declare import squares, zeros
from heavyball.transforms.dog import Numbers, for_pools

# momo_bound is the least loss as this step takes it, momo_fstar what has been found of it so far.
NUMBERS: dict[str, str | float] = {
    **{"momo_loss": 0.0, "momo_slope": 0.0, "momo_along": 0.0, "momo_size": 0.0},
    **{"momo_bound": "lower_bound", "momo_fstar": "lower_bound"},
    "momo_steps": 0,
}


def _mean(exp_avg: Tensor, update: Tensor, beta: Tensor, step: Tensor, from_zero: bool) -> Tensor:
    mean = lerp(exp_avg, update, 1 - beta)
    return mean if from_zero else torch.where(step == 1, update, mean)


def _renew(
    v: Mapping[str, Any], sums: Sequence[Any], beta: Any, from_zero: bool, use_fstar: bool
) -> Numbers:
    """The means of loss and slope, the sums of this step, and the bounds."""
    along, size, now = sums
    weight = 1.0 if v["momo_steps"] == 1 and not from_zero else 1 - beta
    loss = v["momo_loss"] + weight * (v["loss"] - v["momo_loss"])
    slope = v["momo_slope"] + weight * (now - v["momo_slope"])
    new = {"momo_loss": loss, "momo_slope": slope, "momo_along": along, "momo_size": size}
    if not use_fstar:
        return new | {"momo_bound": v["lower_bound"], "momo_fstar": v["lower_bound"]}
    rho = 1 - beta ** v["momo_steps"] if from_zero else 1.0
    return new | _bounds(v, loss - slope, along, size, rho)


def _bounds(v: Mapping[str, Any], height: Any, along: Any, size: Any, rho: Any) -> Numbers:
    """The bound of this step, lowered where the model of the loss is below it, and that of the next."""
    shrink, least, known = 1 + v["lr"] * v["weight_decay"], v["lower_bound"], v["momo_fstar"]
    cap = shrink * height + along
    lowered = (cap / (2 * shrink * rho)).maximum(least)
    bound = lowered.where(cap < shrink * rho * known, known)
    polyak = ((cap - shrink * rho * bound).clamp(min=0.0) / size).where(size > 0, 0.0)
    tau = (v["lr"] / rho).minimum(polyak)
    found = ((height + along - 0.5 * tau * size) / rho).maximum(least)
    return {"momo_bound": bound, "momo_fstar": found}


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


@rate(
    kind="writer",
    provides=(),
    exp_avg=zeros,
    domains={"lower_bound": finite},
    numbers=NUMBERS,
    made_from={"momo_bound": "momo_fstar"},
    from_sums=_shares,
    finish=lambda members, o: for_pools(
        members,
        False,
        lambda v, *sums: _renew(v, sums, v["beta"], o["bias_correction"], o["use_fstar"]),
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
    momo_bound: Tensor,
    beta: Live = 0.9,
    lower_bound: Live = 0.0,
    bias_correction: bool = False,
    use_fstar: bool = False,
    weight_decay: Live = 0.0,
) -> tuple[Tensor, Tensor]:
    """Momentum with a Polyak step size, at most `lr`; `step(loss=...)` or a closure gives the loss.

    A step whose loss is not finite changes nothing.

    f, d, c = means with beta of the loss, u and <u, p>, from the first value;  k = 1 + lr weight_decay
    tau = min(lr / rho, max(k (f - rho b - c) + <d, p>, 0) / ||d||^2), rho = 1, b = lower_bound
    p <- (p - tau d) / k; products and norms over all parameters

    bias_correction: the means start at zero, and rho = 1 - beta^t.
    use_fstar: b is estimated, never below lower_bound. With h = k (f - c) + <d, p>,
        b <- h / (2 k rho) where h < k rho b; after the step
        b <- (f - c + <d, p> - tau ||d||^2 / 2) / rho.

    Shapes: all (*).
    Units: `lr` is the largest step size, 1 or more; `lower_bound` has the loss's unit.
    Errors: ValueError at a step without a loss.
    Source: Schaipp et al. 2023, Algorithm 1, https://arxiv.org/abs/2305.07583; fabian-sp/MoMo.
        Departure: if groups differ, b is estimated with the lr of the first.
    """
    exp_avg = _mean(exp_avg, update, beta, step, bias_correction)
    rho = 1 - beta**step if bias_correction else torch.ones_like(beta)
    shrink = 1 + lr * weight_decay
    left = shrink * (momo_loss - rho * momo_bound - momo_slope) + momo_along
    tau = _step_size(left, momo_size, lr, rho)
    return (param - tau * exp_avg) / shrink, exp_avg


def _step_size(left: Tensor, size: Tensor, lr: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(lr / rho, torch.where(size > 0, left.clamp(min=0) / size, 0.0))


def _of_adam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both means, and the direction."""
    mean = lerp(exp_avg, update, 1 - betas[0])
    square = lerp(exp_avg_sq, update.square(), 1 - betas[1])
    deviation = (square / (1 - betas[1] ** step)).sqrt() + eps
    # what has had no gradient does not move, whatever eps is
    return mean, square, torch.where(deviation > 0, mean / deviation, 0.0)


def _adam_shares(
    update: Tensor,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    param: Tensor,
    step: Tensor,
    betas: tuple[Tensor, Tensor],
    eps: Tensor,
) -> tuple[Tensor, ...]:
    mean, _, direction = _of_adam(update, exp_avg, exp_avg_sq, step, betas, eps)
    return dot(mean, param), dot(mean, direction), dot(update, param)


@rate(
    kind="writer",
    provides=(),
    exp_avg=zeros,
    exp_avg_sq=squares,
    domains={"lower_bound": finite},
    numbers=NUMBERS,
    made_from={"momo_bound": "momo_fstar"},
    from_sums=_adam_shares,
    finish=lambda members, o: for_pools(
        members, False, lambda v, *sums: _renew(v, sums, v["betas"][0], True, o["use_fstar"])
    ),
    shared=True,
)
def momo_adam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    lr: Tensor,
    loss: Tensor,
    momo_loss: Tensor,
    momo_slope: Tensor,
    momo_along: Tensor,
    momo_size: Tensor,
    momo_bound: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    lower_bound: Live = 0.0,
    use_fstar: bool = False,
    weight_decay: Live = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`momo` in the metric of Adam.

    f, d, c, v = means from zero of the loss, u, <u, p> and u^2 (betas[1]);  rho = 1 - betas[0]^t
    D = sqrt(v / (1 - betas[1]^t)) + eps;  k = 1 + lr weight_decay
    tau = min(lr / rho, max(k (f - rho b - c) + <d, p>, 0) / <d, d / D>);  p <- (p - tau d / D) / k

    lower_bound, use_fstar: b, as in `momo`, with <d, d / D> instead of ||d||^2.

    Shapes: all (*).
    Units: `lr` is the largest step, as Adam's; 0.01 or more. `lower_bound` has the loss's unit.
    Errors: ValueError at a step without a loss.
    Source: Schaipp et al. 2023, Algorithm 2, https://arxiv.org/abs/2305.07583; fabian-sp/MoMo.
    """
    exp_avg, exp_avg_sq, direction = _of_adam(update, exp_avg, exp_avg_sq, step, betas, eps)
    rho, shrink = 1 - betas[0] ** step, 1 + lr * weight_decay
    left = shrink * (momo_loss - rho * momo_bound - momo_slope) + momo_along
    tau = _step_size(left, momo_size, lr, rho)
    return (param - tau * direction) / shrink, exp_avg, exp_avg_sq
