"""Measures what passes, for `ChainOpt.metrics`."""

import torch
from torch import Tensor

from heavyball.core.transform import transform
from heavyball.numerics import SCALAR, dot
from heavyball.state.declare import measured


def sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=SCALAR).square()


@transform(
    square=measured(),
    largest=measured(),
    along=measured(),
    grad_square=measured(),
    zeros=measured(),
)
def probe(
    update: Tensor,
    square: Tensor,
    largest: Tensor,
    along: Tensor,
    grad_square: Tensor,
    zeros: Tensor,
    *,
    grad: Tensor,
    name: str = "probe",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Measure the update at this point of the chain, without changing it.

    `opt.metrics()` has, for each group and over all of its parameters, `group_0/<name>/` with rms, norm,
    max (of |u|), cosine (between u and the gradient) and zeros (the number of entries of u that are
    0). The sums are computed in the step's kernels. The numbers are not saved in checkpoints.

    Shapes: all (*).
    """
    return (
        update,
        sum_of_squares(update),
        update.abs().amax().to(SCALAR),
        dot(update, grad),
        sum_of_squares(grad),
        (update == 0).sum(dtype=SCALAR),
    )
