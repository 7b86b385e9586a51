"""Gradient centralization."""

from torch import Tensor

from heavyball.core.transform import transform


@transform()
def centralize(update: Tensor) -> Tensor:
    """Subtract the mean from the gradient of every output unit.

    u' = u - mean of u over all axes but the first, for two or more dimensions; else u' = u

    Shapes: all (*), the output unit first, as in torch's layers.
    Source: Yong et al. 2020, equation 1, https://arxiv.org/abs/2004.01461.
    """
    if update.ndim < 2:
        return update
    return update - update.mean(tuple(range(1, update.ndim)), keepdim=True)
