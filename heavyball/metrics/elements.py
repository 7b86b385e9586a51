"""The two elements that measure a step: one before everything, one after the write."""

import torch
from torch import Tensor

from heavyball.core.transform import transform
from heavyball.numerics import working
from heavyball.state.declare import measured
from heavyball.transforms.probe import sum_of_squares


def _square(param: Tensor) -> Tensor:
    return sum_of_squares(working(param)) if not param.is_meta else torch.zeros((), device="meta")


@transform(grad=measured(), provides=("param_before",))
def before_step(
    update: Tensor, grad: Tensor, *, raw_grad: Tensor, param: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure the raw gradient, and keep the parameter for `behind_step`."""
    return update, sum_of_squares(raw_grad), param


@transform(kind="observer", moved=measured(), weight=measured(_square))
def behind_step(
    update: Tensor, moved: Tensor, weight: Tensor, *, param: Tensor, param_before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure the change of the parameter, and the parameter."""
    return update, sum_of_squares(param - param_before), sum_of_squares(param)


# What a chain that is measured has around its elements.
MEASURES = (before_step, behind_step)
