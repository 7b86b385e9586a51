"""Update clipping by root mean square, in its two published forms."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.transform import transform
from heavyball.numerics import ema, rms, second_moment
from heavyball.state.declare import squares, zeros


@transform(exp_avg=zeros, exp_avg_sq=squares, provides=("lr",))
def stable_adamw(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.99),
    eps: Live = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam with a lower learning rate if the gradient is larger than its second moment.

    m, v, u as in `scale_by_adam`;  r = sqrt(mean(g^2 / max(v, eps^2)))
    the learning rate of later elements, decay included, is lr / max(1, r)

    Shapes: all (*); r is one number per tensor, of the gradient and the updated v.
    Units: the result is dimensionless.
    Source: Wortsman et al. 2023, Algorithm 2, https://arxiv.org/abs/2304.13013.
    """
    exp_avg = ema(exp_avg, update, betas[0], step)
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    deviation = exp_avg_sq.sqrt()
    surprise = rms(update / torch.maximum(deviation, eps))
    return exp_avg / (deviation + eps), exp_avg, exp_avg_sq, lr / surprise.clamp(min=1)


@transform(domains={"threshold": positive})
def clip_update_rms(
    update: Tensor, *, clip_threshold: Tensor | None = None, threshold: Live = 1.0
) -> Tensor:
    """Clip the root mean square of the update at `threshold`.

    u' = u / max(1, RMS(u) / threshold)

    With `prodigy_plus_d`, `threshold` is multiplied by 50 until d has moved.

    Shapes: all (*).
    Units: `threshold` has the unit of u; after a preconditioner it is about 1.
    Source: Shazeer and Stern 2018, section 6, https://arxiv.org/abs/1804.04235.
    """
    if clip_threshold is not None:
        threshold = threshold * clip_threshold
    return update / (rms(update) / threshold).clamp(min=1)
