"""PSGD with a low-rank approximation: Q = (I + U V^T) diag(d) on the flattened parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.decisions import Decision, checked_probability, occasions
from heavyball.linalg.device_memory import warn_if_large
from heavyball.linalg.kron import usable
from heavyball.state.declare import State, scalar

CHOICE = 1  # the salts of random numbers
LEFT, RIGHT = 1, 2

# What is above is not of low rank: a fit takes the cube of it, and N times it in memory, twice.
LARGEST_RANK = 1024

Loads = tuple[Tensor, Tensor, Tensor]


def _thin(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    rank = min(options["rank"], param.numel())
    warn_if_large(
        "psgd_lra", param, 2 * rank * param.numel() * param.element_size(), "a lower rank"
    )
    return torch.zeros(param.numel(), rank, dtype=param.dtype, device=param.device)


def _diagonal(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    return torch.full(
        (param.numel(),), options["precond_init_scale"], dtype=param.dtype, device=param.device
    )


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    value = options["preconditioner_update_probability"]
    if value is not None and not callable(value):
        checked_probability(value, "preconditioner_update_probability")
    if not 1 <= options["rank"] <= LARGEST_RANK:
        raise ValueError(f"rank={options['rank']!r}: expected 1 to {LARGEST_RANK}")
    return None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Columns (batch, N, 1) to (batch, 1, 1), or (batch, N, r) and one column to (batch, r, 1)."""
    return x.mT @ y


