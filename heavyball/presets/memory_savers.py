"""Presets with less state than Adam."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.presets.base import Preset, PresetOptions


class CAME(Preset):
    """Adafactor with a momentum divided by its instability; decoupled weight decay.

    Units: `lr` is about the size of a step in weight units, ten times larger in the first step; 1e-4 to
        4e-4 in use.
    Source: Luo et al. 2023, Algorithm 2, https://arxiv.org/abs/2307.02047; came-pytorch 0.1.3.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        threshold = shared("clip_threshold", clip_threshold)
        chain = (C.scale_by_came(betas=b, threshold=threshold, eps=eps),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class SM3(Preset):
    """Adagrad with accumulators only along the axes; decoupled weight decay.

    Units: `lr` is about 0.1, and steps shrink as the sums grow.
    Source: Anil et al. 2019, SM3-II, https://arxiv.org/abs/1901.11150.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        beta: float = 0.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        chain = (C.scale_by_sm3(momentum=momentum, beta=beta, eps=eps),)
        self.build(params, lr, chain, options, beta1=momentum, weight_decay=weight_decay)
