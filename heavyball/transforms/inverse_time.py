"""A learning rate that falls as the inverse of the step."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform


@transform(provides=("lr",), modifier=True)
def inverse_time(
    update: Tensor, *, step: Tensor, lr: Tensor, decay: Live = 0.0
) -> tuple[Tensor, Tensor]:
    """Decay the learning rate of later elements inversely with the step.

    lr' = lr / (1 + (t - 1) decay);  u' = u

    Shapes: all (*).
    Source: `lr_decay` of torch.optim.Adagrad.
    """
    return update, lr / (1 + (step - 1) * decay)
