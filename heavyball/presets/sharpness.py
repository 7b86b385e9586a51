"""Presets that search for flat minima."""

from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.presets.base import Preset, PresetOptions


class MSAM(Preset):
    """Momentum-SAM: momentum with gradients computed a distance ahead of the weights.

    Call `eval()` before evaluating or saving the model, and `train()` before training continues.

    Units: `lr` as SGD's with momentum; rho is a distance in weight units, 0.05 to 3 in use.
    Source: Becker, Altrock and Risse 2024, https://arxiv.org/abs/2401.12033.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        beta: float = 0.9,
        rho: float = 0.1,
        norm: Literal["global", "tensor"] = "global",
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("beta", beta)
        writer = C.momentum_sam(beta=b, rho=rho, norm=norm, weight_decay=weight_decay)
        self.build(params, lr, (), options, beta1=b, writer=writer)
