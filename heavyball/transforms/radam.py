"""RAdam: Adam that waits with its second moment until it is known well enough."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Interval, Live, fraction
from heavyball.core.transform import transform
from heavyball.numerics import ema, root, second_moment
from heavyball.state.declare import squares, zeros


def _rectifiable(options: Mapping[str, Any]) -> tuple[Interval, Interval]:
    """Betas for which rho_inf = 2 / (1 - beta2) - 1 is above the threshold."""
    return fraction, Interval(1 - 2 / (options["threshold"] + 1), 1, low_open=True)


@transform(exp_avg=zeros, exp_avg_sq=squares, domains={"betas": _rectifiable})
def scale_by_radam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    threshold: int = 5,
    silent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """RAdam: Adam rectified by the variance of its second moment; momentum while that is large.

    m, v as in `scale_by_adam`;  rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 t beta2^t / (1 - beta2^t);  where rho > threshold
    u = m sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)) / (sqrt(v) + eps'),
    eps' = eps / sqrt(1 - beta2^t);  else u = m, or 0 with `silent`

    threshold: 4 in the paper, 5 in torch.

    Shapes: all (*).
    Units: those of the gradient while rho is small (5 steps with beta2 = 0.999), then none.
    Errors: ValueError for a beta2 with which rho never exceeds the threshold.
    Source: Liu et al. 2019, Algorithm 2, https://arxiv.org/abs/1908.03265, in the form of
        torch.optim.RAdam; `silent` is that of schedule-free RAdam.
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, None)
    bias = 1 - betas[1] ** step
    limit = 2 / (1 - betas[1]) - 1
    rho = limit - 2 * step * betas[1] ** step / bias
    known = rho > threshold
    ratio = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    rectified = torch.where(known, ratio, 1.0).sqrt() * exp_avg
    rectified = rectified / root(exp_avg_sq, eps, "biased", bias)
    return torch.where(known, rectified, 0.0 if silent else exp_avg), exp_avg, exp_avg_sq
