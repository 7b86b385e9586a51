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
    """Change nothing in a step in which any gradient holds a NaN or an infinity.

    Parameters, the state of everything behind, and its count of steps stay as they were. The decision
    is one for all parameters and stays on the device. The state `skipped` counts the steps left out.

    Shapes: all (*).
    """
    finite = total == 0
    skipped = skipped + (~finite).to(skipped.dtype)
    # at a skipped first step nothing uses the number, but zero would divide by zero
    return update, skipped, finite, (step - skipped).clamp(min=1)
