"""Muon^2's step in front of the products: the momentum over the root mean square of the gradient."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import second_moment
from heavyball.state.declare import squares


@transform(exp_avg_sq=squares)
def scale_by_gradient_rms(
    update: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    grad: Tensor,
    scheduled_beta2: Tensor | None = None,
    beta2: Live = 0.95,
    eps: Live = 1e-10,
    correct_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Divide the update by the root of the running mean square of the gradient.

    v <- beta2 v + (1 - beta2) g^2, g the gradient the chain started from;  u' = u / (sqrt(v) + eps)

    Behind `muon_momentum` and before `orthogonalize` it is Muon^2. `scale_by_exp_avg_sq` there would
    square the momentum. correct_bias: v / (1 - beta2^t) in place of v.

    Shapes: all (*).
    Units: the result has none.
    Source: https://arxiv.org/abs/2604.09967; record 7 of modded-nanogpt's third track.
    """
    exp_avg_sq = second_moment(exp_avg_sq, grad, beta2, step, scheduled_beta2, correct_bias)
    return update / (exp_avg_sq.sqrt() + eps), exp_avg_sq
