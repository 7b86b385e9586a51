"""A Polyak step size: what is left of the loss, over the size of the gradient."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.rate import rate
from heavyball.numerics import dot
from heavyball.transforms.dog import Numbers, for_pools

# The mean of |x| over a standard normal is the inverse.
NORMAL = math.sqrt(math.pi / 2)
# What the rate of a gradient of almost nothing ends at, as the d of `prodigy_d`.
LARGEST = 2.0**40


def _shares(update: Tensor, *, grad: Tensor, ahead: Tensor | None) -> tuple[Tensor, ...]:
    size = grad.abs().sum(dtype=torch.float64)
    return size, torch.zeros_like(size) if ahead is None else dot(grad, ahead)


def _renew(v: Mapping[str, Any], size: Tensor, along: Tensor) -> Numbers:
    beta = v["polyak_beta"]
    mean = v["polyak_mean"] + (1 - beta) * (NORMAL * size - v["polyak_mean"])
    expected = mean / (1 - beta ** v["polyak_steps"])
    left = (v["loss"] + along).clamp(min=0.0)
    scale = (left / expected).clamp(max=LARGEST).where(expected > 0, 0.0)
    return {"polyak_mean": mean, "polyak_scale": scale}


@rate(
    numbers={"polyak_mean": 0.0, "polyak_scale": 0.0, "polyak_steps": 0},
    from_sums=_shares,
    finish=lambda members, options: for_pools(members, False, _renew),
    shared=True,
)
def polyak_rate(
    update: Tensor,
    *,
    lr: Tensor,
    loss: Tensor,
    polyak_scale: Tensor,
    polyak_beta: Live = 0.0,
) -> tuple[Tensor, Tensor]:
    """Multiply the learning rate by the loss over the size of the gradient: a Polyak step for Adam.

    e_t = plain mean with polyak_beta of sqrt(pi / 2) sum |g|, divided by 1 - polyak_beta^t
    lr' = lr min(2^40, max(0, loss + <g, beta (z - x)>) / e_t), sums over all parameters;  u' = u

    z, x and beta are those of a later `schedule_free`, whose gradients are not taken at x; without
    one, the product is 0. `step(loss=...)` or a closure gives the loss; a step whose loss is not finite
    changes nothing.

    Shapes: all (*).
    Units: `lr` is a factor, leave it at 1; the smallest possible loss must be about 0.
    Errors: ValueError at a step without a loss.
    Source: Defazio et al. 2026, https://arxiv.org/abs/2605.19095. Their file stores the corrected mean
        and corrects it again in every step with polyak_beta > 0; here it is corrected once.
    """
    return update, lr * polyak_scale
