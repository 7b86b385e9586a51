"""SOAP: an inner rule, Adam by default, in the eigenbasis of Shampoo's preconditioner."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball import utils
from heavyball.core.combine import Within, as_chain, leaves
from heavyball.core.hyper import Fixed, Live, fraction, is_sequence, positive
from heavyball.core.transform import Transform
from heavyball.core.whole import whole_transform
from heavyball.linalg import basis as pieces_of
from heavyball.linalg.basis import (
    MergeDims,
    Pieces,
    Sides,
    by_block,
    carried,
    each_block,
    refresh_pieces,
    working_of,
)
from heavyball.linalg.eigenbasis import Refresh, checked_refresh, eigenbasis, refreshed
from heavyball.linalg.kl import whitened_grams
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.modes import rotate, update_gram
from heavyball.linalg.schedule import Schedule, as_schedule
from heavyball.linalg.view import WorkingShape
from heavyball.state.declare import State
from heavyball.transforms.adam import scale_by_adam

First = Literal["skip", "pass", "sign"]


def _schedule(frequency: int, scheduler: Any) -> Schedule:
    # a user's schedule is given back as it is, and not kept when its optimizers are gone
    found = _of_numbers if scheduler is None or isinstance(scheduler, tuple) else as_schedule
    return found(frequency, scheduler)


_of_numbers = functools.lru_cache(maxsize=64)(as_schedule)


def _due(
    count: int,
    *,
    precondition_frequency: int,
    precond_scheduler: Any,
    spread_refreshes: bool,
    first: First = "skip",
    refresh: Literal["after", "before"] = "after",
) -> bool:
    """Whether some basis may have to be refreshed. The first gradient is no step of the inner rule."""
    if count == 1 and first != "skip":
        return True
    if refresh == "before":
        return False
    if spread_refreshes:
        return count > 1
    return _schedule(precondition_frequency, precond_scheduler).fires(count - 1)


def turned_pieces(pieces: Pieces) -> Pieces:
    """Bases from what is kept of them, and back: eigenvectors as rows, which LAPACK writes."""
    return tuple(None if piece is None else piece.mT for piece in pieces)


def _refresh(
    gram_: Pieces,
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
    blocks: Blocks,
    axis: int,
    first: First,
    gram: Literal["plain", "kl"],
) -> tuple[Pieces, Pieces, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Refresh the bases whose turn it is, and carry the inner rule's moments over."""
    if count == 1 and first != "skip":  # what passed by the inner rule has left nothing there
        none = [tuple(torch.zeros_like(x) for x in states) for states in (vectors, squares)]
        return gram_, basis, none[0], none[1]
    # eigenvalues that are kept stay with their columns, which are then not sorted
    schedule = _schedule(precondition_frequency, precond_scheduler)

    def rows(piece: int) -> list[int]:
        phases = (pieces_of.phase(p, piece) if spread_refreshes else 0.0 for p in places)
        return [row for row, early in enumerate(phases) if schedule.fires(count - 1, early)]

    old = turned_pieces(basis)
    new, orders = refresh_pieces(gram_, old, zeroth_power_mode, rows, gram == "plain")
    if all(order is None for order in orders):
        return gram_, basis, vectors, squares
    options: dict[str, Any] = {
        "max_precond_dim": max_precond_dim,
        "merge_dims": merge_dims,
        "split": split,
    }
    options |= {"blocks": blocks, "axis": axis}
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
    return gram_, turned_pieces(new), moments[0], moments[1]


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    checked_refresh(options["zeroth_power_mode"])
    for name, plain in (("gram_of", "update"), ("refresh", "after"), ("first", "skip")):
        if options["gram"] == "kl" and options[name] != plain:
            raise ValueError(f"{name}={options[name]!r} is not supported with gram='kl'")
    usual: tuple[tuple[str, Any], ...] = (("first", "skip"), ("spread_refreshes", False))
    for name, value in usual:
        if options["refresh"] == "before" and options[name] != value:
            raise ValueError(f"{name}={options[name]!r} has no effect with refresh='before'")
    try:
        working_of(tuple(shape), options)
    except ValueError as error:
        return str(error)
    return None


