"""EMA-Nesterov: the gradient is taken a part of the mean way ahead."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param, zeros


def unmoved(param: Tensor, z: Tensor, way: Tensor) -> Tensor:
    """The weights without the way ahead."""
    return z


@transform(
    kind="writer",
    z=copy_of_param,
    way=zeros.holding("values"),
    domains={"gamma": fraction},
    evaluate=unmoved,
)
def ema_nesterov(
    update: Tensor,
    z: Tensor,
    way: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    lr: Tensor,
    beta: Live = 0.3,
    gamma: Live = 0.99,
    start: int = 300,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate gradients ahead of the weights, by a multiple of the mean step.

    z' = p - lr u;  e <- gamma e + (1 - gamma) (z' - z);  p = z' + beta e after step `start`, else z'

    The parameter holds p during training and z in evaluation mode.

    Shapes: all (*).
    Units: `lr` as in the chain before.
    Source: https://arxiv.org/abs/2605.25395; modded-nanogpt's track 3, record 39.
    """
    new = param - lr * update
    way = lerp(way, new - z, 1 - gamma)
    return torch.where(step >= start, new + beta * way, new), new, way
