"""Momentum-SAM: the next gradient is taken ahead of the weights, along the momentum."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp, norm
from heavyball.state.declare import copy_of_param, zeros

AHEAD = "both keep the point from which the next step is taken"


def unmoved(param: Tensor, z: Tensor, exp_avg: Tensor) -> Tensor:
    """The weights without the way ahead."""
    return z


def _square(update: Tensor, *, exp_avg: Tensor, beta: Tensor) -> Tensor:
    return norm(lerp(exp_avg, update, 1 - beta)).square()


@transform(
    kind="writer",
    z=copy_of_param,
    exp_avg=zeros,
    over_all=_square,
    evaluate=unmoved,
    excludes=dict.fromkeys(
        ("lookahead", "outer_nesterov", "parameter_ema", "running_average"), AHEAD
    ),
)
def momentum_sam(
    update: Tensor,
    z: Tensor,
    exp_avg: Tensor,
    *,
    total: Tensor,
    lr: Tensor,
    beta: Live = 0.9,
    rho: Live = 0.1,
    weight_decay: Live = 0.0,
    norm: Literal["global", "tensor"] = "global",
) -> tuple[Tensor, Tensor, Tensor]:
    """Momentum-SAM: hold the parameter a distance ahead of the weights z, in the direction of descent.

    m <- beta m + (1 - beta) u;  z <- z - lr (m + weight_decay z);  p = z - rho m / max(||m||, 1e-8)

    The parameter holds p during training and z in evaluation mode.

    norm: over all parameters as one vector ("global", the paper), or over each tensor (HeavyBall).

    Shapes: all (*).
    Units: `lr` as in the chain before; rho is a distance in weight units, 0.05 to 3 in use.
    Source: Becker, Altrock and Risse 2024, Algorithm 1, https://arxiv.org/abs/2401.12033, with a mean of
        gradients for the momentum; `msam_` of HeavyBall 3.2.1.
    """
    exp_avg = lerp(exp_avg, update, 1 - beta)
    size = (
        total.sqrt() if norm == "global" else torch.linalg.vector_norm(exp_avg, dtype=total.dtype)
    )
    z = z - lr * (exp_avg + weight_decay * z)
    return z - rho / size.clamp(min=1e-8) * exp_avg, z, exp_avg
