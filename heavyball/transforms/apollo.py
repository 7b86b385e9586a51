"""APOLLO: Adam in a random image of the gradient says how large each channel's step should be."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import Transform
from heavyball.core.whole import whole_transform
from heavyball.linalg.low_rank import (
    channels,
    image_shapes,
    images_shape,
    limit,
    scaled_length,
    wrong_rank,
)
from heavyball.linalg.matrices import Blocks, matrices, packed, per_matrix, unpacked
from heavyball.linalg.scratch import scratch
from heavyball.numerics import lerp
from heavyball.state.declare import Holds, State, scalar


def _image(holds: Holds) -> State:
    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
        return param.new_zeros(images_shape(param.shape, options))

    return State(init, "zeros like the projection", holds=holds)


def _scaled(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    last: Tensor,
    s: Tensor,
    scale_type: str,
    betas: Any,
    eps: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Updates of gradients (n, R, C), the new means, and how long they are without `factor`."""
    wide = g.shape[-2] < g.shape[-1]
    z, temporary = scratch("apollo", g, m.shape, m.shape)
    torch.bmm(*((s, g) if wide else (g, s)), out=z)
    m = lerp(m, z, 1 - betas[0])
    v = lerp(v, torch.mul(z, z, out=temporary), 1 - betas[1])
    root = torch.sqrt(v, out=temporary).add_(eps)
    normed = torch.div(m, root, out=root)
    ratio = channels(normed, wide, scale_type) / (channels(z, wide, scale_type) + 1e-8)
    excess, size = limit(scaled_length(g, ratio, wide), last, g.dtype)
    # one pass over the gradient for all factors
    return g * (ratio * (factor / excess)), m, v, size


def _noise_shape(sizes: tuple[int, int], rank: int) -> tuple[int, int]:
    rows, columns = sizes
    return (rank, rows) if rows < columns else (columns, rank)


MEAN, SQUARE = _image("moment"), _image("square")
DECLARED: dict[str, Any] = {
    "requires": wrong_rank,
    "domains": {"rank": positive, "gap": positive},
    "noise_every": "gap",
}


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
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale each channel of the gradient as Adam would in a random projection of it.

    R < C: Z = S g, r x C, channels are columns;  else Z = g S^T, R x r, channels are rows
    S normal with variance 1 / r, redrawn from the seed every `gap` steps
    m, v plain means of Z and Z^2;  N = m / (sqrt(v) + eps)
    s = ||N|| / (||Z|| + 1e-8) per channel, or one for the tensor;  w = g s
    q = max(||w|| / (last + 1e-8), 1.01) / 1.01, initially 1;  w <- w / q;  last = ||w||
    u = sqrt(scale) w sqrt(1 - betas[1]^t) / (1 - betas[0]^t)

    blocks, axis: as in `orthogonalize`; every block has its own projection and limiter; m and v are
        vectors that contain all projections.

    APOLLO-mini is rank=1, scale_type="tensor", scale=128. Clipping the norm right after it works
    against the limiter.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest); m, v of the shape of Z.
    Units: the result is dimensionless; lr is about 0.01.
    Errors: ValueError for a rank that is larger than the matrix, and for fewer than two dimensions.
    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270; apollo-torch 1.0.3.
    """
    view = matrices(update.shape[1:], False, blocks, axis)
    shapes = image_shapes(view, rank)
    m, v = unpacked(exp_avg, shapes), unpacked(exp_avg_sq, shapes)
    before = view.batches(last.reshape(len(update), *view.number_shape))
    results, lengths = [], []
    factor = scale.sqrt() * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    for numbers, g, length in zip(view.of, view.batches(update), before, strict=True):
        shape = len(update), *_noise_shape(view.sizes[numbers[0]], rank)
        s = _together([noise(shape, k) for k in numbers]).mul_(rank**-0.5)
        one, two = (_together([x[k] for k in numbers]) for x in (m, v))
        w, *new, size = _scaled(g, one, two, length, s, scale_type, betas, eps, factor)
        for x, made in zip((m, v), new, strict=True):
            for k, part in zip(numbers, made.split(len(update)), strict=True):
                x[k] = part
        results.append(w)
        lengths.append(size.to(last.dtype).reshape(-1, 1, 1))
    size = view.whole(lengths, last.reshape(len(update), *view.number_shape))
    return (
        view.whole(results, update),
        packed(m, exp_avg),
        packed(v, exp_avg_sq),
        size.reshape(last.shape),
    )


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# a tuple, because a transform at the top of a module is found by its name
OF_BLOCKS = (
    whole_transform(exp_avg=MEAN, exp_avg_sq=SQUARE, last=per_matrix("values"), **DECLARED)(apollo),
)


def _instead(options: Mapping[str, Any]) -> Transform | None:
    return None if options["blocks"] is None else OF_BLOCKS[0]


apollo = whole_transform(
    exp_avg=MEAN, exp_avg_sq=SQUARE, last=scalar(0.0, low=0.0), instead=_instead, **DECLARED
)(apollo)
