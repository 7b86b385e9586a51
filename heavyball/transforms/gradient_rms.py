"""Muon^2's step in front of the products: the momentum over the root mean square of the gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import second_moment, second_weight
from heavyball.state.declare import State
from heavyball.transforms.factored import factored_axes, factored_root, mean_state, next_square


def _axes(param: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | None:
    return factored_axes(param.shape, 1, "second") if options["factored"] else None


def _full(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    return torch.zeros_like(param) if _axes(param, options) is None else None


@transform(
    exp_avg_sq=State(_full, "zeros like the parameter, if not factored", holds="square"),
    row=mean_state(0, _axes, ("largest", "second largest")),
    col=mean_state(1, _axes, ("largest", "second largest")),
)
def scale_by_gradient_rms(
    update: Tensor,
    exp_avg_sq: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    *,
    step: Tensor,
    grad: Tensor,
    scheduled_beta2: Tensor | None = None,
    beta2: Live = 0.95,
    eps: Live = 1e-10,
    correct_bias: bool = False,
    factored: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Divide the update by the root of the running mean square of the gradient.

    v <- beta2 v + (1 - beta2) g^2, g the gradient at the start of the chain;  u' = u / (sqrt(v) + eps)

    After `muon_momentum` and before `orthogonalize`, it is Muon^2; `scale_by_exp_avg_sq` there would
    square the momentum. correct_bias: use v / (1 - beta2^t) instead of v.

    factored: v = row col / max(mean(row), 1e-30) of means with beta2 of the means of g^2 over the
        largest axis and over the second, n + m numbers for an n x m matrix (Muon^2-F).

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: https://arxiv.org/abs/2604.09967; record 7 of modded-nanogpt's third track.
    """
    if exp_avg_sq is not None:
        square = second_moment(exp_avg_sq, grad, beta2, step, scheduled_beta2, correct_bias)
        return update / (square.sqrt() + eps), square, None, None
    weight = second_weight(beta2, step, scheduled_beta2, correct_bias)
    new = next_square(grad, (row, col, None), weight)
    return update / (factored_root(new) + eps), None, new[0], new[1]
