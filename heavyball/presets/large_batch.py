"""Presets for large batches, whose steps are proportional to the norm of the weights."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.core.schedule import largest
from heavyball.presets.base import Preset, PresetOptions, flag


class LAMB(Preset):
    """Adam with each tensor's step scaled to the norm of its weights; timm's arguments.

    The weight decay is part of the scaled step. Biases and gains are scaled like matrices; use
    `route` to exclude them from `trust_ratio`, as timm does for parameters without decay.

    Units: `lr` is a fraction of the weights' norm, 1e-3 to 1e-2 in use.
    Source: You et al. 2019, Algorithm 2, https://arxiv.org/abs/1904.00962; timm 1.0.31, whose global
        clip has no 1e-6.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        clip = (
            ()
            if max_grad_norm is None
            else (C.clip_by_global_norm(max_norm=max_grad_norm, eps=0.0),)
        )
        chain = (
            *clip,
            C.scale_by_adam(betas=b, eps=eps),
            C.decoupled(weight_decay=weight_decay),
            C.trust_ratio(clip=flag("trust_clip", trust_clip)),
        )
        self.build(params, lr, chain, options, beta1=b[0])


class LARS(Preset):
    """Gradient descent with each tensor's step scaled to the norm of its weights; timm's arguments.

    The weight decay is part of the scaled step.

    Units: `lr` times `trust_coefficient` is a fraction of the weights' norm; `lr` is 1 to 10 in use.
    Source: You, Gitman and Ginsburg 2017, Algorithm 1, https://arxiv.org/abs/1708.03888; timm 1.0.31.
        The paper has lr inside the momentum: `heavyball_momentum(lr_in_momentum=True)`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        **options: Unpack[PresetOptions],
    ):
        speed = shared("momentum", momentum)
        ball: C.Transform = C.heavyball_momentum(momentum=speed)
        if flag("nesterov", nesterov):
            if largest(momentum) <= 0:
                raise ValueError(f"nesterov=True with momentum={momentum!r}: expected one above 0")
            ball = C.nesterov_momentum(momentum=speed)
        ratio = C.lars_ratio(
            trust=shared("trust_coefficient", trust_coefficient),
            weight_decay=weight_decay,
            eps=eps,
        )
        beta1 = speed if largest(momentum) else 0.95
        self.build(params, lr, (ratio, ball), options, beta1=beta1)
