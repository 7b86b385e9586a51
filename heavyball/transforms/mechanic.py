"""Mechanic: a factor of the learning rate that is found by betting, around any chain."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.rate import rate
from heavyball.numerics import dot, norm
from heavyball.state.declare import copy_of_param
from heavyball.transforms.dog import Numbers, for_pools

BETAS = [1 - 0.1**i for i in range(1, 7)]
EPS = 1e-8
BETS: dict[str, str | float] = {f"mechanic_{name}{i}": 0.0 for name in "mvrs" for i in range(6)}


def _way(param: Tensor, p0: Tensor, factor: Tensor) -> Tensor:
    return (p0 - param) / (factor + EPS)


def _shares(
    update: Tensor, *, p0: Tensor, param: Tensor, grad: Tensor, mechanic: Tensor
) -> tuple[Tensor, ...]:
    way = _way(param, p0, mechanic)
    return dot(grad, way), dot(param, way), norm(grad).square(), norm(param).square()


def _renew(
    v: Mapping[str, Any], along: Tensor, own: Tensor, square: Tensor, size: Tensor
) -> Numbers:
    decay = v["weight_decay"] * v["mechanic"] * square.sqrt() / (size.sqrt() + EPS)
    h = along + decay * own
    new: Numbers = {}
    total = 0.0 * h
    for i, beta in enumerate(BETAS):
        m, var, r, s = (v[f"mechanic_{name}{i}"] for name in "mvrs")
        most = (beta * m).maximum((h * h).sqrt() + EPS)
        var = beta**2 * var + h * h
        r = (beta * r + h.maximum(-m).minimum(m) * s).clamp(min=0)
        s = (v["s_init"] / len(BETAS) * most + r) / (var.sqrt() + EPS)
        new |= {f"mechanic_{n}{i}": x for n, x in zip("mvrs", (most, var, r, s), strict=True)}
        total = total + s
    return {**new, "mechanic": total}


@rate(
    kind="writer",
    provides=(),
    p0=copy_of_param,
    domains={"s_init": positive},
    numbers={"mechanic": 0.0, "mechanic_before": 0.0, **BETS, "mechanic_steps": 0},
    past={"mechanic_before": "mechanic"},
    from_sums=_shares,
    finish=lambda members, options: for_pools(members, False, _renew),
    shared=True,
)
def mechanic(
    update: Tensor,
    p0: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    mechanic: Tensor,
    mechanic_before: Tensor,
    s_init: Live = 1e-6,
    weight_decay: Live = 0.01,
) -> tuple[Tensor, Tensor]:
    """Scale the total displacement of the chain by a factor that is tuned online (Mechanic).

    D = (p_1 - p) / (S + eps);  h = <g + weight_decay S ||g|| / (||p|| + eps) p, D> over all parameters
    for beta = 0.9, 0.99 ..: m' = max(beta m, |h| + eps);  v <- beta^2 v + h^2
    r <- max(beta r + clamp(h, -m, m) s, 0);  s = (s_init / 6 m' + r) / (sqrt(v) + eps)
    S = sum of s;  p <- p_1 - S (D + lr u);  eps = 1e-8

    `weight_decay` is Mechanic's own; a decay before it is part of u.

    Shapes: all (*).
    Units: `lr` is that of the chain without it, or larger.
    Source: Cutkosky, Defazio and Mehta 2023, Algorithm 1, https://arxiv.org/abs/2306.00144, with the
        clamp of h that the authors added in optax.
    """
    way = _way(param, p0, mechanic_before) + lr * update
    return torch.where(mechanic > 0, p0 - mechanic * way, param), p0
