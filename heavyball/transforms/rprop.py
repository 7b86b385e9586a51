"""Rprop: a step size for every element, by the signs of two gradients."""

import math

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, positive
from heavyball.core.transform import transform
from heavyball.state.declare import zeros

VALUES = zeros.holding("values")


@transform(
    last_grad=VALUES,
    step_size=VALUES,
    provides=("lr",),
    domains={
        "etas": lambda options: (
            Interval(0, 1, low_open=True),
            Interval(1, math.inf, low_open=True),
        ),
        "step_sizes": positive,
    },
    excludes={"decay": "it takes the learning rate's place, which a decay would be scaled by"},
)
def scale_by_rprop(
    update: Tensor,
    last_grad: Tensor,
    step_size: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    etas: Live = (0.5, 1.2),
    step_sizes: Live = (1e-6, 50.0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rprop: increase an element's step while its gradient keeps its sign, else decrease it.

    s = sign(u q);  e <- clamp(e eta_plus where s > 0, e eta_minus where s < 0, *step_sizes)
    q <- u, and 0 where s < 0;  u' = sign(q) e;  lr' = 1

    Shapes: all (*).
    Units: those of the weights. `lr` is the size of the first step only: a scheduler has no effect.
    Errors: ValueError together with a decay.
    Source: Riedmiller and Braun 1993; torch.optim.Rprop. Meant for full-batch gradients.
    """
    agreement = update.sign() * last_grad.sign()
    factor = torch.where(agreement > 0, etas[1], torch.where(agreement < 0, etas[0], 1.0))
    size = torch.where(step == 1, lr, step_size)
    size = torch.clamp(size * factor, step_sizes[0], step_sizes[1]).to(update.dtype)
    update = torch.where(agreement < 0, 0.0, update)
    return update.sign() * size, update, size, torch.ones_like(lr)
