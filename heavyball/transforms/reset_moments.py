"""A restart of all moments every so many steps."""

from torch import Tensor

from heavyball.core.hyper import positive
from heavyball.core.transform import transform


@transform(provides=("step",), modifier=True, domains={"every": positive})
def reset_moments(update: Tensor, *, step: Tensor, every: int = 500) -> tuple[Tensor, Tensor]:
    """Count the steps of everything behind from 1 again, so that its unbiased means forget.

    t' = (t - 1) mod every + 1;  u' = u

    A mean whose weight at t' = 1 is 1 begins anew there; plain means from zero and sums go on. The
    warm-up of the learning rate begins anew for what is behind.

    Shapes: all (*).
    Source: Huang et al. 2025, SPAM, https://arxiv.org/abs/2501.06842.
    """
    return update, (step - 1) % every + 1
