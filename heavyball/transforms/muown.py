"""Muown: weight normalization inside the optimizer, Muon on directions and Adam on row norms."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices
from heavyball.linalg.orthogonalize import Products
from heavyball.numerics import ema, lerp
from heavyball.state.declare import Holds, State, zeros
from heavyball.transforms.muon import Method, needs_matrix, orthogonal

# Shorter rows are taken for rows of this length.
SHORTEST = 1e-12
NS_EPS = 1e-20


def _row_state(holds: Holds, measure: bool) -> State:
    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
        view = matrices(tuple(param.shape), options["stacked"])
        if not measure:
            return param.new_zeros(view.row_shape)
        rows = param.reshape(*view.stack, view.rows, view.columns)
        return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=SHORTEST)

    rule = "initially the norm of each row" if measure else "a number per row"
    return State(init, rule, holds=holds)


@whole_transform(
    kind="writer",
    requires=needs_matrix,
    momentum_buffer=zeros,
    gain=_row_state("values", True),
    length=_row_state("values", True),
    gain_avg=_row_state("moment", False),
    gain_avg_sq=_row_state("square", False),
    domains={"momentum": fraction},
    excludes={
        "decay": "muown has its own, of the row norms",
        **dict.fromkeys(
            ("schedule_free", "hyperball", "spectral_sphere", "pin_radius", "primal_average"),
            "both decide how large the weights are",
        ),
        **dict.fromkeys(("lookahead", "outer_nesterov"), "both move the weights"),
    },
)
def muown(
    update: Tensor,
    momentum_buffer: Tensor,
    gain: Tensor,
    length: Tensor,
    gain_avg: Tensor,
    gain_avg_sq: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    step: Tensor,
    momentum: Live = 0.95,
    betas: Live = (0.9, 0.95),
    eps: Live = 1e-8,
    weight_decay: Live = 0.0,
    method: Method = "quintic-5",
    steps: int = 5,
    products: Products = "auto",
    stacked: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, ...]:
    """Update the directions of the rows with Muon and their norms with Adam.

    initially g = n = the norms of the rows.   w = p / g;  V = w n
    dg = <grad, w> per row;  dV = (g / n) (grad - w dg);  M <- momentum M + (1 - momentum) dV
    V <- V - lr sqrt(max(R, C)) NS(M);  g <- (g - lr Adam(dg)) (1 - lr wd);  n <- norms of V's rows
    p <- g V / n

    V is computed from p, g and n, so M is the only matrix of state. V therefore contains the rounding of
    low-precision weights, unless `param_ecc` is used.

    weight_decay: of the row norms, after the step. method, steps, products, stacked, blocks, axis: as
        in `orthogonalize`; the rows are those of the whole matrix.

    Shapes: two or more dimensions, R x C as in `orthogonalize`.
    Units: lr is that of the row norms, 3e-4, and of directions of length sqrt(max(R, C)).
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: https://arxiv.org/abs/2605.10797; NVIDIA's Emerging-Optimizers.
    """
    view = matrices(update.shape[1:], stacked, blocks, axis)
    shape = (len(update), *view.stack, view.rows, view.columns)
    p, grad, buffer = (t.reshape(shape) for t in (param, update, momentum_buffer))
    rate = lr.reshape(-1, *[1] * (len(shape) - 1)).to(p.dtype)
    w = p / gain
    along = (grad * w).sum(-1, keepdim=True)
    buffer = lerp(buffer, (gain / length) * (grad - w * along), 1 - momentum)

    def directions(m: Tensor) -> Tensor:
        return orthogonal(m, method, steps, NS_EPS, "none", products) * max(m.shape[-2:]) ** 0.5

    turn = view.map(directions, buffer.reshape(update.shape)).reshape(shape)
    v = w * length - rate * turn
    gain_avg = ema(gain_avg, along, betas[0], step)
    gain_avg_sq = ema(gain_avg_sq, along.square(), betas[1], step)
    stretch = gain_avg / (gain_avg_sq.sqrt() + eps)
    shrink = 1 - rate * weight_decay
    new_gain = (gain - rate * stretch) * shrink
    new_length = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=SHORTEST)
    # rows that neither turn nor stretch keep their digits
    still = (turn == 0).all(-1, keepdim=True) & (stretch == 0)
    new = torch.where(still, p * shrink, new_gain * (v / new_length))
    length = torch.where(still, length, new_length)
    states = buffer.reshape(update.shape), new_gain, length, gain_avg, gain_avg_sq
    return new.to(p.dtype).reshape(update.shape), *(s.to(p.dtype) for s in states)
