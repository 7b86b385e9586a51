"""Momentum as torch.optim.SGD has it: a sum of past gradients, not their mean."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.state.declare import scalar, zeros


@transform(
    momentum_buffer=zeros.needs("momentum"), buffer_steps=scalar(0.0, low=0.0).needs("momentum")
)
def heavyball_momentum(
    update: Tensor,
    momentum_buffer: Tensor | None,
    buffer_steps: Tensor | None,
    *,
    lr: Tensor,
    momentum: Live = 0.9,
    dampening: Live = 0.0,
    lr_in_momentum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Momentum, as in Polyak's heavy ball method.

    b_1 = u_1;  b_t = momentum b_(t-1) + (1 - dampening) u_t;  u' = b

    While `momentum` is 0, the update passes unchanged and b does not change. If it has always been
    0, no b is stored, and b_1 is that of the first step in which it is nonzero.

    lr_in_momentum: b sums lr u instead of u, and u' = b / lr; equivalent while lr is constant.

    Shapes: all (*).
    Units: those of u, up to 1 / (1 - momentum) times larger.
    Source: Polyak 1964; torch.optim.SGD.
    """
    if momentum_buffer is None or buffer_steps is None:
        return update, momentum_buffer, buffer_steps
    off = momentum == 0
    if lr_in_momentum:
        update = lr * update
    weight = torch.where(buffer_steps == 0, 1.0, 1 - dampening)
    buffer = torch.where(off, momentum_buffer, momentum * momentum_buffer + weight * update)
    result = torch.where(off, update, buffer)
    if lr_in_momentum:  # at a rate of zero nothing moves
        result = torch.where(lr > 0, result / lr, 0.0)
    return (
        result,
        buffer,
        torch.where(off, buffer_steps, buffer_steps + 1),
    )


@transform(momentum_buffer=zeros.needs("momentum"))
def nesterov_momentum(
    update: Tensor, momentum_buffer: Tensor | None, *, momentum: Live = 0.9
) -> tuple[Tensor, Tensor | None]:
    """Nesterov momentum, in torch's form.

    b <- momentum b + u;  u' = u + momentum b

    Shapes: all (*).
    Units: those of u, up to 1 / (1 - momentum) times larger.
    Source: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html; torch.optim.SGD.
    """
    if momentum_buffer is None:
        return update, None
    buffer = torch.where(momentum == 0, momentum_buffer, momentum * momentum_buffer + update)
    return update + momentum * buffer, buffer
