"""Lion: the sign of a mix of the gradient and its running mean."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import lerp
from heavyball.state.declare import zeros


@transform(exp_avg=zeros)
def scale_by_lion(
    update: Tensor, exp_avg: Tensor, *, betas: Live = (0.9, 0.99)
) -> tuple[Tensor, Tensor]:
    """Lion: the sign of a mix of gradient and momentum.

    u = sign(beta1 m + (1 - beta1) g);  then m <- beta2 m + (1 - beta2) g

    Shapes: all (*).
    Units: u is -1, 0 or 1, so `lr` is the size of every entry's step.
    Source: Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675.
    """
    direction = lerp(exp_avg, update, 1 - betas[0]).sign()
    return direction, lerp(exp_avg, update, 1 - betas[1])
