"""A global clip by the norm of the step before, which needs no other parameter's gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.rate import Member, rate
from heavyball.numerics import norm
from heavyball.transforms.prodigy import added_up, pools


def _renewed(members: Sequence[Member], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The norm of this step, for all groups; it stands still where nothing stepped."""
    new: list[dict[str, Any]] = [{} for _ in members]
    for pool in pools(members, False):
        (total,) = added_up(members, pool)
        size = total.sqrt()
        # a norm that is none would end the training
        kept = size.where(torch.isfinite(size), members[pool[0]].values["last_norm"])
        new = [{"last_norm": kept} for _ in members]
    return new


@rate(
    numbers={"last_norm": 0.0},
    gives=("square",),
    finish=_renewed,
    provides=(),
    shared=True,
    domains={"max_norm": positive},
)
def clip_by_last_norm(
    update: Tensor, *, last_norm: Tensor, max_norm: Live = 1.0
) -> tuple[Tensor, Tensor]:
    """Clip all gradients by their global norm in the previous step.

    N_t = norm of all gradients of step t as one vector, N_0 = 0
    u' = u min(1, max_norm / max(N_{t-1}, ||u||))

    Unlike clipping by N_t, it works when parameters are stepped one at a time (`fuse_backward`). For n
    tensors, each has ||u'|| <= max_norm, in the first step too, and all together have ||u'|| <=
    max_norm min(sqrt(n), N_t / max(N_{t-1}, max_norm)), which is max_norm while the norm stays above it
    and does not grow. Norms cover all groups and all parameters with a gradient; steps that `accumulate`
    skips do not count. It runs before every moment, wherever it is placed.

    Shapes: all (*), ||u|| over one tensor.
    Units: `max_norm` and the entry `last_norm` of the groups, which is N_{t-1}: those of u.
    """
    size = norm(update)
    factor = max_norm / torch.maximum(last_norm, size)
    return update * factor.clamp(max=1), size.square()
