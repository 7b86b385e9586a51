"""CAME: Adafactor whose momentum is divided by its own instability."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import debiased_weight, lerp, mean_like, rms
from heavyball.state.declare import State, zeros
from heavyball.transforms.factored import Square, factored_axes, mean_state, next_means


def _axes(param: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | None:
    return factored_axes(param.shape, 1, "second", "last")


def _full(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    return torch.zeros_like(param) if _axes(param, options) is None else None


def _full_residual(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    return _full(param, options) if param.ndim > 1 else None


# What the factored axes are called.
NAMES = ("last", "second last")


@transform(
    row=mean_state(0, _axes, NAMES),
    col=mean_state(1, _axes, NAMES),
    exp_avg_sq=State(_full, "zeros like the parameter, if not factored", holds="square"),
    residual_row=mean_state(0, _axes, NAMES),
    residual_col=mean_state(1, _axes, NAMES),
    residual_sq=State(_full_residual, "the same for two or more dimensions", holds="square"),
    exp_avg=zeros,
    domains={"threshold": positive},
)
def scale_by_came(
    update: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    exp_avg_sq: Tensor | None,
    residual_row: Tensor | None,
    residual_col: Tensor | None,
    residual_sq: Tensor | None,
    exp_avg: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.9, 0.999, 0.9999),
    threshold: Live = 1.0,
    eps: Live = (1e-30, 1e-16),
    correct_bias: bool = False,
) -> tuple[Tensor | None, ...]:
    """CAME: averaged Adafactor updates, divided by the root of their squared deviation.

    V = row col / mean(row), means of g^2 + eps_1 with beta2;  n = g / sqrt(V)
    n <- n / max(1, RMS(n) / threshold);  m <- beta1 m + (1 - beta1) n
    W = the same of (n - m)^2 + eps_2 with beta3;  u = m / sqrt(W), and m for vectors

    correct_bias: make all means unbiased. Without it, the first u is 11 times a sign, which the
        published learning rates assume.

    Shapes: all (*); rows and columns are those of the last two axes. State is 4 bytes per
        element, plus rows and columns.
    Units: the result is dimensionless.
    Source: Luo et al. 2023, Algorithm 2, https://arxiv.org/abs/2307.02047; came-pytorch 0.1.3.
    """
    weights = [debiased_weight(b, step) if correct_bias else 1 - b for b in betas]
    square = next_means(update.square() + eps[0], (row, col, exp_avg_sq), weights[1])
    direction = _over_root(update, square)
    direction = direction / (rms(direction) / threshold).clamp(min=1)
    exp_avg = lerp(exp_avg, direction, weights[0])
    residual = residual_row, residual_col, residual_sq
    if residual_row is None and residual_sq is None:
        return exp_avg, *square, *residual, exp_avg
    residual = next_means((direction - exp_avg).square() + eps[1], residual, weights[2])
    return _over_root(exp_avg, residual), *square, *residual, exp_avg


def _over_root(x: Tensor, square: Square) -> Tensor:
    """x over the root of a second moment, in two divisions: the product of both roots may underflow."""
    row, col, full = square
    if row is None or col is None:
        assert full is not None
        return x / full.sqrt()
    return x / (row.sqrt() / mean_like(row, col).sqrt()) / col.sqrt()
