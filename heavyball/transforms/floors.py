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
    """Scale the radial part of the update, differently for steps that lengthen the weights.

    c = <u, p> / <p, p>;  u' = (u - c p) + k c p, k = outward if c < 0, else inward

    Shapes: all (*), the products over the whole tensor; zero weights let u pass.
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
    """Lengthen updates that are shorter than a fraction of the weights' norm.

    u' = u max(1, floor ||p|| / max(||u||, 1e-8))

    The relative step never falls below lr floor, which replaces a weight decay; together, the two work
    against each other.

    rows: apply it to each row (all axes but the first) separately.

    Shapes: all (*).
    Units: `floor` is a fraction of ||p|| per unit of lr.
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


MOVED = "what it changes is not the point from which the next step is taken"
AVERAGES = dict.fromkeys(("schedule_free", "primal_average", "momentum_sam", "ema_nesterov"), MOVED)
SPHERES = dict.fromkeys(
    ("hyperball", "spectral_sphere", "muown"), "both decide how large the weights are"
)


@transform(kind="post", excludes=AVERAGES | SPHERES)
def pin_radius(update: Tensor, *, old_param: Tensor, written: Tensor, lr: Tensor) -> Tensor:
    """Rescale the weights to the norm that the radial part of the step alone would give.

    rho = ||p|| - lr <u, p> / ||p||, with p and u before the write;  after it p <- p rho / ||p||

    The tangential part of a step lengthens the weights, however small it is; this undoes it. Zero
    weights stay as they were written.

    Shapes: all (*), norms over the whole tensor.
    Source: record 46 of modded-nanogpt's third track.
    """
    before, size = norm(old_param), norm(update)
    rho = before - lr * dot(written, old_param) / torch.where(before > 0, before, 1.0)
    pinned = torch.where((before > 0) & (size > 0), rho / torch.where(size > 0, size, 1.0), 1.0)
    return update * pinned


@transform(kind="post", excludes=AVERAGES)
def post_cautious_decay(
    update: Tensor, *, old_param: Tensor, written: Tensor, lr: Tensor, weight_decay: Live = 0.0
) -> Tensor:
    """`cautious_decay` after the write, and after `pin_radius`, which would undo it.

    p <- p (1 - lr wd) where u p >= 0, with p and u before the write; an entry with u = 0 decays

    Shapes: all (*).
    Units: `weight_decay` is per unit of `lr` and step.
    Source: record 46 of modded-nanogpt's third track, which skips entries with u = 0.
    """
    agree = written.sign() * old_param.sign() >= 0
    return torch.where(agree, update * (1 - lr * weight_decay), update)
