"""The state of a parameter in parts: who holds what, how it begins, how it is saved and loaded."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from heavyball.core.program import Program
from heavyball.distributed.exchange import Move, moved
from heavyball.distributed.shard import (
    Layout,
    as_dtensor,
    gathered,
    inside,
    like_state,
    local,
    placed,
    replicated,
    spread,
)
from heavyball.numerics import working
from heavyball.runtime.state import value_shape
from heavyball.state import four_bit
from heavyball.state.held import (
    COMPANIONS,
    SCALE,
    fault,
    held,
    is_companion,
    is_packed,
    main_of,
    recode,
)
from heavyball.state.held import layout as dtypes_of
from heavyball.state.packing import BLOCK

if TYPE_CHECKING:
    from heavyball.distributed.parts import Part

WEIGHTS = "train_param"


def slices_of(program: Program) -> dict[str, int]:
    """The states with an entry for every k-th element, and k, where that is more than 1."""
    return {
        node.state_key(name): node.transform.options[declared.slice_by]
        for node, name, declared in program.states
        if declared.slice_by is not None and node.transform.options[declared.slice_by] > 1
    }


@dataclass(frozen=True, eq=False)
class Kept:
    """How a state of a parameter is kept.

    of: the parameter's shape. shape, dtype: those of the whole state. layout: where its parts are.
    at_owner: whether it is whole at the parameter's owner and nowhere else. aligned: whether it has the
    parameter's placements. values: the shape of the whole's values where tensors of other shapes hold
    them.
    """

    of: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    at_owner: bool
    is_number: bool
    aligned: bool = False
    values: tuple[int, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of what is here."""
        return () if self.is_number else self.layout.mine[1]


def kept_states(
    program: Program,
    layout: Layout,
    expected: Mapping[str, Tensor],
    owns: Callable[[str], bool],
    owner: int,
    dtype: torch.dtype,
) -> dict[str, Kept] | None:
    """How each state is kept; None where the shards cannot have it, so that an owner must have it all.

    expected: the state of the whole tensor. dtype: the parameter's.
    """
    found: dict[str, Kept] = {}
    weights = torch.empty(layout.shape, device="meta")
    for key, tensor in {**expected, WEIGHTS: weights}.items():
        shape = tuple(tensor.shape)
        kind = layout.shape, shape, tensor.dtype
        number, values = key in program.numbers, None
        if is_packed(expected, key):
            values = tuple(value_shape(program, key, weights.to(dtype)))
        if owns(key):
            place, aligned = None, False
        elif is_packed(expected, main_of(key)):
            place, aligned = _packed_place(program, layout, key, expected, dtype), False
        else:
            place, aligned = _place(program, layout, key, shape)
        if place is not None:
            found[key] = Kept(*kind, place, False, number, aligned, values)
        elif owns(key) or layout.group.size == 1:
            there = replicated(shape, layout.group).at(owner)
            found[key] = Kept(*kind, there, True, number, False, values)
        else:
            return None
    return found


