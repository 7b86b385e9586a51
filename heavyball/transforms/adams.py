"""AdamS: the momentum itself in place of the second moment."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import zeros


@transform(exp_avg=zeros)
def scale_by_adams(
    update: Tensor, exp_avg: Tensor, *, betas: Live = (0.9, 0.95), eps: Live = 1e-8
) -> tuple[Tensor, Tensor]:
    """Adam with one state: the momentum replaces the second moment of earlier gradients.

    v = beta2 m^2 + (1 - beta2) g^2, with the old m;  m <- beta1 m + (1 - beta1) g
    u = m / (sqrt(v) + eps); nothing is bias-corrected

    Shapes: all (*).
    Units: the result is dimensionless; the first is (1 - beta1) / sqrt(1 - beta2) in size.
    Source: Zhang et al. 2025, https://arxiv.org/abs/2505.16363. It is not the AdamS with stable decay of
        https://arxiv.org/abs/2011.11152.
    """
    square = betas[1] * exp_avg.square() + (1 - betas[1]) * update.square()
    exp_avg = lerp(exp_avg, update, 1 - betas[0])
    return exp_avg / (square.sqrt() + eps), exp_avg
