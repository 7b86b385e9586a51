"""AdaGC: clip every tensor by the mean of its own norm."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import lerp, norm
from heavyball.state.declare import scalar


def _squared_norm(update: Tensor) -> Tensor:
    return norm(update).square()


@transform(
    usual=scalar(0.0, low=0.0),
    over_all=_squared_norm,
    domains={"relative": positive, "absolute": positive},
)
def adagc(
    update: Tensor,
    usual: Tensor,
    *,
    total: Tensor,
    step: Tensor,
    relative: Live = 1.05,
    beta: Live = 0.98,
    absolute: Live = 1.0,
    warmup: int = 100,
) -> tuple[Tensor, Tensor]:
    """Clip the norm of each tensor at a multiple of its running mean.

    t < warmup: h = min(1, absolute / (N + 1e-8)), N the norm of all updates;  y <- min(y, ||h u||)
    then h = min(1, relative y / ||u||);  y <- beta y + (1 - beta) ||h u||;  u' = h u

    During warm-up, a norm of 0 leaves y unchanged. Nothing is clipped until y is known.

    Shapes: all (*). State is one number.
    Units: those of u.
    Source: Wang et al. 2025, https://arxiv.org/abs/2502.11034.
    """
    size, early, known = norm(update), step < warmup, usual > 0
    bound = torch.where(known, relative * usual / size, 1.0)
    factor = torch.where(early, absolute / (total.sqrt() + 1e-8), bound)
    factor = torch.where(size > 0, factor, 1.0).clamp(max=1)
    clipped = factor * size
    least = torch.where(known, torch.minimum(usual, clipped), clipped)
    least = torch.where(size > 0, least, usual)
    usual = torch.where(early, least, torch.where(known, lerp(usual, clipped, 1 - beta), clipped))
    return update * factor, usual
