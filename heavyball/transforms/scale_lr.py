"""Another learning rate for a part of the parameters."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform


@transform(provides=("lr",), modifier=True)
def scale_lr(update: Tensor, *, lr: Tensor, factor: Live = 1.0) -> tuple[Tensor, Tensor]:
    """Multiply the learning rate of everything behind this element, decay and write included.

    lr' = factor lr;  u' = u

    In one branch of a `route` it gives these parameters a learning rate of their own that follows the
    group's through every schedule.

    Shapes: all (*).
    """
    return update, lr * factor
