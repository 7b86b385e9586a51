"""Adafactor's steps relative to the size of the weights."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import rms


@transform()
def scale_by_parameter_rms(
    update: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    lr: Tensor,
    eps: Live = 1e-3,
    relative_step: bool = True,
) -> Tensor:
    """Scale the update by the root mean square of the weights.

    u' = u max(eps, RMS(p)), with `relative_step` times min(1, 1 / (lr sqrt(t)))

    `lr` does not change for later decays.

    Shapes: all (*); RMS over the tensor.
    Units: those of the weights times those of u, so `lr` is relative; with `relative_step`
        the step is that of min(lr, 1 / sqrt(t)).
    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235;
        torch.optim.Adafactor.
    """
    scale = torch.maximum(rms(param), eps)
    if relative_step:
        scale = scale * (1 / (lr * step.sqrt())).clamp(max=1)
    return update * scale


@transform(provides=("lr",), modifier=True)
def scale_lr_by_parameter_rms(
    update: Tensor, *, param: Tensor, lr: Tensor, eps: Live = 1e-3
) -> tuple[Tensor, Tensor]:
    """Scale the learning rate of later elements, decay included, by the weights' root mean square.

    lr' = lr max(eps, RMS(p));  u' = u

    Shapes: all (*); RMS over the tensor.
    Source: `scale_parameter` of fairseq's and transformers' Adafactor.
    """
    return update, lr * torch.maximum(rms(param), eps)
