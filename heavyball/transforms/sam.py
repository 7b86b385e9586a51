"""Sharpness-aware minimization: the gradient of a step is taken uphill of the weights."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform

ALONE = {
    "accumulate": "a perturbation belongs to one gradient, not to the mean of several",
    "sam": "one perturbation is taken in a step",
    "asam": "one perturbation is taken in a step",
}


def _plain(param: Tensor, *, rho: float) -> Tensor:
    """The metric of SAM, that of the weights themselves."""
    return torch.ones_like(param)


def _relative(param: Tensor, *, rho: float, eta: float) -> Tensor:
    """The metric of ASAM, by which scaling a layer changes nothing."""
    return param.abs() + (eta if param.ndim > 1 else 0.0)


@transform(
    perturb=_plain, before_state="its gradient is the one that all others see", excludes=ALONE
)
def sam(update: Tensor, *, rho: Live = 0.05) -> Tensor:
    """Take the gradient at the worst weights near by: `step(closure)` calls the closure twice.

    e = rho g / (||g|| + 1e-12), the norm over all parameters;  g' = the gradient at p + e;  u' = g'

    The weights are put back to the bit before the step. The first loss is returned; statistics of
    layers see both passes.

    Shapes: all (*).
    Units: rho is a distance in weight units.
    Errors: ValueError for a step without a closure, and for steps inside `backward()`.
    Source: Foret et al. 2020, Algorithm 1, https://arxiv.org/abs/2010.01412.
    """
    return update.clone()


@transform(
    perturb=_relative, before_state="its gradient is the one that all others see", excludes=ALONE
)
def asam(update: Tensor, *, rho: Live = 0.5, eta: Live = 0.01) -> Tensor:
    """`sam` whose distance is measured in the size of each weight.

    w = |p| + eta, eta 0 for fewer than two dimensions;  e = rho w^2 g / (||w g|| + 1e-12)
    g' = the gradient at p + e;  u' = g'

    Shapes: all (*).
    Units: rho has none.
    Errors: as `sam`.
    Source: Kwon et al. 2021, Algorithm 1, https://arxiv.org/abs/2102.11600; implementations that people
        use have eta = 0.
    """
    return update.clone()
