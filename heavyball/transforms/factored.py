"""Adafactor's second moment: row and column means in place of a full tensor."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.numerics import lerp, root, second_moment, second_weight
from heavyball.transform import Live, State, transform


def factored_axes(shape: torch.Size, min_dim: int, mode: str) -> tuple[int, int] | None:
    """The largest and the second largest axis, the later of two equal ones the larger; or None."""
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    deciding = second if mode == "second" else largest
    return (largest, second) if shape[deciding] >= min_dim else None


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


@transform(
    row=_mean_state(0),
    col=_mean_state(1),
    exp_avg_sq=State(_full, "zeros like the parameter, if not factored", holds="square"),
)
def factored_rms(
    update: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    beta2: Live = 0.99,
    eps: Live = 1e-8,
    min_dim: int = 32,
    min_dim_mode: Literal["second", "any"] = "second",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`scale_by_exp_avg_sq` with n + m numbers of state for an n x m matrix.

    row, col = unbiased means with beta2 of the means of u^2 over the largest axis and over the second
    V = row col / max(mean(row), 1e-30), the mean over the second largest axis
    u' = u / (sqrt(V) + eps)

    Tensors whose second largest axis (`min_dim_mode="any"`: whose largest) is shorter than `min_dim`
    keep a full second moment; further axes are batch axes.

    Shapes: all (*).
    Units: the result has none.
    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235, with the axes of
        optax. timm and prodigy-plus-schedule-free 1.9.0 average a row over a wrong axis where the
        largest axis comes first, and lose the row factor there.
    """
    if exp_avg_sq is not None:
        exp_avg_sq = second_moment(exp_avg_sq, update, beta2, step, scheduled_beta2)
        return update / root(exp_avg_sq, eps, "outside"), None, None, exp_avg_sq
    largest, second = factored_axes(update.shape, min_dim, min_dim_mode)  # type: ignore[misc]
    assert row is not None
    assert col is not None
    square, weight = update.square(), second_weight(beta2, step, scheduled_beta2)
    row = lerp(row, square.mean(largest, keepdim=True), weight)
    col = lerp(col, square.mean(second, keepdim=True), weight)
    scale = row / row.mean(second, keepdim=True).clamp(min=1e-30)
    return update / (scale.sqrt() * col.sqrt() + eps), row, col, None
