"""Presets with the names, arguments, defaults and results of torch.optim."""

import math
from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import Interval, check_live, shared
from heavyball.presets.base import Preset, PresetOptions, flag

NEGATIVE = Interval(-math.inf, 0, low_open=True)


class Adam(Preset):
    """Adam with L2 regularization; torch.optim.Adam's arguments and defaults.

    Units: `lr` is about the size of a step in weight units.
    Source: Kingma and Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_adam(betas=b, eps=eps, amsgrad=amsgrad)
        chain: tuple = (rule,)
        if not flag("decoupled_weight_decay", decoupled_weight_decay):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), rule), 0.0
        self.built_with(
            amsgrad=(amsgrad, False, "amsgrad"),
            decoupled_weight_decay=(decoupled_weight_decay, False, "decoupled_weight_decay"),
        )
        self.build(
            params, lr, chain, options, beta1=b[0], weight_decay=weight_decay, maximize=maximize
        )


class RAdam(Preset):
    """Adam rectified by the variance of its second moment; torch.optim.RAdam's arguments and defaults.

    Units: the first steps (5 with beta2 = 0.999) are `lr` times the mean gradient, later ones about
        `lr` in size.
    Source: Liu et al. 2019, Algorithm 2, https://arxiv.org/abs/1908.03265.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        rule = C.scale_by_radam(betas=betas, eps=eps)
        chain: tuple = (rule,)
        if not flag("decoupled_weight_decay", decoupled_weight_decay):
            chain, weight_decay = (C.coupled(weight_decay=weight_decay), rule), 0.0
        self.built_with(
            decoupled_weight_decay=(decoupled_weight_decay, False, "decoupled_weight_decay")
        )
        self.build(
            params, lr, chain, options, beta1=betas[0], weight_decay=weight_decay, maximize=maximize
        )


class Adagrad(Preset):
    """Gradients over the root of their summed squares; torch.optim.Adagrad's arguments and defaults.

    Units: the first step has size `lr`, later ones shrink as 1 / sqrt(t).
    Source: Duchi, Hazan and Singer 2011, https://jmlr.org/papers/v12/duchi11a.html.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        chain = (
            C.coupled(weight_decay=weight_decay),
            C.scale_by_adagrad(eps=eps, initial_accumulator_value=initial_accumulator_value),
            C.inverse_time(decay=shared("lr_decay", lr_decay)),
        )
        name = "initial_accumulator_value"
        self.built_with(initial_accumulator_value=(initial_accumulator_value, 0.0, name))
        self.build(params, lr, chain, options, maximize=maximize)


class Adadelta(Preset):
    """Updates in the unit of the weights; torch.optim.Adadelta's arguments and defaults.

    Units: `lr` is a factor near 1.
    Source: Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        chain = C.coupled(weight_decay=weight_decay), C.scale_by_adadelta(rho=rho, eps=eps)
        self.build(params, lr, chain, options, maximize=maximize)


class Adamax(Preset):
    """Adam with the infinity norm; torch.optim.Adamax's arguments and defaults.

    Units: `lr` is about the size of a step in weight units.
    Source: Kingma and Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = C.coupled(weight_decay=weight_decay), C.scale_by_adamax(betas=b, eps=eps)
        self.build(params, lr, chain, options, beta1=b[0], maximize=maximize)


class ASGD(Preset):
    """Gradient descent that averages its weights; torch.optim.ASGD's arguments and defaults.

    `eval()` uses the average of the weights from step `t0` on, which torch computes and never uses.

    Units: `lr` times the gradient is the step.
    Source: Polyak and Juditsky 1992; Xu 2011, https://arxiv.org/abs/1107.2490.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        shrink = shared("lambd", lambd)
        chain = (
            C.coupled(weight_decay=weight_decay),
            C.asgd_rate(lambd=shrink, alpha=alpha),
            C.decoupled(weight_decay=shrink),
            C.running_average(start=t0),
        )
        self.built_with(t0=(t0, 1e6, "t0"))
        self.build(params, lr, chain, options, maximize=maximize)


class Rprop(Preset):
    """A step size for every element; torch.optim.Rprop's arguments and defaults.

    Units: `lr` is the size of the first step and has no effect later. Meant for full-batch gradients.
    Source: Riedmiller and Braun 1993.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        chain = (C.scale_by_rprop(etas=etas, step_sizes=step_sizes),)
        self.build(params, lr, chain, options, maximize=maximize)


class Adafactor(Preset):
    """Factored second moments and relative steps; torch.optim.Adafactor's arguments and defaults.

    `palm=False` uses a constant beta2 of 0.99 instead of 1 - t^beta2_decay.

    Units: the step is a fraction of the weights' root mean square, min(lr, 1 / sqrt(t)).
    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235. `eps[0]=None` is the
        machine epsilon of the dtype of computation; torch uses that of the first parameter's dtype.
    """

    palm_default = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[PresetOptions],
    ):
        check_live("beta2_decay", beta2_decay, 0.0, NEGATIVE)
        if options.get("palm", True):
            options.setdefault("beta2_scale", -beta2_decay)
        chain = (
            C.factored_rms(axes="last", min_dim=1, eps_placement="maximum", eps=eps[0]),
            C.clip_update_rms(threshold=d),
            C.scale_by_parameter_rms(eps=eps[1]),
        )
        self._first_eps = eps[0]
        self.build(params, lr, chain, options, weight_decay=weight_decay, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `ChainOpt`; also accepts a group of torch.optim.Adafactor."""
        super().add_param_group(_of_adafactor(param_group, self._first_eps))


def _of_adafactor(group: Any, first_eps: float | None) -> Any:
    """Translate a group of torch.optim.Adafactor to this library's names; other groups are unchanged."""
    if not isinstance(group, dict) or not {"beta2_decay", "d", "eps"} <= group.keys():
        return group
    group = {**group, "beta2_scale": -group["beta2_decay"], "threshold": group["d"]}
    del group["beta2_decay"], group["d"]
    first, second = group["eps"]
    if first_eps is None and first is not None:
        raise ValueError(
            f"parameter group: eps={group['eps']!r}: its first number cannot be set per group, "
            "pass eps to Adafactor"
        )
    names = ("eps",) if first_eps is None else ("scale_by_parameter_rms.eps",)
    group["eps"] = first_eps if first is None else first
    return {**group, names[0]: second}
