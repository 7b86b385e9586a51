"""Adagrad: divide by the root of all squares so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, nonnegative
from heavyball.core.transform import transform
from heavyball.state.declare import State


def _initial(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    return torch.full_like(param, options["initial_accumulator_value"])


@transform(
    square_sum=State(_initial, "initial_accumulator_value everywhere", holds="square"),
    domains={"initial_accumulator_value": nonnegative},
)
def scale_by_adagrad(
    update: Tensor,
    square_sum: Tensor,
    *,
    eps: Live = 1e-10,
    initial_accumulator_value: Fixed = 0.0,
) -> tuple[Tensor, Tensor]:
    """Divide every element by the root of its accumulated squares.

    s <- s + u^2, initially `initial_accumulator_value`;  u' = u / (sqrt(s) + eps)

    There is no beta2 for `palm_beta2` to schedule.

    Shapes: all (*).
    Units: the result is dimensionless, and shrinks as 1 / sqrt(t) for gradients of constant size.
    Source: Duchi, Hazan and Singer 2011, https://jmlr.org/papers/v12/duchi11a.html;
        torch.optim.Adagrad.
    """
    square_sum = square_sum + update.square()
    return update / (square_sum.sqrt() + eps), square_sum
