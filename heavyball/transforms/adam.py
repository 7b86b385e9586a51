"""Adam: divide the running mean of the gradient by its running root mean square."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, count, ema, lerp, mean_like, root, second_weight
from heavyball.state.declare import State, scalar, zeros


def _square_shape(shape: torch.Size, square: str | int) -> list[int] | None:
    """The shape of the second moment; None where it is one number of several elements."""
    rows = shape[0] if shape else 1
    named = {"element": shape.numel(), "row": rows, "tensor": 1}
    blocks = named[square] if isinstance(square, str) else square
    if blocks == shape.numel():
        return [*shape]
    return None if blocks == 1 else [blocks, *([1] * (len(shape) - 1))]


def _square(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    shape = _square_shape(param.shape, options["square"])
    if shape == [*param.shape]:
        return torch.zeros_like(param)
    return None if shape is None else param.new_zeros(shape)


def _one_square(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    shape = _square_shape(param.shape, options["square"])
    return scalar(0.0).init(param, options) if shape is None else None


def _fits(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    square, rows = options["square"], shape[0] if shape else 1
    if isinstance(square, int) and (square < 1 or rows % square):
        return f"{rows} rows are not square={square!r} blocks of equal size"
    if square != "element" and options["amsgrad"]:
        return f"amsgrad=True has one number for each element, and square={square!r} has not"
    return None


SQUARE = State(_square, "zeros, one for each element, row or block", holds="square")


@transform(
    exp_avg=zeros,
    exp_avg_sq=SQUARE,
    max_exp_avg_sq=SQUARE.needs("amsgrad"),
    one_square=replace(scalar(0.0, low=0.0), init=_one_square),
    requires=_fits,
)
def scale_by_adam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    one_square: Tensor | None,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    scheduled_bias: Tensor | None = None,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    eps_placement: EpsPlacement = "outside",
    amsgrad: bool = False,
    correct_bias: bool = True,
    square: Literal["element", "row", "tensor"] | int = "element",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Adam: a mean of the gradient over the root of a mean of its squares.

    m_t = unbiased mean of g_1..g_t with weights beta1^(t-i);  v_t = the same of g^2 with beta2
    u = m / (sqrt(v) + eps)

    correct_bias: False uses the averages from zero: m (1 - beta1^t), v (1 - beta2^t).
    square: v is a mean of g^2 over each "row" of the first axis (each entry of a vector), over the
        "tensor", or, with a number, over each of that many blocks of rows, such as the heads of a
        projection (Adam-mini, https://arxiv.org/abs/2406.16793).

    With `amsgrad`, v is the largest sum_i (1 - beta2) beta2^(s-i) g_i^2 of any step s so far, over
    the bias 1 - beta2^t, as in torch.

    Shapes: all (*).
    Units: the result is dimensionless, so `lr` is the size of a step in weight units; `eps` has the
        unit of the gradient.
    Source: Kingma and Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980. Departure: the bias
        correction is inside the means. `eps_placement` picks one of the published forms, see
        `heavyball.numerics.root`; "outside" is torch's.
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    weight = second_weight(betas[1], step, scheduled_beta2)
    bias = 1 - betas[1] ** step if scheduled_bias is None else scheduled_bias
    new = update.square()
    if one_square is not None:
        second = one_square = lerp(one_square, new.sum(dtype=one_square.dtype) / count(new), weight)
    else:
        assert exp_avg_sq is not None
        new = (
            _block_means(new, exp_avg_sq) if isinstance(square, int) else mean_like(new, exp_avg_sq)
        )
        second = exp_avg_sq = lerp(exp_avg_sq, new, weight)
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, second * bias)
        second = max_exp_avg_sq / bias
    mean = exp_avg
    if not correct_bias:
        mean = mean * (1 - betas[0] ** step)
        # PaLM's schedule has no bias that was corrected
        corrected = scheduled_beta2 is None or scheduled_bias is not None
        second = second * bias if corrected else second
        bias = torch.ones_like(bias)
    deviation = root(second, eps, eps_placement, bias)
    if isinstance(square, int) and exp_avg_sq is not None:
        deviation = deviation.repeat_interleave(len(update) // len(deviation), 0)
    return mean / deviation, exp_avg, exp_avg_sq, max_exp_avg_sq, one_square


def _block_means(new: Tensor, blocks: Tensor) -> Tensor:
    """The mean of each of equal blocks of rows."""
    return new.reshape(len(blocks), -1).mean(1).reshape(blocks.shape)
