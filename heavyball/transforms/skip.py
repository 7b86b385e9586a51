"""Leave out a step whose gradients are not finite."""

import torch
from torch import Tensor

from heavyball.core.transform import transform
from heavyball.state.declare import scalar


def _count_nonfinite(update: Tensor, *, raw_grad: Tensor) -> Tensor:
    return (~torch.isfinite(raw_grad)).sum(dtype=torch.float64)


@transform(
    skipped=scalar(0.0, low=0.0),
    provides=("gate", "step"),
    over_all=_count_nonfinite,
    before_state="it must come first, or a bad gradient reaches that state",
)
def skip_not_finite(
    update: Tensor, skipped: Tensor, *, total: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Skip steps in which any gradient contains a NaN or an infinity.

    Parameters, the state of later elements and their step counts do not change. The decision is the same
    for all parameters and is made on the device. The state `skipped` counts the skipped steps.

    Shapes: all (*).
    """
    finite = total == 0
    skipped = skipped + (~finite).to(skipped.dtype)
    # at a skipped first step nothing uses the number, but zero would divide by zero
    return update, skipped, finite, (step - skipped).clamp(min=1)
