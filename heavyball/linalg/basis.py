"""The bases of one parameter: which axes have one, when each is refreshed, and its states.

A parameter is cut into blocks (`view.py`), a block has a piece per axis: a tensor, or None for an axis
that is not rotated. Pieces stand in one flat tuple, block after block.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.errors import warn
from heavyball.linalg.eigenbasis import Refresh, carry, carry_square, refreshed, reorder
from heavyball.linalg.view import Merging, WorkingShape, working_shape

Pieces = tuple[Tensor | None, ...]
MergeDims = Literal[False, True, "left"]
Sides = Literal["all", "smaller", "larger"]

# A parameter whose factors need a larger share of the device's memory than this is warned about.
SHARE = 0.05
# Steps of these parts of a circle spread evenly over it, however many there are.
TURN, SMALL_TURN = 0.6180339887498949, 0.3819660112501051


def working_of(shape: tuple[int, ...], options: Mapping[str, Any]) -> WorkingShape:
    """The blocks in which a parameter of this shape is rotated."""
    merging: dict[Any, Merging] = {False: "none", True: "right", "left": "left"}
    limit = options["max_precond_dim"]
    blocks, axis = options.get("blocks"), options.get("axis", 0)
    merge = merging[options["merge_dims"]]
    return working_shape(tuple(shape), merge, limit, options["split"], blocks, axis)


def rotated_sizes(shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per piece the size of its axis, None where it is not rotated.

    Not rotated are axes longer than `max_precond_dim`, those of one element, vectors without
    `precondition_1d`, and all axes but the one that `sides` asks for.
    """
    vector = len(shape) < 2 and not options["precondition_1d"]
    return tuple(
        None if vector or size == 1 or size > options["max_precond_dim"] else size
        for block in working_of(shape, options).blocks
        for size in one_sided(block, options.get("sides", "all"))
    )


def one_sided(block: Sequence[int], sides: Sides) -> tuple[int, ...]:
    """The sizes of a block, 1 in place of those that are not of the side asked for.

    "smaller" is the shortest axis that is longer than 1, the first of several; "larger" the longest, the
    last of several.
    """
    if sides == "all" or len(block) < 2:
        return tuple(block)
    sizes = [(size == 1, size, axis) for axis, size in enumerate(block)]
    chosen = min(sizes)[2] if sides == "smaller" else max((n, axis) for _, n, axis in sizes)[1]
    return tuple(size if axis == chosen else 1 for axis, size in enumerate(block))


def zero_pieces(param: Tensor, options: Mapping[str, Any]) -> Pieces:
    """A zero matrix for every axis that is rotated; warns where they need much memory."""
    sizes = rotated_sizes(tuple(param.shape), options)
    if not param.is_meta:
        # two matrices per axis: the running mean, and its eigenvectors
        needed = 2 * param.element_size() * sum(n * n for n in sizes if n)
        _warn_of_memory(param, needed, max((n for n in sizes if n), default=0), options)
    return tuple(None if n is None else param.new_zeros(n, n) for n in sizes)


def identity_pieces(param: Tensor, options: Mapping[str, Any]) -> Pieces:
    """The identity for every axis that is rotated."""
    return tuple(
        None if n is None else torch.eye(n, dtype=param.dtype, device=param.device)
        for n in rotated_sizes(tuple(param.shape), options)
    )


def value_pieces(param: Tensor, options: Mapping[str, Any]) -> Pieces:
    """An eigenvalue for every direction of every axis that is rotated."""
    first = options["eigenvalue_init"]
    return tuple(
        None if n is None else param.new_full((n,), first)
        for n in rotated_sizes(tuple(param.shape), options)
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all, None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _warn_of_memory(param: Tensor, needed: int, longest: int, options: Mapping[str, Any]) -> None:
    available = device_memory(param.device)
    if available is None or needed <= SHARE * available:
        return
    how = "rotates it in blocks of that size" if options["split"] else "leaves it unrotated"
    warn(
        f"the bases of a parameter of shape {tuple(param.shape)} need {needed / 2**20:,.0f} MiB, over "
        f"{SHARE:.0%} of the memory of {param.device}; its longest rotated axis has {longest} "
        f"elements: a smaller max_precond_dim, such as {longest // 2}, {how}",
        UserWarning,
    )


def phase(place: int, piece: int) -> float:
    """When within an interval a piece of the parameter at this place is refreshed."""
    return (place * TURN + piece * SMALL_TURN) % 1


# ---- a refresh


def refresh_pieces(
    gram: Pieces,
    basis: Pieces,
    way: Refresh,
    rows_of: Callable[[int], Sequence[int]],
    sort: bool = True,
) -> tuple[Pieces, Pieces]:
    """New bases, and the order that each puts the old columns in, None where nothing was refreshed.

    rows_of: which of the parameters in the batch have their turn with this piece.
    """
    bases, orders = list(basis), [None] * len(basis)  # type: list[Tensor | None], list[Any]
    for piece, (factor, old) in enumerate(zip(gram, basis, strict=True)):
        rows = () if factor is None else rows_of(piece)
        if factor is None or old is None or not rows:
            continue
        if len(rows) == len(old):
            bases[piece], orders[piece] = refreshed(factor, old, way, sort)
            continue
        index = torch.tensor(rows, device=old.device)
        new, order = refreshed(factor[index], old[index], way, sort)
        bases[piece] = old.index_copy(0, index, new)
        stay = torch.arange(old.shape[-1], device=old.device).expand(old.shape[:2])
        orders[piece] = stay.index_copy(0, index, order)
    return tuple(bases), tuple(orders)


def by_block(working: WorkingShape, pieces: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The pieces of each block."""
    axes = len(working.merged)
    for start in range(0, len(pieces), axes):
        yield tuple(pieces[start : start + axes])


def each_block(
    working: WorkingShape, x: Tensor, fn: Callable[..., Tensor], *pieces: Sequence[Any]
) -> Tensor:
    """Assemble the results of `fn(block, its pieces, ...)` for every block of x (B, *shape)."""
    groups = zip(*(by_block(working, p) for p in pieces), strict=True)
    blocks = zip(working.blocks_of(x), groups, strict=True)
    return working.whole_of([fn(block, *group) for block, group in blocks])


def carried(
    working: WorkingShape, x: Tensor, old: Pieces, new: Pieces, orders: Pieces, square: str
) -> Tensor:
    """A state of the inner rule after a refresh.

    square: "" for a state like a first moment, which is carried exactly; "sort" or "rotate" for mean
        squares, which follow the order of the columns, or are rotated with squared overlaps.
    """
    if square == "sort":
        return each_block(working, x, reorder, orders)
    fn = carry_square if square == "rotate" else carry
    # an axis that was not refreshed is where it was
    touched = [
        [None if order is None else q for q, order in zip(bases, orders, strict=True)]
        for bases in (old, new)
    ]
    return each_block(working, x, fn, *touched)
