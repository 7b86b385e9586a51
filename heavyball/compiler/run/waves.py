"""Runs programs that are cut at whole transforms: kernels over a wave of parameters, products between.

Parameters go through their programs in waves of about `WAVE` elements, or one for each thread, so that
the temporary tensors between the segments take little memory however large the model is; with
foreach=False a wave is one parameter. The temporary tensors are made anew for each step and shared by
its waves: kept between steps they would lie beside the activations, and making them costs far less than
one product.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Opaque
from heavyball.compiler.passes.segments import Told
from heavyball.compiler.run.kernels import Parts
from heavyball.compiler.run.table import Kernel, Table, place_of
from heavyball.compiler.triton import device as cuda
from heavyball.core.program import WholeNode
from heavyball.linalg.scratch import reused
from heavyball.numerics import compute_dtype, working
from heavyball.runtime.execute import SHARE, Run, ask, run_hooks
from heavyball.runtime.job import Answer, Call, Frame, Job
from heavyball.runtime.state import working_param, write
from heavyball.runtime.step import Runs

WAVE = 2**22
# As many parameters as there are threads may be in a wave of so many elements, where there is something
# to be done on each thread (`whole.serve`).
WIDE = 2**25
# A device has more memory, and every launch waits for a command from the host.
DEVICE_WAVE = 2**25


@dataclass(eq=False)
class Entry:
    """One parameter in a wave, and what it has at this point of a step."""

    index: int
    job: Job
    parts: Parts
    group: int
    row: int = 0  # its place in the wave's numbers
    offset: int = 0  # its place in the wave's temporary tensors, in elements
    count: int = 0
    # numbers that whole transforms have provided, where the host knows them
    known: dict[str, int] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    opaque: dict[Opaque, Any] = field(default_factory=dict)
    frame: Frame = field(init=False)

    def __post_init__(self) -> None:
        self.forget()

    def begin(self) -> None:
        self.count, self.known = self.job.count + 1, {}

    def forget(self) -> None:
        """Let go of what belongs to one step."""
        self.results, self.opaque, self.frame = {}, {}, Frame(self.job, {})


class Wave:
    """Parameters of one dtype on one device that go through their programs together."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.dtype = compute_dtype(entries[0].job.param.dtype)
        self.device = entries[0].job.param.device
        names = {n for e in entries for n in e.parts.segments.levels if not n.startswith("whole.")}
        self.buffers = sorted(names)
        numbers = sorted({n for e in entries for n in e.parts.segments.numbers})
        self.columns = {name: i for i, name in enumerate(numbers)}
        self.shares = sorted((n for n in numbers if n.startswith(SHARE)), key=place_of)
        shape = len(entries), max(len(numbers), 1)
        self.numbers = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.elements = 0
        for row, entry in enumerate(entries):
            entry.row, entry.offset = row, self.elements
            # every tensor begins at a cache line, as torch's own do
            self.elements += -(-entry.job.param.numel() // 16) * 16
        self.stages = [
            list(self._tables(k)) for k in range(max(len(e.parts.kernels) for e in entries))
        ]
        self.scratch: dict[str, Tensor] = {}

    @property
    def calls(self) -> tuple[str, ...]:
        """The keys of the transforms that run between the segments."""
        told = (part.told for e in self.entries for part in e.parts.segments.parts)
        return tuple(dict.fromkeys(each.question.node.key for each in told if each is not None))

    # ---- tables

    @property
    def tables(self) -> Iterator["SegmentRows"]:
        for stage in self.stages:
            yield from stage

    def _tables(self, k: int) -> Iterator["SegmentRows"]:
        tables: dict[int, SegmentRows] = {}
        for entry in self.entries:
            kernel = entry.parts.kernels[k] if k < len(entry.parts.kernels) else None
            if kernel is not None:
                if id(kernel) not in tables:
                    tables[id(kernel)] = segment_table(kernel, self.device)
                tables[id(kernel)].add_entry(entry, functools.partial(self._address, entry))
        for table in tables.values():
            table.finish()
            yield table

    def _address(self, entry: Entry, name: str) -> int:
        if name in entry.parts.segments.levels:
            return 0  # made anew in each step
        tensor = {"param": entry.job.param, "grad": entry.job.grad}.get(name)
        return (self._number(entry, name) if tensor is None else tensor).data_ptr()

    def _number(self, entry: Entry, name: str) -> Tensor:
        if name in self.columns:
            return self.numbers[entry.row, self.columns[name]]
        return entry.job.state[name]

    # ---- a step

    def run(
        self,
        groups: Sequence[Mapping[str, Any]],
        totals: Mapping[str, Tensor],
        scratch: dict[str, Tensor],
        stack: bool,
    ) -> None:
        """Step the parameters."""
        self.scratch = scratch
        for entry in self.entries:
            entry.begin()
        runs = Runs(map(self._walk, self.entries))
        for k, tables in enumerate(self.stages):
            for table in tables:
                table.step_open(self._pointers, groups, totals)
            if k == 0:
                for entry in self.entries:
                    entry.job.counts.note(entry.job.state["step"], entry.count)  # type: ignore[union-attr]
            for index in runs.asking(int):
                runs.answer(index, None)
            runs.answer_calls(stack)
        for entry in self.entries:
            write(entry.job, entry.frame.new, entry.job.state["step"])
            entry.forget()
        self.scratch = {}

    def found_shares(self) -> dict[int, tuple[Tensor, ...]]:
        """The shares of sums that the last step has left, by the numbers of the jobs."""
        columns = [self.columns[name] for name in self.shares]
        entries = (e for e in self.entries if columns and not e.frame.ended)
        return {e.index: tuple(self.numbers[e.row, c] for c in columns) for e in entries}

    def _walk(self, entry: Entry) -> Run:
        """A parameter's way through its segments, which their kernels compute for all parameters."""
        parts = entry.parts.segments.parts
        for k in range(len(self.stages)):
            yield k
            told = parts[k].told if k < len(parts) else None
            if told is not None:
                yield from self._ask(entry, k, told)
                if entry.frame.ended:
                    return
        yield from run_hooks(entry.frame)

    def _ask(self, entry: Entry, k: int, told: Told) -> Run:
        answer = yield from ask(self._call(entry, told), entry.frame)
        if answer is not None:
            self._take(entry, k, told.question.node, answer)

    def _call(self, entry: Entry, told: Told) -> Call:
        question = told.question
        context = {n: self._value(entry, place) for n, place in told.context.items()}
        step = self._value(entry, told.step)
        context["step"] = step
        return Call(
            question.node,
            entry.job,
            self._value(entry, told.update),
            entry.count if question.counted else entry.known.get(str(told.step)),
            context,
            gate=entry.known.get(str(told.gate), self._value(entry, told.gate)),
        )

    def _value(self, entry: Entry, place: "str | Opaque | None") -> Any:
        if place is None:
            return None
        if isinstance(place, Opaque):
            return entry.opaque[place]
        param = entry.job.param
        if place == "param":
            return working_param(param, entry.job.state)
        if place == "grad":
            assert param.grad is not None
            return working(param.grad).to(self.dtype)
        if place in entry.results:
            return entry.results[place]
        if place not in self.scratch:
            return self._number(entry, place)
        shape, strides = param.shape or (1,), param.stride() or (1,)
        return torch.as_strided(self.scratch[place], shape, strides, entry.offset)

    def _take(self, entry: Entry, k: int, node: WholeNode, answer: Answer) -> None:
        """Put an answer where later segments read it."""
        place = f"whole.{k}"
        entry.results[f"{place}.update"] = laid_out(answer.update, entry.job.param, self.dtype)
        for name, value in answer.provided.items():
            if name in node.transform.opaque:
                entry.opaque[Opaque(k, name)] = value
            elif name == "grad":
                entry.results[f"{place}.{name}"] = laid_out(value, entry.job.param, self.dtype)
            else:
                entry.frame.ended |= name == "gate" and value is False
                if isinstance(value, int):
                    entry.known[f"{place}.{name}"] = value
                if f"{place}.{name}" in self.columns:
                    _put(self.numbers[entry.row, self.columns[f"{place}.{name}"]], value)

    def _pointers(self, entries: list[Entry], name: str) -> Tensor:
        """The offset of a temporary tensor for each parameter."""
        if name.startswith("whole."):
            return _host([e.results[name].data_ptr() for e in entries])
        size = self.dtype.itemsize
        return _host([e.offset * size for e in entries]) + self.scratch[name].data_ptr()


def _host(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _put(place: Tensor, value: Tensor | float) -> None:
    """Write a number; an assignment of a Python number would wait for the device."""
    if isinstance(value, Tensor):
        place.copy_(value)
    else:
        place.fill_(value)


@dataclass(eq=False)
class SegmentRows(Table):
    """The tensors of one segment; temporary ones have their own columns."""

    entries: list[Entry] = field(default_factory=list)
    moving: list[tuple[int, str]] = field(default_factory=list)
    order: list[Entry] = field(default_factory=list)

    def add_entry(self, entry: Entry, address: Callable[[str], int]) -> None:
        """Append a parameter's row."""
        self.add(len(self.rows), entry.job, entry.group, address)
        self.entries.append(entry)

    def give_shares_room(self, device: torch.device) -> None:
        """Nothing: the shares of a wave are among its numbers."""

    def finish(self) -> None:
        levels = self.entries[0].parts.segments.levels
        names = enumerate(self.kernel.tensors, start=self.kernel.leading)
        self.moving = [(column, name) for column, name in names if name in levels]
        super().finish()
        self.order = [self.entries[i] for i in self.members]
        self.members = [entry.index for entry in self.order]

    def step_open(
        self, pointers: Any, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, Tensor]
    ) -> None:
        """Run the kernel over the parameters whose step has not ended."""
        still = [i for i, entry in enumerate(self.order) if not entry.frame.ended]
        if not still:
            return
        table = self if len(still) == len(self.order) else self._part(still)
        for column, name in self.moving:
            table.fixed[:, column] = pointers(table.order, name)  # type: ignore[index]
        table.step(groups, totals)

    def _part(self, rows: list[int]) -> "SegmentRows":
        part = segment_table(self.kernel, self.order[0].job.param.device)
        # without the column that a table of matrices has of its own
        part.rows = self.fixed[rows, : len(self.rows[0])].tolist()  # type: ignore[index]
        part.members = list(range(len(rows)))
        part.entries = [self.order[i] for i in rows]
        part.finish()
        return part


@dataclass(eq=False)
class DeviceSegmentRows(SegmentRows, cuda.DeviceTable):
    """The same in the memory of a device."""


def segment_table(kernel: Kernel, device: torch.device) -> SegmentRows:
    """An empty table for a segment on this device."""
    return DeviceSegmentRows(kernel, device=device) if cuda.serves(device) else SegmentRows(kernel)


def laid_out(result: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in the order of the parameter's memory, as kernels walk through it."""
    result = result.to(dtype)
    if result.stride() == param.stride() or (result.is_contiguous() and param.is_contiguous()):
        return result
    made = torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device)
    return made.copy_(result)


@dataclass(eq=False)
class Waves:
    """All parameters of a step whose programs have whole transforms."""

    waves: list[Wave]
    stack: bool

    @property
    def tables(self) -> list[Table]:
        return [table for wave in self.waves for table in wave.tables]

    @reused()
    def run(
        self, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, Tensor]
    ) -> dict[int, tuple[Tensor, ...]]:
        """Step them, wave by wave; returns the shares of sums that are taken after the step."""
        left: dict[int, tuple[Tensor, ...]] = {}
        scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        for wave in self.waves:
            mine = {}
            for name in wave.buffers:
                kind = wave.dtype, wave.device
                place = (name, *kind)
                size = max(w.elements for w in self.waves if (w.dtype, w.device) == kind)
                if place not in scratch:
                    scratch[place] = torch.empty(size, dtype=wave.dtype, device=wave.device)
                mine[name] = scratch[place]
            wave.run(groups, totals, mine, self.stack)
            left.update(wave.found_shares())
        return left


