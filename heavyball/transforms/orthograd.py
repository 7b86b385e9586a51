"""OrthoGrad: remove the part of the gradient that only rescales the weights."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.transform import transform
from heavyball.numerics import dot, is_single, norm


@transform()
def orthograd(
    update: Tensor, *, param: Tensor, single_element: Literal["zero", "passthrough"] = "zero"
) -> Tensor:
    """Project the gradient onto the complement of the weights and keep its norm.

    o = g - <w, g> / (<w, w> + 1e-30) w;  u = o ||g|| / (||o|| + 1e-30)

    A gradient that is parallel to the weights leaves rounding noise in o, which the rescaling would
    blow up to ||g||: where ||o|| <= 4 eps_machine ||g|| the result is 0. One element is always
    parallel; `single_element` says whether it gives 0 or passes.

    Shapes: all (*), the tensor as one vector. Meant for weight matrices: route biases and gains.
    Units: those of the gradient.
    Source: Prieto et al. 2025, section 4.2, https://arxiv.org/abs/2501.04697; w is the point at
        which the gradient was taken, y under `schedule_free`.
    """
    if is_single(param) and single_element == "passthrough":
        return update
    size = norm(update)
    rest = update - dot(param, update) / (dot(param, param) + 1e-30) * param
    left = norm(rest)
    noise = left <= 4 * torch.finfo(update.dtype).eps * size
    if is_single(param):
        noise = torch.ones_like(noise)
    return torch.where(noise, 0.0, rest * (size / (left + 1e-30)))
