"""Prints what is computed between the passes over the elements as Triton, along some of the axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heavyball.compiler.frontend.graph import NotPrintableError, Ref
from heavyball.compiler.passes.axes import Frame, Runs, is_along
from heavyball.compiler.passes.stages import Pass, summed
from heavyball.compiler.triton.dialect import TYPES
from heavyball.compiler.triton.printer import (
    BLOCK,
    HEIGHT,
    TritonPrinter,
    _as_number,
    _indented,
)

HEAD = """\
    row = table + index * {columns}
    size = tl.load(row)
{sizes}
    cols = {lane}
    rows = size // cols
    groups = {groups}
    span = rows // groups
    kept = scratch + index * {slots}
    group = hyper + tl.load(row + 1) * {hypers}
    wide = (cols + {block} - 1) // {block}
    high = (span + {height} - 1) // {height}
    tall = groups * high
    lane = tl.arange(0, {block})
    memory = pointer(row + {memory}, tl.float64, False)
{arrays}
    row_parts = memory + {kept}
    lane_parts = row_parts + {row_sums} * wide * rows
    tile_parts = lane_parts + {lane_sums} * tall * cols
"""
BETWEEN = """\
@triton.jit
def between_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
{head}
{body}
"""
# Adds up what lies at several places, in their order, for every value of an array.
JOIN = """\
for b in range(0, {length}, {block}):
    at = b + lane
    mask = at < {length}
    total = tl.full([{block}], 0.0, tl.float64)
    for j in range(0, {inner}):
        for w in range(0, {outer}):
            x = tl.load({source}, mask, other=0.0)
            total += {term}
    tl.store({target} + at, total.to({kind}).to(tl.float64), mask)"""


@dataclass(frozen=True)
class Memory:
    """What a tensor needs between the passes: arrays that are kept, and parts of sums.

    kept: the runs of each array. row_sums, lane_sums, tile_sums: how many sums of a pass belong to
    rows, to places along the lane, and to the whole tensor. lane: the run that a tile is wide; group:
    those of which a tile has one place each.
    """

    kept: tuple[Runs, ...]
    row_sums: int
    lane_sums: int
    tile_sums: int
    lane: int
    group: Runs

    def of(self, numel: int, later: Sequence[int]) -> tuple[int, int]:
        """How many float64 numbers, and the number of tiles. later: the sizes of runs 1 and on."""
        sizes = (numel // math.prod(later), *later)
        cols, groups = sizes[self.lane], math.prod(sizes[k] for k in self.group)
        rows = numel // cols
        wide, tall = -(-cols // BLOCK), groups * -(-rows // groups // HEIGHT)
        arrays = sum(math.prod(sizes[k] for k in runs) for runs in self.kept)
        parts = self.row_sums * wide * rows + self.lane_sums * tall * cols
        return arrays + parts + self.tile_sums * wide * tall, wide * tall


class TritonArrayPrinter(TritonPrinter):
    """Prints the kernels between the passes, with the sizes of the runs in each row of the table.

    One program per tensor adds up what the tiles of a pass left behind, and computes the values along
    some axes and those per tensor. The last column of the table points to the memory, see `Memory`.

    Errors: NotPrintableError for sums along the lane that belong to different groups of rows.
    """

    # programs divide a slice among them, so it must be read before the pass in which others write
    slices_wait = False

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        starts = self.graph.starts
        assert starts is not None
        self.leading = ("numel", "group", "stream", *(f"axis {k}" for k in starts[1:]))
        self.frame = frame = Frame(starts, self.graph.levels, lambda k: f"n{k}", "//")
        self.stride = "" if frame.period is None else f" * n{frame.period}"
        self.lanes = f"lane{self.stride}"
        self.group = self._group()

    def _group(self) -> Runs:
        found = {
            self.frame.without_lane(self._level(i))
            for p in self.plan.passes
            for i in self._reduced(p, "lane")
        }
        if len(found) > 1:
            raise NotPrintableError("sums over different axes in one walk over rows, on CUDA")
        return found.pop() if found else ()

    @property
    def memory(self) -> Memory:
        """What a tensor needs besides its own."""
        kept = tuple(self.frame.runs(self._level(i)) for i in self.plan.kept)
        row, lane, tile = map(self._most, ("row", "lane", "tile"))
        return Memory(kept, row, lane, tile, self.frame.lane, self.group)

    def _most(self, kind: str) -> int:
        return max([len(self._reduced(p, kind)) for p in self.plan.passes] + [1])

    @property
    def height(self) -> int:
        """How many rows a tile has."""
        return HEIGHT

    # ---- levels

    def _level(self, index: int) -> str:
        return self.graph.values[index].level

    def _kind(self, level: str) -> str:
        if not is_along(level):
            return "tile"
        return "lane" if self.frame.lane in self.frame.runs(level) else "row"

    def _reduced(self, planned: Pass, kind: str) -> list[int]:
        """The sums of a pass over elements, or every k-th of them, by what they belong to."""
        return [i for i in self._left(planned) if self._kind(self._level(i)) == kind]

    def _place(self, at: str, source: Runs, level: str) -> str:
        return f"({self.frame.place(at, source, self.frame.runs(level))})"

    # ---- shared by all kernels

    def _head(self) -> str:
        frame, memory = self.frame, self.memory
        first = len(TritonPrinter.leading)
        sizes = [f"n{k} = tl.load(row + {first + k - 1})" for k in frame.all[1:]]
        sizes.append(f"n0 = size // {frame.size(frame.all[1:])}")
        return HEAD.format(
            columns=len(self.columns) + 1,
            memory=len(self.columns),
            sizes=_indented(sizes, 1),
            lane=f"n{frame.lane}",
            groups=frame.size(self.group),
            slots=len(self.graph.values),
            hypers=len(self.hypers) + len(self.totals),
            block=BLOCK,
            height=self.height,
            arrays=_indented([f"m{i} = memory + {self._before(i)}" for i in self.plan.kept], 1),
            kept=self._before(None),
            row_sums=memory.row_sums,
            lane_sums=memory.lane_sums,
        )

    def _before(self, index: int | None) -> str:
        """The size of the arrays that are kept before the one of this value."""
        kept = self.plan.kept if index is None else self.plan.kept[: self.plan.kept.index(index)]
        return self.frame.sizes(map(self._level, kept))

    def _number_text(self, i: int) -> str:
        value = self.graph.values[i]
        if value.op == "members":
            return f"{self.frame.members(*value.args)}.to(tl.float64)"
        return super()._number_text(i)

    def _read_array(self, i: int, place: str, mask: str) -> str:
        value = f"tl.load(m{i} + {place}{mask})"
        is_bool = self.graph.values[i].kind == "bool"
        return f"{self._names()[i]} = {value}" + (" != 0" if is_bool else f".to({self.type})")

    # ---- between passes

    def _between(self, k: int) -> str:
        """Kernel k runs before pass k, the last one after all."""
        passes = self.plan.passes
        lines = self._joined(passes[k - 1]) if k else []
        lines.append("tl.debug_barrier()")
        last = k == len(passes)
        nodes = self.plan.final if last else passes[k].scalars
        here = set(nodes) | (set(self._reduced(passes[k - 1], "tile")) if k else set())
        vectors = [] if last else passes[k].vectors
        wanted = self._needs(nodes) | self._needs(vectors)
        if last:
            wanted |= set(self.plan.numbers.values())
        else:
            wanted |= {i for i in passes[k].vector_stores.values() if self._is_number(i)}
            if any(map(self._is_random, passes[k].vector_stores)):
                wanted.add(self.graph.counted)
        lines += self._fetch(wanted - here)
        lines += [f"x{i} = {self._number_text(i)}" for i in nodes]
        lines += [self._keep(i) for i in sorted(here)]
        if last:
            for name, i in self.plan.numbers.items():
                cell = f"pointer(row + {self.columns.index(name)}, tl.float64, False)"
                lines.append(f"tl.store({cell}, x{i})  # {name}")
        else:
            needs = self._needs(vectors) | {i for i in wanted if self._is_number(i)}
            for i in sorted(needs):
                is_bool = self.graph.values[i].kind == "bool"
                lines.append(f"c{i} = x{i}" + ("" if is_bool else f".to({self.type})"))
            lines += self._key_lines(passes[k].vector_stores)
            for level in self.frame.levels:
                lines += self._along(passes[k], level)
        return BETWEEN.format(k=k, head=self._head(), body=_indented(lines, 1))

    def _is_number(self, i: int) -> bool:
        return self.graph.values[i].level == "scalar"

    def _keep(self, i: int) -> str:
        is_bool = self.graph.values[i].kind == "bool"
        return f"tl.store(kept + {i}, {_as_number(f'x{i}', 'tl.float64') if is_bool else f'x{i}'})"

    def _joined(self, planned: Pass) -> list[str]:
        """Add up what the tiles of a pass left behind."""
        frame, lines = self.frame, list[str]()
        for n, i in enumerate(self._reduced(planned, "row")):
            runs, gone = frame.runs(self._level(i)), frame.missing(self._level(i), frame.rows)
            place = f"{frame.place('at', runs, frame.rows)} + {frame.place('j', gone, frame.rows)}"
            source = f"row_parts + {n} * wide * rows + w * rows + {place}"
            lines += self._joining(i, frame.size(gone), "wide", source)
        for n, i in enumerate(self._reduced(planned, "lane")):
            runs = frame.runs(self._level(i))
            tile = f"({frame.place('at', runs, self.group)}) * high + w"
            place = f"({tile}) * cols + {frame.place('at', runs, (frame.lane,))}"
            lines += self._joining(i, "1", "high", f"lane_parts + {n} * tall * cols + {place}")
        for n, i in enumerate(self._reduced(planned, "tile")):
            over = "find_largest" if self.graph.values[i].op == "amax" else "add_up"
            count = self.memory.tile_sums
            lines.append(f"x{i} = {over}(tile_parts + {n}, wide * tall, {count}, 128)")
        return lines

    def _joining(self, i: int, inner: str, outer: str, source: str, term: str = "x") -> list[str]:
        text = JOIN.format(
            length=self.frame.size(self.frame.runs(self._level(i))),
            block=BLOCK,
            inner=inner,
            outer=outer,
            source=source,
            term=term,
            target=f"m{i}",
            kind=self.type,
        )
        return text.splitlines()

    def _along(self, planned: Pass, level: str) -> list[str]:
        """One walk over the values of a level, and the sums of them."""
        values = self.graph.values
        nodes = [i for i in planned.vectors if values[i].level == level]
        of_level = [i for i in planned.reductions if self._level(values[i].args[0].index) == level]
        sums = [i for i in of_level if self._is_number(i)]
        tensors = self.graph.tensors
        stores = {n: i for n, i in planned.vector_stores.items() if tensors[n] == level}
        lines = []
        if nodes or sums or stores:
            length = self.frame.size(self.frame.runs(level))
            body = ["at = b + lane", f"mask = at < {length}"]
            body += self._vector_body(nodes, sums, stores, level)
            lines += [f"r{i} = tl.full([{BLOCK}], 0.0, tl.float64)" for i in sums]
            lines += [f"for b in range(0, {length}, {BLOCK}):", *("    " + x for x in body)]
            for i in sums:
                lines += [f"x{i} = tl.sum(r{i}, 0)", self._keep(i)]
            lines.append("tl.debug_barrier()")
        joined = [line for i in of_level if i not in sums for line in self._summed(i, level)]
        return [*lines, *joined, "tl.debug_barrier()"] if joined else lines

    def _summed(self, i: int, level: str) -> list[str]:
        """A sum of values of a level that leaves some of their axes."""
        frame, base = self.frame, summed(self.graph, i)
        gone = frame.missing(self._level(i), frame.runs(level))
        place = self._place("at", frame.runs(self._level(i)), level)
        source = f"m{base} + {place} + {self._place('j', gone, level)}"
        squared = base != self.graph.values[i].args[0].index
        return self._joining(i, frame.size(gone), "1", source, "x * x" if squared else "x")

    def _vector_body(
        self, nodes: list[int], sums: list[int], stores: dict[str, int], level: str
    ) -> list[str]:
        values, names, here = self.graph.values, self._names(), set(nodes)
        lines: list[str] = []

        def read(index: int) -> None:
            if is_along(values[index].level) and index not in here:
                here.add(index)
                place = self._place("at", self.frame.runs(level), values[index].level)
                lines.append(self._read_array(index, place, ", mask, other=0.0"))

        for i in nodes:
            v = values[i]
            for a in v.args:
                if isinstance(a, Ref):
                    read(a.index)
            if v.op == "load":
                lines.append(f"{names[i]} = {self._read(v.args[0], self._cell, 'at')}")
            else:
                lines.append(f"{names[i]} = {self._expression(v, names, self.compute)}")
            if i in self.plan.kept:
                number = names[i] if v.kind == "float" else _as_number(names[i], self.type)
                lines.append(f"tl.store(m{i} + at, {number}.to(tl.float64), mask)")
        for i in sums:
            source = values[i].args[0].index
            square = values[source].op == "square"
            read(values[source].args[0].index if square else source)
            lines += self._accumulation(i, names)
        for name, i in stores.items():
            read(i)
            lines += self._write(name, names[i], self._cell, "at", "at")
        return lines

    def _cell(self, name: str) -> str:
        kind = TYPES[self.dtypes[name]]
        return f"pointer(row + {self.columns.index(name)}, {kind}, False)"
