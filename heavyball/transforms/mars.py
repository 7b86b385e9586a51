"""MARS: correct the gradient by its change since the step before."""

from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import norm
from heavyball.state.declare import zeros


@transform(last_grad=zeros.holding("values"), domains={"max_norm": positive})
def mars(
    update: Tensor,
    last_grad: Tensor,
    *,
    gamma: Live = 0.025,
    beta1: Live = 0.95,
    max_norm: Live | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Reduce the variance of the gradient.

    c = g_t + gamma beta1 / (1 - beta1) (g_t - g_(t-1)), g_0 = 0;  u = c min(1, max_norm / ||c||)

    `beta1` should be that of the first moment after it. `max_norm=None` does not clip.

    Shapes: all (*); the norm is over the tensor.
    Source: Yuan et al. 2024, Algorithm 1 (the approximate form), https://arxiv.org/abs/2411.10438,
        defaults of the authors' code. HeavyBall's option `mars` has gamma 0.0025 and no clip.
    """
    corrected = update + gamma * beta1 / (1 - beta1) * (update - last_grad)
    if max_norm is not None:
        # a zero norm gives infinity here, and the bound 1
        corrected = corrected * (max_norm / norm(corrected)).clamp(max=1)
    return corrected, update
