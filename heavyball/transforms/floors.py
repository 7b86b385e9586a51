"""How long an update is beside the weights: a brake along them, a floor, and a fixed share."""

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import dot, norm


@transform()
def radial_brake(
    update: Tensor, *, param: Tensor, outward: Live = 0.5, inward: Live = 1.0
) -> Tensor:
    """Scale the part of the update along the weights, and more where the step would lengthen them.

    c = <u, p> / <p, p>;  u' = (u - c p) + k c p, k = outward if c < 0, else inward

    Shapes: all (*), the products over the whole tensor; weights of zero let u pass.
    Units: those of u.
    Source: record 46 of modded-nanogpt's third track.
    """
    square = dot(param, param)
    c = torch.where(square > 0, dot(update, param) / square, 0.0)
    keep = torch.where(c < 0, outward, inward)
    return update - (1 - keep) * c * param


@transform()
def update_floor(
    update: Tensor, *, param: Tensor, floor: Live = 0.35, rows: bool = False
) -> Tensor:
    """Lengthen an update that is shorter than a share of the weights.

    u' = u max(1, floor ||p|| / max(||u||, 1e-8))

    The relative step never falls below lr floor, which takes the place of a decay; with one the two work
    against each other.

    rows: with the norms of each row (all axes but the first) on its own.

    Shapes: all (*).
    Units: `floor` is the share of ||p|| per unit of lr.
    Source: records 9, 29 and 46 of modded-nanogpt's third track.
    """
    axes = tuple(range(1, update.ndim)) if rows else None
    if axes == ():
        size, wanted = update.abs(), param.abs()
    else:
        size, wanted = norm(update, axes), norm(param, axes)
    return update * (floor * wanted / size.clamp(min=1e-8)).clamp(min=1)


@transform()
def relative_update(update: Tensor, *, param: Tensor) -> Tensor:
    """Give the update the norm of the weights.

    u' = u ||p|| / ||u||; weights of zero stay

    Shapes: all (*), norms over the whole tensor.
    Units: lr is the share of ||p|| that a step has.
    Source: RelativeUpdateHook of NVIDIA's Emerging-Optimizers.
    """
    size = norm(update)
    # divided first: the quotient of the norms may be infinite where the update is not
    return update / torch.where(size > 0, size, 1.0) * norm(param)
