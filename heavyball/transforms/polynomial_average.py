"""An average of the parameters that weighs late steps more."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param


def averaged_parameter(param: Tensor, polynomial_average: Tensor) -> Tensor:
    """The mean itself."""
    return polynomial_average


@transform(kind="observer", polynomial_average=copy_of_param, evaluate=averaged_parameter)
def polynomial_average(
    update: Tensor, polynomial_average: Tensor, *, step: Tensor, param: Tensor, gamma: Live = 8.0
) -> tuple[Tensor, Tensor]:
    """Average the parameters after every step with weights of about t^gamma, for evaluation.

    a <- a + (1 + gamma) / (t + gamma) (p - a), so a_1 = p_1

    Shapes: all (*).
    Source: Shamir and Zhang 2013, https://arxiv.org/abs/1212.1824; the averager of DoG.
    """
    return update, lerp(polynomial_average, param, (1 + gamma) / (step + gamma))
