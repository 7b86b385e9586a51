"""LAMB's and LARS' ratios: steps in proportion to the size of a tensor's weights."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import norm


@transform()
def trust_ratio(update: Tensor, *, param: Tensor, clip: bool = False) -> Tensor:
    """Scale the update of every tensor to the norm of its weights.

    u' = u ||p|| / ||u||, u where either norm is 0; with `clip` u min(1, ||p|| / ||u||)

    If it is placed after a decay, the decay is part of u; a decay that the chain adds comes after it
    and is not.

    Shapes: all (*), norms over the tensor.
    Units: those of the weights, so `lr` is a fraction of them.
    Source: You et al. 2019, LAMB, Algorithm 2, https://arxiv.org/abs/1904.00962, without bounds of
        ||p||; `clip` is LAMBC, https://arxiv.org/abs/2011.13584.
    """
    size, step = norm(param), norm(update)
    ratio = torch.where((size > 0) & (step > 0), size / step, 1.0)
    return update * (ratio.clamp(max=1) if clip else ratio)


@transform()
def lars_ratio(
    update: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    trust: Live = 0.001,
    weight_decay: Live = 0.0,
    eps: Live = 1e-8,
    clip: bool = False,
) -> Tensor:
    """Give the gradient of every tensor a share of the norm of its weights, decay included.

    r = trust ||p|| / (||g|| + weight_decay ||p|| + eps), 1 where ||p|| or ||g|| is 0
    u = r (g + weight_decay p);  clip: min(r / lr, 1) in place of r, as LARC

    Shapes: all (*), norms over the tensor. Biases and gains are routed past it.
    Units: those of the weights times `trust`, so `lr` is about 1 to 10.
    Source: You, Gitman and Ginsburg 2017, Algorithm 1, https://arxiv.org/abs/1708.03888; timm.
    """
    size, slope = norm(param), norm(update)
    ratio = trust * size / (slope + weight_decay * size + eps)
    if clip:
        ratio = (ratio / lr).clamp(max=1)
    ratio = torch.where((size > 0) & (slope > 0), ratio, 1.0)
    return ratio * (update + weight_decay * param)