def _elements(job: Job) -> int:
    """The size of a parameter in a wave: its elements, or those of its matrices.

    New matrices wait for the end of their wave, and can be many times the parameter.
    """
    shape = job.param.shape
    matrices = sum(t.numel() for t in job.state.values() if t.shape != shape)
    return max(job.param.numel(), matrices)


def _alike(one: Tensor, other: Tensor) -> bool:
    kinds = [(t.device, compute_dtype(t.dtype)) for t in (one, other)]
    return kinds[0] == kinds[1]


def _has_after(entry: Entry) -> bool:
    return any(isinstance(n, WholeNode) and n.transform.after for n in entry.job.program.flat)


def arrange(entries: list[Entry], foreach: bool | None) -> Waves:
    """Put parameters into waves, those of one shape, which may share calls, next to each other."""
    places: dict[Any, int] = {}

    def order(entry: Entry) -> tuple:
        param = entry.job.param
        kind = param.shape, id(entry.parts), entry.group
        device, dtype = places.setdefault(param.device, len(places)), compute_dtype(param.dtype)
        return device, dtype.itemsize, places.setdefault(kind, len(places))

    waves: list[list[Entry]] = []
    size, threads = 0, torch.get_num_threads()
    for entry in sorted(entries, key=order):
        numel, before = _elements(entry.job), waves[-1][0].job.param if waves else None
        fresh = before is None or not _alike(before, entry.job.param)
        if cuda.serves(entry.job.param.device):
            most = DEVICE_WAVE
        else:
            wide = bool(waves) and len(waves[-1]) < threads and _has_after(entry)
            most = WIDE if wide else WAVE
        if fresh or foreach is False or size + numel > most:
            waves.append([])
            size = 0
        waves[-1].append(entry)
        size += numel
    return Waves([Wave(wave) for wave in waves], foreach is not False)