DECLARED: dict[str, Any] = {
    "provides": ("gate", "step"),
    "opens_once": True,
    "opaque": ("bases", "working", "passed"),
    "host": ("shampoo_beta",),
    "domains": {
        "shampoo_beta": fraction,
        "precondition_frequency": positive,
        "max_precond_dim": positive,
        "eigenvalue_init": positive,
    },
    "requires": _problem,
    "due": _due,
}
GRAM = State(pieces_of.zero_pieces, "a zero matrix per rotated axis of each block", several=True)
BASIS = State(
    pieces_of.identity_pieces, "Q_i^T: the identity per rotated axis of each block", several=True
)
VALUES = State(
    pieces_of.value_pieces, "an eigenvalue per column of each rotated axis", several=True
)


def _instead(options: Mapping[str, Any]) -> Transform | None:
    if options["gram"] == "kl":
        return VARIANTS["kl"]
    return VARIANTS["grad"] if options["gram_of"] == "grad" else None


@whole_transform(gram=GRAM, basis=BASIS, after=_refresh, instead=_instead, **DECLARED)
def to_eigenbasis(
    update: Tensor,
    gram_: Pieces,
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
    sides: Sides = "all",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
    first: First = "skip",
    refresh: Literal["after", "before"] = "after",
    gram: Literal["plain", "kl"] = "plain",
    gram_of: Literal["update", "grad"] = "update",
    eigenvalue_init: Fixed = 0.1,
) -> tuple[Tensor, Pieces, Pieces, bool, int, Any, Any, Any]:
    """Rotate the update into the eigenvectors of its running second moments along each axis.

    GG_i <- b GG_i + (1 - b) G_(i) G_(i)^T, b = shampoo_beta, G_(i) the unfolding along axis i
    t = 1: Q_i = eigenvectors of GG_i, by descending eigenvalue; later elements do not run
    t > 1: u = G x_i Q_i^T; after the write, when due: Q_i <- orthogonal factor of GG_i Q_i
    gram="kl": with D_i the products of the other axes' eigenvalues l and Y = G x_i Q_i^T
        GG_i <- b GG_i + (1 - b) Q_i Y_(i) D_i^-1 Y_(i)^T Q_i^T / n_i, n_i columns
        l_i <- b l_i + (1 - b) mean of Y^2 D_i^-1 over the other axes

    Use it through `soap_precond(...)`: the chain inside runs in the basis, counts steps from the second
    gradient, and its moments follow refreshes. First moments are transferred to the new basis exactly;
    second moments follow the sorting of the columns by q^T GG q.

    precondition_frequency, precond_scheduler: the interval between refreshes, or a `PrecondSchedule` (or
        its two numbers).
    max_precond_dim: longer axes are not rotated; with `split` they are split into blocks of this size.
    merge_dims: True merges axes from the right, except the first, up to `max_precond_dim`; "left" merges
        from the left, as SOAP's authors do.
    precondition_1d: rotate vectors too.
    zeroth_power_mode: how a basis is refreshed, see `heavyball.linalg.eigenbasis.refreshed`.
    rotate_second_moment: rotate second moments with squared overlaps instead of sorting them.
    spread_refreshes: refresh the bases of different tensors in different steps of an interval, depending
        on their positions in the optimizer, to spread the work.
    sides: "smaller" or "larger" rotates only the shortest or the longest axis.
    blocks, axis: blocks of an axis with separate bases, as in `orthogonalize`.
    first: what the first gradient does: "skip" nothing; "pass" and "sign" apply the update itself or its
        sign, without the chain in the basis.
    refresh: "before" refreshes a basis before it is used, so the first gradient also steps. Second
        moments stay with their columns; first moments are not supported in such a basis.
    gram: "kl" whitens the gradients of each GG_i by the other axes' eigenvalues l, which start at
        `eigenvalue_init` and are at least 1 / max(10, min(n, 4000))^2 for an axis of n.
    gram_of: "grad" computes GG_i from the gradient at the start of the chain.

    Shapes: all (*); tensors with no axis to rotate pass through.
    Errors: ValueError for blocks that do not add up, and options that exclude each other.
    Source: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321, and the authors' code; KL:
        https://arxiv.org/abs/2509.03378, whose authors store l as separate means.
        Departure: a gradient with an entry that is not finite does not change the eigenvectors of GG.
    """
    working = _view(update, max_precond_dim, merge_dims, split, blocks, axis)
    schedule = _schedule(precondition_frequency, precond_scheduler)
    way = zeroth_power_mode if refresh == "before" else None
    return _enter(update, update, gram_, basis, working, count, shampoo_beta, first, schedule, way)


