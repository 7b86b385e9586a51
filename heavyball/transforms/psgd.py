"""PSGD with Kronecker factors: fit Q to whiten the gradient, step along Q^T Q g."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg import kron, triangles
from heavyball.linalg.decisions import Decision, checked_probability, occasions
from heavyball.linalg.device_memory import warn_if_large
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.scratch import scratch
from heavyball.linalg.view import WorkingShape, working_shape
from heavyball.state.declare import State

# How often the factors are balanced, per fit.
BALANCING = 0.01
BALANCE, ROUND = (
    1,
    1 << 20,
)  # salts of random numbers; those of the noise are the numbers of the blocks

ADVICE = (
    "max_size_triangular (diagonal factors for longer axes), memory_save_mode='one_diag' or 'all_diag', "
    "or split=True (blocks of at most max_size_triangular) take less; so do store_triu_as_line=True "
    "and q_dtype='bfloat16', each by a half"
)


# The options that say how a tensor is seen.
LAYOUT = (
    *("max_size_triangular", "min_ndim_triangular", "memory_save_mode", "merge_dims", "split"),
    *("blocks", "axis"),
)


@dataclass(frozen=True)
class Layout:
    """Which blocks a tensor is cut into, and which axes of each have triangular factors."""

    view: WorkingShape
    triangular: tuple[tuple[bool, ...], ...]

    def per_block(self, values: Sequence[Tensor]) -> list[list[Tensor]]:
        """A flat sequence with one value for every axis of every block, block by block."""
        rest = iter(values)
        return [[next(rest) for _ in axes] for axes in self.triangular]


@functools.lru_cache(maxsize=4096)
def layout(
    shape: tuple[int, ...],
    max_size: int,
    min_ndim: int,
    mode: kron.MemorySaveMode,
    merge_dims: bool,
    split: bool,
    blocks: Any,
    axis: int,
) -> Layout:
    """How PSGD sees a tensor of this shape."""
    view = working_shape(shape, "two" if merge_dims else "none", max_size, split, blocks, axis)
    axes = tuple(kron.triangular_axes(block, max_size, min_ndim, mode) for block in view.blocks)
    return Layout(view, axes)


def layout_of(shape: Sequence[int], options: Mapping[str, Any]) -> Layout:
    """The layout under a transform's options."""
    return layout(tuple(shape), *(options[name] for name in LAYOUT))


