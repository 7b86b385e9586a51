"""Presets that estimate their learning rate, other than Prodigy."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.presets.base import Preset, PresetOptions


class DoG(Preset):
    """Gradient descent with step size distance over gradient norms; the authors' arguments.

    Units: `lr` is a factor, leave it at 1.
    Source: Ivgi, Hinder and Carmon 2023, https://arxiv.org/abs/2302.12022, without their averager,
        `polynomial_average`. `weight_decay` is part of the gradient.
    """

    layerwise = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        reps: float = 1e-6,
        eps: float = 1e-8,
        init_lr: float | None = None,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        rate = C.dog_rate(reps=reps, eps=eps, init_lr=init_lr, layerwise=self.layerwise)
        chain = C.regularized(weight_decay=weight_decay), rate
        self.build(params, lr, chain, options)


class LDoG(DoG):
    """DoG with distances and gradient norms per tensor.

    Units: `lr` is a factor, leave it at 1.
    Source: Ivgi, Hinder and Carmon 2023, https://arxiv.org/abs/2302.12022.
    """

    layerwise = True


class DoWG(Preset):
    """DoG with distance-weighted gradient norms; optax's arguments.

    Units: `lr` is a factor, leave it at 1.
    Source: Khaled, Mishchenko and Jin 2023, https://arxiv.org/abs/2305.16284. `weight_decay` is part of
        the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        chain = C.regularized(weight_decay=weight_decay), C.dowg_rate(eps=eps)
        self.build(params, lr, chain, options)


class DAdaptAdam(Preset):
    """Adam with a lower bound on the distance as learning rate; dadaptation's arguments.

    Units: `lr` is a factor, leave it at 1.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733. Decay is decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        d0: float = 1e-6,
        growth_rate: float = float("inf"),
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.d_adapt_adam(betas=b, eps=eps, d0=d0, growth_rate=growth_rate),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class DAdaptSGD(Preset):
    """Dual averaging with a lower bound on the distance as learning rate; dadaptation's arguments.

    Units: `lr` is a factor, leave it at 1.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733. `weight_decay` is part of the
        gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        d0: float = 1e-6,
        growth_rate: float = float("inf"),
        **options: Unpack[PresetOptions],
    ):
        writer = C.d_adapt_sgd(momentum=momentum, d0=d0, growth_rate=growth_rate)
        chain = (C.regularized(weight_decay=weight_decay),)
        self.build(params, lr, chain, options, writer=writer)


class DAdaptLion(Preset):
    """Lion with a lower bound on the distance as learning rate; dadaptation's arguments.

    Units: `lr` is a factor, leave it at 1.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733. Decay is decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        d0: float = 1e-6,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.d_adapt_lion(betas=b, d0=d0),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class COCOB(Preset):
    """Coin betting, without a learning rate.

    Units: `lr` has no effect.
    Source: Orabona and Tommasi 2017, Algorithm 2, https://arxiv.org/abs/1705.07795.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        alpha: float = 100.0,
        eps: float = 1e-8,
        **options: Unpack[PresetOptions],
    ):
        self.build(params, lr, (), options, writer=C.cocob(alpha=alpha, eps=eps))


class MoMo(Preset):
    """Momentum with a Polyak step size; pass the loss to `step(loss=...)`.

    Units: `lr` is the largest step size, 1 or more.
    Source: Schaipp et al. 2023, https://arxiv.org/abs/2305.07583. Decay is proximal.
    """

    takes_inputs = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        *,
        beta: float = 0.9,
        lower_bound: float = 0.0,
        bias_correction: bool = False,
        use_fstar: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("beta", beta)
        writer = C.momo(
            beta=b,
            lower_bound=lower_bound,
            bias_correction=bias_correction,
            use_fstar=use_fstar,
            weight_decay=weight_decay,
        )
        self.build(params, lr, (), options, beta1=b, writer=writer)


class MoMoAdam(Preset):
    """Adam with a Polyak step size; pass the loss to `step(loss=...)`.

    Units: `lr` is the largest step, as Adam's; 0.01 or more.
    Source: Schaipp et al. 2023, https://arxiv.org/abs/2305.07583. Decay is proximal.
    """

    takes_inputs = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        lower_bound: float = 0.0,
        use_fstar: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        writer = C.momo_adam(
            betas=b,
            eps=eps,
            lower_bound=lower_bound,
            use_fstar=use_fstar,
            weight_decay=weight_decay,
        )
        self.build(params, lr, (), options, beta1=b[0], writer=writer)
