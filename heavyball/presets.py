"""Named optimizers. Each is a chain; none holds mathematics of its own."""

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.optimizer import ChainOpt
from heavyball.transform import Shared, Transform, check_live, nearest, nonnegative, shared

CLIPPINGS: dict[str, Transform] = {
    "l2_clip": C.clip_by_norm,
    "rms_clip": C.clip_by_rms,
    "global_norm_clip": C.clip_by_global_norm,
    "agc": C.adaptive_gradient_clip,
    "l2_normalize": C.l2_normalize,
    "rms_normalize": C.rms_normalize,
    "trust_region": C.trust_region,
    "mu_law": C.mu_law,
    "a_law": C.a_law,
    "softsign": C.softsign,
    "clip_update_rms": C.clip_update_rms,
}
Clipping = str | Transform | Callable[[Tensor], Tensor] | None


class PresetOptions(TypedDict, total=False):
    """Options that every preset takes.

    warmup_steps: lr grows linearly over this many steps.
    caution: drop update entries that disagree with the gradient (`cautious`); with `schedule_free`,
        those of the change of y.
    mars, mars_gamma: correct the gradient by its change (`mars` without its clip), with the preset's
        own beta1.
    gradient_clipping, update_clipping: a name (see `heavyball.presets.CLIPPINGS`), a transform, or a
        function of a tensor, applied to the gradient or to the finished update.
    palm, beta2_scale: PaLM's schedule for beta2, 1 - t^(-beta2_scale).
    foreach: False steps one parameter at a time, for the smallest peak memory.
    compile, stochastic_rounding, seed: as in `ChainOpt`.
    """

    warmup_steps: float
    caution: bool
    mars: bool
    mars_gamma: float
    gradient_clipping: Clipping
    update_clipping: Clipping
    palm: bool
    beta2_scale: float
    foreach: bool | None
    compile: bool | str
    stochastic_rounding: bool
    seed: int


DEFAULTS: dict[str, Any] = {
    "warmup_steps": 0,
    "caution": False,
    "mars": False,
    "mars_gamma": 0.0025,
    "gradient_clipping": None,
    "update_clipping": None,
    "palm": False,
    "beta2_scale": 0.8,
    "foreach": None,
    "compile": "auto",
    "stochastic_rounding": True,
    "seed": 0,
}


# What ChainOpt takes under the same name.
PASSED_ON = ("warmup_steps", "foreach", "compile", "stochastic_rounding", "seed")


