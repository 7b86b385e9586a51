"""SOAP: an inner rule, Adam by default, in the eigenbasis of Shampoo's preconditioner."""

import functools
from typing import Any

import torch
from torch import Tensor

from heavyball import utils
from heavyball.core.combine import Within, as_chain
from heavyball.core.hyper import Live, fraction, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg import basis as pieces_of
from heavyball.linalg.basis import (
    MergeDims,
    Pieces,
    carried,
    each_block,
    refresh_pieces,
    working_of,
)
from heavyball.linalg.eigenbasis import Refresh, checked_refresh, eigenbasis
from heavyball.linalg.modes import rotate, update_gram
from heavyball.linalg.schedule import Schedule, as_schedule
from heavyball.linalg.view import WorkingShape
from heavyball.state.declare import State
from heavyball.transforms.adam import scale_by_adam


def _schedule(frequency: int, scheduler: Any) -> Schedule:
    # a user's schedule is given back as it is, and not kept when its optimizers are gone
    found = _of_numbers if scheduler is None or isinstance(scheduler, tuple) else as_schedule
    return found(frequency, scheduler)


_of_numbers = functools.lru_cache(maxsize=64)(as_schedule)


def _due(
    count: int, *, precondition_frequency: int, precond_scheduler: Any, spread_refreshes: bool
) -> bool:
    """Whether some basis may have to be refreshed. The first gradient is no step of the inner rule."""
    if spread_refreshes:
        return count > 1
    return _schedule(precondition_frequency, precond_scheduler).fires(count - 1)


def _turned(pieces: Pieces) -> Pieces:
    """Bases from what is kept of them, and back: eigenvectors as rows, which LAPACK writes."""
    return tuple(None if piece is None else piece.mT for piece in pieces)


