"""Yogi: Adam whose second moment moves by a bounded amount."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, nonnegative
from heavyball.core.transform import transform
from heavyball.numerics import ema
from heavyball.state.declare import State, zeros


def _initial(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    return torch.full_like(param, options["initial_accumulator_value"])


@transform(
    exp_avg=zeros,
    square=State(_initial, "initial_accumulator_value everywhere", holds="square"),
    domains={"initial_accumulator_value": nonnegative},
)
def scale_by_yogi(
    update: Tensor,
    exp_avg: Tensor,
    square: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-3,
    initial_accumulator_value: Fixed = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Yogi: Adam whose second moment changes by a bounded amount.

    m as in `scale_by_adam`;  v <- v - (1 - beta2) sign(v - g^2) g^2, initially
    `initial_accumulator_value`;  u = m / (sqrt(v / (1 - beta2^t)) + eps)

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Zaheer et al. 2018, Algorithm 2,
        https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization. m starts at 0 as
        in the paper; pytorch_optimizer also starts it at `initial_accumulator_value`.
    """
    new = update.square()
    square = square - (1 - betas[1]) * (square - new).sign() * new
    square = square.clamp(min=0)  # what rounding may take below
    exp_avg = ema(exp_avg, update, betas[0], step)
    deviation = (square / (1 - betas[1] ** step)).sqrt()
    return exp_avg / (deviation + eps), exp_avg, square
