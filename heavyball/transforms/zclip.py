"""ZClip: clip the global norm where it is an outlier."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction, positive
from heavyball.core.transform import transform
from heavyball.numerics import lerp, norm
from heavyball.state.declare import scalar


def _squared_norm(update: Tensor) -> Tensor:
    return norm(update).square()


@transform(
    norm_mean=scalar(0.0, low=0.0),
    norm_var=scalar(0.0, low=0.0),
    over_all=_squared_norm,
    domains={"z": positive, "alpha": fraction, "max_norm": positive, "warmup": positive},
)
def zclip(
    update: Tensor,
    norm_mean: Tensor,
    norm_var: Tensor,
    *,
    total: Tensor,
    step: Tensor,
    warmup: int = 25,
    z: Live = 2.5,
    alpha: Live = 0.97,
    max_norm: Live | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip the global norm of all updates if it is many standard deviations above its mean.

    n = norm of all updates as one vector; the first `warmup` steps give its mean and variance
    then s = (n - mean) / (std + 1e-6);  N = mean + z^2 std / s where s > z, else n
    mean <- alpha mean + (1 - alpha) N;  var <- alpha var + (1 - alpha) (N - mean)^2;  u' = u N / n

    max_norm: N is at most this, from the first step on.

    Shapes: all (*). Mean and variance are stored per parameter, so a parameter whose gradients start
        late has its own warm-up.
    Units: those of u.
    Source: Kumar et al. 2025, https://arxiv.org/abs/2504.02507.
    """
    size, early = total.sqrt(), step <= warmup
    deviation = norm_var.sqrt()
    score = (size - norm_mean) / (deviation + 1e-6)
    outlier = (score > z) & ~early
    target = torch.where(outlier, norm_mean + z * deviation / (score / z), size)
    if max_norm is not None:
        target = torch.minimum(target, max_norm)
    # of the first ones plain mean and variance, as running sums
    change = size - norm_mean
    mean = torch.where(early, norm_mean + change / step, lerp(norm_mean, target, 1 - alpha))
    first_var = ((step - 1) * norm_var + change * (size - mean)) / step
    later_var = lerp(norm_var, (target - mean).square(), 1 - alpha)
    var = torch.where(early, first_var, later_var).clamp(min=0)
    factor = torch.where(size > target, target / size, 1.0)
    return update * factor, mean, var
