"""The plain write."""

from torch import Tensor

from heavyball.core.transform import DEFAULTS, transform


@transform(kind="writer")
def descend(update: Tensor, *, param: Tensor, lr: Tensor, shrink: Tensor | None = None) -> Tensor:
    """Take one step against the update.

    p <- p - lr u, and minus what `separate_decay` takes off

    Units: `lr` times the update's unit is the parameter's.
    """
    return param - lr * update if shrink is None else param - lr * update - shrink


DEFAULTS["writer"] = descend
