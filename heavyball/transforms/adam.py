"""Adam: divide the running mean of the gradient by its running root mean square."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, ema, root, second_moment
from heavyball.state.declare import squares, zeros


@transform(exp_avg=zeros, exp_avg_sq=squares, max_exp_avg_sq=squares.needs("amsgrad"))
def scale_by_adam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    eps_placement: EpsPlacement = "outside",
    amsgrad: bool = False,
    correct_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scale every element by its own gradient size.

    m_t = unbiased mean of g_1..g_t with weights beta1^(t-i);  v_t = the same of g^2 with beta2
    u = m / (sqrt(v) + eps)

    correct_bias: False leaves the averages as they are from zero: m (1 - beta1^t), v (1 - beta2^t).

    With `amsgrad`, v is the largest sum_i (1 - beta2) beta2^(s-i) g_i^2 of any step s so far, over
    the bias 1 - beta2^t, as in torch.

    Shapes: all (*).
    Units: the result has none, so `lr` is the size of a step in weight units; `eps` has the unit of
        the gradient.
    Source: Kingma and Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980. Departure: the bias
        correction is inside the means. `eps_placement` picks one of the published forms, see
        `heavyball.numerics.root`; "outside" is torch's.
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    bias = 1 - betas[1] ** step
    square = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = torch.maximum(max_exp_avg_sq, square * bias)
        square = max_exp_avg_sq / bias
    mean = exp_avg
    if not correct_bias:
        mean = mean * (1 - betas[0] ** step)
        # PaLM's schedule has no bias that was corrected
        square = square if scheduled_beta2 is not None else square * bias
        bias = torch.ones_like(bias)
    return mean / root(square, eps, eps_placement, bias), exp_avg, exp_avg_sq, max_exp_avg_sq
