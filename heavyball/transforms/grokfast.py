"""Grokfast: amplify the slow part of the gradient."""

from typing import Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import ema, lerp
from heavyball.state.declare import zeros


@transform(slow=zeros, domains={"alpha": fraction})
def grokfast(
    update: Tensor,
    slow: Tensor,
    *,
    step: Tensor,
    alpha: Live = 0.98,
    lamb: Live = 2.0,
    start: Literal["first", "unbiased"] = "first",
) -> tuple[Tensor, Tensor]:
    """Add a slow running mean of the gradient to the gradient.

    e <- alpha e + (1 - alpha) g, initially g_1;  u = g + lamb e

    start: "unbiased" uses the unbiased mean, which gives g_1 no extra weight.

    Shapes: all (*).
    Units: those of the gradient, up to 1 + lamb times larger.
    Source: Lee et al. 2024, https://arxiv.org/abs/2405.20233, `gradfilter_ema` of the authors.
    """
    if start == "unbiased":
        slow = ema(slow, update, alpha, step)
    else:
        slow = torch.where(step == 1, update, lerp(slow, update, 1 - alpha))
    return update + lamb * slow, slow
