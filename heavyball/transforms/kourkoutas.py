"""Kourkoutas-beta: a memory of squares that shortens where the gradient spikes."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import lerp, norm
from heavyball.state.declare import scalar


@transform(
    usual=scalar(0.0, low=0.0),
    product=scalar(1.0, low=0.0),
    provides=("scheduled_beta2", "scheduled_bias"),
    modifier=True,
    domains={"alpha": fraction},
)
def kourkoutas_beta2(
    update: Tensor,
    usual: Tensor,
    product: Tensor,
    *,
    step: Tensor,
    beta2_min: Live = 0.88,
    beta2_max: Live = 0.999,
    alpha: Live = 0.93,
    tiny: Live = 1e-9,
    warmup: int = 350,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Set the beta2 of later second moments from the size of each tensor's gradient.

    r <- alpha r + (1 - alpha) ||u||, from zero;  s = ||u|| / (r + tiny);  s <- s / (1 + s)
    beta2_t = beta2_max - (beta2_max - beta2_min) s, and (beta2_min + beta2_max) / 2 while t <= warmup

    Second moments correct their bias exactly, by 1 - beta2_1 .. beta2_t, except `scale_by_adam` with
    `correct_bias=False`, the authors' default.

    Shapes: all (*), the norm over the tensor. State is two numbers.
    Units: none. Without a warm-up, beta2 is low until r converges: ||u_1|| / r = 1 / (1 - alpha).
    Source: Kassinos 2025, https://arxiv.org/abs/2508.12996; a "layer" of the paper is a tensor here.
    """
    size = norm(update)
    usual = lerp(usual, size, 1 - alpha)
    spike = size / (usual + tiny)
    beta2 = beta2_max - (beta2_max - beta2_min) * (spike / (1 + spike))
    beta2 = torch.where(step <= warmup, (beta2_min + beta2_max) / 2, beta2)
    product = product * beta2
    return update, usual, product, 1 - (1 - beta2) / (1 - product), 1 - product
