"""PaLM's schedule for beta2."""

from torch import Tensor

from heavyball.core.hyper import Live, open_fraction
from heavyball.core.transform import transform
from heavyball.numerics import debiased_weight


@transform(provides=("scheduled_beta2",), modifier=True, domains={"beta2_scale": open_fraction})
def palm_beta2(
    update: Tensor, *, step: Tensor, beta2_scale: Live = 0.8, debias: bool = False
) -> tuple[Tensor, Tensor]:
    """PaLM's schedule: increase the beta2 of later second moments over time.

    beta2_t = 1 - t^(-beta2_scale), instead of the transform's own beta2 and bias correction; since
    beta2_1 = 0, the average is already unbiased.

    debias: correct the bias anyway, as HeavyBall does, which gives new gradients more weight.

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311; the form is that of
        Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.
    """
    beta2 = 1 - step ** (-beta2_scale)
    return update, 1 - debiased_weight(beta2, step) if debias else beta2
