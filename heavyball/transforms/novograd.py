"""NovoGrad: momentum of gradients over their norms."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp, norm
from heavyball.state.declare import scalar, zeros


@transform(exp_avg=zeros, square_norm=scalar(0.0, low=0.0))
def scale_by_novograd(
    update: Tensor,
    exp_avg: Tensor,
    square_norm: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    betas: Live = (0.95, 0.98),
    eps: Live = 1e-8,
    weight_decay: Live = 0.0,
    grad_averaging: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the gradient of a tensor by the root of its mean squared norm, then add momentum.

    s <- beta2 s + (1 - beta2) ||g||^2, initially ||g_1||^2;  d = g / (sqrt(s) + eps) + weight_decay p
    m <- beta1 m + d, with `grad_averaging` beta1 m + (1 - beta1) d; initially d_1;  u = m

    The decay is part of the momentum.

    Shapes: all (*), the norm over the tensor. State is the momentum and one number.
    Units: the result has a norm of about 1 / (1 - beta1), or 1 with `grad_averaging`.
    Source: Ginsburg et al. 2019, Algorithm 1, https://arxiv.org/abs/1905.11286.
    """
    first, new = step == 1, norm(update).square()
    square_norm = torch.where(first, new, lerp(square_norm, new, 1 - betas[1]))
    direction = update / (square_norm.sqrt() + eps) + weight_decay * param
    weight = 1 - betas[0] if grad_averaging else torch.ones_like(betas[0])
    mean = torch.where(first, direction, betas[0] * exp_avg + weight * direction)
    return mean, mean, square_norm
