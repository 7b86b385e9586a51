"""Gradient accumulation inside the optimizer."""

import math

import torch
from torch import Tensor

from heavyball.core.hyper import Interval
from heavyball.core.transform import transform
from heavyball.state.declare import zeros


@transform(
    accumulated=zeros.holding("values"),
    provides=("grad", "gate", "step"),
    domains={"k": Interval(1, math.inf)},
)
def accumulate(
    update: Tensor, accumulated: Tensor, *, step: Tensor, k: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Step once in every k calls, with the mean of the k updates.

    a <- a + (u - a) / n for the n-th of k calls; at n = k, later elements run with
    u' = a, and a <- 0. In the other calls, later elements do not change, nor do their step counts.

    Shapes: all (*).
    Source: optax.MultiSteps.
    """
    position = torch.remainder(step - 1, k) + 1
    mean = accumulated + (update - accumulated) / position
    full = position == k
    return mean, torch.where(full, 0.0, mean), mean, full, (step / k).ceil()
