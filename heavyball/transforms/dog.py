"""DoG and DoWG: the learning rate is the distance from the start over the gradients so far."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.rate import Estimate, Member, rate
from heavyball.numerics import norm
from heavyball.state.declare import copy_of_param, scalar
from heavyball.transforms.prodigy import added_up, pools

Numbers = dict[str, Any]


def for_pools(
    members: Sequence[Member], split: bool, renew: Callable[..., Numbers]
) -> list[Numbers]:
    """New numbers of every group: `renew(values, *sums)` of those that have one estimate."""
    new: list[Numbers] = [{} for _ in members]
    for pool in pools(members, split):
        found = renew(members[pool[0]].values, *added_up(members, pool))
        for i in pool if split else range(len(members)):
            new[i] |= found
    return new


def _estimate(name: str, start: str) -> Estimate:
    return Estimate(
        name=name, start=start, split="split_groups", stands=lambda *_: True, tuned_by=start
    )


def _shares(update: Tensor, *, p0: Tensor, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return norm(param - p0).square(), norm(grad).square(), norm(param).square()


def _renew_dog(v: Mapping[str, Any], distance: Tensor, square: Tensor, size: Tensor) -> Numbers:
    begins = v["dog_s"] <= 0
    far = v["dog_r"].maximum(distance.sqrt())
    start = v["reps"] * (1 + size.sqrt())
    more = square + v["eps"].where(begins, 0.0)
    return {"dog_r": start.where(begins, far), "dog_s": v["dog_s"] + more}


@rate(
    p0=copy_of_param,
    r=scalar(0.0, low=0.0).needs("layerwise"),
    s=scalar(0.0, low=0.0).needs("layerwise"),
    domains={"reps": positive, "init_lr": positive},
    numbers={"dog_r": 0.0, "dog_s": 0.0, "dog_steps": 0},
    from_sums=_shares,
    finish=lambda members, options: for_pools(members, options["split_groups"], _renew_dog),
    estimate=_estimate("dog_r", "reps"),
)
def dog_rate(
    update: Tensor,
    p0: Tensor,
    r: Tensor | None,
    s: Tensor | None,
    *,
    step: Tensor,
    param: Tensor,
    grad: Tensor,
    lr: Tensor,
    dog_r: Tensor,
    dog_s: Tensor,
    dog_steps: Tensor,
    reps: Live = 1e-6,
    eps: Live = 1e-8,
    layerwise: bool = False,
    init_lr: Live | None = None,
    split_groups: bool = False,
) -> tuple[Tensor | None, ...]:
    """Multiply the learning rate by the distance moved over the root of all squared gradients (DoG).

    r = largest ||p - p_1|| of any step so far, initially reps (1 + ||p_1||);  S = eps + sum of ||g||^2
    lr' = lr r / sqrt(S), norms over all parameters;  u' = u

    layerwise: compute r and S for each tensor (LDoG).
    init_lr: the learning rate of the first step.
    split_groups: compute r and S for each group.

    Shapes: all (*).
    Units: `lr` is a factor, leave it at 1; r has the unit of the weights. reps is 1e-4 for models with
        batch normalization.
    Source: Ivgi, Hinder and Carmon 2023, Algorithm 1, https://arxiv.org/abs/2302.12022; the authors
        evaluate with `polynomial_average`.
    """
    if r is not None and s is not None:
        first = step == 1
        far = torch.maximum(r, norm(param - p0))
        r, s = torch.where(first, reps * (1 + norm(param)), far), s + norm(grad).square()
        found = lr * r / (s + eps).sqrt()
    else:
        first = dog_steps == 1
        found = lr * dog_r / dog_s.sqrt()
    if init_lr is not None:
        found = torch.where(first, init_lr, found)
    return update, p0, r, s, found


def _far_shares(update: Tensor, *, p0: Tensor, param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return norm(param - p0).square(), norm(grad).square()


def _renew_dowg(v: Mapping[str, Any], distance: Tensor, square: Tensor) -> Numbers:
    far = v["dowg_r"].maximum(distance)
    return {"dowg_r": far, "dowg_s": v["dowg_s"] + far * square}


@rate(
    p0=copy_of_param,
    domains={"eps": positive},
    numbers={"dowg_r": "eps", "dowg_s": 0.0, "dowg_steps": 0},
    from_sums=_far_shares,
    finish=lambda members, options: for_pools(members, options["split_groups"], _renew_dowg),
    estimate=_estimate("dowg_r", "eps"),
)
def dowg_rate(
    update: Tensor,
    p0: Tensor,
    *,
    lr: Tensor,
    dowg_r: Tensor,
    dowg_s: Tensor,
    eps: Live = 1e-4,
    split_groups: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dog_rate` with each gradient weighted by the distance at its step.

    R = largest ||p - p_1||^2 so far, initially eps;  S = sum of R ||g||^2
    lr' = lr R / (sqrt(S) + eps), norms over all parameters;  u' = u

    split_groups: compute R and S for each group.

    Shapes: all (*).
    Units: `lr` is a factor, leave it at 1; eps is a square of the weights' unit.
    Source: Khaled, Mishchenko and Jin 2023, Algorithm 1, https://arxiv.org/abs/2305.16284, as in
        optax.
    """
    return update, p0, lr * dowg_r / (dowg_s.sqrt() + eps)
