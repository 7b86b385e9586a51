"""Prodigy from progress alone: the newer SPEED of prodigy-plus-schedule-free."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, positive
from heavyball.core.rate import Member, rate
from heavyball.numerics import SCALAR, dot, every
from heavyball.state.declare import scalar
from heavyball.transforms.prodigy import (
    COUNT,
    COVERED,
    DISTANCES,
    FIRST,
    MOST,
    SHARES,
    STEPPING,
    UNIT,
    added_up,
    beta3_of,
    covered,
    pools,
    rectification,
    shares_of,
    stepping_d,
    unit_change_of,
    where_any,
)

# The least that a displacement is divided by.
LEAST = 1e-8
# What d may grow by in a step, without d_coef.
GROWTH = 2**0.25


def _estimate(members: Sequence[Member], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    new: list[dict[str, Any]] = [{"d": m.values["d"]} for m in members]
    for pool in pools(members, options["split_groups"]):
        v = members[pool[0]].values
        if options["prodigy_steps"] and v["d_steps"] >= options["prodigy_steps"]:
            continue
        added, *sums, count = added_up(members, pool)
        cover, before = covered(v, *sums), v["d_numerator"]
        mine, rest = cover.parts(before)
        kept = beta3_of(v.get("beta3"), v["betas"]) * mine
        # What speaks against the direction counts only once d has moved.
        numerator = (kept + added).where((v["d"] > v["d0"]) | (added > 0), kept) + rest
        largest = v["d_largest_numerator"].maximum(numerator)
        grows = (numerator >= largest) & (numerator > 0) & (before > 0)
        ratio = (numerator / before).where(grows, 1.0).sqrt()
        # a step that some take no part in is so much less of one
        ratio = ratio.minimum(GROWTH**cover.share)
        d_hat = v["d_step"] * ratio * v["d_coef"] ** 0.125
        d = v["d"].maximum(d_hat.clamp(max=MOST)).where(grows, v["d"])
        found = {"d": d, "d_numerator": numerator, "d_largest_numerator": largest}
        found |= cover.entries
        found = where_any(count, found, v)
        for i in pool if options["split_groups"] else range(len(members)):
            new[i] |= found
    return stepping_d(new, members, options, "d_numerator")


@rate(
    p0=FIRST.gone_at("prodigy_steps", "d_steps"),
    along=scalar(0.0),
    l1=scalar(LEAST),
    l2=scalar(LEAST),
    unit=UNIT,
    provides=("lr", "unit_change", "d_unit"),
    domains={
        "d0": positive,
        "d_coef": positive,
        "slice_p": COUNT,
        "prodigy_steps": Interval(0, float("inf")),
    },
    numbers={
        "d": "d0",
        "d_numerator": 0.0,
        "d_largest_numerator": 0.0,
        **COVERED,
        **STEPPING,
        "d_steps": 0,
    },
    made_from={"d_step": "d"},
    gives=SHARES,
    finish=_estimate,
    moment_unit="d_unit",
    moment_change="unit_change",
    estimate=DISTANCES,
)
def prodigy_progress_d(
    update: Tensor,
    p0: Tensor | None,
    along: Tensor,
    l1: Tensor,
    l2: Tensor,
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
    use_bias_correction: bool = False,
    after_first: bool = False,
    split_groups: bool = True,
    split_groups_mean: bool = True,
) -> tuple[Tensor | None, ...]:
    """Prodigy-style estimate: d grows while the weights make more progress than ever before.

    for all later elements: lr' = d lr
    a <- (1 - t^-0.75) a + t^-0.75 <g, p_1 - p>;  l_q <- max(l_q, ||p_1 - p||_q, 1e-8), q = 1 and 2,
        over every slice_p-th element of a tensor
    n = sum d^2 / sqrt(d0) / (1 + l_2)^2 a / l_1, with the d by which the weights have moved
    N' = beta3 N, and N' + n if n > 0 or d > d0
    where N' is positive and the largest so far, and N > 0:
        d <- max(d, d min(2^(1/4), sqrt(N' / N)) d_coef^(1/8))

    No sum of gradients is stored, and the scale of the gradients does not matter. As in
    `prodigy_plus_d`, the new d is used from the next step on, and later moments are stored in units
    of d.

    prodigy_steps, use_bias_correction, after_first, split_groups, split_groups_mean: as there.

    Shapes: all (*).
    Units: `lr` is a factor around 1; d has the unit of the weights.
    Source: `use_speed` of prodigy-plus-schedule-free 2.0.1. Departures: p_1 - p is the displacement
        of the weights at which the gradient is taken, also in front of `schedule_free`, where the
        original takes z; p_1 is not rounded to bfloat16.
    """
    rect = rectification(step, betas[1]) if use_bias_correction else 1.0
    provided = (d_step * lr * rect, unit_change_of(unit, d), d)
    trains = lr > 0
    if p0 is None:
        none = torch.zeros_like(d)
        return update, None, along, l1, l2, d, *provided, *[none] * 5, trains.to(SCALAR)
    moved = p0 - every(param, slice_p)
    weight = step**-0.75
    if after_first:  # the second gradient is then the first that counts
        weight = torch.where(step == 2, 1.0, weight)
    counts = trains & (step > 1) if after_first else trains
    new_along, new_l1, new_l2 = (
        torch.where(counts, new, old)
        for new, old in (
            (along + weight * (dot(every(grad, slice_p), moved) - along), along),
            (torch.maximum(l1, moved.abs().sum(dtype=SCALAR)), l1),
            (torch.maximum(l2, moved.square().sum(dtype=SCALAR).sqrt()), l2),
        )
    )
    now, before = _progress(new_along, new_l1, new_l2), _progress(along, l1, l2)
    numerator = torch.where(counts, d_step**2 / d0.sqrt() * now, 0.0)
    shares = shares_of(trains, numerator, now, before)
    return update, p0, new_along, new_l1, new_l2, d, *provided, *shares


def _progress(along: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
    return along / l1 / (1 + l2) ** 2
