"""SinkGD's normalization: rows and columns alternately, until both have the same size."""

import math

from torch import Tensor

from heavyball.core.hyper import positive
from heavyball.core.transform import transform
from heavyball.numerics import norm


@transform(domains={"iterations": positive})
def sinkhorn_normalize(update: Tensor, *, iterations: int = 5) -> Tensor:
    """Normalize rows and columns of a matrix alternately, until both have root mean square 1.

    `iterations` times: rows, then columns where R <= C, else columns, then rows;
    each line of k entries: x <- x sqrt(k) / max(||x||, 1 / sqrt(k))

    The axis normalized last ends at exactly 1. A vector is normalized to root mean square 1. After
    `exp_avg(beta=0.9, correct_bias=False)` it is SinkSGD.

    Shapes: all (*), R x C as (size of axis 0, rest).
    Units: the result is dimensionless, and an entry is about 1; lr as for signs.
    Source: Scetbon et al. 2025, Algorithm 3, https://arxiv.org/abs/2502.06742, where rows are always
        first; the order and the floor are those of adv_optm 2.5.16.
    """
    columns = tuple(range(1, update.ndim))
    rest = math.prod(update.shape[1:])
    order = (columns, (0,)) if len(update) <= rest else ((0,), columns)
    result, scales = update, dict.fromkeys(order, 1.0)
    for axes in (axes for _ in range(iterations) for axes in order if axes):
        length = math.prod(update.shape[axis] for axis in axes) or 1
        # one factor for each row and one for each column, however many there were
        scales[axes] = scales[axes] * (length**0.5 / norm(result, axes).clamp(min=length**-0.5))
        result = update * scales[order[0]] * scales[order[1]]
    return result
