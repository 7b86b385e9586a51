"""SOAP and similar optimizers, which run in the eigenbasis of Shampoo's preconditioner."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball import utils
from heavyball.core.hyper import Shared, shared
from heavyball.core.transform import Transform
from heavyball.linalg.basis import MergeDims
from heavyball.linalg.eigenbasis import Refresh, checked_refresh
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.schedule import Schedule
from heavyball.numerics import EpsPlacement
from heavyball.presets.base import Preset, PresetOptions, split_options

SCHEDULE = (1 / 3, 9.0)


class BasisOptions(PresetOptions, total=False):
    """Options of the presets in this file, in addition to those of every preset.

    precondition_1d, zeroth_power_mode, rotate_second_moment, spread_refreshes: as in
        `to_eigenbasis`.
    precondition_frequency, precond_scheduler: the interval between refreshes, or a schedule, given
        as two numbers or a `heavyball.PrecondSchedule`; pass only one of the two.
        `zeroth_power_mode` defaults to `heavyball.utils.zeroth_power_mode`.
    max_precond_dim, merge_dims, split: which axes have a basis, as in `to_eigenbasis`.
    normalize_grads: normalize the update to root mean square 1 after rotating back.
    blocks, axis: blocks with separate bases, as in `orthogonalize`; `blocks` may be given by names,
        {"*.in_proj_weight": 3}.
    """

    precondition_frequency: int
    precond_scheduler: tuple[float, float] | Schedule | None
    max_precond_dim: int
    merge_dims: MergeDims
    precondition_1d: bool
    split: bool
    normalize_grads: bool
    zeroth_power_mode: Refresh
    rotate_second_moment: bool
    spread_refreshes: bool
    blocks: Blocks
    axis: Literal[0, 1]


class RuleOptions(BasisOptions, total=False):
    """The same, and `shampoo_beta`, the decay of the preconditioner's averages."""

    shampoo_beta: float


BASIS_DEFAULTS: dict[str, Any] = {
    "shampoo_beta": 0.95,
    "precondition_frequency": 2,
    "precond_scheduler": None,
    "max_precond_dim": 2048,
    "merge_dims": True,
    "precondition_1d": False,
    "split": False,
    "normalize_grads": False,
    "zeroth_power_mode": "qr",
    "rotate_second_moment": False,
    "spread_refreshes": False,
    "blocks": None,
    "axis": 0,
}


class BasisPreset(Preset):
    """A preset whose update rule runs in an eigenbasis."""

    listed = False

    more_options = BASIS_DEFAULTS
    scheduler_default: ClassVar[tuple[float, float] | None] = None

    def build_in_basis(
        self,
        params: Any,
        lr: float | Tensor,
        rule: Transform,
        options: RuleOptions,
        *,
        beta1: float | Shared,
        weight_decay: float,
        writer: Transform | None = None,
        behind: tuple[Transform, ...] = (),
        basis: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Put the update rule into a basis, and the common options around it.

        PaLM's schedule goes inside, where steps count from the rule's first one.

        basis: options of `to_eigenbasis` that belong to the preset.
        """
        mine, common = split_options(options, BASIS_DEFAULTS)
        way = checked_refresh(
            mine.get("zeroth_power_mode", utils.zeroth_power_mode),
            f"{'' if 'zeroth_power_mode' in mine else 'heavyball.utils.'}zeroth_power_mode",
        )
        mine["zeroth_power_mode"] = way
        chosen = {**BASIS_DEFAULTS, "precond_scheduler": self.scheduler_default, **mine}
        if chosen["precond_scheduler"] is not None and "precondition_frequency" in mine:
            raise ValueError(
                f"precondition_frequency={chosen['precondition_frequency']!r} has no effect with "
                f"precond_scheduler={chosen['precond_scheduler']!r}; pass only one of them"
            )
        self.build(
            params,
            lr,
            lambda palm: (C.soap_precond(*palm, rule, **chosen, **basis), *behind),
            common,
            beta1=beta1,
            weight_decay=weight_decay,
            writer=writer,
        )


class SOAP(BasisPreset):
    """Adam in the eigenbasis of Shampoo's preconditioner; HeavyBall's arguments and defaults.

    The first gradient only initializes the basis: the parameters do not move in the first step.

    correct_bias: False omits Adam's bias corrections.

    Units: `lr` is about the size of a step in weight units.
    Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321. With betas (.95, .95),
        precondition_frequency 10, max_precond_dim 10000 and merge_dims False it matches the authors'
        code, except that the decay comes before the step. HeavyBall uses max(sqrt(v), eps), this
        preset the authors' sqrt(v) + eps.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        correct_bias: bool = True,
        **options: Unpack[BasisOptions],
    ):
        b = shared("betas", betas)
        # PaLM's average needs no bias correction, so there is none to put eps before
        placement: EpsPlacement = "outside" if options.get("palm", self.palm_default) else "biased"
        adam = C.scale_by_adam(betas=b, eps=eps, eps_placement=placement, correct_bias=correct_bias)
        chosen: RuleOptions = {**options, "shampoo_beta": shampoo_beta}
        self.build_in_basis(params, lr, adam, chosen, beta1=b[0], weight_decay=weight_decay)


