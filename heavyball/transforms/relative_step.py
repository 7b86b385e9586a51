"""Adafactor's own schedule in place of a learning rate."""

from torch import Tensor

from heavyball.core.transform import transform


@transform(provides=("lr",), modifier=True)
def relative_step(
    update: Tensor, *, step: Tensor, warmup_init: bool = False
) -> tuple[Tensor, Tensor]:
    """Use the inverse square root of the step as the learning rate of later elements.

    lr' = min(1e-2, 1 / sqrt(t)), or with `warmup_init` min(1e-6 t, 1 / sqrt(t));  u' = u

    Shapes: all (*).
    Units: `lr` has no effect.
    Source: Shazeer and Stern 2018, section 9, https://arxiv.org/abs/1804.04235; `relative_step` of
        fairseq's and transformers' Adafactor.
    """
    first = 1e-6 * step if warmup_init else 1e-2
    return update, (1 / step.sqrt()).clamp(max=first)
