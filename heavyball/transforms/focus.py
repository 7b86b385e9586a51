"""FOCUS: signs of the momentum, and of the way back to the averaged weights."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import ema, lerp
from heavyball.state.declare import zeros

SIGNS = "focus replaces the preconditioner, and its update is made of signs"


@transform(
    exp_avg=zeros.needs("momentum"),
    param_avg=zeros.holding("weights"),
    provides=("decayed",),
    excludes={
        "factored_rms": "focus has no second moment that could be factored",
        "scale_by_adam_atan2": SIGNS,
        "muon": SIGNS,
    },
)
def focus(
    update: Tensor,
    exp_avg: Tensor | None,
    param_avg: Tensor,
    *,
    step: Tensor,
    param: Tensor,
    betas: Live = (0.9, 0.999),
    gamma: Live = 0.1,
    momentum: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Step by the sign of the momentum, with attraction to the averaged weights.

    m <- beta1 m + (1 - beta1) g;  q = unbiased mean of p_1..p_t with weights beta2^(t-i)
    u = sign(m) + gamma sign(p - q); a later `decoupled` decays q instead of p

    momentum: False uses the sign of g and stores no m.

    Shapes: all (*).
    Units: |u| <= 1 + gamma, so `lr` is the size of every entry's step.
    Source: Liu et al. 2025, Algorithm 1, https://arxiv.org/abs/2501.12243. Departure: the mean is
        unbiased by its weights, so that p - q is exactly 0 at t = 1; the authors divide by
        1 - beta2^t, which leaves a rounding error there, and its sign moves the weights.
    """
    exp_avg = None if exp_avg is None else lerp(exp_avg, update, 1 - betas[0])
    param_avg = ema(param_avg, param, betas[1], step)
    direction = update if exp_avg is None else exp_avg
    return direction.sign() + gamma * (param - param_avg).sign(), exp_avg, param_avg, param_avg
