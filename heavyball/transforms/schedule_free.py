"""Schedule-free: an average of the iterates in place of a decreasing learning rate."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, nonnegative, open_fraction
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param, scalar
from heavyball.transforms.cautious import CautiousScale, mask_disagreeing


def averaged_iterate(
    param: Tensor,
    z: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    last_beta: Tensor,
    *,
    beta: Tensor,
) -> Tensor:
    """x = y + (1 - 1 / beta) (z - y), the point to evaluate at, with the beta that y was made with."""
    beta = torch.where(last_beta > 0, last_beta, beta)
    return lerp(param, z, 1 - 1 / beta)


def _present(beta: Tensor, beta_max: Tensor | None, step: Tensor, anneal_steps: int) -> Tensor:
    """The beta of this step: 1 - beta falls geometrically to 1 - beta_max."""
    if beta_max is None or not anneal_steps:
        return beta
    far = ((step - 1) / anneal_steps).clamp(max=1)
    return 1 - (1 - beta) ** (1 - far) * (1 - beta_max) ** far


def _ahead(
    param: Tensor,
    z: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    last_beta: Tensor,
    *,
    step: Tensor,
    beta: Tensor,
    beta_max: Tensor | None,
    anneal_steps: int,
) -> Tensor:
    """beta (z - x), from z - y, which is that with the beta that y was made with."""
    beta = _present(beta, beta_max, step, anneal_steps)
    return torch.where(last_beta > 0, beta / last_beta, 0.0) * (z - param)


@transform(
    kind="writer",
    z=copy_of_param,
    weight_sum=scalar(0.0, low=0.0),
    lr_max=scalar(0.0, low=0.0),
    last_beta=scalar(0.0, low=0.0),
    domains={
        "beta": open_fraction,
        "beta_max": open_fraction,
        "anneal_steps": nonnegative,
        "c_warmup": nonnegative,
    },
    offers={"ahead": _ahead},
    excludes={"parameter_ema": "both decide which weights are evaluated"},
    evaluate=averaged_iterate,
)
def schedule_free(
    update: Tensor,
    z: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    last_beta: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    lr: Tensor,
    beta: Live = 0.9,
    r: Live = 0.0,
    weight_lr_power: Live = 2.0,
    c: Live = 0.0,
    c_warmup: int = 0,
    beta_max: Live | None = None,
    anneal_steps: int = 0,
    caution: Literal["none", "cautious", "grams"] = "none",
    caution_scale: CautiousScale = "mean",
    weight_at: Literal["peak", "now"] = "peak",
    shrink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Schedule-free averaging: step from z, average in x, compute gradients at y, in between.

    w_t = t^r max(lr_1..lr_t)^weight_lr_power;  c_t = w_t / (w_1 + .. + w_t)
    y <- y + c_t (z - y) - lr (1 - beta (1 - c_t)) u;  z <- z - lr u
    which keeps y = (1 - beta) z + beta x with x <- (1 - c_t) x + c_t z. If beta has changed since
    the last step, y moves first, for the same x and z: y <- z + beta / beta_old (y - z).

    The parameter holds y during training and x in evaluation mode, see `ChainOpt.eval`. An earlier
    weight decay decays y and z by the same amount, as the authors do.

    c: above 0, c_t is min(1, c (1 - beta) c_t), a longer average.
    c_warmup: c_t = 1 and w_t = 0 in the first c_warmup steps, so the average starts after them.
    beta_max, anneal_steps: 1 - beta decreases geometrically to 1 - beta_max in anneal_steps steps.
    caution: masks (or sets the signs of) the whole change of y by u, never of z; earlier `cautious` and
        `grams` elements act on u instead. `caution_scale` is the `scale` of `cautious`.
    weight_at: "now" weights a step by its own lr_t instead of the largest so far.

    Shapes: all (*).
    Units: `lr` as in the chain before; no schedule is needed except a warm-up.
    Errors: beta must be above 0, because x is recovered from y.
    Source: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682, weights as in the
        authors' package; c from https://arxiv.org/abs/2507.09846;
        c_warmup and beta_max from https://arxiv.org/abs/2605.19095. Departure: weights and lr_max are
        stored per parameter, so a parameter whose gradients start late is averaged from its own
        first step.
    """
    lr_max = torch.maximum(lr_max, lr)
    weight = step**r * (lr_max if weight_at == "peak" else lr) ** weight_lr_power
    if c_warmup:
        weight = torch.where(step > c_warmup, weight, 0.0)
    weight_sum = weight_sum + weight
    share = torch.where(weight_sum > 0, weight / weight_sum, 0.0)
    beta = _present(beta, beta_max, step, anneal_steps)
    share = torch.where(c > 0, (c * (1 - beta) * share).clamp(max=1), share)
    if c_warmup:
        share = torch.where(step <= c_warmup, 1.0, share)
    # without a change the factor is 0, and the sum exact
    moved = torch.where(last_beta > 0, beta / last_beta - 1, 0.0)
    param = param + moved * (param - z)
    forward = 1 - beta * (1 - share)
    change = share * (param - z) + lr * forward * update
    if caution == "cautious":
        change = mask_disagreeing(change, update, caution_scale)
    elif caution == "grams":
        change = update.sign() * change.abs()
    if shrink is None:
        return param - change, z - lr * update, weight_sum, lr_max, beta
    return (
        param - change - forward * shrink,
        z - lr * update - shrink,
        weight_sum,
        lr_max,
        beta,
    )
