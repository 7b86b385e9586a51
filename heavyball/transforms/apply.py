"""A plain function, and the sign for maximizing, as elements of a chain."""

from collections.abc import Callable

import torch
from torch import Tensor

from heavyball.core.transform import transform


def identity(update: Tensor) -> Tensor:
    """The update itself."""
    return update


@transform()
def apply(update: Tensor, *, fn: Callable = identity) -> Tensor:
    """Apply a function to the update.

    u' = fn(u); fn must be pure and preserve the shape.

    Shapes: all (*).
    """
    # the update may be a state of the element before, and `fn` may work in place all the same
    result = fn(update.clone())
    if not isinstance(result, torch.Tensor) or result.shape != update.shape:
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise TypeError(
            f"apply: {fn!r} returned {shape}, expected a tensor of shape {tuple(update.shape)}"
        )
    return result


@transform(provides=("grad",))
def maximize(update: Tensor, *, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Maximize the objective: later elements see the negative gradient.

    u' = -u, and g' = -g for elements that use the gradient
    """
    return -update, -grad
