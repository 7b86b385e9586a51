"""A running mean of the parameters, to evaluate with."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema
from heavyball.state.declare import zeros


def averaged_parameter(param: Tensor, parameter_ema: Tensor) -> Tensor:
    """The mean itself."""
    return parameter_ema


@transform(kind="observer", parameter_ema=zeros.holding("weights"), evaluate=averaged_parameter)
def parameter_ema(
    update: Tensor, parameter_ema: Tensor, *, step: Tensor, param: Tensor, beta: Live = 0.999
) -> tuple[Tensor, Tensor]:
    """Average the parameters behind every step.

    e_t = unbiased mean of p_1..p_t with weights beta^(t-i), p_i the parameter after step i

    `ChainOpt.eval` puts e into the parameters and `train` puts the parameters back, both exactly.
    It may stand anywhere in a chain and runs after the write.

    Shapes: all (*).
    Source: Polyak and Juditsky 1992; `ema_decay` of HeavyBall is 1 - beta.
    """
    return update, ema(parameter_ema, param, beta, step)