def _packed_place(
    program: Program, layout: Layout, key: str, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> Layout | None:
    """Where the parts of a packed state are: those of whole blocks of codes; None if it has none."""
    main, like = main_of(key), torch.empty(layout.shape, dtype=dtype, device="meta")
    of_param = tuple(value_shape(program, main, like)) == layout.shape
    if main + SCALE not in expected or not of_param or layout.cuts_blocks(four_bit.BLOCK):
        return None
    return layout.flat(four_bit.BLOCK if key.endswith(SCALE) else 2)


def _place(
    program: Program, layout: Layout, key: str, shape: tuple[int, ...]
) -> tuple[Layout | None, bool]:
    """Where the parts of a state are, and whether that is as the parameter's; None if it has none."""
    if key in program.numbers:
        return layout.along(()), False
    if key.endswith(SCALE):
        return (None if layout.cuts_blocks(BLOCK) else layout.flat(BLOCK)), False
    k = slices_of(program).get(main_of(key))
    if k is not None:
        return layout.flat(k), False
    if len(shape) != len(layout.shape):
        return None, False
    pairs = list(zip(shape, layout.shape, strict=True))
    if any(n not in (1, whole) for n, whole in pairs):
        return None, False
    return layout.along(axis for axis, (n, whole) in enumerate(pairs) if n == whole), True


# ---- how it begins


class Beginning:
    """Makes what a parameter's state lacks of what this process shall hold.

    here: the shard. whole: the whole tensor, where this process owns it. first: of a state with an entry
    for every k-th element, which element here is the first, by k.
    """

    def __init__(
        self, program: Program, here: Tensor, whole: Tensor | None, first: Callable[[int], int]
    ):
        self._program, self._here, self._whole, self._first = program, here, whole, first
        self._several: dict[str, Any] = {}

    def add(self, state: dict[str, Tensor], kept: Mapping[str, Kept]) -> None:
        """Create what is missing in a state."""
        for key, where in kept.items():
            if key in state or key == WEIGHTS or (where.at_owner and self._whole is None):
                continue
            if key == "step":
                state[key] = torch.zeros((), dtype=where.dtype, device=self._here.device)
            elif not is_companion(key):
                self._create(state, key, self._value(key, where), kept)
            elif main_of(key) not in kept:  # a parameter's correction, at first nothing
                sizes = where.layout.mine[1]
                state[key] = torch.zeros(sizes, dtype=where.dtype, device=self._here.device)

    def _create(
        self, state: dict[str, Tensor], key: str, value: Tensor, kept: Mapping[str, Kept]
    ) -> None:
        for part in ("", *COMPANIONS):
            if key + part in kept:
                where = kept[key + part]
                sizes = where.sizes
                state[key + part] = torch.zeros(sizes, dtype=where.dtype, device=value.device)
        shape = value.shape if is_packed(state, key) else state[key].shape
        held(state, key, self._program.holds_of(key), shape).store(value.reshape(shape))

    def _value(self, key: str, where: Kept) -> Tensor:
        if where.at_owner:
            assert self._whole is not None
            return self._init(key, self._whole)
        k = slices_of(self._program).get(key)
        if k is not None:
            return self._init(key, self._here.flatten()[self._first(k) :])
        if where.values is not None:  # whole blocks of a shard
            return self._init(key, self._here)
        sizes = where.layout.mine[1]
        if not where.is_number and math.prod(sizes) == 0:
            return torch.zeros(sizes, device=self._here.device)
        value = self._init(key, self._here) if self._here.numel() else None
        if value is None or (not where.is_number and value.numel() != math.prod(sizes)):
            # what is decided by the shape is decided by the whole
            like = torch.zeros(where.of, dtype=self._here.dtype, device=self._here.device)
            value = self._init(key, like)
            if not where.is_number:
                box = where.layout.mine
                value = value.reshape(where.shape)[inside(box, ((0,) * len(where.shape), ()))]
        return value

    def _init(self, key: str, param: Tensor) -> Tensor:
        """What the transform begins with, on this tensor."""
        for node, name, declared in self._program.states:
            place = node.state_key(name)
            if declared.several and key.rpartition(".")[0] == place:
                if place not in self._several:
                    made = declared.init(working(param), node.transform.options)
                    self._several[place] = made
                return self._several[place][int(key.rpartition(".")[2])]
            if place == key:
                return declared.init(working(param), node.transform.options)
        raise KeyError(key)


# ---- as others see it


def shown(param: Tensor, key: str, where: Kept, part: Tensor) -> Tensor:
    """A state as it stands in `optimizer.state`: a DTensor where it lies as its parameter does."""
    if not where.aligned or not isinstance(param, DTensor):
        return part
    placements = like_state(where.shape, param)
    return as_dtensor(part, where.shape, param.device_mesh, placements)


def saving(param: Tensor, where: Kept, part: Tensor | None, device: torch.device) -> Move:
    """The move that brings a state into the layout in which it is saved."""
    target = where.layout.everywhere()
    if isinstance(param, DTensor) and where.shape:
        target = placed(where.shape, param.device_mesh, spread(param))
    return Move(where.layout, target, part, where.dtype, device)


def travels(where: Kept) -> bool:
    """Whether a state must be brought into another layout to be saved."""
    return where.at_owner or not (where.is_number or where.aligned or where.layout.is_whole)


def saved(param: Tensor, where: Kept, part: Tensor) -> Tensor:
    """What a checkpoint gets of a state that has arrived there."""
    if isinstance(param, DTensor) and where.shape:
        return as_dtensor(part, where.shape, param.device_mesh, spread(param))
    return part


def taken(part: "Part", saved: Mapping[str, Any]) -> dict[str, Any]:
    """What this process shall hold of the state that was saved for a parameter.

    A plain tensor is the whole one, on every process. What has another shape stays as it is, and is
    refused where it is looked at.
    """
    entries = _in_formats(part, saved)
    found: dict[str, Any] = {}
    moves: list[Move] = []
    names: list[str] = []
    for key in sorted(entries):  # in an order that all processes share
        value, where = entries[key], part.kept.get(key)
        if where is None or not isinstance(value, Tensor) or _is_number(where, value):
            if where is None or not where.at_owner or part.is_mine:
                found[key] = local(value) if isinstance(value, Tensor) else value
        elif tuple(value.shape) != where.shape:
            whole = gathered(value.detach())
            # a part's shape is no reason to take it for one
            found[key] = whole[None] if tuple(whole.shape) == where.sizes else whole
        else:
            move = _loading(part.param, where, value.detach(), part.here.device)
            if isinstance(move, Move):
                moves.append(move)
                names.append(key)
            elif not where.at_owner or part.is_mine:
                found[key] = move
    for key, tensor in zip(names, moved(moves) if moves else (), strict=True):
        if not part.kept[key].at_owner or part.is_mine:
            found[key] = tensor
    return {key: found[key] for key in entries if key in found}


def _is_number(where: Kept, value: Tensor) -> bool:
    return where.is_number or not value.ndim


def _loading(param: Tensor, where: Kept, value: Tensor, device: torch.device) -> Move | Tensor:
    """What this process shall hold of a whole state, or the move that brings it."""
    if (
        isinstance(value, DTensor)
        and isinstance(param, DTensor)
        and value.device_mesh == param.device_mesh
    ):
        if where.aligned and tuple(value.placements) == like_state(where.shape, param):
            return local(value)
        if not where.aligned and tuple(value.placements) == spread(param):
            source = placed(where.shape, param.device_mesh, spread(param))
            return Move(source, where.layout, local(value), value.dtype, device)
    value = gathered(value)
    return value[inside(where.layout.mine, ((0,) * value.ndim, ()))]


def _in_formats(part: "Part", saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved state in the formats of this optimizer, where codes begin or end to be one."""
    tensors = {k: v for k, v in saved.items() if isinstance(v, Tensor)}
    expected = {
        key: torch.empty(where.shape, dtype=where.dtype, device="meta")
        for key, where in part.kept.items()
    }
    mains = [key for key in sorted(tensors) if not is_companion(key) and key in expected]
    other = [key for key in mains if _codes(tensors, key) != _codes(expected, key)]
    if not other:
        return saved
    made = dict(saved)
    for key in other:
        whole = {
            key + end: gathered(tensors[key + end].detach())
            for end in ("", *COMPANIONS)
            if key + end in tensors
        }
        values = part.kept[key].values
        shape = torch.Size(part.kept[key].shape if values is None else values)
        if fault(whole, key, shape) is None:
            recode(
                whole,
                {k: v for k, v in expected.items() if main_of(k) == key},
                part.program.holds_of,
                lambda key, shape=shape: shape,  # type: ignore[misc]
            )
        for end in ("", *COMPANIONS):
            made.pop(key + end, None)
        made |= whole
    return made


def _codes(state: Mapping[str, Tensor], key: str) -> Any:
    """Whether a state is kept as codes or packed, and how: only these are in blocks."""
    in_blocks = key + SCALE in state or is_packed(state, key)
    return dtypes_of(state, key) if in_blocks else None
