"""PSGD with square Kronecker factors, turned back to symmetric ones by a Procrustes step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg import kron
from heavyball.linalg.decisions import Decision, occasions
from heavyball.linalg.device_memory import warn_if_large
from heavyball.linalg.matrices import Blocks
from heavyball.state.declare import State
from heavyball.transforms.psgd import BALANCE, BALANCING, Layout, layout_of, problem

Method = Literal["procrustes", "quad"]
ADVICE = (
    "max_size_triangular (diagonal factors for longer axes), memory_save_mode='one_diag' or 'all_diag', "
    "or split=True (blocks of at most max_size_triangular) take less"
)


def _axes(plan: Layout) -> list[tuple[int, int, bool]]:
    """For every axis of every block its size, the number of axes, and whether its factor is full."""
    return [
        (size, len(block), full)
        for block, axes in zip(plan.view.blocks, plan.triangular, strict=True)
        for size, full in zip(block, axes, strict=True)
    ]


def _first_factors(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    axes = _axes(layout_of(param.shape, options))
    count = sum(size * size if full else size for size, _, full in axes)
    warn_if_large("psgd_pro", param, count * param.element_size(), ADVICE)
    scale = options["precond_init_scale"]
    return tuple(kron.identity(size, full, scale ** (1 / n), param) for size, n, full in axes)


def _first_loads(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    axes = _axes(layout_of(param.shape, options))
    return tuple(torch.zeros(1, dtype=param.dtype, device=param.device) for _ in axes)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def toward_symmetric(factor: Tensor) -> Tensor:
    """One step along the rotation that makes Q most symmetric: Q + a R Q + a^2 / 2 R^2 Q.

    R = (Q^T - Q) / bound of ||Q^T - Q||, and a <= 1/8 maximizes the trace of the result. To second
    order in a, a rotation of Q: Q^T Q changes by O(a^4).
    """
    turn = factor.mT - factor
    turn = turn / kron.norm_lower_bound(turn).clamp(min=torch.finfo(factor.dtype).tiny)
    once = turn @ factor
    twice = turn @ once
    curvature, slope = _trace(twice), _trace(once)
    # the trace of a parabola that opens downwards has its top at -slope / curvature
    top = -slope / torch.where(curvature < 0, curvature, -1)
    a = torch.where(curvature < 0, top.clamp(max=0.125), 0.125)
    return factor + a * once + 0.5 * a * a * twice


def fitted(
    factors: Sequence[Tensor],
    loads: Sequence[Tensor],
    x: Tensor,
    *,
    lr: Tensor,
    beta: Tensor,
    method: Method,
) -> tuple[list[Tensor], list[Tensor]]:
    """New factors and loads, one step nearer to whitening x (batch, s_1, ..., s_n)."""
    white = _times_p(x, factors)
    new, new_loads = [], []
    count = x[0].numel()
    for axis, (factor, load) in enumerate(zip(factors, loads, strict=True)):
        diagonal = factor.ndim == 2
        target = count / factor.shape[-1]
        grown = kron.gram(white, axis, diagonal)
        size = (
            grown.amax(dim=1, keepdim=True) if diagonal else kron.norm_lower_bound(grown).flatten(1)
        )
        newest = size + target
        load = torch.maximum(load + (1 - beta) * (newest - load), newest)
        rate = lr / load if diagonal else (lr / load)[..., None]
        if diagonal:
            step = (
                1 - rate / 2 * (grown - target) if method == "quad" else 1 - rate * (grown - target)
            )
            factor = factor * (step.square() if method == "quad" else step)
        elif method == "quad":
            factor = factor - rate / 2 * (grown @ factor - target * factor)
            factor = factor - rate / 2 * (factor @ grown - target * factor)
            factor = (factor + factor.mT) / 2
        else:
            factor = toward_symmetric(factor - rate * (grown @ factor - target * factor))
        new.append(factor)
        new_loads.append(load)
    return new, new_loads


def _times_p(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    squares = [q.square() if q.ndim == 2 else q.mT @ q for q in factors]
    return kron.precondition_with(x, squares)


@whole_transform(
    requires=problem,
    domains={"precond_lr": positive, "precond_init_scale": positive},
    factors=State(_first_factors, "Q_i, square or diagonal, initially the identity", several=True),
    loads=State(_first_loads, "L_i, a number for each axis", several=True),
)
def psgd_pro(
    update: Tensor,
    factors: tuple[Tensor, ...],
    loads: tuple[Tensor, ...],
    *,
    grad: Tensor,
    count: int,
    noise: Any,
    chance: Any,
    precond_lr: Live = 0.1,
    beta_load: Live = 0.9,
    damping: Live = 1e-9,
    precond_init_scale: int | float = 1,
    preconditioner_update_probability: float | int | Callable[[int], float] | None = None,
    decision: Decision = "stochastic",
    method: Method = "procrustes",
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: kron.MemorySaveMode = None,
    momentum_into_precond_update: bool = True,
    merge_dims: bool = False,
    split: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Multiply by P = Q^T Q with square factors, fitted without a linear solve.

    u' = u x_1 Q_1^T Q_1 ... x_n Q_n^T Q_n

    and in some steps first, with G = u + (damping + eps_machine |u|) V, V ~ N(0, I), T the Gram
    matrix of P G along axis i, c = numel / s_i and L = max(mean of the past with beta_load, bound of
    ||T|| + c):

    procrustes  Q_i <- Q_i - precond_lr / L (T - c) Q_i, then one step of a rotation that makes it
                more symmetric; a diagonal q_i <- q_i (1 - precond_lr / L (t - c))
    quad        half of that step from the left, half of it from the right, and (Q + Q^T) / 2;
                a diagonal q_i <- q_i (1 - precond_lr / 2L (t - c))^2

    Which factors are diagonal, which steps fit, balancing, `blocks` and `axis`: as in `psgd_kron`.

    Shapes: all (*).
    Units: the result is dimensionless; P is that of 1 / update.
    Errors: ValueError for blocks that do not add up, or of an axis that is merged with others.
    Source: the methods Q0.5EQ1.5 and QUAD of psgd_torch; Li 2015, https://arxiv.org/abs/1512.04202.
        Departure: the norm is bounded as in `psgd_kron`, not by a random subspace.
    """
    options = {
        "max_size_triangular": max_size_triangular,
        "min_ndim_triangular": min_ndim_triangular,
        "memory_save_mode": memory_save_mode,
        "merge_dims": merge_dims,
        "split": split,
        "blocks": blocks,
        "axis": axis,
    }
    plan = layout_of(update.shape[1:], options)
    fits = occasions(preconditioner_update_probability, decision).at(count - 1, chance)
    balances = fits and chance(BALANCE) < BALANCING
    inputs = plan.view.blocks_of(update)
    targets = inputs if momentum_into_precond_update else plan.view.blocks_of(grad)
    outputs, new, new_loads = [], [], []
    for place, (x, q, old_loads) in enumerate(
        zip(inputs, plan.per_block(factors), plan.per_block(loads), strict=True)
    ):
        if fits:
            seen = targets[place]
            eps = torch.finfo(seen.dtype).eps
            seen = seen + (damping + eps * seen.abs()) * noise(seen.shape, place)
            start = kron.balanced(q) if balances else q
            made, their_loads = fitted(
                start, old_loads, seen, lr=precond_lr, beta=beta_load, method=method
            )
            informative = targets[place].flatten(1).abs().amax(dim=1) > 0
            kept = kron.usable([*made, *their_loads], [*q, *old_loads], informative)
            q, old_loads = kept[: len(q)], kept[len(q) :]
        outputs.append(_times_p(x, q))
        new += q
        new_loads += old_loads
    return plan.view.whole_of(outputs), tuple(new), tuple(new_loads)
