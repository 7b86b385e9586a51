"""Generalized primal averaging: schedule-free with an exponential average."""

from typing import Literal

from torch import Tensor

from heavyball.core.hyper import Interval, Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import copy_of_param

SHARE = Interval(0, 1, low_open=True, high_open=False)


def averaged_iterate(param: Tensor, z: Tensor, *, mu_y: Tensor) -> Tensor:
    """x = y + (1 - 1 / mu_y) (z - y)."""
    return lerp(param, z, 1 - 1 / mu_y)


@transform(
    kind="writer",
    z=copy_of_param,
    domains={"mu_y": SHARE, "mu_x": SHARE},
    excludes={
        "parameter_ema": "both decide which weights are evaluated",
        "running_average": "both decide which weights are evaluated",
    },
    evaluate=averaged_iterate,
)
def primal_average(
    update: Tensor,
    z: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    decay_rate: Tensor | None = None,
    mu_y: Live = 0.7,
    mu_x: Live = 0.9967,
    decay_at: Literal["y", "z"] = "y",
) -> tuple[Tensor, Tensor]:
    """Step from z, average in x with a constant weight, and compute gradients at y, in between.

    z' = z - lr u;  y' = y + c (z - y) - lr (1 - mu_y (1 - c)) u, c = 1 - mu_x
    which keeps y = mu_y x + (1 - mu_y) z with x' = mu_x x + (1 - mu_x) z'

    The parameter holds y during training and x in evaluation mode.

    decay_at: "z" makes `decoupled` decay z, as in the paper, instead of y.

    Shapes: all (*).
    Units: `lr` as in the chain before. mu_x is per step: 0.9967 is a half-life of 210 steps. mu_y = 1
        with the rate lr / (1 - mu_x) is heavy ball, mu_y = mu_x Nesterov.
    Source: Defazio et al. 2025, https://arxiv.org/abs/2512.17131; gpa of facebookresearch/optimizers.
        There, a decay of z moves y by only c times its share, so x moves outward; here, all of
        it is part of the step.
    """
    if decay_at == "z" and decay_rate is not None:
        update = update + decay_rate * (z - param)
    share = 1 - mu_x
    change = share * (z - param) - lr * (1 - mu_y * mu_x) * update
    return param + change, z - lr * update
