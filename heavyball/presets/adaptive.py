"""First-order presets that are not in torch.optim."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.presets.base import Preset, PresetOptions, flag


class AdaBelief(Preset):
    """Adam that divides by the deviation of the gradient from its mean; decoupled weight decay.

    Units: `lr` is about the size of a step in weight units, 1e-4 to 1e-2 in use.
    Source: Zhuang et al. 2020, https://arxiv.org/abs/2010.07468, without rectification.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.scale_by_adabelief(betas=b, eps=eps),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class Adan(Preset):
    """Adam with Nesterov momentum from gradient differences; the authors' arguments.

    Weight decay is proximal, or decoupled with `no_prox`.

    Units: `lr` is about the size of a step in weight units; the authors use 5 to 10 times AdamW's.
    Source: Xie et al. 2022, https://arxiv.org/abs/2208.06677. In place of `max_grad_norm`,
        pass `gradient_clipping=C.clip_by_global_norm(max_norm=...)`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        decay = C.decoupled if flag("no_prox", no_prox) else C.proximal_decay
        chain = C.scale_by_adan(betas=b, eps=eps), decay(weight_decay=weight_decay)
        self.build(params, lr, chain, options, beta1=b[0])


class Yogi(Preset):
    """Adam whose second moment changes by a bounded amount; decoupled weight decay.

    Units: `lr` is about the size of a step in weight units, 1e-3 to 1e-2 in use.
    Source: Zaheer et al. 2018,
        https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        initial_accumulator_value: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_yogi(
            betas=b, eps=eps, initial_accumulator_value=initial_accumulator_value
        )
        self.build(params, lr, (rule,), options, beta1=b[0], weight_decay=weight_decay)


class NovoGrad(Preset):
    """Momentum of gradients divided by their norms; the weight decay is part of the momentum.

    Units: the step of a tensor has norm `lr` / (1 - beta1), so the best `lr` depends on the size of
        tensors; 1e-3 to 1e-2 in use.
    Source: Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_novograd(
            betas=b, eps=eps, weight_decay=weight_decay, grad_averaging=grad_averaging
        )
        self.build(params, lr, (rule,), options, beta1=b[0])


class Signum(Preset):
    """The sign of the mean gradient; decoupled weight decay.

    Units: `lr` is the size of every entry's step.
    Source: Bernstein et al. 2018, https://arxiv.org/abs/1802.04434.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        speed = shared("momentum", momentum)
        chain = C.exp_avg(beta=speed, correct_bias=False), C.sign
        self.build(params, lr, chain, options, beta1=speed, weight_decay=weight_decay)


class Tiger(Preset):
    """Signum with the author's defaults: beta 0.965 and a weight decay.

    Units: `lr` is the size of every entry's step.
    Source: Su 2023, https://kexue.fm/archives/9512.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        **options: Unpack[PresetOptions],
    ):
        b = shared("beta", beta)
        chain = C.exp_avg(beta=b, correct_bias=False), C.sign
        self.build(params, lr, chain, options, beta1=b, weight_decay=weight_decay)


class AdamS(Preset):
    """Adam with the momentum in place of the second moment; decoupled weight decay.

    Units: `lr` is about the size of a step in weight units, as AdamW's.
    Source: Zhang et al. 2025, https://arxiv.org/abs/2505.16363.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (C.scale_by_adams(betas=b, eps=eps),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class StableSPAM(Preset):
    """Adam with adaptive spike and norm clipping, and periodic restarts of its moments.

    Units: `lr` is about the size of a step in weight units, as AdamW's.
    Source: Huang et al. 2025, https://arxiv.org/abs/2502.17055; see `stable_spam`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        eps: float = 1e-8,
        every: int = 1000,
        weight_decay: float = 0.0,
        **options: Unpack[PresetOptions],
    ):
        b, small = shared("betas", betas), shared("eps", eps)
        chain = (
            C.stable_spam(gamma1=gamma1, gamma2=gamma2, theta=theta, eps=small, every=every),
            C.scale_by_adam(betas=b, eps=small),
        )
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)