class Preset(ChainOpt):
    """A named chain with the options that every preset takes, see `PresetOptions`."""

    palm_default = False

    def _build(
        self,
        params: Any,
        lr: float | Tensor,
        chain: tuple[Any, ...],
        options: PresetOptions,
        *,
        beta1: float | Shared = 0.95,
        writer: Transform | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        """Put the common options around the preset's own chain, and build the optimizer.

        beta1: what MARS takes for the first moment's beta; the authors' 0.95 where there is none.
        """
        chosen = _checked_options(type(self), options)
        caution = chosen["caution"]
        elements: list[Any] = [C.maximize] if _flag("maximize", maximize) else []
        if chosen["mars"]:
            elements.append(C.mars(gamma=chosen["mars_gamma"], beta1=beta1, max_norm=None))
        elements += _clipping("gradient_clipping", chosen["gradient_clipping"])
        if chosen["palm"]:
            elements.append(C.palm_beta2(beta2_scale=chosen["beta2_scale"]))
        elements += chain
        elements += _clipping("update_clipping", chosen["update_clipping"])
        if caution and writer is None:
            elements.append(C.cautious)
        if writer is not None:
            elements.append(writer(caution="cautious") if caution else writer)
        ChainOpt.__init__(
            self,
            params,
            lr,
            *elements,
            weight_decay=weight_decay,
            **{name: chosen[name] for name in PASSED_ON},
        )


def _checked_options(preset: type[Preset], options: PresetOptions) -> dict[str, Any]:
    own = [n for n in inspect.signature(preset.__init__).parameters if n not in ("self", "options")]
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(
                f"{preset.__name__} has no option {name!r}; {nearest(name, [*own, *DEFAULTS])}"
            )
    chosen = {**DEFAULTS, "palm": preset.palm_default, **options}
    for name in ("caution", "mars", "palm"):
        _flag(name, chosen[name])
    check_live("mars_gamma", chosen["mars_gamma"], 0.0, nonnegative)
    for name, switch in (("mars_gamma", "mars"), ("beta2_scale", "palm")):
        if name in options and not chosen[switch]:
            raise ValueError(f"{name}={options[name]!r} has no effect without {switch}=True")  # type: ignore[literal-required]
    return chosen


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False")
    return value


def _clipping(option: str, value: Clipping) -> list[Transform]:
    if value is None:
        return []
    if isinstance(value, Transform):
        return [value]
    if isinstance(value, str) and value in CLIPPINGS:
        return [CLIPPINGS[value]]
    if isinstance(value, str):
        raise ValueError(f"{option}={value!r}; {nearest(value, CLIPPINGS)}")
    if callable(value):
        return [C.apply(fn=value)]
    raise TypeError(
        f"{option}={value!r}: expected a transform, a function, or one of {', '.join(CLIPPINGS)}"
    )


class SGD(Preset):
    """Gradient descent, with momentum if asked for; torch.optim.SGD's arguments and defaults.

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
        if _flag("nesterov", nesterov):
            if momentum <= 0 or dampening != 0:
                raise ValueError(
                    f"nesterov=True with momentum={momentum!r} and dampening={dampening!r}: "
                    "expected a momentum above 0 and no dampening"
                )
            ball = C.nesterov_momentum(momentum=speed)
        else:
            ball = C.heavyball_momentum(momentum=speed, dampening=dampening)
        chain = C.coupled(weight_decay=weight_decay), ball
        self._build(params, lr, chain, options, beta1=speed, maximize=maximize)


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
        self._build(
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
        if not _flag("decoupled_weight_decay", decoupled_weight_decay):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), nadam), 0.0
        self._build(
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
        self._build(params, lr, chain, options, maximize=maximize)


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
        self._build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


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
        if not _flag("decouple", decouple):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), adopt), 0.0
        self._build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


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
        self._build(params, lr, (mix,), options, beta1=b[0], weight_decay=weight_decay)


class Lion(Preset):
    """Signs of a mix of gradient and momentum; the authors' defaults.

    Units: `lr` is the step of every entry, so take it three to ten times smaller than AdamW's.
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
        self._build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class Focus(Preset):
    """Signs of the momentum, with a pull to the averaged weights; the authors' defaults.

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
        self._build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class SFAdamW(Preset):
    """Schedule-free AdamW; the authors' defaults. `betas[0]` is the interpolation of y.

    Call `eval()` before evaluating or saving the model, `train()` before training on.

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
        self._build(
            params, lr, chain, options, beta1=b[0], writer=writer, weight_decay=weight_decay
        )


class PaLMSFAdamW(SFAdamW):
    """Schedule-free AdamW with PaLM's schedule for beta2: `SFAdamW(palm=True)`.

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311.
    """

    palm_default = True


class FactoredAdamW(Preset):
    """Adafactor's factored second moment and update clipping with AdamW's learning rate and decay.

    The chain is factored_rms | clip_update_rms | exp_avg, in the order of Adafactor: the momentum is
    one of normalized updates. State is 4 bytes per float32 matrix element, AdamW's is 8.

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
        self._build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


PRESETS: dict[str, type[Preset]] = {
    cls.__name__: cls
    for cls in (
        SGD,
        AdamW,
        NAdam,
        RMSprop,
        LaProp,
        ADOPT,
        AdEMAMix,
        Lion,
        Focus,
        SFAdamW,
        PaLMSFAdamW,
        FactoredAdamW,
    )
}
