"""Sharpness-aware minimization: the gradient of a step is taken uphill of the weights."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.core.whole import whole_transform
from heavyball.state.declare import zeros

ROUNDINGS = 128
ALONE = {
    "accumulate": "a perturbation belongs to one gradient, not to the mean of several",
    "maximize": "it looks for the worst weights of what is minimized; negate the loss instead",
    "sam": "one perturbation is taken in a step",
    "asam": "one perturbation is taken in a step",
    "looksam": "one perturbation is taken in a step",
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
    """Sharpness-aware minimization: use the gradient at the worst weights nearby. Needs a closure.

    e = rho g / (||g|| + 1e-12), the norm over all parameters;  g' = the gradient at p + e;  u' = g'

    `step(closure)` calls the closure twice. The weights are restored exactly before the step. The first
    loss is returned; statistics of layers (batch norm) see both passes.

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
    """`sam` with a perturbation proportional to the size of each weight.

    w = |p| + eta, eta = 0 for fewer than two dimensions;  e = rho w^2 g / (||w g|| + 1e-12)
    g' = the gradient at p + e;  u' = g'

    Shapes: all (*).
    Units: rho has none.
    Errors: as `sam`.
    Source: Kwon et al. 2021, Algorithm 1, https://arxiv.org/abs/2102.11600; common implementations
        use eta = 0.
    """
    return update.clone()


@whole_transform(
    perturb=_plain,
    perturb_every="k",
    sharp=zeros,
    domains={"k": positive},
    before_state="its gradient is the one that all others see",
    excludes=ALONE,
)
def looksam(
    update: Tensor,
    sharp: Tensor,
    *,
    first_grad: Tensor | None = None,
    rho: Live = 0.1,
    k: int = 10,
    alpha: Live = 0.7,
) -> tuple[Tensor, Tensor]:
    """`sam` in every k-th step; its gradient is approximated in between from the last one.

    at (t - 1) mod k = 0: g' as in `sam`, u' = g';  s <- g' - <g', g> g / ||g||^2
    else u' = g + alpha ||g|| / (||s|| + 1e-8) s; s is 0 if it is only rounding

    `step(closure)` calls the closure twice in the first of k steps, and once in the others.

    Shapes: all (*), norms and products over the whole tensor, except rho's norm, over all of them.
    Units: rho is a distance in weight units; alpha has none.
    Errors: as `sam`.
    Source: Liu et al. 2022, Algorithm 1, https://arxiv.org/abs/2203.02714.
    """
    if first_grad is not None:
        size = _size(first_grad)
        along = first_grad / torch.where(size > 0, size, 1.0)
        axes = tuple(range(1, update.ndim))
        left = update - (update * along).sum(axes, keepdim=True) * along
        # what rounding has left of equal gradients is no direction
        least = ROUNDINGS * torch.finfo(left.dtype).eps * _size(update)
        return update.clone(), torch.where(_size(left) > least, left, 0.0)
    return update + alpha * _size(update) / (_size(sharp) + 1e-8) * sharp, sharp


def _size(x: Tensor) -> Tensor:
    """The norm of each tensor of a batch."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