def _dtype(param: Tensor, options: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if options["q_dtype"] == "bfloat16" else param.dtype


def numbers(shape: Sequence[int], options: Mapping[str, Any], line: bool) -> int:
    """How many numbers the factors of a tensor hold."""
    plan = layout_of(shape, options)
    return sum(
        n if not full else triangles.line_length(n) if line else n * n
        for block, axes in zip(plan.view.blocks, plan.triangular, strict=True)
        for n, full in zip(block, axes, strict=True)
    )


def _first_factors(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    count = numbers(param.shape, options, options["store_triu_as_line"])
    count += numbers(param.shape, options, False) if options["cached"] else 0
    warn_if_large("psgd_kron", param, count * _dtype(param, options).itemsize, ADVICE)
    return first_factors(param, options)


def first_factors(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """scale^(1/n) times the identity for each of the n axes of each block."""
    plan, dtype = layout_of(param.shape, options), _dtype(param, options)
    found = []
    for block, axes in zip(plan.view.blocks, plan.triangular, strict=True):
        scale = options["precond_init_scale"] ** (1 / len(block))
        for size, full in zip(block, axes, strict=True):
            like = torch.empty((), dtype=dtype, device=param.device)
            line = options["store_triu_as_line"]
            found.append(kron.identity(size, full, scale, like, line=line))
    return tuple(found)


def _first_squares(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    plan, dtype = layout_of(param.shape, options), _dtype(param, options)
    found = []
    for block, axes in zip(plan.view.blocks, plan.triangular, strict=True):
        scale = options["precond_init_scale"] ** (2 / len(block))
        for size, full in zip(block, axes, strict=True):
            like = torch.empty((), dtype=dtype, device=param.device)
            found.append(kron.identity(size, full, scale, like))
    return tuple(found)


def problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the options, or with a shape under them."""
    value = options["preconditioner_update_probability"]
    if value is not None and not callable(value):
        checked_probability(value, "preconditioner_update_probability")
    for name, least in (("max_size_triangular", 0), ("min_ndim_triangular", 0)):
        if options[name] < least:
            raise ValueError(f"{name}={options[name]!r}: expected at least {least}")
    try:
        layout_of(shape, options)
    except ValueError as error:
        return str(error)
    return None


def opened(factors: Sequence[Tensor], axes: Sequence[bool], line: bool) -> list[Tensor]:
    """The factors of a block as matrices and diagonals, good until the next ones are opened."""
    lines = [line and full for full in axes]
    sizes = [
        triangles.line_size(q.shape[-1]) for q, kept in zip(factors, lines, strict=True) if kept
    ]
    room = iter(scratch("opened", factors[0], *((len(factors[0]), n, n) for n in sizes)))
    return [
        triangles.from_line(q, next(room)) if kept else q
        for q, kept in zip(factors, lines, strict=True)
    ]


def closed(factors: Sequence[Tensor], axes: Sequence[bool], line: bool) -> list[Tensor]:
    """The factors of a block as they are kept."""
    return [
        triangles.to_line(q) if full and line else q for q, full in zip(factors, axes, strict=True)
    ]


@whole_transform(
    requires=problem,
    domains={"precond_lr": positive, "precond_init_scale": positive},
    factors=State(
        _first_factors, "the triangles or diagonals of Q_i, initially the identity", several=True
    ),
    squares=State(_first_squares, "Q_i^T Q_i", several=True).needs("cached"),
)
def psgd_kron(
    update: Tensor,
    factors: tuple[Tensor, ...],
    squares: tuple[Tensor, ...] | None,
    *,
    grad: Tensor,
    count: int,
    noise: Any,
    chance: Any,
    precond_lr: Live = 0.1,
    precond_init_scale: int | float = 1,
    preconditioner_update_probability: float | int | Callable[[int], float] | None = None,
    decision: Decision = "stochastic",
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: kron.MemorySaveMode = None,
    momentum_into_precond_update: bool = True,
    delayed: bool = False,
    cached: bool = False,
    store_triu_as_line: bool = True,
    q_dtype: Literal["float32", "bfloat16"] = "float32",
    merge_dims: bool = False,
    split: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Multiply by P = Q^T Q, where Q = Q_1 x ... x Q_n is fitted to make the gradient white.

    u' = u x_1 Q_1^T Q_1 ... x_n Q_n^T Q_n, one triangular or diagonal factor for every axis

    and in some steps first, with V ~ N(0, I), G = u + sqrt(2^-23) mean|u| V, A = G x_i Q_i,
    B = V x_i Q_i^(-T), T1 = A A^T and T2 = B B^T of the unfoldings along axis i:

    Q_i <- Q_i - precond_lr triu(T1 - T2) Q_i / bound of ||T1 + T2||   (elementwise for a diagonal)

    after balancing the factors (to one largest entry) with probability 0.01.

    preconditioner_update_probability: the probability of a fit, a function of the number of previous
        steps, or None for clamp(exp(-0.001 (n - 500)), 0.03, 1); `decision` determines the steps
        from it, see `heavyball.linalg.decisions.Occasions`. They are the same for all parameters
        with the same number of gradients.
    max_size_triangular, min_ndim_triangular, memory_save_mode: which factors are diagonal, see
        `heavyball.linalg.kron.triangular_axes`.
    momentum_into_precond_update: fit Q to the update that arrives here, else to the gradient.
    delayed: fit after computing the update, which then uses the factors of the previous step.
    cached: store Q_i^T Q_i, which halves the products in steps without a fit.
    store_triu_as_line: store only the triangle of a factor, half of the matrix.
    q_dtype: dtype of the stored factors; bfloat16 is rounded stochastically and computed in float32.
        "float32" is float64 for float64 parameters.
    merge_dims: view a tensor with more than two dimensions as a matrix, (all but the last, last) or
        (first, all but the first), whichever is more square.
    split: split axes longer than `max_size_triangular` into blocks with separate factors.
    blocks, axis: blocks of an axis with separate factors, as in `orthogonalize`.

    Shapes: all (*).
    Units: the result is dimensionless, its entries are about 1 in size; P is that of 1 / update.
    Errors: ValueError for blocks that do not add up, or of an axis that is merged with others.
    Source: Li 2015, https://arxiv.org/abs/1512.04202; the Kron optimizer of kron_torch 0.3.3.
        Departures: the noise never reaches the update; updates that are all zero and fits that are not
        finite do not change the factors.
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
    old = plan.per_block(factors)
    old_squares = plan.per_block(squares) if squares else [None] * len(inputs)
    outputs: list[Tensor] = []
    new: list[Tensor] = []
    new_squares: list[Tensor] = []
    for place, axes in enumerate(plan.triangular):
        x, stored, square = inputs[place], old[place], old_squares[place]
        q: list[Tensor] = []
        if fits or square is None:
            q = opened(stored, axes, store_triu_as_line)
        if delayed or not fits:
            outputs.append(_times_p(x, q, square))
        if fits:
            q = kron.balanced(q) if balances else q
            v = noise(x.shape, place)
            q = kron.fitted(q, targets[place], v, precond_lr, passing=store_triu_as_line)
            q = [rounded(f, q_dtype, noise, ROUND + len(new) + i) for i, f in enumerate(q)]
            stored = closed(q, axes, store_triu_as_line)
            square = [_nearest(s, q_dtype) for s in kron.squares(q)] if cached else None
            if not delayed:
                outputs.append(_times_p(x, q, square))
        new += stored
        new_squares += square or []
    return plan.view.whole_of(outputs), tuple(new), tuple(new_squares) if cached else None


def _times_p(x: Tensor, factors: Sequence[Tensor], squares: Sequence[Tensor] | None) -> Tensor:
    if squares is None:
        return kron.precondition(x, factors)
    return kron.precondition_with(x, squares)


def rounded(factor: Tensor, q_dtype: str, noise: Any, salt: int) -> Tensor:
    """A factor as it can be stored, without bias, so that small changes add up."""
    if q_dtype != "bfloat16":
        return factor
    bits = noise.bits(factor.shape, salt)
    return kron.rounded(factor, bits)


def _nearest(square: Tensor, q_dtype: str) -> Tensor:
    """What is kept of a square, so that this step uses what the next ones find."""
    return square if q_dtype != "bfloat16" else square.to(torch.bfloat16).to(square.dtype)
