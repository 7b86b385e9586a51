"""Bounds on the size of a gradient or an update."""

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, nonnegative, positive
from heavyball.core.transform import transform
from heavyball.numerics import norm, rms


@transform(domains={"max_norm": positive})
def clip_by_norm(update: Tensor, *, max_norm: Live = 1.0) -> Tensor:
    """Clip the norm of each tensor at `max_norm`.

    u' = u min(1, max_norm / ||u||)

    Shapes: all (*), the norm over the whole tensor.
    """
    return update * (max_norm / norm(update)).clamp(max=1)


@transform(domains={"max_rms": positive})
def clip_by_rms(update: Tensor, *, max_rms: Live = 1.0) -> Tensor:
    """Clip the root mean square of each tensor at `max_rms`.

    u' = u min(1, max_rms / RMS(u))

    Shapes: all (*).
    """
    return update * (max_rms / rms(update)).clamp(max=1)


@transform()
def l2_normalize(update: Tensor) -> Tensor:
    """Give a tensor the norm 1.

    u' = u / max(||u||, 1e-8)

    Shapes: all (*).
    Source: what HeavyBall 1.0 calls l2_clip_.
    """
    return update / norm(update).clamp(min=1e-8)


@transform()
def rms_normalize(update: Tensor, *, eps: Live | None = None) -> Tensor:
    """Give a tensor the root mean square 1.

    u' = u / max(RMS(u), 1e-6), or with a number u / (RMS(u) + eps)

    Shapes: all (*).
    Source: what HeavyBall 1.0 calls rmsnorm_clip_; with eps Scion's BiasRMS,
        https://arxiv.org/abs/2502.07529.
    """
    if eps is None:
        return update / rms(update).clamp(min=1e-6)
    return update / (rms(update) + eps)


def _squared_norm(update: Tensor) -> Tensor:
    return norm(update).square()


@transform(over_all=_squared_norm, domains={"max_norm": positive, "eps": nonnegative})
def clip_by_global_norm(
    update: Tensor, *, total: Tensor, max_norm: Live = 1.0, eps: Fixed = 1e-6
) -> Tensor:
    """Clip the global norm of all updates at `max_norm`.

    u' = u min(1, max_norm / (N + eps)), N the norm of all updates as one vector

    Only parameters with a gradient in this step count.

    Shapes: all (*).
    Source: Pascanu, Mikolov and Bengio 2013, https://arxiv.org/abs/1211.5063; 1e-6 as in
        torch.nn.utils.clip_grad_norm_.
    """
    return update * (max_norm / (total.sqrt() + eps)).clamp(max=1)


@transform(domains={"clipping": positive, "min_norm": positive})
def adaptive_gradient_clip(
    update: Tensor,
    *,
    param: Tensor,
    clipping: Live = 0.01,
    min_norm: Live = 1e-3,
    unit_wise: bool = True,
) -> Tensor:
    """Clip the gradient relative to the norm of its weights.

    u' = u M / max(N(u), 1e-6) where N(u) > M, M = clipping max(N(p), min_norm)

    N is the norm of each output unit (over all axes but the first; the whole tensor for fewer than
    two dimensions), or with `unit_wise=False` always that of the whole tensor.

    Shapes: all (*), the output unit first, as in torch's layers.
    Source: Brock et al. 2021, equation 3, https://arxiv.org/abs/2102.06171.
    """
    axes = tuple(range(1, param.ndim)) if unit_wise and param.ndim > 1 else None
    bound, size = clipping * norm(param, axes).clamp(min=min_norm), norm(update, axes)
    return update * torch.where(size > bound, bound / size.clamp(min=1e-6), 1.0)
