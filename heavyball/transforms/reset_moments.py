"""A restart of all moments every so many steps."""

from torch import Tensor

from heavyball.core.hyper import positive
from heavyball.core.transform import transform


@transform(provides=("step",), modifier=True, domains={"every": positive})
def reset_moments(update: Tensor, *, step: Tensor, every: int = 500) -> tuple[Tensor, Tensor]:
    """Restart the step count of later elements periodically, which resets unbiased means.

    t' = (t - 1) mod every + 1;  u' = u

    Means that have weight 1 at t' = 1 restart there; means from zero and sums continue. The
    learning-rate warm-up of later elements restarts too.

    Shapes: all (*).
    Source: Huang et al. 2025, SPAM, https://arxiv.org/abs/2501.06842.
    """
    return update, (step - 1) % every + 1
