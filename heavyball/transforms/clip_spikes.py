"""SPAM's clip of single entries, and the restart of moments."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import squares


@transform(square=squares, domains={"theta": positive})
def clip_spikes(
    update: Tensor,
    square: Tensor,
    *,
    step: Tensor,
    theta: Live = 5000.0,
    beta2: Live = 0.999,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Clip every entry at the root of `theta` times its running mean square.

    u' = sign(u) sqrt(theta v) where u^2 > theta v and t > start;
    then v <- beta2 v + (1 - beta2) u'^2, from zero

    The first gradient is not clipped, because v is not known yet.

    Shapes: all (*).
    Units: those of u. v is not bias-corrected: at the second step theta v is 5 u_1^2.
    Source: Huang et al. 2025, SPAM, https://arxiv.org/abs/2501.06842, whose v is Adam's own. After
        `reset_moments`, v restarts with the moments.
    """
    first = step == 1
    square = torch.where(first, 0.0, square)
    bound = (theta * square).sqrt()
    spikes = (update.abs() > bound) & ~first & (step > start)
    update = torch.where(spikes, update.sign() * bound, update)
    return update, lerp(square, update.square(), 1 - beta2)
