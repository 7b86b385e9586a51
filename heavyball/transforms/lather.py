"""LATHER: an inner rule, Adam by default, in the eigenbasis of PSGD's Kronecker factors."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.combine import Within, as_chain
from heavyball.core.hyper import Live, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg import kron, triangles
from heavyball.linalg.basis import Pieces, carried, each_block
from heavyball.linalg.decisions import Decision, occasions
from heavyball.linalg.device_memory import warn_if_large
from heavyball.linalg.eigenbasis import eigenbasis, followed
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.modes import rotate
from heavyball.linalg.scratch import scratch
from heavyball.state.declare import State
from heavyball.transforms.adam import scale_by_adam
from heavyball.transforms.psgd import (
    ADVICE,
    BALANCE,
    BALANCING,
    LAYOUT,
    ROUND,
    closed,
    first_factors,
    layout_of,
    numbers,
    opened,
    problem,
    rounded,
)
from heavyball.transforms.soap import from_eigenbasis, turned_pieces


def _first_factors(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    size = 2 if options["q_dtype"] == "bfloat16" else param.element_size()
    needed = size * numbers(param.shape, options, options["store_triu_as_line"])
    needed += param.element_size() * numbers(param.shape, options, False)
    warn_if_large("to_psgd_basis", param, needed, ADVICE)
    return first_factors(param, options)


def _first_basis(param: Tensor, options: Mapping[str, Any]) -> Pieces:
    """The identity for every axis with a triangular factor."""
    plan = layout_of(param.shape, options)
    return tuple(
        torch.eye(size, dtype=param.dtype, device=param.device) if full else None
        for block, axes in zip(plan.view.blocks, plan.triangular, strict=True)
        for size, full in zip(block, axes, strict=True)
    )


def _fits(count: int, chance: Callable[..., float], probability: Any, decision: Decision) -> bool:
    """Whether the factors are fitted to this gradient: always to the first, which does nothing else."""
    return occasions(probability, decision).at(count - 1, chance) or count == 1


def _new_bases(
    factors: tuple[Tensor, ...], old: Pieces, line: bool, of: Callable[[Tensor, Tensor], Tensor]
) -> Pieces:
    """What `of(factor, basis)` makes for every axis that has a basis."""
    new: list[Tensor | None] = []
    for stored, basis in zip(factors, old, strict=True):
        if basis is None:
            new.append(None)
            continue
        if line:
            (room,) = scratch("opened", stored, basis.shape)
            stored = triangles.from_line(stored, room)
        new.append(of(stored, basis))
    return tuple(new)


def _first(factor: Tensor, basis: Tensor) -> Tensor:
    # in the unit of the largest entry, since squares of 1e30 would not be finite
    scaled = factor / factor.abs().amax((-2, -1), keepdim=True)
    return eigenbasis(scaled.mT @ scaled, basis)


def _refresh(
    factors: tuple[Tensor, ...],
    basis: Pieces,
    *,
    vectors: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
    count: int,
    chance: Any,
    preconditioner_update_probability: Any,
    decision: Decision,
    max_size_triangular: int,
    min_ndim_triangular: int,
    memory_save_mode: kron.MemorySaveMode,
    store_triu_as_line: bool,
    merge_dims: bool,
    split: bool,
    blocks: Blocks,
    axis: int,
) -> tuple[tuple[Tensor, ...], Pieces, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Let the bases follow the factors, and carry the inner rule's first moments over."""
    if not _fits(count, chance, preconditioner_update_probability, decision):
        return factors, basis, vectors, squares
    values = max_size_triangular, min_ndim_triangular, memory_save_mode, merge_dims, split
    options = dict(zip(LAYOUT, (*values, blocks, axis), strict=True))
    old = turned_pieces(basis)
    new = _new_bases(factors, old, store_triu_as_line, followed)
    turned = tuple(
        carried(layout_of(x.shape[1:], options).view, x, old, new, new, "") for x in vectors
    )
    return factors, turned_pieces(new), turned, squares


