"""Presets that estimate their learning rate."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, TypeVar, Unpack, cast

import torch
from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.presets.base import OptionsButRounding, Preset, PresetOptions, flag
from heavyball.presets.soap import SCHEDULE, BasisPreset, RuleOptions

# A smallest axis that no tensor has: all of the second moment is kept.
NEVER = 2**62


class Prodigy(Preset):
    """Adam whose learning rate is the estimated distance to the solution; the authors' defaults.

    `lr` is a factor: leave it at 1, or decrease it from 1 with a schedule. Tune `d_coef` instead.

    Units: the step is `lr` d per element, d in weight units, see `opt.d`.
    Source: Mishchenko and Defazio 2023, Algorithm 4, https://arxiv.org/abs/2306.06101, as in
        prodigyopt 1.1.2; `decouple=False` makes `weight_decay` part of the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        slice_p: int = 1,
        split_groups: bool = False,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        rate = C.prodigy_d(
            betas=b,
            beta3=beta3,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            slice_p=slice_p,
            safeguard_warmup=safeguard_warmup,
            use_bias_correction=use_bias_correction,
            split_groups=split_groups,
        )
        chain: tuple = (C.scale_by_adam(betas=b, eps=eps, correct_bias=False), rate)
        if b[0].item == 0:
            chain += (C.in_new_unit,)
        if not flag("decouple", decouple):
            chain, weight_decay = (C.regularized(weight_decay=weight_decay), *chain), 0.0
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class PrecondScheduleProdigySOAP(BasisPreset):
    """SOAP with a decreasing refresh rate and Prodigy's learning rate.

    The options are those of `SOAP` and of `Prodigy`; `lr` is a factor, leave it at 1.

    Units: the step is `lr` d per element of the basis, d in weight units, see `opt.d`.
    Source: HeavyBall's SOAP, see docs/precond_schedule.md, and Mishchenko and Defazio 2023,
        https://arxiv.org/abs/2306.06101.
    """

    scheduler_default = SCHEDULE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        slice_p: int = 1,
        split_groups: bool = False,
        **options: Unpack[RuleOptions],
    ):
        b = shared("betas", betas)
        rate = C.prodigy_d(
            betas=b,
            beta3=beta3,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            slice_p=slice_p,
            split_groups=split_groups,
        )
        rule = C.scale_by_adam(betas=b, eps=eps)
        self.build_in_basis(
            params, lr, rule, options, beta1=b[0], weight_decay=weight_decay, behind=(rate,)
        )


def _exclude(first: str, second: str, reason: str, remedy: str) -> None:
    raise ValueError(f"{first} and {second} exclude each other: {reason}; pass {remedy}")


Init = TypeVar("Init", bound=Callable[..., None])


def _noting_what_is_given(init: Init) -> Init:
    """Store the names of the passed arguments in `self._given`."""
    names = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **options: Any) -> None:
        self._given = frozenset((*names[1 : len(args) + 1], *options))
        init(self, *args, **options)

    return cast(Init, noting)


class ProdigyPlusScheduleFree(Preset):
    """Schedule-free optimizer that estimates its learning rate; prodigy-plus-schedule-free's arguments.

    Call `eval()` before evaluating or saving the model, and `train()` before training continues. See
    docs/prodigy.md for the options, and for differences from the original. `fused_back_pass` is
    `heavyball.fuse_backward`, except that a second gradient of a parameter starts a new step, because
    trainers with their own hooks do not call `step()`. `use_speed=True` is that of 1.9.0, "progress"
    that of 2.0.1, see `prodigy_progress_d`.

    Units: the step is `lr` d per element, d in weight units, see `opt.d`; leave `lr` at 1.
    Options that are passed override defaults that exclude them: `eps=None` turns StableAdamW off,
    `use_focus=True` turns factoring off.

    Errors: ValueError if two options that were passed exclude each other, with the reason and the
        remedy.
    Source: prodigy-plus-schedule-free 1.9.0 (`schedulefree_c`, `d_limiter`, "progress": 2.0.1), after
        https://arxiv.org/abs/2306.06101 and https://arxiv.org/abs/2405.15682.
    """

    _given: frozenset[str]

    @_noting_what_is_given
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        prodigy_steps: int = 0,
        use_speed: bool | Literal["progress"] = False,
        eps: float | None = 1e-8,
        split_groups: bool = True,
        split_groups_mean: bool = True,
        factored: bool = True,
        factored_fp32: bool = True,
        fused_back_pass: bool = False,
        use_stableadamw: bool = True,
        use_muon_pp: bool = False,
        use_cautious: bool = False,
        use_grams: bool = False,
        use_adopt: bool = False,
        use_orthograd: bool = False,
        use_focus: bool = False,
        stochastic_rounding: bool = True,
        *,
        use_schedulefree: bool = True,
        schedulefree_c: float = 0.0,
        d_limiter: bool = False,
        **options: Unpack[OptionsButRounding],
    ):
        switches = {name: value for name, value in locals().items() if isinstance(value, bool)}
        progress = use_speed == "progress"
        if not progress:
            flag('use_speed (or "progress")', use_speed)
        chosen = {"use_speed": use_speed is True}
        chosen |= {name: flag(name, value) for name, value in switches.items()}
        _give_way(chosen, self._given, eps)
        _check_pairs(chosen, eps)
        if schedulefree_c and not use_schedulefree:
            raise ValueError(
                f"schedulefree_c={schedulefree_c!r} has no effect with use_schedulefree=False"
            )
        if progress and d_limiter:
            reason = "the growth of d is bounded anyway"
            _exclude('use_speed="progress"', "d_limiter=True", reason, "d_limiter=False")
        b = shared("betas", betas)
        plus: dict[str, Any] = {
            "use_speed": chosen["use_speed"],
            "d_limiter": d_limiter,
            "narrow_sums": True,
        }
        form = C.prodigy_progress_d if progress else C.prodigy_plus_d(**plus)
        rate = form(
            betas=b,
            beta3=beta3,
            d0=d0,
            d_coef=d_coef,
            prodigy_steps=prodigy_steps,
            use_bias_correction=use_bias_correction,
            after_first=use_adopt,
            split_groups=split_groups,
            split_groups_mean=split_groups_mean,
        )
        chain: list[Any] = [*_directions(chosen, b, eps), rate]
        if chosen["use_stableadamw"]:
            chain.append(C.clip_update_rms)
        caution: Literal["cautious", "grams", "none"] = (
            "cautious" if use_cautious else "grams" if use_grams else "none"
        )
        writer = C.schedule_free(beta=b[0], caution=caution, weight_at="now", c=schedulefree_c)
        if not use_schedulefree:
            chain += [C.cautious] if use_cautious else [C.grams] if use_grams else []
        chain.append(C.separate_decay(weight_decay=weight_decay, by_lr=weight_decay_by_lr))
        passed: PresetOptions = {**options, "stochastic_rounding": stochastic_rounding}
        if chosen["factored"] and not factored_fp32:
            params = [*params] if not isinstance(params, Tensor) else params
            if any(p.dtype in (torch.bfloat16, torch.float16) for p in _tensors(params)):
                passed.setdefault("storage_dtype", {"row": "bfloat16", "col": "bfloat16"})
        self.backward_ends_step = fused_back_pass
        if fused_back_pass:
            passed["fuse_backward"] = True
        self.build(
            params,
            lr,
            tuple(chain),
            passed,
            beta1=b[0],
            writer=writer if use_schedulefree else None,
        )


