"""The plain mean of the parameters behind all steps from one on."""

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, nonnegative
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param


def averaged_parameter(param: Tensor, running_average: Tensor) -> Tensor:
    """The mean itself."""
    return running_average


@transform(
    kind="observer",
    running_average=copy_of_param,
    evaluate=averaged_parameter,
    domains={"start": nonnegative},
)
def running_average(
    update: Tensor, running_average: Tensor, *, step: Tensor, param: Tensor, start: Fixed = 0.0
) -> tuple[Tensor, Tensor]:
    """Average the parameters after every step with equal weights, for evaluation.

    a_t = p_t up to t = start + 2, then the mean of p_(start+2) .. p_t:
    a <- a + (p - a) / (t - 1 - start)

    Shapes: all (*).
    Source: Polyak and Juditsky 1992, as `ax` of torch.optim.ASGD, which starts in the second step.
    """
    share = 1 / (step - 1 - start).clamp(min=1)
    return update, torch.where(share == 1, param, lerp(running_average, param, share))
