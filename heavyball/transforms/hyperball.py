"""Hyperball: every matrix stays on the sphere of its first norm, and lr is the relative step."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.transform import Transform, transform
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices, matrices_of
from heavyball.numerics import norm
from heavyball.state.declare import State
from heavyball.transforms.muon import size_of, wrong_blocks

NO_DECAY = "on a sphere a decay only turns the step: leave it out"
EXCLUDED = {
    "decay": NO_DECAY,
    **dict.fromkeys(
        ("schedule_free", "muown", "pin_radius", "primal_average", "lookahead", "outer_nesterov"),
        "both decide how large the weights are",
    ),
}


def _first_norm(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    radius = options["radius"]
    if not isinstance(radius, str):
        found = torch.full((), radius, dtype=torch.float64, device=param.device)
    elif radius == "spectral" and param.numel() and not param.is_meta:
        found = torch.linalg.matrix_norm(param.flatten(1).double(), 2)
    else:
        found = norm(param)
    if param.numel() and not param.is_meta and not found > 0:
        raise ValueError(
            f"hyperball: a parameter of shape {tuple(param.shape)} is all zero, so its norm cannot be "
            "kept: initialize it differently, or pass a number as radius"
        )
    return found


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    radius = options["radius"]
    if not isinstance(radius, str) and not 0 < radius < float("inf"):
        raise ValueError(f"radius={radius!r}: expected 'initial', 'spectral', or a number above 0")
    if len(shape) < 2:
        return "needs two or more dimensions; route the parameter to another chain"
    return wrong_blocks(shape, options)


TARGET = State(_first_norm, "the norm of the first weights, or `radius`", is_number=True, low=0.0)


def _first_norms(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The same of every block."""
    view, radius = matrices_of(param.shape, options), options["radius"]
    found = param.new_zeros(1, *view.number_shape)
    if param.is_meta or not param.numel():
        return found[0]
    if not isinstance(radius, str):
        return found[0] + radius
    how = 2 if radius == "spectral" else "fro"
    values = [
        torch.linalg.matrix_norm(x, how, keepdim=True)  # type: ignore[call-overload]
        for x in view.batches(param[None])
    ]
    found = view.whole(values, found)[0]
    if not (found > 0).all():
        raise ValueError(
            f"hyperball: a block of a parameter of shape {tuple(param.shape)} is all zero, so its "
            "norm cannot be kept: initialize it differently, or pass a number as radius"
        )
    return found


def _on_spheres(
    update: Tensor,
    target_norm: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    radius: Literal["initial", "spectral"] | float = "initial",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """`hyperball` whose blocks have spheres of their own."""
    view = matrices(update.shape[1:], False, blocks, axis)
    rate = lr.reshape(-1, *[1] * len(view.number_shape)).expand(-1, *view.number_shape)

    def step(p: Tensor, u: Tensor, target: Tensor, rate: Tensor) -> Tensor:
        size = size_of(u)
        moved = p - rate * target * u / size.clamp(min=1e-12)
        now = torch.linalg.matrix_norm(moved, 2, keepdim=True) if spectral else size_of(moved)
        return torch.where(size == 0, p, moved * (target / now.clamp(min=1e-12)))

    spectral = radius == "spectral"
    given = update, target_norm, rate.to(param.dtype)
    return view.map(step, param, more=given), target_norm


def _on_spectral_sphere(
    update: Tensor, target_norm: Tensor, *, param: Tensor, lr: Tensor, radius: str = "spectral"
) -> tuple[Tensor, Tensor]:
    """`hyperball` with the spectral norm."""
    x, u = param.flatten(2), update.flatten(2)
    target, rate = target_norm.reshape(-1, 1, 1), lr.reshape(-1, 1, 1)
    size = size_of(u)
    moved = x - rate * target * u / size.clamp(min=1e-12)
    moved = moved * (target / torch.linalg.matrix_norm(moved, 2)[..., None, None].clamp(min=1e-12))
    return torch.where(size == 0, x, moved).to(param.dtype).reshape(param.shape), target_norm


DECLARED: dict[str, Any] = {"kind": "writer", "excludes": EXCLUDED, "requires": _problem}
# in a mapping, because a transform at the top of a module is found by its name
VARIANTS = {
    "spectral": whole_transform(target_norm=TARGET, **DECLARED)(_on_spectral_sphere),
    "blocks": whole_transform(
        target_norm=State(_first_norms, "the norms of the first blocks, or `radius`"), **DECLARED
    )(_on_spheres),
}


def _instead(options: Mapping[str, Any]) -> Transform | None:
    if options["blocks"] is not None:
        return VARIANTS["blocks"]
    return VARIANTS["spectral"] if options["radius"] == "spectral" else None


@transform(
    kind="writer",
    target_norm=TARGET,
    excludes=EXCLUDED,
    requires=_problem,
    instead=_instead,
)
def hyperball(
    update: Tensor,
    target_norm: Tensor,
    *,
    param: Tensor,
    lr: Tensor,
    radius: Literal["initial", "spectral"] | float = "initial",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Step by a fraction of the weights' initial norm, and rescale to that norm.

    R = ||p_1||;  p' = p - lr R u / ||u||;  p <- p' R / ||p'||; if u = 0 the weights stay

    radius: "initial" is R as above, a number is R itself, "spectral" takes the largest singular value
        in place of the norm of p.
    blocks, axis: as in `orthogonalize`; every block has its own sphere.

    The scale of u has no effect, and a decay would only rotate it, so the chain adds none.

    Shapes: two or more dimensions; norms over the whole tensor, or a block.
    Units: lr is the angle of a step, 0.005 to 0.02, and falls to 0 over the run.
    Errors: ValueError for fewer than two dimensions, and for weights that are initially all zero.
    Source: https://arxiv.org/abs/2606.16899, section 2. Departures: R is constant, while records of
        modded-nanogpt take the norm before each step; Emerging-Optimizers sets nearly zero values to
        zero.
    """
    size = norm(update)
    moved = param - lr * target_norm * update / size.clamp(min=1e-12)
    moved = moved * (target_norm / norm(moved).clamp(min=1e-12))
    return torch.where(size == 0, param, moved), target_norm
