"""A running mean of the parameters, to evaluate with."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, closed_fraction, nonnegative
from heavyball.core.transform import transform
from heavyball.numerics import debiased_weight, lerp
from heavyball.state.declare import copy_of_param


def averaged_parameter(param: Tensor, parameter_ema: Tensor, *, blend: Tensor) -> Tensor:
    """The mean, or a part of the way to it."""
    return lerp(param, parameter_ema, blend)


@transform(
    kind="observer",
    parameter_ema=copy_of_param,
    domains={"start": nonnegative, "blend": closed_fraction},
    evaluate=averaged_parameter,
)
def parameter_ema(
    update: Tensor,
    parameter_ema: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    beta: Live = 0.999,
    start: int = 0,
    blend: Live = 1.0,
    start_as_copy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Average the parameters after every step, for evaluation.

    e_t = unbiased mean of p_(start+1)..p_t with weights beta^(t-i), p_i the parameter after step i;
    e_t = p_t up to step `start`. Evaluation is at (1 - blend) p + blend e.

    `ChainOpt.eval` writes this into the parameters and `train` restores them exactly. The transform
    can be placed anywhere in a chain and runs after the write.

    start_as_copy: e is initialized with p_(start+1), and every later step has the weight 1 - beta,
        so the first keeps the larger weight beta^(t-start-1).

    Shapes: all (*).
    Source: Polyak and Juditsky 1992; `ema_decay` of HeavyBall is 1 - beta. `start` and `blend` are those
        of record 45 of modded-nanogpt's third track, with start_as_copy and beta = 1 - 1/150.
    """
    count = (step - start).clamp(min=1)
    if not start_as_copy:
        return update, lerp(parameter_ema, param, debiased_weight(beta, count))
    share = torch.where(count > 1, 1 - beta, 1.0)
    return update, lerp(parameter_ema, param, share)
