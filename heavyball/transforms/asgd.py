"""The learning rate of averaged stochastic gradient descent."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform


@transform(provides=("lr",), modifier=True)
def asgd_rate(
    update: Tensor, *, step: Tensor, lr: Tensor, lambd: Live = 1e-4, alpha: Live = 0.75
) -> tuple[Tensor, Tensor]:
    """Decay the learning rate of later elements as a power of the step.

    lr' = lr / (1 + lambd lr (t - 1))^alpha;  u' = u

    Shapes: all (*).
    Source: Xu 2011, https://arxiv.org/abs/1107.2490; torch.optim.ASGD, which computes lr' at the end of
        a step, so that a scheduler's lr takes effect one step later.
    """
    return update, lr / (1 + lambd * lr * (step - 1)) ** alpha
