"""Where the parts of a tensor are: a box for every process of a group.

Everything that is decided here is decided from the whole tensor and the whole mesh, so that all
processes decide alike. This is the only module that uses names of torch that are not public.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

# The first element of a part of a tensor along each axis, and how many elements there are.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Group:
    """Processes in a fixed order: how many, and which of them this one is. One alone has no handle."""

    handle: Any
    size: int
    me: int


ALONE = Group(None, 1, 0)
_groups: dict[Any, Group] = {}


def group_of(handle: Any) -> Group:
    """The processes of a `ProcessGroup`."""
    if handle not in _groups:
        _groups[handle] = Group(handle, dist.get_world_size(handle), dist.get_rank(handle))
    return _groups[handle]


def group_of_mesh(mesh: DeviceMesh) -> Group:
    """The processes of a mesh of any number of dimensions, in the mesh's order."""
    if mesh.ndim == 1:
        return group_of(mesh.get_group())
    ranks = mesh.mesh.flatten().tolist()
    if ranks == list(range(dist.get_world_size())):
        return group_of(dist.group.WORLD)
    return group_of(mesh._flatten().get_group())


def numel(box: Box) -> int:
    return math.prod(box[1])


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    low = tuple(map(max, one[0], other[0]))
    ends = zip(one[0], one[1], other[0], other[1], strict=True)
    sizes = tuple(min(a + n, b + m) - s for (a, n, b, m), s in zip(ends, low, strict=True))
    return (low, sizes) if all(n > 0 for n in sizes) else None


def inside(box: Box, frame: Box) -> tuple[slice, ...]:
    """Where a box lies in a tensor that holds another one."""
    return tuple(slice(o - f, o - f + n) for o, n, f in zip(box[0], box[1], frame[0], strict=True))