def _of_grad(
    update: Tensor,
    gram_: Pieces,
    basis: Pieces,
    *,
    grad: Tensor,
    count: int,
    shampoo_beta: Live = 0.95,
    precondition_frequency: int = 10,
    precond_scheduler: tuple | Schedule | None = None,
    max_precond_dim: int = 10000,
    merge_dims: MergeDims = False,
    split: bool = False,
    zeroth_power_mode: Refresh = "qr",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
    first: First = "skip",
    refresh: Literal["after", "before"] = "after",
) -> tuple[Tensor, Pieces, Pieces, bool, int, Any, Any, Any]:
    """`to_eigenbasis` with gram_of="grad"."""
    working = _view(update, max_precond_dim, merge_dims, split, blocks, axis)
    schedule = _schedule(precondition_frequency, precond_scheduler)
    way = zeroth_power_mode if refresh == "before" else None
    return _enter(update, grad, gram_, basis, working, count, shampoo_beta, first, schedule, way)


def _of_kl(
    update: Tensor,
    gram_: Pieces,
    basis: Pieces,
    eigenvalues: Pieces,
    *,
    count: int,
    shampoo_beta: Live = 0.95,
    max_precond_dim: int = 10000,
    merge_dims: MergeDims = False,
    split: bool = False,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Pieces, Pieces, Pieces, bool, int, Any, Any, Any]:
    """`to_eigenbasis` with gram="kl"."""
    working = _view(update, max_precond_dim, merge_dims, split, blocks, axis)
    if count == 1:
        gram, basis = first_bases(working, update, gram_, shampoo_beta)
        return update, gram, basis, eigenvalues, False, 0, None, None, None
    bases = turned_pieces(basis)
    turned = each_block(working, update, rotate, bases)
    gram, values = kl_step(working, turned, gram_, bases, eigenvalues, shampoo_beta)
    return turned, gram, basis, values, True, count - 1, bases, working, None


