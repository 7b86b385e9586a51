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


MOVED = "what it changes is not the point from which the next step is taken"
AVERAGES = dict.fromkeys(("schedule_free", "primal_average", "momentum_sam", "ema_nesterov"), MOVED)
SPHERES = dict.fromkeys(
    ("hyperball", "spectral_sphere", "muown"), "both decide how large the weights are"
)


@transform(kind="post", excludes=AVERAGES | SPHERES)
def pin_radius(update: Tensor, *, old_param: Tensor, written: Tensor, lr: Tensor) -> Tensor:
    """Give the weights the norm that they would have by the step along them alone.

    rho = ||p|| - lr <u, p> / ||p||, with p and u of before the write;  behind it p <- p rho / ||p||

    What a step has across the weights lengthens them, however small it is; this takes it back. Weights
    of zero stay as they were written.

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
    """`cautious_decay` behind the write, and behind a pin that would take it back.

    p <- p (1 - lr wd) where u p >= 0, with p and u of before the write; an entry with u = 0 decays

    Shapes: all (*).
    Units: `weight_decay` is per unit of `lr` and step.
    Source: record 46 of modded-nanogpt's third track, which leaves out entries with u = 0.
    """
    agree = written.sign() * old_param.sign() >= 0
    return torch.where(agree, update * (1 - lr * weight_decay), update)
