"""SM3: Adagrad whose sums are kept as one number for each place along each axis."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.state.declare import State, zeros

MOST_AXES = 8


def _kept(shape: torch.Size) -> list[int]:
    """The axes with sums; the one number of an axis of size 1 is never the least."""
    return [k for k, n in enumerate(shape) if n != 1] or [0]


def _bound(axis: int) -> State:
    """The largest sum of squares at each place along one axis."""

    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        if axis not in _kept(param.shape):
            return None
        return param.new_zeros([n if i == axis else 1 for i, n in enumerate(param.shape)])

    return State(init, f"zeros along axis {axis}", holds="square")


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    return None if len(shape) <= MOST_AXES else f"has more than {MOST_AXES} dimensions"


@transform(
    exp_avg=zeros.needs("momentum"),
    axis_0=_bound(0),
    axis_1=_bound(1),
    axis_2=_bound(2),
    axis_3=_bound(3),
    axis_4=_bound(4),
    axis_5=_bound(5),
    axis_6=_bound(6),
    axis_7=_bound(7),
    domains={"momentum": fraction},
    requires=_problem,
)
def scale_by_sm3(
    update: Tensor,
    exp_avg: Tensor | None,
    axis_0: Tensor | None,
    axis_1: Tensor | None,
    axis_2: Tensor | None,
    axis_3: Tensor | None,
    axis_4: Tensor | None,
    axis_5: Tensor | None,
    axis_6: Tensor | None,
    axis_7: Tensor | None,
    *,
    momentum: Live = 0.9,
    beta: Live = 0.0,
    eps: Live = 1e-30,
) -> tuple[Tensor | None, ...]:
    """SM3: Adagrad with the sum of squares bounded by one number per index of each axis.

    v = least of a_k over the axes;  v <- v + g^2, with beta > 0: beta v + (1 - beta) g^2
    a_k <- largest v over the other axes, with beta > 0 at least what it was
    m <- momentum m + (1 - momentum) g / sqrt(v + eps);  u = m; without momentum, g / sqrt(v + eps)

    Shapes: all (*) of up to 8 dimensions; a_k has one number for each index of axis k, and axes of
        size 1 have none, because it would never be the smallest.
    Units: the result is dimensionless; lr is about 0.1, and steps shrink as in Adagrad.
    Errors: ValueError for more dimensions.
    Source: Anil et al. 2019, SM3-II, https://arxiv.org/abs/1901.11150.
    """
    given = (axis_0, axis_1, axis_2, axis_3, axis_4, axis_5, axis_6, axis_7)
    bounds = {k: x for k, x in enumerate(given) if x is not None}
    first, *others = bounds.values()
    least = first
    for bound in others:
        least = torch.minimum(least, bound)
    square = update.square()
    v = torch.where(beta > 0, beta * least + (1 - beta) * square, least + square)
    new: list[Tensor | None] = [None] * len(given)
    for k, old in bounds.items():
        rest = tuple(i for i in bounds if i != k)
        largest = v.amax(rest, keepdim=True) if rest else v
        new[k] = torch.where(beta > 0, torch.maximum(largest, old), largest)
    result = update / (v + eps).sqrt()
    if exp_avg is not None:
        result = exp_avg = momentum * exp_avg + (1 - momentum) * result
    return result, exp_avg, *new
