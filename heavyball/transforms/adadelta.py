"""Adadelta: updates in the unit of the weights, by the ratio of two root mean squares."""

from torch import Tensor

from heavyball.core.hyper import Live, closed_fraction
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import squares


@transform(
    exp_avg_sq=squares,
    update_avg_sq=squares.holding("values"),
    domains={"rho": closed_fraction},
)
def scale_by_adadelta(
    update: Tensor, exp_avg_sq: Tensor, update_avg_sq: Tensor, *, rho: Live = 0.9, eps: Live = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the update by the running root mean square of previous updates.

    v <- rho v + (1 - rho) u^2;  u' = u sqrt(d + eps) / sqrt(v + eps)
    then d <- rho d + (1 - rho) u'^2

    eps is inside both roots, not squared, so it has the unit of a square.

    Shapes: all (*).
    Units: those of the weights, so `lr` is a factor near 1. The first updates are tiny:
        sqrt(eps / (1 - rho)) sign(u).
    Source: Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701; torch.optim.Adadelta.
    """
    exp_avg_sq = lerp(exp_avg_sq, update.square(), 1 - rho)
    update = (update_avg_sq + eps).sqrt() / (exp_avg_sq + eps).sqrt() * update
    return update, exp_avg_sq, lerp(update_avg_sq, update.square(), 1 - rho)
