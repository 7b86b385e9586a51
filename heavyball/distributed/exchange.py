"""Moves tensors from one layout to another: one all-to-all for all tensors of a group and dtype.

What goes where follows from the layouts alone, so every process knows the sizes of what it sends and of
what it receives, and takes part also where it has nothing to send.

Where there are R copies of S parts each (HSDP), an owner gets its pieces from its own copy alone. What
it has made goes back in two hops: to the parts of its own copy, and from each of these to the same part
of the other copies. So no process sends a piece to two others of one copy, what crosses between copies
leaves from S processes instead of one, and everything is received once:

    there (S - 1) / S,  back (S - 1) / S,  to the other copies R - 1  of a matrix's bytes

which is (N + S - 2) / (N S) of them for each of N = R S processes, 2 (N - 1) / N^2 with one copy.
Nothing less is enough while one process makes a result that N need a part of.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heavyball.distributed.shard import Box, Group, Layout, inside, numel, overlap


@dataclass(frozen=True, eq=False)
class Move:
    """A tensor on its way: how it lies now, how it shall lie, and what of it is here.

    part: None where nothing of it is here, or where this process has failed and sends zeros. dtype: in
    which it travels. by: how it lies in between, where it takes two hops.
    """

    source: Layout
    target: Layout
    part: Tensor | None
    dtype: torch.dtype
    device: torch.device
    by: Layout | None = None


def back(
    layout: Layout, owner: int, whole: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Move:
    """The move of what an owner has made to all that hold parts of it, through its own copy."""
    return Move(layout.at(owner), layout, whole, dtype, device, layout.copy_at(owner))


# What one process gets from another: its rank, and the box.
Piece = tuple[int, Box]


@functools.lru_cache(maxsize=16384)
def _pieces(source: Layout, target: Layout, rank: int) -> tuple[Piece, ...]:
    """Where each piece of what a process shall hold comes from.

    What it has itself it takes from there. Of several that hold the same, every process turns to the one
    of its own copy.
    """
    wanted = target.boxes[rank]
    if not numel(wanted):
        return ()
    copy = source.copy_of(rank)
    found = []
    for box, holders in source.holders.items():
        common = overlap(box, wanted)
        if common is not None:
            near = (holder for holder in holders if source.copy_of(holder) == copy)
            sender = rank if rank in holders else next(near, holders[copy % len(holders)])
            found.append((sender, common))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Route:
    """What this process sends to each and receives from each: (which move, box), in order."""

    sent: tuple[tuple[tuple[int, Box], ...], ...]
    received: tuple[tuple[tuple[int, Box], ...], ...]


@functools.lru_cache(maxsize=4096)
def route(layouts: tuple[tuple[Layout, Layout], ...]) -> Route:
    """What this process sends and receives to bring tensors from one layout each to another."""
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
        self._route = route(tuple((move.source, move.target) for move in moves))
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

    @property
    def tensors(self) -> list[Tensor]:
        """What is here of what is sent, and the memory for what arrives."""
        parts = (move.part for move in self._moves)
        return [t for t in (*parts, self._received) if t is not None]

    def _part(self, number: int, box: Box) -> Tensor:
        move = self._moves[number]
        if move.part is None:  # it could not be computed
            return torch.zeros(numel(box), dtype=move.dtype, device=move.device)
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
            if sender == me:
                place, part = inside(box, wanted), move.part
                made[place] = 0 if part is None else part[inside(box, own)].to(move.dtype)
        return made


class _Hop:
    """Moves of several groups and dtypes, begun together in an order that all processes share."""

    def __init__(self, moves: Sequence[Move]):
        self._size = len(moves)
        kinds: dict[Any, list[int]] = {}
        for number, move in enumerate(moves):
            kinds.setdefault((move.source.group, move.dtype, move.device.type), []).append(number)
        self._begun = [(found, Exchange([moves[i] for i in found])) for found in kinds.values()]

    @property
    def tensors(self) -> list[Tensor]:
        """What is sent, and the memory for what arrives."""
        return [tensor for _, exchange in self._begun for tensor in exchange.tensors]

    def wait(self) -> list[Tensor]:
        found = dict[int, Tensor]()
        for numbers, exchange in self._begun:
            found.update(zip(numbers, exchange.wait(), strict=True))
        return [found[number] for number in range(self._size)]


class Beside:
    """A stream of a device for what is relayed, so that products do not wait until it has arrived."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def __call__(self, used: Iterable[Tensor]) -> Iterator[None]:
        """Work on this stream; `used` are tensors of the stream that computes."""
        for tensor in used:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self, made: Iterable[Tensor]) -> None:
        """Let the present stream use what was made on this one."""
        present = torch.cuda.current_stream(self._stream.device)
        present.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(present)


@functools.lru_cache
def beside(device: torch.device) -> Beside | None:
    """The stream for what is relayed on a device; the CPU has none."""
    return Beside(device) if device.type == "cuda" else None


class Exchanges:
    """Moves that are under way, each in one hop or in two.

    Nothing waits on the host where the device is a GPU: the all-to-alls run on the streams of their
    groups, and what is relayed on one beside the stream that computes.
    """

    def __init__(self, moves: Sequence[Move]):
        self._moves = moves
        devices = [move.device for move in moves if move.device.type != "cpu"]
        self._beside = beside((devices or [moves[0].device])[0])
        self._near: list[Tensor] = []
        self._last: _Hop | None = None
        self._first = _Hop([m if m.by is None else replace(m, target=m.by) for m in moves])
        self._twice = [number for number, move in enumerate(moves) if move.by is not None]

    def relay(self) -> None:
        """Begin the second hop of those that take two, when the first is done."""
        if self._last is not None or not self._twice:
            return
        if self._beside is None:
            self._forward()
        else:
            with self._beside(self._first.tensors):
                self._forward()

    def _forward(self) -> None:
        self._near = self._first.wait()
        moves = []
        for number in self._twice:
            move = self._moves[number]
            assert move.by is not None
            moves.append(replace(move, source=move.by, part=self._near[number]))
        self._last = _Hop(moves)

    def wait(self) -> list[Tensor]:
        """What this process holds of each tensor now, in the order of the moves."""
        self.relay()
        if self._last is None:
            return self._first.wait()
        if self._beside is not None:
            self._beside.join([*self._near, *self._last.tensors])
        found = dict(enumerate(self._near))
        found.update(zip(self._twice, self._last.wait(), strict=True))
        return [found[number] for number in range(len(self._moves))]


def moved(moves: Sequence[Move]) -> list[Tensor]:
    """The tensors in their new layouts."""
    return Exchanges(moves).wait()