@whole_transform(
    requires=problem,
    domains={"precond_lr": positive, "precond_init_scale": positive},
    factors=State(
        _first_factors, "the triangles or diagonals of Q_i, initially the identity", several=True
    ),
    basis=State(_first_basis, "B_i^T: the identity for every triangle", several=True),
    after=_refresh,
    due=lambda count: count > 1,
    provides=("gate", "step"),
    opens_once=True,
    opaque=("bases", "working", "passed"),
)
def to_psgd_basis(
    update: Tensor,
    factors: tuple[Tensor, ...],
    basis: Pieces,
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
    store_triu_as_line: bool = True,
    q_dtype: Literal["float32", "bfloat16"] = "float32",
    merge_dims: bool = False,
    split: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, tuple[Tensor, ...], Pieces, bool, int, Any, Any, Any]:
    """Rotate the update into the eigenvectors of Q_i^T Q_i, with the factors Q_i of `psgd_kron`.

    t = 1: Q_i is fitted to u, B_i = eigenvectors of Q_i^T Q_i, by descending eigenvalue; later elements
        do not run
    t > 1: u' = u x_i B_i^T, and, in the steps in which `psgd_kron` fits, Q_i is fitted to u; after the
        write B_i <- orthogonal factor of Q_i^T Q_i B_i, its columns b by descending ||Q_i b||, each
        with the sign of the old one in its position

    Use it through `lather_precond(...)`: the chain inside runs in the basis and counts steps from
    the second gradient. First moments are transferred to the new basis exactly; second moments keep
    their positions.

    The options are those of `psgd_kron`. Axes with a diagonal factor are not rotated.

    Shapes: all (*); tensors with no axis to rotate pass through.
    Errors: as `psgd_kron`.
    Source: LATHER of HeavyBall 3.2.1. Departures: the fit is that of `psgd_kron`, without a running
        bound over previous steps; the first gradient is always fitted.
    """
    values = max_size_triangular, min_ndim_triangular, memory_save_mode, merge_dims, split
    options = dict(zip(LAYOUT, (*values, blocks, axis), strict=True))
    plan = layout_of(update.shape[1:], options)
    fits = _fits(count, chance, preconditioner_update_probability, decision)
    if fits:
        balances = chance(BALANCE) < BALANCING
        targets = plan.view.blocks_of(update if momentum_into_precond_update else grad)
        new: list[Tensor] = []
        for place, (stored, axes) in enumerate(
            zip(plan.per_block(factors), plan.triangular, strict=True)
        ):
            q = opened(stored, axes, store_triu_as_line)
            q = kron.balanced(q) if balances else q
            v = noise(targets[place].shape, place)
            q = kron.fitted(q, targets[place], v, precond_lr, passing=store_triu_as_line)
            q = [rounded(f, q_dtype, noise, ROUND + len(new) + i) for i, f in enumerate(q)]
            new += closed(q, axes, store_triu_as_line)
        factors = tuple(new)
    bases = turned_pieces(basis)
    if count == 1:
        bases = _new_bases(factors, bases, store_triu_as_line, _first)
        return update, factors, turned_pieces(bases), False, 0, None, None, None
    turned = each_block(plan.view, update, rotate, bases)
    return turned, factors, basis, True, count - 1, bases, plan.view, None


class Lather(Within):
    """`lather_precond`, printed as it is written."""

    def __repr__(self) -> str:
        chosen = {**self.enter.options, **self.enter.hyper}
        given = [n for n in chosen if n in self.enter.given]
        inner = () if self.chain is ADAM else map(repr, self.chain)
        return f"{self.name}({', '.join([*inner, *(f'{n}={chosen[n]!r}' for n in given)])})"

    def __reduce__(self) -> tuple:
        chosen = {**self.enter.options, **self.enter.hyper}
        given = {n: value for n, value in chosen.items() if n in self.enter.given}
        return _lather, (() if self.chain is ADAM else self.chain, given)


# a tuple, because a transform at the top of a module is found by its name
ADAM = (scale_by_adam,)


def lather_precond(*inner: Any, **options: Any) -> Within:
    """Run a chain, Adam by default, in the eigenbasis of PSGD's Kronecker factors.

    `lather_precond()` is LATHER, `lather_precond(scale_by_laprop)` is LaProp in that basis. The options
    are those of `to_psgd_basis`.
    """
    return _lather(inner, options)


def _lather(inner: tuple[Any, ...], options: dict[str, Any]) -> Within:
    if len(inner) == 1 and isinstance(inner[0], tuple | list):
        inner = tuple(inner[0])
    chain = as_chain(inner, "lather_precond") if inner else ADAM
    return Lather("lather_precond", to_psgd_basis(**options), chain, from_eigenbasis)
