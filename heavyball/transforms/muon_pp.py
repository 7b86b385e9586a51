"""The orthogonalized direction of prodigy-plus-schedule-free, and the size that it is divided by."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import matrices
from heavyball.numerics import lerp, rms, second_weight
from heavyball.state.declare import scalar
from heavyball.transforms.muon import needs_matrix, orthogonal

# The largest multiple of a first gradient that the transforms behind can square in float32.
LARGEST = 2.0**56


@whole_transform(requires=needs_matrix)
def adaptive_orthogonalize(update: Tensor, *, steps: int = 6, eps: Live = 1e-7) -> Tensor:
    """Orthogonalize a matrix, and shrink the result if the matrix itself is small.

    O = NS(u), as `orthogonalize` with "quintic";  u' = clamp(<u, O>, -1, 1) O

    Shapes: two or more dimensions; an n-d kernel is one matrix (size of axis 0, rest).
    Units: the result is dimensionless, but follows the gradient's size below a trace norm of 1.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: `use_muon_pp` of prodigy-plus-schedule-free 1.9.0; the factor is from
        https://github.com/leloykun/adaptive-muon. Products as by "auto" of `orthogonalize`.
    """

    def shrunk(x: Tensor) -> Tensor:
        result = orthogonal(x, "quintic", steps, eps)
        return result * (x * result).sum((-2, -1), keepdim=True).clamp(-1, 1)

    return matrices(update.shape[1:]).map(shrunk, update)


@transform(square=scalar(0.0, low=0.0))
def scale_by_tensor_rms(
    update: Tensor,
    square: Tensor,
    *,
    step: Tensor,
    unit_change: Tensor | None = None,
    beta2: Live = 0.99,
    eps: Live = 1e-8,
    correct_bias: bool = False,
    first_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Divide a tensor by its running root mean square, a single number.

    r <- beta2 r + (1 - beta2) max(RMS(u), 1e-8)^2;  u' = u / (sqrt(r) + eps)

    correct_bias: correct the bias of r. first_only: r stays that of the first step, and u' is
        limited to 2^56, so that its square is finite.

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: `use_muon_pp` of prodigy-plus-schedule-free 1.9.0, where r is rounded to bfloat16.
    """
    size = rms(update).clamp(min=1e-8).square()
    if first_only:
        square = torch.where(step == 1, size, square)
        # behind a first gradient of zero it would be out of the range that gradients are kept in
        return (update / (square.sqrt() + eps)).clamp(-LARGEST, LARGEST), square
    old = square if unit_change is None else square * unit_change**2
    square = lerp(old, size, second_weight(beta2, step, None, correct_bias))
    return update / (square.sqrt() + eps), square
