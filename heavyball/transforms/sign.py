"""The sign of the update."""

from torch import Tensor

from heavyball.core.transform import transform
from heavyball.numerics import norm


@transform()
def sign(update: Tensor, *, graft: bool = False) -> Tensor:
    """Replace every element with its sign.

    u' = sign(u);  graft: u' = sign(u) ||u|| / ||sign(u)||, which preserves the norm

    Shapes: all (*); `graft` takes norms over the whole tensor.
    Units: none; with `graft` those of u.
    Source: Bernstein et al. 2018, https://arxiv.org/abs/1802.04434. After `exp_avg` it is Signum.
    """
    signs = update.sign()
    if graft:
        signs = signs * (norm(update) / norm(signs).clamp(min=1))
    return signs
