"""D-Adaptation: the distance to the solution, bounded from below while training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, fraction, positive
from heavyball.core.rate import Member, rate
from heavyball.numerics import SCALAR, dot, lerp, norm
from heavyball.state.declare import copy_of_param, squares, zeros
from heavyball.transforms.dog import Numbers, for_pools
from heavyball.transforms.prodigy import DISTANCE, MOST

VALUES = zeros.holding("values")
GROWTH = Interval(1, float("inf"), high_open=False)
DOMAINS = {"d0": positive, "growth_rate": GROWTH}
BOUND = replace(DISTANCE, tuned_by="d0", try_instead="a larger d0 (1e-5, 1e-4)", unlike=None)


def _weighted(v: Mapping[str, Any], numerator: Tensor, size: Tensor) -> Numbers:
    """The estimate from means with sqrt(beta2) of N and s."""
    keep = v["betas"][1].sqrt()
    mean = keep * v["d_numerator"] + (1 - keep) * numerator
    found = (mean / ((1 - keep) * size)).where(size > 0, 0.0)
    most = (v["d"] * v.get("growth_rate", float("inf"))).clamp(max=MOST)
    return {"d": v["d"].maximum(found.minimum(most)), "d_numerator": mean}


def _finish(
    renew: Callable[..., Numbers],
) -> Callable[[Sequence[Member], Mapping[str, Any]], list[Numbers]]:
    return lambda members, options: for_pools(members, options["split_groups"], renew)


@rate(
    exp_avg=VALUES,
    exp_avg_sq=squares,
    s=VALUES,
    domains=DOMAINS,
    numbers={"d": "d0", "d_numerator": 0.0, "d_steps": 0},
    gives=("along", "size"),
    finish=_finish(_weighted),
    estimate=BOUND,
)
def d_adapt_adam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    s: Tensor,
    *,
    lr: Tensor,
    d: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    d0: Live = 1e-6,
    growth_rate: Live = float("inf"),
    split_groups: bool = False,
) -> tuple[Tensor, ...]:
    """Adam with a lower bound on the distance to the solution as its learning rate.

    lr' = d lr;  N = <g, s / (sqrt(v) + eps)> lr' over all parameters, with the old v and s
    m <- beta1 m + (1 - beta1) lr' g;  v <- beta2 v + (1 - beta2) g^2;  b = sqrt(beta2)
    s <- b s + (1 - b) lr' g;  W <- b W + (1 - b) N;  u = m / (lr' (sqrt(v) + eps))
    after the step: d <- max(d, min(W / ((1 - b) ||s||_1), d growth_rate))

    Shapes: all (*). It is both the rate and the update rule; means start at zero and are not
        bias-corrected.
    Units: `lr` is a factor, leave it at 1; d has the unit of the weights.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733; dadaptation 3.2 DAdaptAdam.
    """
    rate = d * lr
    keep = betas[1].sqrt()
    along = rate * dot(update, s / (exp_avg_sq.sqrt() + eps))
    exp_avg = lerp(exp_avg, rate * update, 1 - betas[0])
    exp_avg_sq = lerp(exp_avg_sq, update.square(), 1 - betas[1])
    s = lerp(s, rate * update, 1 - keep)
    direction = torch.where(rate > 0, exp_avg / (rate * (exp_avg_sq.sqrt() + eps)), 0.0)
    return direction, exp_avg, exp_avg_sq, s, rate, along, s.abs().sum(dtype=SCALAR)


@rate(
    exp_avg=VALUES,
    s=VALUES,
    domains={"d0": positive},
    numbers={"d": "d0", "d_numerator": 0.0, "d_steps": 0},
    gives=("along", "size"),
    finish=_finish(_weighted),
    estimate=BOUND,
)
def d_adapt_lion(
    update: Tensor,
    exp_avg: Tensor,
    s: Tensor,
    *,
    lr: Tensor,
    d: Tensor,
    betas: Live = (0.9, 0.99),
    d0: Live = 1e-6,
    split_groups: bool = False,
) -> tuple[Tensor, ...]:
    """Lion with a lower bound on the distance to the solution as its learning rate.

    lr' = d lr;  u = sign(beta1 m + (1 - beta1) g);  N = <u, s> lr' over all parameters, old s
    m <- beta2 m + (1 - beta2) lr' g;  b = sqrt(beta2);  s <- b s + (1 - b) lr' u
    W <- b W + (1 - b) N;  after the step: d <- max(d, W / ((1 - b) ||s||_1))

    Shapes: all (*). It is both the rate and the update rule.
    Units: `lr` is a factor, leave it at 1; d has the unit of the weights.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733; dadaptation 3.2 DAdaptLion.
    """
    rate = d * lr
    keep = betas[1].sqrt()
    direction = lerp(exp_avg, update, 1 - betas[0]).sign()
    along = rate * dot(direction, s)
    exp_avg = lerp(exp_avg, rate * update, 1 - betas[1])
    s = lerp(s, rate * direction, 1 - keep)
    return direction, exp_avg, s, rate, along, s.abs().sum(dtype=SCALAR)


def _moved(s: Tensor, update: Tensor, rate: Tensor) -> Tensor:
    """s + r u, where its product with a gradient stays finite: r is huge after a tiny first gradient."""
    most = 2.0 ** (504 if update.dtype == torch.float64 else 70)
    return (s + rate.clamp(max=most) * update).clamp(min=-most, max=most)


def _sgd_shares(
    update: Tensor, *, s: Tensor, lr: Tensor, d: Tensor, d_first: Tensor
) -> tuple[Tensor, ...]:
    rate = torch.where(d_first > 0, d * lr / d_first, 0.0)
    return rate * dot(update, s), norm(_moved(s, update, rate)).square(), norm(update).square()


def _summed(v: Mapping[str, Any], along: Tensor, size: Tensor, square: Tensor) -> Numbers:
    numerator = v["d_numerator"] + along
    found = (2 * numerator / size.sqrt()).where(size > 0, 0.0)
    most = (v["d"] * v["growth_rate"]).clamp(max=MOST)
    d = v["d"].maximum(found.minimum(most))
    first = v["d_first"].where(v["d_first"] > 0, square.sqrt())
    return {"d": d, "d_numerator": numerator, "d_first": first}


@rate(
    kind="writer",
    provides=(),
    s=VALUES,
    p0=copy_of_param,
    domains={"momentum": fraction, **DOMAINS},
    numbers={"d": "d0", "d_before": "d0", "d_numerator": 0.0, "d_first": 0.0, "d_steps": 0},
    past={"d_before": "d"},
    from_sums=_sgd_shares,
    finish=_finish(_summed),
    estimate=BOUND,
)
def d_adapt_sgd(
    update: Tensor,
    s: Tensor,
    p0: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    d_before: Tensor,
    d_first: Tensor,
    momentum: Live = 0.0,
    d0: Live = 1e-6,
    growth_rate: Live = float("inf"),
    split_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dual averaging with a lower bound on the distance to the solution as its learning rate.

    G = ||u_1|| over all parameters;  r = d lr / G;  N <- N + r <u, s>;  s <- s + r u
    p <- momentum p + (1 - momentum) (p_1 - s);  d <- max(d, min(2 N / ||s||, d growth_rate))

    Shapes: all (*).
    Units: `lr` is a factor, leave it at 1; d has the unit of the weights.
    Source: Defazio and Mishchenko 2023, https://arxiv.org/abs/2301.07733; dadaptation 3.2 DAdaptSGD,
        which leaves the decay out of G.
    """
    s = _moved(s, update, torch.where(d_first > 0, d_before * lr / d_first, 0.0))
    return lerp(param, p0 - s, 1 - momentum), s, p0
