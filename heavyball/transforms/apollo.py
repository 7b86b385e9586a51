"""APOLLO: Adam in a random image of the gradient says how large each channel's step should be."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.low_rank import channels, image_shape, limited, matrix_shape, wrong_rank
from heavyball.numerics import lerp
from heavyball.state.declare import Holds, State, scalar


def _image(holds: Holds) -> State:
    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
        return param.new_zeros(image_shape(param.shape, options["rank"]))

    return State(init, "zeros like the image", holds=holds)


@whole_transform(
    exp_avg=_image("moment"),
    exp_avg_sq=_image("square"),
    last=scalar(0.0, low=0.0),
    requires=wrong_rank,
    domains={"rank": positive, "gap": positive},
    noise_every="gap",
)
def apollo(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last: Tensor,
    *,
    step: Tensor,
    noise: Any,
    rank: int = 256,
    gap: int = 200,
    scale: Live = 1.0,
    scale_type: Literal["channel", "tensor"] = "channel",
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale each channel of the gradient as Adam would in a random image of it.

    R < C: Z = S g, r x C, channels are columns;  else Z = g S^T, R x r, channels are rows
    S normal with variance 1 / r, new every `gap` steps from the seed
    m, v plain means of Z and Z^2;  N = m / (sqrt(v) + eps)
    s = ||N|| / (||Z|| + 1e-8) per channel, or one for the tensor;  w = g s
    q = max(||w|| / (last + 1e-8), 1.01) / 1.01, 1 at first;  w <- w / q;  last = ||w||
    u = sqrt(scale) w sqrt(1 - betas[1]^t) / (1 - betas[0]^t)

    APOLLO-mini is rank=1, scale_type="tensor", scale=128. A clip of the norm right behind works against
    the limiter.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest); m, v of the shape of Z.
    Units: the result has none; lr is about 0.01.
    Errors: ValueError for a rank that is larger than the matrix, and for fewer than two dimensions.
    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270; apollo-torch 1.0.3.
    """
    rows, columns = matrix_shape(update.shape[1:])
    g = update.reshape(len(update), rows, columns)
    wide = rows < columns
    side = min(rows, columns)
    shape = (len(g), rank, side) if wide else (len(g), side, rank)
    s = noise(shape) / rank**0.5
    z = s @ g if wide else g @ s
    m = lerp(exp_avg, z, 1 - betas[0])
    v = lerp(exp_avg_sq, z.square(), 1 - betas[1])
    normed = m / (v.sqrt() + eps)
    ratio = channels(normed, wide, scale_type) / (channels(z, wide, scale_type) + 1e-8)
    w, size = limited(g * ratio, last)
    bias = (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    return (w * (scale.sqrt() * bias)).reshape(update.shape), m, v, size.to(torch.float64)
