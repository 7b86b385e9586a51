"""The plain write."""

from torch import Tensor

from heavyball.transform import transform


@transform(kind="writer")
def descend(update: Tensor, *, param: Tensor, lr: Tensor) -> Tensor:
    """Take one step against the update.

    p <- p - lr u

    Units: `lr` times the update's unit is the parameter's.
    """
    return param - lr * update
