"""Prodigy: how far the solution is, estimated while training, in place of a learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, positive
from heavyball.core.rate import Estimate, Member, rate
from heavyball.core.transform import transform
from heavyball.numerics import SCALAR, dot, every
from heavyball.state.declare import State, scalar

COUNT = Interval(1, float("inf"))


def _first_weights(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    return every(param, options["slice_p"]).clone(memory_format=torch.contiguous_format)


def _no_sums(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    like = every(param, options["slice_p"])
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


FIRST = State(
    _first_weights, "every slice_p-th of the first weights", holds="values", slice_by="slice_p"
)
SUMS = State(_no_sums, "zeros, one for each of p0", holds="values", slice_by="slice_p")
# the d of the parameter's last step, in which its moments are expressed
UNIT = scalar(0.0)


def _narrow_sums(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    sums = _no_sums(param, options)
    return (
        sums.to(torch.bfloat16) if options["narrow_sums"] and sums.dtype != torch.float64 else sums
    )


NARROW_SUMS = State(_narrow_sums, SUMS.rule, holds="values", slice_by="slice_p")


def beta3_of(beta3: Tensor | None, betas: Any) -> Tensor:
    """The decay of the sums: sqrt(beta2) if none is given."""
    return betas[1].sqrt() if beta3 is None else beta3


def unit_change_of(unit: Tensor, d: Tensor) -> Tensor:
    """What a moment in the unit of the last step is multiplied by."""
    return torch.where(unit > 0, unit / d, 1.0)


def pools(members: Sequence[Member], split: bool) -> list[list[int]]:
    """The groups that share a d, of those with a gradient; the others' d stands still."""
    active = [i for i, m in enumerate(members) if m.sums is not None]
    if split:
        return [[i] for i in active]
    return [active] if active else []


def added_up(members: Sequence[Member], pool: list[int]) -> tuple[Tensor, ...]:
    """The sums of a pool of groups."""
    found = [members[i].sums for i in pool]
    if len(found) == 1:
        return found[0]  # type: ignore[return-value]
    return tuple(torch.stack(parts).sum() for parts in zip(*found, strict=True))  # type: ignore[arg-type]


# ---- parameters without a gradient in a step
#
# s of a parameter stands still while it has no gradient, so the norm that N is set against is that of
# all parameters, and what N holds of those that are missing stands still as well.

# of the last step: ||s||_1 over all parameters, and how many of them have an s that is not 0
COVERED: dict[str, str | float] = {"d_norm": 0.0, "d_members": 0.0}
# What d never exceeds: weights that follow it, and what is made of them, stay finite.
MOST = 2.0**40
# What no entry of s exceeds.
LARGEST = 2.0**120


class Covered(NamedTuple):
    """How the parameters of a step stand to all that have stepped.

    norm: ||s||_1 over all. share: which part of it was that of those in the step. members: how many
    have an s that is not 0.
    """

    norm: Tensor
    share: Tensor
    members: Tensor

    @property
    def entries(self) -> dict[str, Tensor]:
        """`COVERED` after the step."""
        return {"d_norm": self.norm, "d_members": self.members}

    def parts(self, numerator: Tensor) -> tuple[Tensor, Tensor]:
        """What N holds of the parameters in the step, and of those that are missing.

        N is not kept by parameter: each is taken to have the part of it that it has of the norm.
        """
        return self.share * numerator, (1 - self.share) * numerator


def covered(
    v: Mapping[str, Any], now: Tensor, before: Tensor, held: Tensor, holds: Tensor
) -> Covered:
    """The norm over all parameters, given that of the parameters in a step.

    now, before: their norm after and before it. holds, held: how many of them have and had one not 0.
    """
    missing = v["d_members"] > held  # the norms alone do not say: s may be rounded when it is kept
    theirs = (v["d_norm"] - before).where(missing, 0.0)
    part = (before / v["d_norm"]).clamp(min=0, max=1)
    share = part.where(missing & (v["d_norm"] > 0), 1.0)
    return Covered(now + theirs, share, holds + (v["d_members"] - held).where(missing, 0.0))


# what a parameter gives: its part of N, its norm after and before the step and whether these are not
# 0, and whether it took part
SHARES = ("numerator", "now", "before", "held", "holds", "count")


