"""How much state each process of a mesh will hold, from shapes alone."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from heavyball.core.program import Program
from heavyball.distributed.parts import (
    Part,
    another,
    keep_at_owner,
    owners,
    part_of,
    whole_state,
)
from heavyball.distributed.shard import Group, Layout, numel, planned
from heavyball.runtime.place import Place


def sizes_of(mesh: Any) -> tuple[int, ...]:
    """The sizes of a mesh: of a `DeviceMesh`, a number of processes, or (copies, processes of a copy).

    Errors: TypeError or ValueError for anything else.
    """
    if isinstance(mesh, DeviceMesh):
        return tuple(mesh.shape)
    sizes = (mesh,) if isinstance(mesh, int) and not isinstance(mesh, bool) else mesh
    if not isinstance(sizes, tuple) or not all(isinstance(n, int) for n in sizes):
        raise TypeError(f"mesh={mesh!r}: expected a DeviceMesh, a number, or a tuple of numbers")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"mesh={mesh!r}: expected at least one process along every axis")
    return sizes


def parts_on(
    mesh: Any, places: Iterable[Place], programs: Mapping[Any, Program], totals: bool
) -> list[Part]:
    """The parts of parameters on a mesh that need not exist, as `fully_shard` would cut them."""
    sizes = sizes_of(mesh)
    group = Group(None, math.prod(sizes), 0)
    known: dict[Any, Part] = {}
    parts = []
    for place in places:
        param, program = place.param, programs[place.param]
        layout = planned(tuple(param.shape), sizes, group)
        kind = id(program), layout, param.dtype, place.index
        if kind not in known:
            known[kind] = part_of(place, program, layout, totals)
        parts.append(another(known[kind], place))
    owners(parts, {})
    for part in parts:
        keep_at_owner(part)
    return parts


def bytes_on(parts: Iterable[Part]) -> list[int]:
    """The bytes of state that each process will hold after the first step."""
    found = torch.zeros(0, dtype=torch.int64, device="cpu")
    for part in parts:
        if not len(found):
            found = torch.zeros(part.layout.group.size, dtype=torch.int64, device="cpu")
        wanted = whole_state(part.program, part.shape, part.here.dtype, part.place.group, False)
        for key in wanted if part.param.requires_grad and part.shape.numel() else ():
            where = part.kept[key]
            if where.at_owner:
                found[part.owner] += math.prod(where.shape) * where.dtype.itemsize
            elif where.is_number:
                found += where.dtype.itemsize
            else:
                found += _elements(where.layout) * where.dtype.itemsize
    return found.tolist()


@functools.lru_cache(maxsize=1024)
def _elements(layout: Layout) -> Tensor:
    """How many elements each process has."""
    return torch.tensor([numel(box) for box in layout.boxes], dtype=torch.int64, device="cpu")
