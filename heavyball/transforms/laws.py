"""Functions that compress large entries of an update, element by element."""

import math

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, closed_fraction, positive
from heavyball.core.transform import transform


@transform(domains={"lerp": closed_fraction, "scale": positive})
def trust_region(update: Tensor, *, lerp: Live = 0.9, scale: Live = 1.5) -> Tensor:
    """Leave small entries unchanged and bound large ones by 2.

    y = u / scale
    u' = clip(scale ((1 - lerp) sign(y) log(1 + |y|) + lerp tanh(y)), -2, 2)

    Shapes: all (*).
    Source: `trust_region_clip_` of HeavyBall.
    """
    y = update / scale
    mixed = (1 - lerp) * y.sign() * torch.log1p(y.abs()) + lerp * torch.tanh(y)
    return (scale * mixed).clamp(-2, 2)


@transform(domains={"mu": positive})
def mu_law(update: Tensor, *, mu: Live = 127.0) -> Tensor:
    """The logarithmic companding of North American telephony.

    u' = sign(u) log(1 + mu |u|) / log(1 + mu)

    Shapes: all (*).
    Source: ITU-T G.711; `mu_law_compress` of HeavyBall.
    """
    return update.sign() * torch.log1p(mu * update.abs()) / torch.log1p(mu)


@transform(domains={"a": Interval(1, math.inf)})
def a_law(update: Tensor, *, a: Live = 87.6) -> Tensor:
    """The logarithmic companding of European telephony.

    h = a |u| where a |u| < 1, else 1 + log(a |u|);  u' = sign(u) h / (1 + log(a))

    Shapes: all (*). Entries above 1 are not clipped.
    Source: ITU-T G.711; `a_law_compress` of HeavyBall.
    """
    scaled = a * update.abs()
    # the logarithm of the small ones is not used, so it need not be finite
    compressed = torch.where(scaled < 1, scaled, 1 + scaled.clamp(min=1).log())
    return update.sign() * compressed / (1 + a.log())  # type: ignore[attr-defined]


@transform()
def softsign(update: Tensor) -> Tensor:
    """Bound every entry smoothly by 2.

    u' = 2 u / (1 + |u|)

    Shapes: all (*).
    """
    return 2 * update / (1 + update.abs())