def _tensors(params: Any) -> Iterator[Tensor]:
    """The tensors among parameters, groups, and (name, parameter) pairs."""
    if isinstance(params, Tensor):
        yield params
    elif isinstance(params, dict):
        yield from _tensors(params.get("params", ()))
    elif isinstance(params, Iterable) and not isinstance(params, str):
        for item in params:
            yield from _tensors(item)


def _directions(chosen: dict[str, bool], betas: Any, eps: float | None) -> list[Any]:
    """The elements that compute the direction; different for matrices with `use_muon_pp`."""
    elements = [C.orthograd] if chosen["use_orthograd"] else []
    elements += _direction(chosen, betas, eps)
    if not chosen["use_muon_pp"]:
        return elements
    size = C.scale_by_tensor_rms(
        beta2=betas[1], correct_bias=chosen["use_bias_correction"], first_only=chosen["use_speed"]
    )
    # documented in the original, though not done there: no orthograd before it
    return [C.route(C.when((C.adaptive_orthogonalize, size), min_ndim=2), otherwise=elements)]


def _direction(chosen: dict[str, bool], betas: Any, eps: float | None) -> list[Any]:
    correct_bias, plain = chosen["use_bias_correction"], not chosen["use_schedulefree"]
    if chosen["use_focus"]:
        return [C.focus(betas=betas, gamma=0.1, momentum=plain)]
    min_dim = 32 if chosen["factored"] else NEVER
    arguments: dict[str, Any] = {"beta2": betas[1], "eps": eps, "correct_bias": correct_bias}
    if chosen["use_adopt"]:
        delayed = C.delayed_rms(min_dim=min_dim, min_dim_mode="any", **arguments)
        return [delayed, C.exp_avg(beta=betas[0])] if plain else [delayed]
    if chosen["factored"] or plain:
        momentum = betas[0] if plain else 0.0
        return [C.factored_rms(momentum=momentum, min_dim=min_dim, min_dim_mode="any", **arguments)]
    return [C.scale_by_exp_avg_sq(**arguments)]


def _give_way(chosen: dict[str, bool], given: Collection[str], eps: float | None) -> None:
    """Turn off an option left at its default if a passed option excludes it."""
    if eps is None and "use_stableadamw" not in given:
        chosen["use_stableadamw"] = False
    if chosen["use_focus"] and "factored" not in given:
        chosen["factored"] = False


def _check_pairs(chosen: dict[str, bool], eps: float | None) -> None:
    """Raise if two passed options exclude each other."""
    if chosen["use_cautious"] and chosen["use_grams"]:
        reason = "both decide by the sign of the update what becomes of an entry"
        _exclude("use_cautious=True", "use_grams=True", reason, "one of them")
    if eps is None and chosen["use_stableadamw"]:
        reason = "the arc tangent already bounds the update"
        _exclude("eps=None", "use_stableadamw=True", reason, "use_stableadamw=False")
    if chosen["use_muon_pp"] and not chosen["use_schedulefree"]:
        reason = "the orthogonalized direction has no first moment"
        _exclude("use_muon_pp=True", "use_schedulefree=False", reason, "one of them")
    if chosen["use_focus"]:
        if chosen["factored"]:
            reason = "focus has no second moment that could be factored"
            _exclude("use_focus=True", "factored=True", reason, "factored=False")
        if chosen["use_muon_pp"]:
            reason = "focus replaces the direction"
            _exclude("use_focus=True", "use_muon_pp=True", reason, "one of them")
        if eps is None:
            reason = "focus has no denominator, so there is no arc tangent"
            _exclude("use_focus=True", "eps=None", reason, "a number for eps")
        if chosen["use_adopt"]:
            reason = "focus has no second moment that ADOPT could delay"
            _exclude("use_focus=True", "use_adopt=True", reason, "one of them")