class PaLMSOAP(SOAP):
    """SOAP with PaLM's schedule for beta2: `SOAP(palm=True)`.

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311.
    """

    palm_default = True


class PrecondScheduleSOAP(SOAP):
    """SOAP with a decreasing refresh rate: `SOAP(precond_scheduler=(1/3, 9))`.

    Source: HeavyBall; see docs/precond_schedule.md.
    """

    scheduler_default = SCHEDULE


class PrecondSchedulePaLMSOAP(SOAP):
    """SOAP with PaLM's schedule for beta2 and a decreasing refresh rate.

    Source: HeavyBall; see `PaLMSOAP` and `PrecondScheduleSOAP`.
    """

    palm_default = True
    scheduler_default = SCHEDULE


class SFPaLMSOAP(BasisPreset):
    """Schedule-free SOAP with PaLM's schedule for beta2; `betas[0]` is the interpolation of y.

    The update rule in the basis is `scale_by_exp_avg_sq`. Call `eval()` before evaluating or saving
    the model, `train()` before training on.

    Source: HeavyBall, from Defazio et al. 2024, https://arxiv.org/abs/2405.15682, and Vyas et al. 2024,
        https://arxiv.org/abs/2409.11321. `betas[0]` is its `beta`.
    """

    palm_default = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[RuleOptions],
    ):
        b = shared("betas", betas)
        writer = C.schedule_free(beta=b[0], r=r, weight_lr_power=weight_lr_power)
        rule = C.scale_by_exp_avg_sq(beta2=b[1], eps=eps)
        self.build_in_basis(
            params, lr, rule, options, beta1=b[0], weight_decay=weight_decay, writer=writer
        )


class PrecondScheduleSFPaLMSOAP(SFPaLMSOAP):
    """Schedule-free SOAP with PaLM's schedule for beta2 and a decreasing refresh rate.

    Source: HeavyBall; see `SFPaLMSOAP` and `PrecondScheduleSOAP`.
    """

    scheduler_default = SCHEDULE


class SOAPNAdam(BasisPreset):
    """NAdam in the eigenbasis of Shampoo's preconditioner.

    Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, with the rule of Dozat 2016,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum_decay: float = 4e-3,
        **options: Unpack[RuleOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_nadam(betas=b, eps=eps, momentum_decay=momentum_decay)
        self.build_in_basis(params, lr, rule, options, beta1=b[0], weight_decay=weight_decay)


class SOAPAdEMAMix(BasisPreset):
    """AdEMAMix in the eigenbasis of Shampoo's preconditioner.

    Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, with the rule of Pagliardini, Ablin and
        Grangier 2024, https://arxiv.org/abs/2409.03137.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float, float] = (0.9, 0.95, 0.9999),
        alpha: float = 2.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        **options: Unpack[RuleOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_ademamix(
            betas=b, alpha=alpha, eps=eps, alpha_warmup=alpha_warmup, beta3_warmup=beta3_warmup
        )
        self.build_in_basis(params, lr, rule, options, beta1=b[0], weight_decay=weight_decay)


class SOLP(BasisPreset):
    """LaProp in the eigenbasis of Shampoo's preconditioner.

    Source: HeavyBall, from Vyas et al. 2024, https://arxiv.org/abs/2409.11321, and Ziyin, Wang and Ueda
        2020, https://arxiv.org/abs/2002.04839.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Unpack[RuleOptions],
    ):
        b = shared("betas", betas)
        rule = C.scale_by_laprop(betas=b, eps=eps)
        self.build_in_basis(params, lr, rule, options, beta1=b[0], weight_decay=weight_decay)
