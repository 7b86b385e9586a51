"""Another learning rate for a part of the parameters."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform


@transform(provides=("lr",), modifier=True)
def scale_lr(update: Tensor, *, lr: Tensor, factor: Live = 1.0) -> tuple[Tensor, Tensor]:
    """Multiply the learning rate of all later elements, including decay and write.

    lr' = factor lr;  u' = u

    In one branch of a `route`, it gives these parameters their own learning rate, which follows every
    schedule of the group.

    Shapes: all (*).
    """
    return update, lr * factor