def shares_of(trains: Tensor, numerator: Tensor, now: Tensor, before: Tensor) -> tuple[Tensor, ...]:
    """`SHARES` of a parameter; all 0 where it does not train."""
    shares = numerator, now, before, (before != 0).to(SCALAR), (now != 0).to(SCALAR)
    return (*(torch.where(trains, share, 0.0) for share in shares), trains.to(SCALAR))


def where_any(count: Tensor, new: Mapping[str, Tensor], v: Mapping[str, Any]) -> dict[str, Tensor]:
    """New numbers of the group, or the old ones where no parameter took part."""
    return {name: value.where(count > 0, v[name]) for name, value in new.items()}


# ---- what is said of d

# A freeze before d can have been found: the rate is meant to be what it begins at.
EARLY = 10


def _unlike(name: str, one: Any, other: Any, hyper: Mapping[str, Any]) -> str | None:
    """What to say of groups that have one d and differ in a hyper-parameter."""
    if name != "betas":
        return None
    if one[1] == other[1] or "beta3" in hyper:
        return ""
    decay = f"the estimate of their one d decays with the square root of {other[1]!r} for both"
    return f"{decay}; give a beta3"


def _stands(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    freeze = options.get("prodigy_steps", 0)
    return bool(freeze and group["d_steps"] >= freeze) or group.get("growth_rate") == 1


DISTANCE = Estimate(
    name="d",
    start="d0",
    split="split_groups",
    unlike=_unlike,
    stands=_stands,
    early=lambda options: 0 < options.get("prodigy_steps", 0) <= EARLY,
    tuned_by="d_coef",
    try_instead="a larger d0 (1e-5, 1e-4), d_coef=2, larger batches, no warm-up, or without "
    "use_bias_correction; see docs/prodigy.md",
)
# of groups that may step with one d while each has its own
DISTANCES = replace(DISTANCE, steps_with="d_step", mean="split_groups_mean")


# ---- the authors' Prodigy


def _correction(step: Tensor, betas: Any, use_bias_correction: bool) -> Tensor | float:
    if not use_bias_correction:
        return 1.0
    return (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)


def _next_sums(
    s: Tensor,
    gradient: Tensor,
    d: Tensor,
    d0: Tensor,
    dlr: Tensor,
    beta3: Tensor,
    safeguard_warmup: bool,
) -> Tensor:
    new = beta3 * s + d / d0 * (d if safeguard_warmup else dlr) * gradient
    return torch.where(dlr > 0, new.clamp(-LARGEST, LARGEST), s)


def _shares(
    update: Tensor,
    *,
    p0: Tensor,
    s: Tensor,
    step: Tensor,
    param: Tensor,
    grad: Tensor,
    lr: Tensor,
    d: Tensor,
    betas: Any,
    beta3: Tensor | None,
    d0: Tensor,
    slice_p: int,
    safeguard_warmup: bool,
    use_bias_correction: bool,
) -> tuple[Tensor, ...]:
    gradient, decay = every(grad, slice_p), beta3_of(beta3, betas)
    dlr = d * lr * _correction(step, betas, use_bias_correction)
    new = _next_sums(s, gradient, d, d0, dlr, decay, safeguard_warmup)
    trains = dlr > 0
    along = d / d0 * dlr * dot(gradient, p0 - every(param, slice_p))
    return shares_of(trains, along, new.abs().sum(dtype=SCALAR), s.abs().sum(dtype=SCALAR))


def _estimate(members: Sequence[Member], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    new: list[dict[str, Any]] = [{} for _ in members]
    for pool in pools(members, options["split_groups"]):
        added, *sums, count = added_up(members, pool)
        v = members[pool[0]].values
        beta3 = beta3_of(v.get("beta3"), v["betas"])
        cover = covered(v, *sums)
        size, (mine, rest) = cover.norm, cover.parts(v["d_numerator"])
        numerator = (beta3 * mine + added + rest).where(size > 0, v["d_numerator"])
        d_hat = (v["d_coef"] * numerator / size).clamp(max=MOST).where(size > 0, v["d"])
        d_max = v["d_max"].maximum(d_hat)
        d = v["d"].maximum(d_hat).where(v["d"] == v["d0"], v["d"])
        d = d_max.minimum(d * v["growth_rate"]).where(size > 0, v["d"])
        found = where_any(
            count, {**cover.entries, "d": d, "d_max": d_max, "d_numerator": numerator}, v
        )
        for i in pool if options["split_groups"] else range(len(members)):
            new[i] |= found
    return new


@rate(
    p0=FIRST,
    s=SUMS,
    unit=UNIT,
    provides=("lr", "unit_change", "eps_change", "d_unit"),
    domains={
        "d0": positive,
        "d_coef": positive,
        "growth_rate": Interval(1, float("inf"), high_open=False),
        "slice_p": COUNT,
    },
    numbers={
        "d": "d0",
        "d_before": "d0",
        "d_max": "d0",
        "d_numerator": 0.0,
        **COVERED,
        "d_steps": 0,
    },
    past={"d_before": "d"},
    from_sums=_shares,
    finish=_estimate,
    moment_unit="d_unit",
    moment_change="unit_change",
    hyper_change={"eps": "eps_change"},
    estimate=DISTANCE,
)
def prodigy_d(
    update: Tensor,
    p0: Tensor,
    s: Tensor,
    unit: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    grad: Tensor,
    lr: Tensor,
    d: Tensor,
    d_before: Tensor,
    betas: Live = (0.9, 0.999),
    beta3: Live | None = None,
    d0: Live = 1e-6,
    d_coef: Live = 1.0,
    growth_rate: Live = float("inf"),
    slice_p: int = 1,
    safeguard_warmup: bool = False,
    use_bias_correction: bool = False,
    split_groups: bool = False,
) -> tuple[Tensor, ...]:
    """Multiply the learning rate by the distance to the solution, estimated as in Prodigy.

    for all later elements, with the d before the step: lr' = d lr
    N <- beta3 N + (d / d0) lr' <g, p_1 - p>;  s <- beta3 s + (d / d0) lr' g
    d^ = d_coef N / ||s||_1, N and the norm over all parameters, also those without a gradient
    d_max <- max(d_max, d^);  d <- min(d_max, d growth_rate); while d is d0, first d <- max(d, d^)

    Later moments weight each gradient by the d of its step, and `eps` has the unit of the new d, as
    in the authors' Adam. Moments are stored as m / d, so stored values are multiplied by d_old / d_new.

    beta3: None is sqrt(betas[1]).
    slice_p: N and s use every slice_p-th element.
    safeguard_warmup: s adds (d / d0) d g, so that a warm-up of `lr` does not raise d.
    use_bias_correction: lr' is also multiplied by sqrt(1 - beta2^t) / (1 - beta1^t), for moments without
        their own correction.
    split_groups: estimate a d for each group. Groups with different `lr` keep their ratio either way.

    Shapes: all (*).
    Units: `lr` is a factor around 1; d has the unit of the weights.
    Source: Mishchenko and Defazio 2023, Algorithm 4, https://arxiv.org/abs/2306.06101, as in the
        authors' package prodigyopt 1.1.2. Departures: gradients are weighted by the `lr` of their
        own group; while s is 0 everywhere, steps are ordinary.
    """
    dlr = d_before * lr * _correction(step, betas, use_bias_correction)
    decay = beta3_of(beta3, betas)
    s = _next_sums(s, every(grad, slice_p), d_before, d0, dlr, decay, safeguard_warmup)
    changes = unit_change_of(unit, d_before), d / d_before
    return update, p0, s, d_before, dlr, *changes, d_before


@transform()
def in_new_unit(update: Tensor, *, eps_change: Tensor | None = None) -> Tensor:
    """Multiply by what d has grown by in this step, for `prodigy_d` with a direction that has no mean.

    u' = u d_new / d_old; in a chain without `prodigy_d`, where no d changes, u' = u

    Shapes: all (*).
    Source: prodigyopt 1.1.2 with beta1 = 0, which steps by the new d where it steps by the old one
        with a first moment.
    """
    return update if eps_change is None else update * eps_change


# ---- the plus form


def rectification(step: Tensor, beta2: Tensor) -> Tensor:
    """The factor of RAdam, 0 where the variance of the second moment is unbounded."""
    power = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * power / (1 - power)
    square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, square.clamp(min=0).sqrt(), 0.0)


# What groups keep that step with the harmonic mean of their d: it, the least that it may fall to when
# another group joins, and whether the group trained in the last step.
STEPPING: dict[str, str | float] = {"d_step": "d0", "d_least": 0.0, "d_active": 0.0}


def stepping_d(
    new: list[dict[str, Any]],
    members: Sequence[Member],
    options: Mapping[str, Any],
    measure: str,
) -> list[dict[str, Any]]:
    """Add the d that each group steps with: its own, or the harmonic mean of those that train.

    A group trains where a parameter took part in the step and has something to say: the common
    number `measure` is not 0. Where one begins to, the d that the others step with is at most halved.
    """
    if not (options["split_groups"] and options["split_groups_mean"]):
        for values in new:
            values["d_step"] = values["d"]
        return new
    if len(members) == 1:
        active = members[0].values["d_active"].where(~_trains(new[0], members[0], measure), 1.0)
        return [{**new[0], "d_step": new[0]["d"], "d_active": active}]
    trains = torch.stack([_trains(*pair, measure) for pair in zip(new, members, strict=True)])
    before = torch.stack([m.values["d_active"] > 0 for m in members])
    d = torch.stack([values["d"] for values in new])
    number = trains.sum(dtype=torch.float64)
    mean = torch.where(number > 1, number / torch.where(trains, 1 / d, 0.0).sum(), d)
    steps = torch.stack([m.values["d_step"] for m in members])
    least = torch.stack([m.values["d_least"] for m in members])
    joined = (trains & ~before).any() & trains & before
    least = torch.where(joined, torch.maximum(least, steps / 2), least).minimum(number * d)
    found = {
        "d_step": torch.where(trains, torch.maximum(mean, least), steps),
        "d_least": torch.where(trains, least, 0.0),
        "d_active": trains.to(torch.float64),
    }
    for i, values in enumerate(new):
        v = members[i].values
        values |= {name: value[i].where(number > 0, v[name]) for name, value in found.items()}
    return new


def _trains(values: Mapping[str, Tensor], member: Member, measure: str) -> Tensor:
    if member.sums is None:
        return torch.zeros_like(values["d"], dtype=torch.bool)
    return (member.sums[-1] > 0) & (values.get(measure, member.values[measure]) != 0)


def _estimate_plus(members: Sequence[Member], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    new: list[dict[str, Any]] = [{"d": m.values["d"]} for m in members]
    for pool in pools(members, options["split_groups"]):
        v = members[pool[0]].values
        if options["prodigy_steps"] and v["d_steps"] >= options["prodigy_steps"]:
            continue
        added, *sums, count = added_up(members, pool)
        cover = covered(v, *sums)
        size, (mine, rest) = cover.norm, cover.parts(v["d_numerator"])
        numerator = beta3_of(v.get("beta3"), v["betas"]) * mine
        # What speaks against the direction so far counts only once d has moved, and does not add up.
        against = numerator.minimum(added).where(v["d"] > v["d0"], numerator)
        numerator = against.where(added < 0, numerator + added) + rest
        if options["d_limiter"]:
            most = v["d"] * 2**0.25
            d_hat = v["d_coef"] * numerator.atan2(size).minimum(most)
        else:
            # an arc tangent, which is bounded
            d_hat = (v["d_coef"] * numerator).atan2(size)
        # where s has become too small for its dtype there is nothing to compare N with
        d = v["d"].maximum(d_hat.clamp(max=MOST)).where(size > 0, v["d"])
        if options["use_speed"]:
            d = d.minimum(v["d"] ** 0.975)
        found = where_any(count, {**cover.entries, "d": d, "d_numerator": numerator}, v)
        for i in pool if options["split_groups"] else range(len(members)):
            new[i] |= found
    return stepping_d(new, members, options, "d_norm")


@rate(
    p0=FIRST.gone_at("prodigy_steps", "d_steps"),
    s=NARROW_SUMS.gone_at("prodigy_steps", "d_steps"),
    unit=UNIT,
    provides=("lr", "unit_change", "clip_threshold", "d_unit"),
    domains={
        "d0": positive,
        "d_coef": positive,
        "slice_p": COUNT,
        "prodigy_steps": Interval(0, float("inf")),
    },
    numbers={"d": "d0", "d_numerator": 0.0, **COVERED, **STEPPING, "d_steps": 0},
    made_from={"d_step": "d"},
    gives=SHARES,
    finish=_estimate_plus,
    moment_unit="d_unit",
    moment_change="unit_change",
    estimate=DISTANCES,
)
def prodigy_plus_d(
    update: Tensor,
    p0: Tensor | None,
    s: Tensor | None,
    unit: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    grad: Tensor,
    lr: Tensor,
    d: Tensor,
    d_step: Tensor,
    betas: Live = (0.9, 0.99),
    beta3: Live | None = None,
    d0: Live = 1e-6,
    d_coef: Live = 1.0,
    slice_p: int = 11,
    prodigy_steps: int = 0,
    use_speed: bool = False,
    d_limiter: bool = False,
    use_bias_correction: bool = False,
    after_first: bool = False,
    narrow_sums: bool = False,
    split_groups: bool = True,
    split_groups_mean: bool = True,
) -> tuple[Tensor, ...]:
    """Prodigy's estimate as in prodigy-plus-schedule-free: one pass, and the new d from the next step.

    for all later elements: lr' = d lr
    n = sum sqrt(d) <g, p_1 - p>;  s <- beta3 s + sqrt(d) g, over every slice_p-th element
    N <- beta3 N, then N + n if n >= 0, or min(N, n) if n < 0 and d > d0
    d <- max(d, atan2(d_coef N, ||s||_1))

    Later moments are stored in units of d, as in `prodigy_d`; `eps` therefore acts as d eps.

    beta3: None is sqrt(betas[1]).
    prodigy_steps: from this step of the group on, d is constant, and p0 and s are freed.
    use_speed: n is the sum of d0 sqrt(d) sign(<g, p_1 - p>), s takes d0 sqrt(d) sign(g), and d grows
        at most to d^0.975, regardless of the size of weights and gradients.
    d_limiter: d grows by at most the factor 2^(1/4) d_coef per step.
    use_bias_correction: multiply lr' by RAdam's factor, 0 in the first steps of a parameter.
    after_first: ignore a parameter's first gradient, as moments do that only initialize with it.
    narrow_sums: store s of float32 weights in bfloat16, rounded stochastically, which saves 2 bytes
        per 11 elements. p0 is never narrowed, because p_1 - p is a difference of nearly equal numbers.
    split_groups: estimate a d for each group; split_groups_mean: then lr' uses the harmonic mean of
        the d of all groups that train. When a group starts to train, this mean at most halves.

    Shapes: all (*).
    Units: `lr` is a factor around 1; d has the unit of the weights.
    Source: prodigy-plus-schedule-free 1.9.0, after https://arxiv.org/abs/2306.06101; `d_limiter` is
        from 2.0.1. Departures: p0 and s are not rounded to bfloat16; a parameter's moments are
        rescaled by the d of its own last step, even if it had no gradient since then.
    """
    rect = rectification(step, betas[1]) if use_bias_correction else 1.0
    # the larger updates of the first steps, where d has not moved, tell it which way to go
    threshold = torch.where(d <= d0, 1.0 if use_speed else 50.0, 1.0)
    provided = (d_step * lr * rect, unit_change_of(unit, d), threshold, d)
    trains = lr > 0
    count = trains.to(torch.float64)
    if s is None or p0 is None:
        none = torch.zeros_like(d)
        return update, None, None, d, *provided, *[none] * 5, count  # type: ignore[arg-type, return-value]
    gradient, x = every(grad, slice_p), d.sqrt()
    along = dot(gradient, p0 - every(param, slice_p))
    if use_speed:
        along, gradient, x = along.sign(), gradient.sign(), d0 * x
    decay = beta3_of(beta3, betas)
    new = torch.where(trains & (step > 1) if after_first else trains, decay * s + x * gradient, s)
    shares = shares_of(trains, x * along, new.abs().sum(dtype=SCALAR), s.abs().sum(dtype=SCALAR))
    return update, p0, new, d, *provided, *shares
