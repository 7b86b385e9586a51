"""The spectral sphere: steps of unit spectral norm that keep the largest singular value of a matrix."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices, matrices_of, per_column, per_matrix
from heavyball.linalg.power import leading_triple
from heavyball.state.declare import State
from heavyball.transforms.hyperball import EXCLUDED
from heavyball.transforms.muon import needs_matrix, orthogonal, size_of

# Where the function of lambda jumps, the search ends at the jump after so many halvings at the most.
HALVINGS = 60


def _radius(param: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    if options["radius"] == "mup":
        return None
    view = matrices_of(param.shape, options)
    if param.is_meta:
        return param.new_zeros(view.number_shape)
    like = param.new_zeros(1, *view.number_shape)
    values = [torch.linalg.matrix_norm(x, 2)[..., None, None] for x in view.batches(param[None])]
    found = view.whole(values, like)[0]
    if not (found > 0).all():
        raise ValueError(
            f"spectral_sphere: a matrix of a parameter of shape {tuple(param.shape)} is all zero, so "
            "its norm cannot be kept: initialize it differently, or pass radius='mup'"
        )
    return found


@whole_transform(
    kind="writer",
    requires=needs_matrix,
    right=per_column("values", 1.0),
    multiplier=per_matrix("values").needs("solve"),
    target=State(_radius, "the first spectral norms, if radius='initial'"),
    domains={"scaler": positive, "power_iterations": positive, "steps": positive},
    host=("scaler",),
    excludes={k: v for k, v in EXCLUDED.items() if k != "spectral_sphere"}
    | {"hyperball": "both decide how large the weights are"},
)
def spectral_sphere(
    update: Tensor,
    right: Tensor,
    multiplier: Tensor | None,
    target: Tensor | None,
    *,
    param: Tensor,
    lr: Tensor,
    scaler: Live = 1.0,
    radius: Literal["mup", "initial"] = "mup",
    solve: bool = True,
    retract: Literal["after", "before"] = "after",
    method: Literal["polar_express", "svd"] = "polar_express",
    steps: int = 8,
    power_iterations: int = 20,
    tolerance: Fixed = 1e-6,
    stacked: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Take the steepest step of unit spectral norm that keeps the spectral norm to first order.

    R = scaler sqrt(rows / columns), or the first spectral norm;  p <- p R / sigma_1(p)
    (a, b) the leading singular vectors of p;  Theta = a b^T;  M = u / ||u||
    p <- p - lr R polar(M + k Theta) with <Theta, polar(M + k Theta)> = 0;  then p <- p R / sigma_1(p)
    if u = 0 the weights stay

    solve: False takes k = 0, MuonSphere: one polar factor per step, where the root takes about 15.
    retract: "before" omits the retraction after the step, as the authors do.
    method, steps: how polar factors are computed. power_iterations: starting from the previous vector.
    tolerance: how close to 0 the inner product must be.
    stacked, blocks, axis: as in `orthogonalize`.

    Use it after a momentum: `muon_momentum(momentum=0.9) | spectral_sphere`. A decay would be undone.

    Shapes: two or more dimensions, rows x columns as in `orthogonalize`.
    Units: lr is the step as a fraction of R, about 0.02.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: https://arxiv.org/abs/2601.08393, Algorithm 1. Departure: k is searched up to
        2 sqrt(min(rows, columns)); the authors' bracket is too short, and falls back silently to the
        old k.
    """
    view = matrices(update.shape[1:], stacked, blocks, axis)
    rate = _spread(lr, view.number_shape).to(param.dtype)
    nothing = rate.new_zeros(rate.shape)
    goal = nothing if target is None else target
    k = nothing if multiplier is None else multiplier
    polar = _polar(method, steps)

    def step(
        p: Tensor, b: Tensor, k: Tensor, u: Tensor, rate: Tensor, goal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = scaler * (p.shape[-2] / p.shape[-1]) ** 0.5 if target is None else goal
        sigma, a, b = leading_triple(p, b, power_iterations)
        x = torch.where(sigma > 0, p * (size / sigma), p)
        length = size_of(u)
        direction, theta = u / length.clamp(min=torch.finfo(u.dtype).tiny), a @ b
        if solve:
            k = _root(direction, theta, polar, tolerance)
            direction = direction + k * theta
        x = x - rate * size * polar(direction)
        if retract == "after":
            sigma, _, b = leading_triple(x, b, power_iterations)
            x = torch.where(sigma > 0, x * (size / sigma), x)
        return torch.where(length == 0, p, x), b, k

    new, right, k = view.map(step, param, right, k, more=(update, rate, goal))
    return new, right, None if multiplier is None else k, target


def _spread(lr: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A number per parameter as a number per matrix."""
    return lr.reshape(-1, *[1] * len(shape)).expand(-1, *shape)


def _polar(method: Any, steps: int) -> Callable[[Tensor], Tensor]:
    return lambda x: orthogonal(x, method, steps, 1e-20)


def _root(m: Tensor, theta: Tensor, polar: Callable[..., Tensor], tolerance: float) -> Tensor:
    """k with <Theta, polar(M + k Theta)> = 0, which grows with k; per matrix (n, 1, 1)."""

    def value(k: Tensor) -> Tensor:
        return (theta * polar(m + k * theta)).sum((-2, -1), keepdim=True)

    # the nuclear norm of M is at most sqrt(min(rows, columns)), and beyond twice that Theta decides
    far = 2 * min(m.shape[-2:]) ** 0.5
    high = m.new_full((len(m), 1, 1), far)
    low, k = -high, torch.zeros_like(high)
    at_low, at_high, now = value(low), value(high), value(k)
    for halving in range(HALVINGS):
        if m.device.type == "cpu" and bool((now.abs() <= tolerance).all()):
            break
        done, below = now.abs() <= tolerance, now < 0
        low, at_low = torch.where(below, k, low), torch.where(below, now, at_low)
        high, at_high = torch.where(below, high, k), torch.where(below, at_high, now)
        # the chord is faster where the function is smooth, the middle where it jumps
        middle = (low + high) / 2
        chord = low - at_low * (high - low) / (at_high - at_low).clamp(min=1e-30)
        smooth = halving < HALVINGS // 3 and halving % 3 < 2
        inside = (chord > low) & (chord < high) & smooth
        k = torch.where(done, k, torch.where(inside, chord, middle))
        now = value(k)
    return k
