"""Moves tensors from one layout to another: one all-to-all for all tensors of a group and dtype.

What goes where follows from the layouts alone, so every process knows the sizes of what it sends and of
what it receives, and takes part also where it has nothing to send.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heavyball.distributed.shard import Box, Group, Layout, inside, numel, overlap


@dataclass(frozen=True, eq=False)
class Move:
    """A tensor on its way: how it lies now, how it shall lie, and what of it is here, if anything."""

    source: Layout
    target: Layout
    part: Tensor | None
    dtype: torch.dtype
    device: torch.device


# What one process gets from another: its rank, and the box.
Piece = tuple[int, Box]


@functools.lru_cache(maxsize=16384)
def _pieces(source: Layout, target: Layout, rank: int) -> tuple[Piece, ...]:
    """Where each piece of what a process shall hold comes from.

    What it has itself it takes from there. Of several that hold the same, each serves another one: of
    copies of the whole set, every process turns to its own copy.
    """
    wanted, own = target.boxes[rank], source.boxes[rank]
    if not numel(wanted):
        return ()
    copy = source.holders[own].index(rank) if numel(own) else rank
    found = []
    for box, holders in source.holders.items():
        common = overlap(box, wanted)
        if common is not None:
            sender = rank if rank in holders else holders[copy % len(holders)]
            found.append((sender, common))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Route:
    """What this process sends to each and receives from each: (which move, box), in order."""

    sent: tuple[tuple[tuple[int, Box], ...], ...]
    received: tuple[tuple[tuple[int, Box], ...], ...]


@functools.lru_cache(maxsize=4096)
def _route(layouts: tuple[tuple[Layout, Layout], ...]) -> Route:
    group = layouts[0][0].group
    sent: list[list[tuple[int, Box]]] = [[] for _ in range(group.size)]
    received: list[list[tuple[int, Box]]] = [[] for _ in range(group.size)]
    for number, (source, target) in enumerate(layouts):
        for rank, box in enumerate(target.boxes):
            if not numel(box):
                continue
            for sender, piece in _pieces(source, target, rank):
                if sender == group.me and rank != group.me:
                    sent[rank].append((number, piece))
                if rank == group.me and sender != group.me:
                    received[sender].append((number, piece))
    return Route(tuple(map(tuple, sent)), tuple(map(tuple, received)))


class Exchange:
    """One all-to-all that is under way; `wait` gives what has arrived."""

    def __init__(self, moves: Sequence[Move]):
        self._moves, first = moves, moves[0]
        self._group: Group = first.source.group
        self._route = _route(tuple((move.source, move.target) for move in moves))
        self._work: Any = None
        self._received: Tensor | None = None
        if self._group.size == 1:
            return
        place: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        parts = [self._part(*piece) for pieces in self._route.sent for piece in pieces]
        self._sent = torch.cat(parts) if parts else torch.empty(0, **place)
        sizes = [
            [sum(numel(box) for _, box in pieces) for pieces in side]
            for side in (self._route.sent, self._route.received)
        ]
        self._sizes = sizes[1]
        self._received = torch.empty(sum(sizes[1]), **place)
        self._work = dist.all_to_all_single(
            self._received,
            self._sent,
            sizes[1],
            sizes[0],
            group=self._group.handle,
            async_op=True,
        )

    def _part(self, number: int, box: Box) -> Tensor:
        move = self._moves[number]
        assert move.part is not None
        return move.part[inside(box, move.source.mine)].reshape(-1).to(move.dtype)

    def wait(self) -> list[Tensor]:
        """What this process holds of each tensor now, an empty tensor where that is nothing."""
        if self._work is not None:
            self._work.wait()
        made = [self._made(move) for move in self._moves]
        if self._received is not None:
            rest = iter(
                self._received.split([numel(b) for ps in self._route.received for _, b in ps])
            )
            for pieces in self._route.received:
                for number, box in pieces:
                    target, place = made[number], self._moves[number].target.mine
                    target[inside(box, place)] = next(rest).reshape(box[1])
        return made

    def _made(self, move: Move) -> Tensor:
        """Memory for what shall be here, and in it what is here already."""
        me, own, wanted = self._group.me, move.source.mine, move.target.mine
        if own == wanted and move.part is not None:
            return move.part.to(move.dtype)
        made = torch.empty(wanted[1], dtype=move.dtype, device=move.device)
        for sender, box in _pieces(move.source, move.target, me):
            if sender == me and move.part is not None:
                made[inside(box, wanted)] = move.part[inside(box, own)].to(move.dtype)
        return made


class Exchanges:
    """Moves of several groups and dtypes, begun together in an order that all processes share."""

    def __init__(self, moves: Sequence[Move]):
        self._size = len(moves)
        kinds: dict[Any, list[int]] = {}
        for number, move in enumerate(moves):
            kinds.setdefault((move.source.group, move.dtype, move.device.type), []).append(number)
        self._begun = [(found, Exchange([moves[i] for i in found])) for found in kinds.values()]

    def wait(self) -> list[Tensor]:
        """What this process holds of each tensor now, in the order of the moves."""
        found = dict[int, Tensor]()
        for numbers, exchange in self._begun:
            found.update(zip(numbers, exchange.wait(), strict=True))
        return [found[number] for number in range(self._size)]


def moved(moves: Sequence[Move]) -> list[Tensor]:
    """The tensors in their new layouts."""
    return Exchanges(moves).wait()
