"""Slow weights that follow the fast ones every few steps."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, closed_fraction, fraction, positive
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param, zeros

AVERAGES = {
    "schedule_free": "both keep the point from which the next step is taken",
    "primal_average": "both keep the point from which the next step is taken",
    "hyperball": "the slow weights leave the sphere",
    "muown": "the slow weights lose its norms",
}


@transform(
    kind="post",
    slow=copy_of_param,
    domains={"k": positive, "alpha": closed_fraction},
    excludes=AVERAGES | {"outer_nesterov": "both keep slow weights"},
)
def lookahead(
    update: Tensor, slow: Tensor, *, step: Tensor, k: int = 5, alpha: Live = 0.5
) -> tuple[Tensor, Tensor]:
    """Every k steps, move slow weights towards the fast ones, and continue from there.

    at t mod k = 0, after the write: s <- s + alpha (p - s);  p <- s;  s_0 is p before the first step

    Moments are kept.

    Shapes: all (*).
    Source: Zhang et al. 2019, Algorithm 1, https://arxiv.org/abs/1907.08610.
    """
    moved, now = lerp(slow, update, alpha), step % k == 0
    return torch.where(now, moved, update), torch.where(now, moved, slow)


@transform(
    kind="post",
    slow=copy_of_param,
    momentum=zeros.holding("values"),
    domains={"k": positive, "outer_momentum": fraction},
    excludes=AVERAGES,
)
def outer_nesterov(
    update: Tensor,
    slow: Tensor,
    momentum: Tensor,
    *,
    step: Tensor,
    k: int = 30,
    outer_lr: Live = 0.7,
    outer_momentum: Live = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every k steps, use the displacement as the gradient of a step with Nesterov momentum.

    at t mod k = 0, after the write: d = s - p;  b <- outer_momentum b + d
    s <- s - outer_lr (outer_momentum b + d);  p <- s;  s_0 is p before the first step

    Without momentum it is `lookahead` with alpha = outer_lr. Moments are kept.

    Shapes: all (*).
    Units: `outer_lr` is a factor, 0.5 to 1; k is 10 to 40.
    Source: DiLoCo with one worker, https://arxiv.org/abs/2311.08105; SNOO,
        https://arxiv.org/abs/2510.15830; torch.optim.SGD with Nesterov on d.
    """
    way, now = slow - update, step % k == 0
    new = outer_momentum * momentum + way
    moved = slow - outer_lr * (outer_momentum * new + way)
    return (
        torch.where(now, moved, update),
        torch.where(now, moved, slow),
        torch.where(now, new, momentum),
    )