def _refresh(
    gram: Pieces,
    basis: Pieces,
    *,
    vectors: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
    count: int,
    places: tuple[int, ...],
    precondition_frequency: int,
    precond_scheduler: Any,
    max_precond_dim: int,
    merge_dims: MergeDims,
    split: bool,
    zeroth_power_mode: Refresh,
    rotate_second_moment: bool,
    spread_refreshes: bool,
) -> tuple[Pieces, Pieces, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Refresh the bases whose turn it is, and carry the inner rule's moments over."""
    schedule = _schedule(precondition_frequency, precond_scheduler)

    def rows(piece: int) -> list[int]:
        phases = (pieces_of.phase(p, piece) if spread_refreshes else 0.0 for p in places)
        return [row for row, early in enumerate(phases) if schedule.fires(count - 1, early)]

    old = _turned(basis)
    new, orders = refresh_pieces(gram, old, zeroth_power_mode, rows)
    if all(order is None for order in orders):
        return gram, basis, vectors, squares
    options = {"max_precond_dim": max_precond_dim, "merge_dims": merge_dims, "split": split}
    moments = []
    square = "rotate" if rotate_second_moment else "sort"
    for states, way in ((vectors, ""), (squares, square)):
        working = [working_of(tuple(x.shape[1:]), options) for x in states]
        moments.append(
            tuple(
                carried(shape, x, old, new, orders, way)
                for shape, x in zip(working, states, strict=True)
            )
        )
    return gram, _turned(new), moments[0], moments[1]


@whole_transform(
    gram=State(pieces_of.zero_pieces, "a zero matrix per rotated axis of each block", several=True),
    basis=State(
        pieces_of.identity_pieces,
        "Q_i^T: the identity per rotated axis of each block",
        several=True,
    ),
    provides=("gate", "step"),
    opens_once=True,
    opaque=("bases", "working"),
    host=("shampoo_beta",),
    domains={
        "shampoo_beta": fraction,
        "precondition_frequency": positive,
        "max_precond_dim": positive,
    },
    requires=lambda shape, options: checked_refresh(options["zeroth_power_mode"]) and None,
    after=_refresh,
    due=_due,
)
def to_eigenbasis(
    update: Tensor,
    gram: Pieces,
    basis: Pieces,
    *,
    count: int,
    shampoo_beta: Live = 0.95,
    precondition_frequency: int = 10,
    precond_scheduler: tuple | Schedule | None = None,
    max_precond_dim: int = 10000,
    merge_dims: MergeDims = False,
    precondition_1d: bool = False,
    split: bool = False,
    zeroth_power_mode: Refresh = "qr",
    rotate_second_moment: bool = False,
    spread_refreshes: bool = False,
) -> tuple[Tensor, Pieces, Pieces, bool, int, Any, Any]:
    """Rotate the update into the eigenvectors of its running second moments along each axis.

    GG_i <- b GG_i + (1 - b) G_(i) G_(i)^T, b = shampoo_beta, G_(i) the unfolding along axis i
    t = 1: Q_i = eigenvectors of GG_i, by descending eigenvalue; nothing behind this element happens
    t > 1: u = G x_i Q_i^T; after the write, if it is time: Q_i <- orthogonal factor of GG_i Q_i

    Belongs between `soap_precond`'s parentheses: the chain behind it runs in the basis, its step counts
    from the second gradient, and its moments follow a refresh. First moments are carried into the new
    basis exactly; second ones follow the sorting of the columns by q^T GG q.

    precondition_frequency, precond_scheduler: refresh every so many steps, or by a
        `PrecondSchedule` (or its two numbers).
    max_precond_dim: longer axes are not rotated; with `split` they are cut into blocks of this size.
    merge_dims: True multiplies axes from the right, without the first, up to `max_precond_dim`; "left"
        from the left, as SOAP's authors do.
    precondition_1d: rotate vectors too.
    zeroth_power_mode: how a basis is refreshed, see `heavyball.linalg.eigenbasis.refreshed`.
    rotate_second_moment: rotate second moments with squared overlaps instead of sorting them.
    spread_refreshes: refresh the bases of different tensors at different steps of an interval, by
        their places in the optimizer, so that no step has all of the work.

    Shapes: all (*); tensors with no axis to rotate pass through.
    Source: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321, and the authors' code.
        Departure: a gradient with an entry that is not finite leaves GG's eigenvectors alone.
    """
    options = {"max_precond_dim": max_precond_dim, "merge_dims": merge_dims, "split": split}
    working = working_of(tuple(update.shape[1:]), options)
    gram = _averaged(working, update, gram, shampoo_beta)
    if count == 1:
        basis = tuple(None if factor is None else eigenbasis(factor) for factor in gram)
        return update, gram, _turned(basis), False, 0, None, None
    bases = _turned(basis)
    turned = each_block(working, update, rotate, bases)
    return turned, gram, basis, True, count - 1, bases, working


def _averaged(working: WorkingShape, update: Tensor, gram: Pieces, beta: float) -> Pieces:
    if all(factor is None for factor in gram):
        return gram
    axes = len(working.merged)
    blocks = working.blocks_of(_finite(update))
    # in the memory of the old ones: with new ones a step would copy more than it multiplies
    return tuple(
        None if factor is None else update_gram(blocks[place // axes], place % axes, factor, beta)
        for place, factor in enumerate(gram)
    )


def _finite(update: Tensor) -> Tensor:
    """Zeros for a tensor with an entry that is not finite: they do not change GG's eigenvectors."""
    if update.device.type == "cpu" and all(f(update).isfinite() for f in (torch.amax, torch.amin)):
        return update  # looking is a tenth of the work of choosing there
    largest = update.abs().amax(tuple(range(1, update.ndim)), keepdim=True)
    return torch.where(torch.isfinite(largest), update, 0.0)


@whole_transform
def from_eigenbasis(
    update: Tensor, *, bases: Any, working: Any, normalize_grads: bool = False
) -> Tensor:
    """Rotate the update back from the basis of `to_eigenbasis`.

    u' = u x_i Q_i;  with `normalize_grads` u' / (1e-30 + RMS(u'))

    Shapes: all (*).
    Source: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321.
    """
    back = functools.partial(rotate, back=True)
    update = each_block(working, update, back, bases)
    if normalize_grads:
        square = update.square().mean(tuple(range(1, update.ndim)), keepdim=True)
        update = update / (1e-30 + square.sqrt())
    return update


class Soap(Within):
    """`soap_precond`, printed as it is written."""

    def __repr__(self) -> str:
        chosen = {**self.enter.options, **self.enter.hyper, **self.leave.options}
        given = [n for n in chosen if n in self.enter.given | self.leave.given]
        inner = () if self.chain is ADAM else map(repr, self.chain)
        return f"{self.name}({', '.join([*inner, *(f'{n}={chosen[n]!r}' for n in given)])})"


# a tuple, because a transform at the top of a module is found by its name
ADAM = (scale_by_adam(betas=(0.95, 0.95), eps_placement="biased"),)


def soap_precond(*inner: Any, normalize_grads: bool = False, **options: Any) -> Within:
    """Run a chain, Adam by default, in the eigenbasis of Shampoo's preconditioner.

    `soap_precond()` is SOAP, `soap_precond(scale_by_laprop)` is LaProp in the eigenbasis. The options
    are those of `to_eigenbasis`, and `normalize_grads` of `from_eigenbasis`. `zeroth_power_mode` is
    `heavyball.utils.zeroth_power_mode` if it is not given.
    """
    if "zeroth_power_mode" in options:
        checked_refresh(options["zeroth_power_mode"])
    else:
        way = checked_refresh(utils.zeroth_power_mode, "heavyball.utils.zeroth_power_mode")
        options |= {"zeroth_power_mode": way} if way != "qr" else {}
    enter = to_eigenbasis(**options)
    # a schedule that cannot be is refused here rather than at the first step
    _schedule(enter.options["precondition_frequency"], enter.options["precond_scheduler"])
    leave = from_eigenbasis(normalize_grads=True) if normalize_grads else from_eigenbasis
    if len(inner) == 1 and isinstance(inner[0], tuple | list):
        inner = tuple(inner[0])
    chain = as_chain(inner, "soap_precond") if inner else ADAM
    return Soap("soap_precond", enter, chain, leave)
