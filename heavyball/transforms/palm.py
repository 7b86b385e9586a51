"""PaLM's schedule for beta2."""

from torch import Tensor

from heavyball.core.hyper import Live, open_fraction
from heavyball.core.transform import transform
from heavyball.numerics import debiased_weight


@transform(provides=("scheduled_beta2",), modifier=True, domains={"beta2_scale": open_fraction})
def palm_beta2(
    update: Tensor, *, step: Tensor, beta2_scale: Live = 0.8, debias: bool = False
) -> tuple[Tensor, Tensor]:
    """Let the memory of every second moment behind this element grow with time.

    beta2_t = 1 - t^(-beta2_scale), in place of the transform's own beta2 and of its bias correction:
    beta2_1 = 0, so the average is unbiased as it is.

    debias: correct it once more all the same, as HeavyBall does; new gradients weigh more then.

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311; the form is that of
        Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.
    """
    beta2 = 1 - step ** (-beta2_scale)
    return update, 1 - debiased_weight(beta2, step) if debias else beta2
