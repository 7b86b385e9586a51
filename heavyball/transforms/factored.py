"""Adafactor's second moment: row and column means in place of a full tensor."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import ema, lerp, mean_like, quotient, second_weight
from heavyball.state.declare import State, zeros


def factored_axes(shape: torch.Size, min_dim: int, mode: str) -> tuple[int, int] | None:
    """The largest and the second largest axis, the later of two equal ones the larger; or None.

    With one axis of more than one element there is nothing to gain: `col` would be all of it.
    """
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    deciding = second if mode == "second" else largest
    return (largest, second) if shape[deciding] >= min_dim and shape[second] > 1 else None


def _axes(param: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | None:
    return factored_axes(param.shape, options["min_dim"], options["min_dim_mode"])


def _mean_state(which: int) -> State:
    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        axes = _axes(param, options)
        if axes is None:
            return None
        shape = [1 if axis == axes[which] else n for axis, n in enumerate(param.shape)]
        return torch.zeros(shape, dtype=param.dtype, device=param.device)

    axis = ("largest", "second largest")[which]
    return State(init, f"means over the {axis} axis, if factored", holds="square")


def _full(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    return torch.zeros_like(param) if _axes(param, options) is None else None


ROW, COL = _mean_state(0), _mean_state(1)
FULL = State(_full, "zeros like the parameter, if not factored", holds="square")


@transform(
    row=ROW,
    col=COL,
    exp_avg_sq=FULL,
    exp_avg=zeros.needs("momentum"),
    domains={"momentum": fraction},
)
def factored_rms(
    update: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    exp_avg_sq: Tensor | None,
    exp_avg: Tensor | None,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    beta2: Live = 0.99,
    eps: Live | None = 1e-8,
    momentum: Live = 0.0,
    min_dim: int = 32,
    min_dim_mode: Literal["second", "any"] = "second",
    correct_bias: bool = True,
    clip_threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`scale_by_exp_avg_sq` with n + m numbers of state for an n x m matrix.

    row, col = unbiased means with beta2 of the means of u^2 over the largest axis and over the second
    V = row col / max(mean(row), 1e-30), the mean over the second largest axis
    u' = u / (sqrt(V) + eps)

    Tensors whose second largest axis (`min_dim_mode="any"`: whose largest) is shorter than `min_dim`
    keep a full second moment, and so do those with one axis only of more than one element; further
    axes are batch axes. `eps` None and `correct_bias` are those of
    `scale_by_exp_avg_sq`.

    momentum: above 0, the mean of u with this beta takes the place of u above the root.

    Shapes: all (*).
    Units: the result has none.
    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235, with the axes of
        optax. timm and prodigy-plus-schedule-free 1.9.0 average a row over a wrong axis where the
        largest axis comes first, and lose the row factor there.
    """
    weight = second_weight(beta2, step, scheduled_beta2, correct_bias)
    new = next_square(update, (row, col, exp_avg_sq), weight)
    deviation = factored_root(new)
    if exp_avg is not None:
        update = exp_avg = ema(exp_avg, update, momentum, step, correct_bias)
    return quotient(update, deviation, eps, clip_threshold), *new, exp_avg


Square = tuple[Tensor | None, Tensor | None, Tensor | None]


def next_square(update: Tensor, square: Square, weight: Tensor) -> Square:
    """One step of a second moment: the means of its rows and columns, or all of it."""
    row, col, full = square
    if full is not None:
        return None, None, lerp(full, update.square(), weight)
    assert row is not None
    assert col is not None
    new = update.square()
    row = lerp(row, mean_like(new, row), weight)
    return row, lerp(col, mean_like(new, col), weight), None


def factored_root(square: Square) -> Tensor:
    """The root of a second moment; of means, the root of row col / mean(row)."""
    row, col, full = square
    if full is not None:
        return full.sqrt()
    assert row is not None
    assert col is not None
    scale = row / mean_like(row, col).clamp(min=1e-30)
    return scale.sqrt() * col.sqrt()