def _solved(left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
    """(I + U V^T)^(-1) x, or with the transposed matrix, by way of r x r (Woodbury)."""
    if transpose:
        left, right = right, left
    rank = left.shape[-1]
    small = torch.eye(rank, dtype=x.dtype, device=x.device) + right.mT @ left
    # one that cannot be solved gives non-finite values, and these are never used
    return x - left @ torch.linalg.solve_ex(small, right.mT @ x).result


def _times_q(x: Tensor, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    x = diagonal * x
    return x + left @ _dot(right, x)


def _times_q_transposed(x: Tensor, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    return diagonal * (x + right @ _dot(left, x))


def _equal_sizes(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U and V with one Frobenius norm and the same U V^T."""
    tiny = torch.finfo(left.dtype).tiny
    sizes = [torch.linalg.matrix_norm(m, keepdim=True).clamp(min=tiny) for m in (left, right)]
    ratio = (sizes[1] / sizes[0]).sqrt()
    return left * ratio, right / ratio


def _load(old: Tensor, new: Tensor, beta: Tensor) -> Tensor:
    """A running maximum that forgets: never below the newest value."""
    old = old.to(new.dtype)
    return torch.maximum(old + (1 - beta) * (new - old), new)


def fitted(
    left: Tensor,
    right: Tensor,
    diagonal: Tensor,
    loads: Loads,
    seen: Tensor,
    noise: Tensor,
    *,
    lr: Tensor,
    beta: Tensor,
    turn_left: bool,
) -> tuple[Tensor, Tensor, Tensor, Loads]:
    """One step of U or V, and of d, for columns (batch, N, 1)."""
    tiny = torch.finfo(seen.dtype).tiny
    left, right = _equal_sizes(left, right)
    a = _times_q(seen, left, right, diagonal)
    b = _solved(left, right, noise / diagonal, True)
    grown = _times_q_transposed(a, left, right, diagonal) * seen
    shrunk = noise * _solved(left, right, b, False) / diagonal
    bound = grown.abs().amax(1, keepdim=True) + shrunk.abs().amax(1, keepdim=True)
    first = _load(loads[0], bound, beta)
    new_diagonal = diagonal - lr / first.clamp(min=tiny) * (grown - shrunk) * diagonal
    other = right if turn_left else left
    bound = sum(
        torch.linalg.vector_norm(x, dim=1, keepdim=True)
        * torch.linalg.vector_norm(other @ _dot(other, x), dim=1, keepdim=True)
        for x in (a, b)
    )
    place = 1 if turn_left else 2
    load = _load(loads[place], bound, beta)
    rate = lr / load.clamp(min=tiny)
    if turn_left:
        small = torch.eye(left.shape[-1], dtype=a.dtype, device=a.device) + right.mT @ left
        change = (a @ (_dot(a, right) @ small)) - b @ (_dot(b, right) @ small)
        left = left - rate * change
    else:
        change = (a + right @ _dot(left, a)) @ _dot(a, left)
        change = change - (b + right @ _dot(left, b)) @ _dot(b, left)
        right = right - rate * change
    kept = (first, load, loads[2]) if turn_left else (first, loads[1], load)
    return left, right, new_diagonal, kept


@whole_transform(
    requires=_problem,
    domains={"precond_lr": positive, "precond_init_scale": positive},
    left=State(_thin, "U, drawn at the first step"),
    right=State(_thin, "V, drawn at the first step"),
    diagonal=State(_diagonal, "d, initially precond_init_scale"),
    load=scalar(0.0, low=0.0),
    left_load=scalar(0.0, low=0.0),
    right_load=scalar(0.0, low=0.0),
)
def psgd_lra(
    update: Tensor,
    left: Tensor,
    right: Tensor,
    diagonal: Tensor,
    load: Tensor,
    left_load: Tensor,
    right_load: Tensor,
    *,
    grad: Tensor,
    count: int,
    noise: Any,
    chance: Any,
    precond_lr: Live = 0.1,
    beta_load: Live = 0.9,
    damping: Live = 1e-9,
    rank: int = 10,
    precond_init_scale: int | float = 1,
    preconditioner_update_probability: float | int | Callable[[int], float] | None = None,
    decision: Decision = "stochastic",
    momentum_into_precond_update: bool = True,
) -> tuple[Tensor, ...]:
    """Multiply by P = Q^T Q, Q = (I + U V^T) diag(d), fitted to make the flattened gradient white.

    u' = d (I + V U^T) (I + U V^T) (d u), U and V N x r, d N numbers

    and in some steps first, with v ~ N(0, I) and h = u + (damping + eps_machine |u|) v, U and V scaled
    to the same norm, a = Q h, b = Q^(-T) v:

    d <- d - precond_lr / L (P h h - v P^(-1) v) d
    U <- U - precond_lr / L' (a a^T - b b^T) V (I + V^T U), or, with probability 1/2,
    V <- V - precond_lr / L' (I + V U^T) (a a^T - b b^T) U

    L = max|P h h| + max|v P^(-1) v|, L' = ||a|| ||V V^T a|| + ||b|| ||V V^T b|| (U U^T for V), each as
    max(mean of the past with beta_load, newest).

    Shapes: all (*); every parameter has its own Q, of rank min(r, N). U and V are initialized with
        normals over sqrt(N (r + 10)).
    Units: the result is dimensionless; P is that of 1 / update.
    Source: Li 2022, https://arxiv.org/abs/2211.04422, and the LRA class of psgd_torch. Departure: one
        Q for each parameter instead of one for all.
    """
    x = update.flatten(1)[..., None]
    size, thin = x.shape[1], left.shape[-1]
    if count == 1:
        spread = (size * (thin + 10)) ** -0.5
        left = noise(left.shape, LEFT) * spread
        right = noise(right.shape, RIGHT) * spread
    column = diagonal[..., None]
    if occasions(preconditioner_update_probability, decision).at(count - 1, chance):
        seen = x if momentum_into_precond_update else grad.flatten(1)[..., None]
        draw = noise(x.shape)
        damped = seen + (damping + torch.finfo(x.dtype).eps * seen.abs()) * draw
        loads = tuple(v.reshape(-1, 1, 1) for v in (load, left_load, right_load))
        new = fitted(
            left,
            right,
            column,
            loads,  # type: ignore[arg-type]
            damped,
            draw,
            lr=precond_lr,
            beta=beta_load,
            turn_left=chance(CHOICE) < 0.5,
        )
        before = [left, right, column, *loads]
        now = [*new[:3], *(v.to(load.dtype) for v in new[3])]
        informative = seen.flatten(1).abs().amax(dim=1) > 0
        left, right, column, *parts = usable(now, before, informative)
        load, left_load, right_load = (
            v.reshape(o.shape) for v, o in zip(parts, (load, left_load, right_load), strict=True)
        )
    out = _times_q_transposed(_times_q(x, left, right, column), left, right, column)
    return out.reshape(update.shape), left, right, column[..., 0], load, left_load, right_load
