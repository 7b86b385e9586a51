"""AdaGO's step size: from the accumulated norms of a matrix' gradients."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import norm
from heavyball.state.declare import scalar

REASON = "both decide how far a tensor goes by its norm"


@transform(
    square_sum=scalar(0.0, low=0.0),
    domains={"gamma": positive},
    excludes=dict.fromkeys(("trust_ratio", "lars_ratio", "stable_adamw"), REASON),
)
def adagrad_norm_rate(
    update: Tensor,
    square_sum: Tensor,
    *,
    grad: Tensor,
    lr: Tensor,
    gamma: Live = 10.0,
    eps: Live = 5e-4,
) -> tuple[Tensor, Tensor]:
    """Shrink the step of a tensor with the sum of its clamped gradient norms, as Adagrad does.

    n = min(||g||, gamma);  s <- s + n^2;  u' = u max(eps, lr n / sqrt(s)) / lr, so that a step of
    size lr becomes one of max(eps, lr n / sqrt(s)); a decay keeps its lr. Nothing moves at lr = 0.

    Shapes: all (*), one s per tensor.
    Units: those of u; `eps` has the unit of lr. After `orthogonalize`, lr is about 0.05.
    Source: Zhang et al. 2025, Algorithm 1, https://arxiv.org/abs/2509.02981. pytorch_optimizer 4.1.0
        divides by s instead of its root.
    """
    size = norm(grad).clamp(max=gamma)
    square_sum = square_sum + size.square()
    share = torch.where(square_sum > 0, size / square_sum.sqrt(), 0.0)
    factor = torch.maximum(torch.where(lr > 0, eps / lr, 0.0), share)
    return update * factor, square_sum
