"""First-order presets. Each is a chain and contains no math of its own."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.core.schedule import largest
from heavyball.presets.base import Preset, PresetOptions, flag


class SGD(Preset):
    """Gradient descent, optionally with momentum; torch.optim.SGD's arguments and defaults.

    Units: without momentum, `lr` times the gradient is the step.
    Source: torch.optim.SGD; `weight_decay` is part of the gradient, as there.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        speed = shared("momentum", momentum)
        ball: C.Transform
        if flag("nesterov", nesterov):
            if largest(momentum) <= 0 or dampening != 0:
                raise ValueError(
                    f"nesterov=True with momentum={momentum!r} and dampening={dampening!r}: "
                    "expected a momentum above 0 and no dampening"
                )
            ball = C.nesterov_momentum(momentum=speed)
        else:
            ball = C.heavyball_momentum(momentum=speed, dampening=dampening)
        chain = C.coupled(weight_decay=weight_decay), ball
        self.built_with(nesterov=(nesterov, False, "nesterov"))
        beta1 = speed if largest(momentum) else 0.95
        self.build(params, lr, chain, options, beta1=beta1, maximize=maximize)


class AdamW(Preset):
    """Adam with decoupled weight decay; torch.optim.AdamW's arguments and defaults.

    Units: `lr` is about the size of a step in weight units.
    Source: Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.scale_by_adam(betas=b, eps=eps, amsgrad=amsgrad),)
        self.built_with(amsgrad=(amsgrad, False, "amsgrad"))
        self.build(
            params, lr, chain, options, beta1=b[0], weight_decay=weight_decay, maximize=maximize
        )


class NAdam(Preset):
    """Adam with Nesterov momentum; torch.optim.NAdam's arguments and defaults.

    Source: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        nadam = C.scale_by_nadam(betas=b, eps=eps, momentum_decay=momentum_decay)
        chain: tuple = (nadam,)
        if not flag("decoupled_weight_decay", decoupled_weight_decay):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), nadam), 0.0
        self.built_with(
            decoupled_weight_decay=(decoupled_weight_decay, False, "decoupled_weight_decay")
        )
        self.build(
            params, lr, chain, options, beta1=b[0], weight_decay=weight_decay, maximize=maximize
        )


class RMSprop(Preset):
    """Gradients over their running root mean square; torch.optim.RMSprop's arguments and defaults.

    Source: torch.optim.RMSprop; `weight_decay` is part of the gradient, as there.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        chain = (
            C.coupled(weight_decay=weight_decay),
            C.scale_by_rms(alpha=alpha, eps=eps, centered=centered),
            C.heavyball_momentum(momentum=momentum),
        )
        self.built_with(centered=(centered, False, "centered"))
        self.build(params, lr, chain, options, maximize=maximize)


class LaProp(Preset):
    """Normalize the gradient, then average; the authors' defaults.

    Source: Ziyin, Wang and Ueda 2020, https://arxiv.org/abs/2002.04839. Departure: decay is
        decoupled and scaled by lr; the authors' p (1 - weight_decay) is the chain with `independent`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        centered: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.scale_by_laprop(betas=b, eps=eps, centered=centered),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class ADOPT(Preset):
    """Adam that converges with any beta2; the authors' defaults.

    Source: Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853. `decouple=False` adds the decay
        to the gradient, as the authors' default does.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        clip_exponent: float | None = 0.25,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        adopt = C.scale_by_adopt(betas=b, eps=eps, clip_exponent=clip_exponent)
        chain: tuple = (adopt,)
        if not flag("decouple", decouple):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), adopt), 0.0
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class AdEMAMix(Preset):
    """Adam with a second, slower momentum; the authors' defaults.

    Source: Pagliardini, Ablin and Grangier 2024, https://arxiv.org/abs/2409.03137.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        mix = C.scale_by_ademamix(
            betas=b, alpha=alpha, eps=eps, alpha_warmup=alpha_warmup, beta3_warmup=beta3_warmup
        )
        self.build(params, lr, (mix,), options, beta1=b[0], weight_decay=weight_decay)


class Lion(Preset):
    """The sign of a mix of gradient and momentum; the authors' defaults.

    Units: `lr` is the step of every entry; use a value 3 to 10 times smaller than AdamW's.
    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.scale_by_lion(betas=b),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class Focus(Preset):
    """The sign of the momentum, with attraction to the averaged weights; the authors' defaults.

    Source: Liu et al. 2025, https://arxiv.org/abs/2501.12243; decays by the averaged weight.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma: float = 0.1,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.focus(betas=b, gamma=gamma),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class SFAdamW(Preset):
    """Schedule-free AdamW; the authors' defaults. `betas[0]` is the interpolation of y.

    Call `eval()` before evaluating or saving the model, and `train()` before training continues.

    Source: Defazio et al. 2024, https://arxiv.org/abs/2405.15682.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        schedulefree_c: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        writer = C.schedule_free(beta=b[0], r=r, weight_lr_power=weight_lr_power, c=schedulefree_c)
        chain = (C.scale_by_exp_avg_sq(beta2=b[1], eps=eps),)
        self.build(params, lr, chain, options, beta1=b[0], writer=writer, weight_decay=weight_decay)


class ScheduleFreePlus(Preset):
    """Schedule-free Adam with a Polyak step size; `step(loss=...)` or a closure gives the loss.

    Call `eval()` before evaluating or saving the model, and `train()` before training continues.

    sf_beta, sf_beta_max, sf_beta_anneal_steps: the interpolation of y, annealed from sf_beta to
        sf_beta_max in so many steps; 0 keeps sf_beta constant.
    polyak_beta: of the mean size of the gradient. c_warmup, r, weight_lr_power: as in `schedule_free`.

    Units: `lr` is a factor of the estimated step size, leave it at 1. weight_decay is multiplied by the
        square of the rate; 20 to 50 in use.
    Source: Defazio et al. 2026, https://arxiv.org/abs/2605.19095.
    """

    takes_inputs = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sf_beta: float = 0.9,
        sf_beta_max: float = 0.965,
        sf_beta_anneal_steps: int = 0,
        polyak_beta: float = 0.0,
        c_warmup: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        writer = C.schedule_free(
            beta=shared("sf_beta", sf_beta),
            beta_max=shared("sf_beta_max", sf_beta_max) if sf_beta_anneal_steps else None,
            anneal_steps=sf_beta_anneal_steps,
            c_warmup=c_warmup,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        chain = (
            C.polyak_rate(polyak_beta=polyak_beta),
            C.scale_by_adam(betas=b, eps=eps),
            C.palm_decay(weight_decay=weight_decay),
        )
        self.build(params, lr, chain, options, beta1=b[0], writer=writer)


class PaLMSFAdamW(SFAdamW):
    """Schedule-free AdamW with PaLM's schedule for beta2: `SFAdamW(palm=True)`.

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311.
    """

    palm_default = True


class FactoredAdamW(Preset):
    """Adafactor's factored second moment and update clipping with AdamW's learning rate and decay.

    The chain is factored_rms | clip_update_rms | exp_avg, in the order of Adafactor: the momentum
    averages normalized updates. State is 4 bytes per float32 matrix element, AdamW's is 8.

    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235. Departure: an
        absolute `lr` and a constant beta2 by default; `palm=True` is Adafactor's 1 - t^(-0.8).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        threshold: float = 1.0,
        min_dim: int = 32,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (
            C.factored_rms(beta2=b[1], eps=eps, min_dim=min_dim),
            C.clip_update_rms(threshold=threshold),
            C.exp_avg(beta=b[0]),
        )
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)
