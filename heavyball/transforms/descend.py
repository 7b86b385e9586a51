"""The plain write."""

from torch import Tensor

from heavyball.core.transform import DEFAULTS, transform


@transform(kind="writer")
def descend(update: Tensor, *, param: Tensor, lr: Tensor, shrink: Tensor | None = None) -> Tensor:
    """Write the parameter: subtract `lr` times the update.

    p <- p - lr u, minus the decay of `separate_decay`

    Units: `lr` times the update's unit is the parameter's.
    """
    return param - lr * update if shrink is None else param - lr * update - shrink


DEFAULTS["writer"] = descend
