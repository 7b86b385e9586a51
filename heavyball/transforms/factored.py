"""Adafactor's second moment: row and column means in place of a full tensor."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import ema, lerp, mean_like, quotient, second_weight
from heavyball.state.declare import State, zeros


def factored_axes(
    shape: torch.Size, min_dim: int, mode: str, axes: str = "largest"
) -> tuple[int, int] | None:
    """The largest and the second largest axis, the later of two equal ones the larger; or None.

    With one axis of more than one element there is nothing to gain: `col` would be all of it.
    axes: "last" takes the last one and the one before in their places.
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
    *_, second, largest = range(len(shape)) if axes == "last" else order
    if shape[largest] < 2:
        return None
    deciding = second if mode == "second" else largest
    return (largest, second) if shape[deciding] >= min_dim and shape[second] > 1 else None


def _axes(param: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | None:
    shape, axes = param.shape, options.get("axes", "largest")
    return factored_axes(shape, options["min_dim"], options["min_dim_mode"], axes)


# Which axes of a parameter are factored, the one over which rows are means first; or None.
Axes = Callable[[Tensor, Mapping[str, Any]], tuple[int, int] | None]


def mean_state(
    which: int, axes_of: Axes = _axes, names: tuple[str, str] = ("largest", "second largest")
) -> State:
    """Means over the first (0) or the second (1) of the factored axes, which are called so."""

    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        axes = axes_of(param, options)
        if axes is None:
            return None
        shape = [1 if axis == axes[which] else n for axis, n in enumerate(param.shape)]
        return torch.zeros(shape, dtype=param.dtype, device=param.device)

    return State(init, f"means over the {names[which]} axis, if factored", holds="square")


def _full(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    return torch.zeros_like(param) if _axes(param, options) is None else None


ROW, COL = mean_state(0), mean_state(1)
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
    axes: Literal["largest", "last"] = "largest",
    eps_placement: Literal["outside", "maximum"] = "outside",
    clip_threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`scale_by_exp_avg_sq` with n + m numbers of state for an n x m matrix.

    row, col = unbiased means with beta2 of the means of u^2 over the largest axis and over the second
    V = row col / max(mean(row), 1e-30), the mean over the second largest axis
    u' = u / (sqrt(V) + eps)

    Tensors whose second largest axis (`min_dim_mode="any"`: whose largest) is shorter than `min_dim`
    keep a full second moment, and so do tensors with only one axis of more than one element. Other
    axes are batch axes. `eps` None and `correct_bias`: as in `scale_by_exp_avg_sq`.

    momentum: above 0, the mean of u with this beta replaces u in the numerator.
    axes: "last" factors the last two axes, even if others are larger.
    eps_placement: "maximum" is u / max(sqrt(V), eps), and eps in place of 1e-30; eps None is then the
        machine epsilon of the mathematics. With "last" and `min_dim=1` it is torch's Adafactor.

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Shazeer and Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235, with the axes of
        optax. timm and prodigy-plus-schedule-free 1.9.0 average a row over a wrong axis where the
        largest axis comes first, and lose the row factor there.
    """
    weight = second_weight(beta2, step, scheduled_beta2, correct_bias)
    new = next_square(update, (row, col, exp_avg_sq), weight)
    if eps_placement == "maximum":
        eps = torch.finfo(update.dtype).eps if eps is None else eps
        whole = new[2]
        short = axes == "last" and min_dim == 1 and update.ndim > 1
        deviation = factored_root(new, eps) if whole is None or not short else _floored(whole, eps)
        deviation = deviation.clamp(min=eps)
    else:
        deviation = factored_root(new)
    if exp_avg is not None:
        update = exp_avg = ema(exp_avg, update, momentum, step, correct_bias)
    if eps_placement == "maximum":
        return update / deviation, *new, exp_avg
    return quotient(update, deviation, eps, clip_threshold), *new, exp_avg


def _floored(full: Tensor, eps: Tensor | float) -> Tensor:
    """The root that means of rows and columns would give where one of the last two axes is 1 long."""
    mean = full.mean((-2, -1), keepdim=True)
    return (full * (mean / mean.clamp(min=eps))).sqrt()


Square = tuple[Tensor | None, Tensor | None, Tensor | None]


def next_square(update: Tensor, square: Square, weight: Tensor) -> Square:
    """One step of a second moment: the means of its rows and columns, or all of it."""
    return next_means(update.square(), square, weight)


def next_means(new: Tensor, square: Square, weight: Tensor) -> Square:
    """The same, given the squares."""
    row, col, full = square
    if full is not None:
        return None, None, lerp(full, new, weight)
    assert row is not None
    assert col is not None
    row = lerp(row, mean_like(new, row), weight)
    return row, lerp(col, mean_like(new, col), weight), None


def factored_root(square: Square, floor: Tensor | float = 1e-30) -> Tensor:
    """The root of a second moment; of means, the root of row col / max(mean(row), floor)."""
    row, col, full = square
    if full is not None:
        return full.sqrt()
    assert row is not None
    assert col is not None
    scale = row / mean_like(row, col).clamp(min=floor)
    return scale.sqrt() * col.sqrt()