@dataclass(frozen=True, eq=False)
class Layout:
    """Which part of a tensor each process of a group holds.

    shape: of the whole tensor. boxes: one for each process; several may hold the same. copies: which
    complete copy of the tensor each process has a part of; None where that is not known.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    group: Group
    copies: tuple[int, ...] | None = None

    @property
    def mine(self) -> Box:
        return self.boxes[self.group.me]

    def copy_of(self, rank: int) -> int:
        """The number of the copy that a process has a part of."""
        if self.copies is not None:
            return self.copies[rank]
        return self.holders.get(self.boxes[rank], [rank]).index(rank)

    @functools.cached_property
    def holders(self) -> dict[Box, list[int]]:
        """The processes that hold each box that is not empty."""
        found: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.boxes):
            if numel(box):
                found.setdefault(box, []).append(rank)
        return found

    @functools.cached_property
    def is_first(self) -> bool:
        """Whether this process is the first of those that hold its box: a sum counts that once."""
        return self.holders.get(self.mine, [None])[0] == self.group.me

    @functools.cached_property
    def cut(self) -> tuple[bool, ...]:
        """Along which axes some process has not all elements."""
        return tuple(any(b[1][k] != n for b in self.boxes) for k, n in enumerate(self.shape))

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether every process holds the whole tensor."""
        return not any(self.cut)

    def along(self, axes: Iterable[int]) -> "Layout":
        """The layout of values that are the same along all other axes."""
        return _along(self, tuple(axes))

    def at(self, owner: int) -> "Layout":
        """The same tensor, all of it at one process."""
        return _at(self.shape, self.group, owner)

    def copy_at(self, rank: int) -> "Layout | None":
        """The parts of a process's own copy alone; None if there is no other, or it has all of it."""
        return _copy_at(self, rank)

    def everywhere(self) -> "Layout":
        """The same tensor, all of it at every process."""
        return replicated(self.shape, self.group)

    def flat(self, k: int) -> "Layout | None":
        """The layout of what has one value for each k elements, counted in the tensor's order.

        None where some process does not hold such values in one piece.
        """
        boxes = []
        for box in self.boxes:
            low, high = self._range(box)
            if low is None:
                return None
            first = -(-low // k)
            boxes.append(((first,), (max(-(-high // k) - first, 0),)))
        return Layout((-(-math.prod(self.shape) // k),), tuple(boxes), self.group)

    def cuts_blocks(self, k: int) -> bool:
        """Whether a block of k elements, counted in the tensor's order, is not all at one process."""
        for low, high in map(self._range, self.boxes):
            if low is None or low % k or (high % k and high != math.prod(self.shape)):
                return True
        return False

    def _range(self, box: Box) -> Any:
        """The first element of a box in the order of the whole tensor, and the one behind the last."""
        if not numel(box):
            return 0, 0
        if box[1][1:] != self.shape[1:]:
            return None, None
        row = math.prod(self.shape[1:])
        low = box[0][0] * row if box[0] else 0
        return low, low + numel(box)

    def check(self, label: str) -> None:
        """Refuse parts that do not make up the whole.

        Errors: ValueError that begins with the label.
        """
        for axis, n in enumerate(self.shape):
            pieces = sorted({(b[0][axis], b[1][axis]) for b in self.holders})
            ends = [low + size for low, size in pieces]
            starts = [low for low, _ in pieces]
            if pieces and starts != [0, *ends[:-1]]:
                raise ValueError(f"{label}: its shards overlap or leave gaps along axis {axis}")
            if pieces and ends[-1] != n:
                raise ValueError(
                    f"{label}: its shards end at {ends[-1]} along axis {axis}, not {n}"
                )
        if sum(map(numel, self.holders)) != math.prod(self.shape):
            raise ValueError(f"{label}: its shards do not make up the tensor")


@functools.lru_cache(maxsize=65536)
def _along(layout: Layout, axes: tuple[int, ...]) -> Layout:
    kept = set(axes)

    def part(box: Box) -> Box:
        pairs = [(o, n) if k in kept else (0, 1) for k, (o, n) in enumerate(zip(*box, strict=True))]
        return tuple(o for o, _ in pairs), tuple(n for _, n in pairs)

    shape = tuple(n if k in kept else 1 for k, n in enumerate(layout.shape))
    return Layout(shape, tuple(map(part, layout.boxes)), layout.group)


@functools.lru_cache(maxsize=65536)
def _at(shape: tuple[int, ...], group: Group, owner: int) -> Layout:
    nothing: Box = ((0,) * len(shape), (0,) * len(shape))
    whole: Box = ((0,) * len(shape), shape)
    boxes = tuple(whole if rank == owner else nothing for rank in range(group.size))
    return Layout(shape, boxes, group)


@functools.lru_cache(maxsize=65536)
def _copy_at(layout: Layout, rank: int) -> Layout | None:
    copies = [layout.copy_of(other) for other in range(layout.group.size)]
    if len({*copies}) == 1 or copies.count(copies[rank]) == 1:
        return None
    nothing: Box = ((0,) * len(layout.shape), (0,) * len(layout.shape))
    boxes = tuple(
        box if copy == copies[rank] else nothing
        for copy, box in zip(copies, layout.boxes, strict=True)
    )
    return Layout(layout.shape, boxes, layout.group)


def alone(tensor: Tensor) -> Layout:
    """The layout of a tensor that has nothing to do with other processes."""
    return replicated(tuple(tensor.shape), ALONE)


@functools.lru_cache(maxsize=65536)
def replicated(shape: tuple[int, ...], group: Group) -> Layout:
    """The layout of a tensor that every process of a group holds."""
    whole: Box = ((0,) * len(shape), shape)
    return Layout(shape, (whole,) * group.size, group)


def layout_of(tensor: DTensor) -> Layout:
    """The layout of a DTensor."""
    return placed(tensor.shape, tensor.device_mesh, tensor.placements)


def placed(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> Layout:
    """The layout of a tensor of this shape that is placed so."""
    return _placed(tuple(shape), tuple(mesh.shape), tuple(placements), group_of_mesh(mesh))


def planned(shape: Sequence[int], mesh: tuple[int, ...], group: Group) -> Layout:
    """The layout that `fully_shard` gives a tensor: its first axis over the last one of a mesh."""
    placements: list[Any] = [Replicate()] * len(mesh)
    if shape:
        placements[-1] = Cut(0)
    return _placed(tuple(shape), mesh, tuple(placements), group)


@functools.lru_cache(maxsize=65536)
def _placed(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], group: Group
) -> Layout:
    boxes, copies = [], dict[tuple[int, ...], list[int]]()
    for rank, place in enumerate(itertools.product(*map(range, mesh))):
        sizes, offset = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        boxes.append((tuple(map(int, offset)), tuple(map(int, sizes))))
        repeated = tuple(k for k, p in zip(place, placements, strict=True) if p.is_replicate())
        copies.setdefault(repeated, []).append(rank)
    copy = {rank: number for number, ranks in enumerate(copies.values()) for rank in ranks}
    return Layout(shape, tuple(boxes), group, tuple(copy[rank] for rank in range(len(boxes))))


def check_placements(label: str, tensor: DTensor) -> None:
    """Refuse a DTensor that is no complete tensor in parts.

    Errors: ValueError that begins with the label.
    """
    for placement in tensor.placements:
        if placement.is_partial():
            raise ValueError(
                f"{label} is placed as {tuple(tensor.placements)}: its values are yet to be reduced; "
                "redistribute it first"
            )
    if tensor.device_mesh.get_coordinate() is None:
        raise ValueError(f"{label} is on a mesh of which this process is no part")
    layout = layout_of(tensor)
    layout.check(label)
    found, expected = tuple(tensor.to_local().shape), layout.mine[1]
    if found != expected:
        raise ValueError(
            f"{label}: this process holds a part of shape {found}, expected {expected}"
        )


# ---- DTensors and what is here of them


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
        if hasattr(tensor, "wait"):  # a collective is still under way
            tensor = tensor.wait()
    return tensor


def like_state(shape: Sequence[int], param: DTensor) -> tuple[Any, ...]:
    """The placements of a state with a value for each element along some of a parameter's axes."""
    cut = [None if p.is_replicate() else p.dim for p in param.placements]  # type: ignore[attr-defined]
    return tuple(
        p if axis is None or shape[axis] == param.shape[axis] else Replicate()
        for p, axis in zip(param.placements, cut, strict=True)
    )


def spread(param: DTensor) -> tuple[Any, ...]:
    """Placements that cut another tensor along its first axis wherever the parameter is cut."""
    return tuple(Replicate() if p.is_replicate() else Cut(0) for p in param.placements)


def as_dtensor(
    part: Tensor, shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]
) -> DTensor:
    """A DTensor of what this process holds."""
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
