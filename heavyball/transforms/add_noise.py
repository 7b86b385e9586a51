"""Gaussian noise on the gradient that dies out."""

from collections.abc import Callable

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.whole import whole_transform


@whole_transform
def add_noise(
    update: Tensor,
    *,
    step: Tensor,
    noise: Callable[..., Tensor],
    eta: Live = 0.01,
    gamma: Live = 0.55,
) -> Tensor:
    """Add noise whose variance falls as a power of the step.

    u' = u + sqrt(eta / (1 + t)^gamma) N(0, 1)

    The noise depends only on the optimizer's seed, the parameter's position and its step.

    Shapes: all (*).
    Units: `eta` has the unit of the square of u.
    Source: Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807.
    """
    deviation = (eta / (1 + step) ** gamma).sqrt()
    return update + deviation.to(update.dtype) * noise(tuple(update.shape)).to(update.dtype)
