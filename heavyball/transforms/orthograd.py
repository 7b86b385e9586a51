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
    """Project the gradient onto the orthogonal complement of the weights, preserving its norm.

    o = g - <w, g> / (<w, w> + 1e-30) w;  u = o ||g|| / (||o|| + 1e-30)

    If the gradient is parallel to the weights, o is rounding noise, which rescaling would amplify to
    ||g||. The result is therefore 0 if ||o|| <= 4 eps_machine ||g||. A single element is always
    parallel; `single_element` decides whether it becomes 0 or passes.

    Shapes: all (*), the tensor as one vector. Meant for weight matrices; use `route` to exclude
        biases and gains.
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