def first_bases(
    working: WorkingShape, update: Tensor, gram: Pieces, beta: float
) -> tuple[Pieces, Pieces]:
    """The factors of a first gradient, over their columns, and their eigenvectors."""
    pieces = []
    for block, factors in zip(
        working.blocks_of(_finite(update)), by_block(working, gram), strict=True
    ):
        for k, factor in enumerate(factors):
            columns = max(1, block[0].numel() // max(1, block.shape[k + 1]))
            made = None if factor is None else update_gram(block / columns**0.5, k, factor, beta)
            pieces.append(made)
    return tuple(pieces), turned_pieces(tuple(None if f is None else eigenbasis(f) for f in pieces))


def kl_step(
    working: WorkingShape,
    turned: Tensor,
    gram: Pieces,
    bases: Pieces,
    values: Pieces,
    beta: float,
) -> tuple[Pieces, Pieces]:
    """One step of the factors and eigenvalues of every block."""
    grams: list[Any] = []
    new: list[Any] = []
    blocks = working.blocks_of(_finite(turned))
    groups = zip(*(by_block(working, x) for x in (gram, bases, values)), strict=True)
    for block, pieces in zip(blocks, groups, strict=True):
        made, kept = whitened_grams(block, pieces[0], pieces[1], pieces[2], beta)
        grams += made
        new += kept
    return tuple(grams), tuple(new)


def _refresh_kl(
    gram_: Pieces,
    basis: Pieces,
    eigenvalues: Pieces,
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
    blocks: Blocks,
    axis: int,
) -> tuple[Pieces, Pieces, Pieces, tuple[Tensor, ...], tuple[Tensor, ...]]:
    gram, basis, vectors, squares = _refresh(
        gram_,
        basis,
        vectors=vectors,
        squares=squares,
        count=count,
        places=places,
        precondition_frequency=precondition_frequency,
        precond_scheduler=precond_scheduler,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        split=split,
        zeroth_power_mode=zeroth_power_mode,
        rotate_second_moment=rotate_second_moment,
        spread_refreshes=spread_refreshes,
        blocks=blocks,
        axis=axis,
        first="skip",
        gram="kl",
    )
    return gram, basis, eigenvalues, vectors, squares


# in a mapping, because a transform at the top of a module is found by its name
VARIANTS = {
    "grad": whole_transform(gram=GRAM, basis=BASIS, after=_refresh, **DECLARED)(_of_grad),
    "kl": whole_transform(
        gram=GRAM, basis=BASIS, eigenvalues=VALUES, after=_refresh_kl, **DECLARED
    )(_of_kl),
}


def _view(
    update: Tensor,
    limit: int,
    merge_dims: MergeDims,
    split: bool,
    blocks: Blocks,
    axis: int,
) -> WorkingShape:
    options = {"max_precond_dim": limit, "merge_dims": merge_dims, "split": split}
    return working_of(tuple(update.shape[1:]), options | {"blocks": blocks, "axis": axis})


def _enter(
    update: Tensor,
    seen: Tensor,
    gram: Pieces,
    basis: Pieces,
    working: WorkingShape,
    count: int,
    beta: float,
    first: First,
    schedule: Schedule,
    way: Refresh | None,
) -> tuple[Tensor, Pieces, Pieces, bool, int, Any, Any, Any]:
    """A step of `to_eigenbasis`. way: how bases are renewed before they are used; None: they are not."""
    now = way if count > 1 and schedule.fires(count - 1) else None
    # the order in which the columns would stand, had they been sorted by the last step
    orders = [_order(g, q) for g, q in zip(gram, basis, strict=True)] if now else []
    gram = _averaged(working, seen, gram, beta)
    if count == 1:
        basis = turned_pieces(tuple(None if f is None else eigenbasis(f) for f in gram))
        if way is None:
            passed = {"skip": None, "pass": update, "sign": update.sign()}[first]
            opens = passed is not None
            return update, gram, basis, opens, int(opens), None, working if opens else None, passed
    elif now:
        basis = tuple(
            None if f is None or q is None else _renewed(f, q, order, now)
            for f, q, order in zip(gram, basis, orders, strict=True)
        )
    bases = turned_pieces(basis)
    turned = each_block(working, update, rotate, bases)
    return turned, gram, basis, True, count - (way is None), bases, working, None


def _order(gram: Tensor | None, basis: Tensor | None) -> Tensor | None:
    if gram is None or basis is None:
        return None
    return ((basis @ gram) * basis).sum(-1).argsort(dim=-1, descending=True, stable=True)


def _renewed(gram: Tensor, basis: Tensor, order: Tensor | None, way: Refresh) -> Tensor:
    """A basis (as rows) renewed in an order of its columns, and put back where they were.

    The means in the basis stay with their columns, as if both had been sorted.
    """
    assert order is not None
    index = order[..., None].expand_as(basis)
    new, _ = refreshed(gram, basis.gather(1, index).mT, way, False)
    return torch.empty_like(basis).scatter_(1, index, new.mT)


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
    update: Tensor, *, bases: Any, working: Any, passed: Any, normalize_grads: bool = False
) -> Tensor:
    """Rotate the update back from the basis of `to_eigenbasis`.

    u' = u x_i Q_i;  with `normalize_grads` u' / (1e-30 + RMS(u'))

    Shapes: all (*).
    Source: Vyas et al. 2024, Algorithm 3, https://arxiv.org/abs/2409.11321.
    """
    if passed is not None:
        return passed
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

    `soap_precond()` is SOAP, `soap_precond(scale_by_laprop)` is LaProp in the eigenbasis. It takes the
    options of `to_eigenbasis`, and `normalize_grads` of `from_eigenbasis`. `zeroth_power_mode`
    defaults to `heavyball.utils.zeroth_power_mode`.
    """
    if "zeroth_power_mode" in options:
        checked_refresh(options["zeroth_power_mode"])
    else:
        way = checked_refresh(utils.zeroth_power_mode, "heavyball.utils.zeroth_power_mode")
        options |= {"zeroth_power_mode": way} if way != "qr" else {}
    enter = to_eigenbasis(**options)
    # an invalid schedule raises here rather than at the first step
    _schedule(enter.options["precondition_frequency"], enter.options["precond_scheduler"])
    leave = from_eigenbasis(normalize_grads=True) if normalize_grads else from_eigenbasis
    if len(inner) == 1 and is_sequence(inner[0]):
        inner = tuple(inner[0])
    chain = as_chain(inner, "soap_precond") if inner else ADAM
    if enter.options["refresh"] == "before":
        for t in leaves(chain):
            held = (s for s in t.all_states.values() if t.options.get(s.needed_by or "", True))
            if any(state.holds == "moment" for state in held):
                raise ValueError(
                    f"soap_precond: {t.name} has a first moment, which refresh='before' would leave "
                    "in the old basis; put the momentum before soap_precond"
                )
    return Soap("soap_precond", enter, chain, leave)
