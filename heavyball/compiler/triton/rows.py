"""Spells kernels with values along some of the axes as Triton: every tensor is walked tile by tile."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from heavyball.compiler.frontend.ops import NotPrintableError
from heavyball.compiler.frontend.symbols import Input, Var
from heavyball.compiler.passes.axes import Frame, FrameText, Runs, is_along
from heavyball.compiler.passes.loops import (
    Fold,
    Keep,
    Kernel,
    Loop,
    Read,
    Reduce,
    Statement,
    Store,
    Walk,
)
from heavyball.compiler.triton.printer import BLOCK, TritonPrinter, indented
from heavyball.compiler.triton.templates import BETWEEN, HEAD, JOIN, PRELUDE, TILE

# A tile of a matrix is a block wide and has so many rows.
HEIGHT = 64


@dataclass(frozen=True)
class Memory:
    """The memory of a tensor between walks: arrays and partial sums.

    kept: the runs of each array. row_sums, lane_sums, tile_sums: how many sums of a walk belong to
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


class TritonRowPrinter(TritonPrinter):
    """Spells walks over tiles, a block of the lane of some rows, and the kernels between them.

    One program per tensor adds up what the tiles of a walk left behind, and computes arrays and
    numbers. Where sums belong to places along the lane, the rows of a tile are of one group, for which
    the sum has one value each; rows are numbered by group, and then by `a`. The last column of the table
    points to the memory, see `Memory`.

    Errors: NotPrintableError for sums along the lane that belong to different groups of rows.
    """

    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        assert kernel.frame is not None
        self.frame: Frame = kernel.frame
        for c in kernel.tensors:
            if c.scale is not None:
                where = "walked by rows, where a block of it may begin in one and end in the next"
                raise NotPrintableError(f"{c.code_bits}-bit state ({c.name}) {where}, on CUDA")
            if c.is_bits and self.frame.period is not None:
                raise NotPrintableError(f"bits ({c.name}) in rows with a period, on CUDA")
        self.sizes = FrameText(self.frame, lambda k: f"n{k}", "//", kernel.kept)
        self.stride = "" if self.frame.period is None else f" * n{self.frame.period}"
        self.lanes = f"lane{self.stride}"
        self.group = self._group()
        self.memory = self._memory()

    def _group(self) -> Runs:
        lanes = [v for w in self.kernel.walks for s in w.sums if self._kind(v := s.var) == "lane"]
        found = {self.frame.without_lane(v.level) for v in lanes}
        if len(found) > 1:
            raise NotPrintableError("sums over different axes in one walk over rows, on CUDA")
        return found.pop() if found else ()

    def _memory(self) -> Memory:
        kept = tuple(self.frame.runs(v.level) for v in self.kernel.kept)
        rows, lanes, tiles = (
            max([len(self._sums(w, kind)) for w in self.kernel.walks] + [1])
            for kind in ("row", "lane", "tile")
        )
        return Memory(kept, rows, lanes, tiles, self.frame.lane, self.group)

    def _kind(self, v: Var) -> str:
        """What a value is one for each of: the whole tile, places along the lane, or rows."""
        if not is_along(v.level):
            return "tile"
        return "lane" if self.frame.has_lane(v.level) else "row"

    def _sums(self, walk: Walk, kind: str) -> list[Reduce]:
        """The sums of a walk over elements, or every k-th of them, by what they belong to."""
        return [s for s in walk.sums if self._kind(s.var) == kind]

    def _place(self, at: str, source: Runs, level: str) -> str:
        return f"({self.sizes.place(at, source, self.frame.runs(level))})"

    # ---- shared by all kernels

    def _given(self, loop: Loop) -> list[str]:
        side = ["side"] if any(c.is_bits for c in loop.columns) else []
        return [*side, *super()._given(loop)]

    def _side(self) -> list[str]:
        """How many values a row of bits has."""
        if not any(c.is_bits for c in self.kernel.tensors):
            return []
        assert self.kernel.view is not None
        behind = [k for k in self.frame.all if self.frame.starts[k] >= self.kernel.view.rows]
        return [f"side = {self.sizes.size(behind)}"]

    def source(self) -> str:
        """The whole module."""
        parts = [PRELUDE, *self._formats()]
        for k, walk in enumerate(self.kernel.walks):
            parts.append(self._between(k))
            if self._walked(walk):
                blocks = self._slice_block(k, walk) + self._block(k, walk)
                parts.append(blocks + self._kernel(k, walk))
        return "\n\n".join([*parts, self._between(len(self.kernel.walks))])

    @property
    def functions(self) -> list[str]:
        """The kernels in the order in which they run."""
        steps = list[str]()
        for k, walk in enumerate(self.kernel.walks):
            steps += [f"between_{k}", *([f"pass_{k}"] if self._walked(walk) else [])]
        return [*steps, f"between_{len(self.kernel.walks)}"]

    @staticmethod
    def _walked(walk: Walk) -> bool:
        """Whether there is anything to do for elements."""
        return any(loop.body for loop in walk.loops)

    def _head(self) -> str:
        frame, kernel = self.frame, self.kernel
        first = len(kernel.leading) - len(frame.later)
        sizes = [f"n{k} = tl.load(row + {first + k - 1})" for k in frame.all[1:]]
        sizes.append(f"n0 = size // {self.sizes.size(frame.all[1:])}")
        sizes += self._side()
        arrays = [f"m{v.index} = memory + {self.sizes.before(v)}" for v in kernel.kept]
        return HEAD.format(
            columns=len(kernel.columns) + 1,
            memory=len(kernel.columns),
            sizes=indented(sizes, 1),
            lane=f"n{frame.lane}",
            groups=self.sizes.size(self.group),
            slots=kernel.slots,
            hypers=self.width,
            block=BLOCK,
            height=HEIGHT,
            arrays=indented(arrays, 1),
            kept=self.sizes.before(None),
            row_sums=self.memory.row_sums,
            lane_sums=self.memory.lane_sums,
        )

    def _input(self, e: Input) -> str:
        if e.name == "members":
            return f"{self.sizes.members(*e.args)}.to(tl.float64)"
        return super()._input(e)

    def _read_array(self, v: Var, place: str, mask: str) -> str:
        value = f"tl.load(m{v.index} + {place}{mask})"
        change = " != 0" if v.type == torch.bool else f".to({self.type})"
        return f"{self.name(v)} = {value}{change}"

    # ---- between walks

    def _between(self, k: int) -> str:
        """Kernel k runs before walk k, the last one after all."""
        walks = self.kernel.walks
        lines = [line for s in (self._joined(walks[k - 1]) if k else ()) for line in s]
        lines.append("tl.debug_barrier()")
        lets = self.kernel.final if k == len(walks) else walks[k].numbers
        arrays = [] if k == len(walks) else walks[k].arrays
        loops = [a for a in arrays if isinstance(a, Loop)]
        here = {let.var for let in lets}
        here |= {s.var for s in self._sums(walks[k - 1], "tile")} if k else set()
        wanted = self._needs(lets) | self._loop_needs(loops)
        wanted |= set(self.kernel.written.values()) if k == len(walks) else set()
        lines += self.fetch(wanted - here)
        lines += self.lets(lets)
        lines += [self.keep(v) for v in sorted(here, key=lambda v: v.index)]
        lines += self.write_numbers() if k == len(walks) else []
        lines += self.constants(self._loop_needs(loops))
        lines += [*self.keys(loops), *self.pointers(loops, "False")]
        for part in arrays:
            lines += self._folded(part) if isinstance(part, Fold) else self._along(part)
        return BETWEEN.format(k=k, head=self._head(), body=indented(lines, 1))

    def _joined(self, walk: Walk) -> Iterable[list[str]]:
        """Add the partial sums of a walk's tiles."""
        frame, sizes = self.frame, self.sizes
        for n, s in enumerate(self._sums(walk, "row")):
            runs, gone = frame.runs(s.var.level), frame.missing(s.var.level, frame.rows)
            place = f"{sizes.place('at', runs, frame.rows)} + {sizes.place('j', gone, frame.rows)}"
            source = f"row_parts + {n} * wide * rows + w * rows + {place}"
            yield self._joining(
                s.var, sizes.size(gone), "wide", source, how=s.how, over=self._over(s)
            )
        for n, s in enumerate(self._sums(walk, "lane")):
            runs = frame.runs(s.var.level)
            tile = f"({sizes.place('at', runs, self.group)}) * high + w"
            place = f"({tile}) * cols + {sizes.place('at', runs, (frame.lane,))}"
            source = f"lane_parts + {n} * tall * cols + {place}"
            yield self._joining(s.var, "1", "high", source, how=s.how, over=self._over(s))
        for n, s in enumerate(self._sums(walk, "tile")):
            yield [self.joined(s, f"tile_parts + {n}", "wide * tall", self.memory.tile_sums)]

    def _over(self, s: Reduce) -> str:
        """What a complete sum is divided by."""
        members = self.sizes.members("element", s.var.level)
        return f" / {members}.to(tl.float64)" if s.is_mean else ""

    def _joining(
        self,
        v: Var,
        inner: str,
        outer: str,
        source: str,
        term: str = "x",
        how: str = "add",
        over: str = "",
    ) -> list[str]:
        largest = how == "max"
        text = JOIN.format(
            length=self.sizes.level(v.level),
            block=BLOCK,
            inner=inner,
            outer=outer,
            source=source,
            start='float("-inf")' if largest else "0.0",
            joined=f"larger(total, {term})" if largest else f"total + {term}",
            target=f"m{v.index}",
            kind=self.type,
            over=over,
        )
        return text.splitlines()

    def _along(self, loop: Loop) -> list[str]:
        """One walk over the values of a level, and the sums of them."""
        length = self.sizes.level(loop.level)
        body = ["at = b + lane", f"mask = at < {length}"]
        body += [line for s in loop.body for line in self._of_array(s, loop)]
        lines = [f"r{s.var.index} = tl.full([{BLOCK}], 0.0, tl.float64)" for s in loop.sums]
        lines += [f"for b in range(0, {length}, {BLOCK}):", *("    " + x for x in body)]
        for s in loop.sums:
            lines += [f"x{s.var.index} = {self.total(s)}", self.keep(s.var)]
        return [*lines, "tl.debug_barrier()"]

    def _of_array(self, s: Statement, loop: Loop) -> list[str]:
        if isinstance(s, Keep):
            value = self.expr(s.var.to(self.kernel.compute))
            return [f"tl.store(m{s.var.index} + at, {value}.to(tl.float64), mask)"]
        if isinstance(s, Read):
            place = self._place("at", self.frame.runs(loop.level), s.var.level)
            return [self._read_array(s.var, place, ", mask, other=0.0")]
        return self.statements(s, "at", "at")

    def _folded(self, fold: Fold) -> list[str]:
        """An array of sums over one of more axes."""
        level, source = fold.var.level, fold.source.level
        gone = self.frame.missing(level, self.frame.runs(source))
        place = f"{self._place('at', self.frame.runs(level), source)} + {self._place('j', gone, source)}"
        term = "x * x" if fold.squared else "x"
        found = f"m{fold.source.index} + {place}"
        return [
            *self._joining(fold.var, self.sizes.size(gone), "1", found, term),
            "tl.debug_barrier()",
        ]

    # ---- walks over tiles

    def _kernel(self, k: int, walk: Walk) -> str:
        needs = self._loop_needs(walk.loops)
        begin = [*self.fetch(needs), *self.constants(needs)]
        begin += [*self.keys(walk.loops), *self.pointers(walk.loops)]
        once = [v for v in walk.elements.arrays if self._is_same_in_tile(v)]
        columns = [self._read_lanes(v, "g", self.group) for v in once]
        columns += [self.zero(walk, s) for t in ("lane", "tile") for s in self._sums(walk, t)]
        columns += self._slice_of_tile(k, walk)
        rows = self.frame.rows
        rest = tuple(k for k in rows if k not in self.group)
        place = self.sizes.place
        return TILE.format(
            k=k,
            head=self._head(),
            begin=indented(begin, 1),
            height=HEIGHT,
            block=BLOCK,
            columns=indented(columns, 1),
            row=f"{place('a', rest, rows)} + {place('g', self.group, rows)}",
            start=f"{place('r', rows, self.frame.all)} + left{self.stride}",
            body=indented(self._row_body(k, walk, once), 2),
            end=indented(self._tile_end(walk), 1),
        )

    def _slice_of_tile(self, k: int, walk: Walk) -> list[str]:
        """The walk over a program's share of a slice, whatever its own rows are.

        Errors: NotPrintableError if another program might write what it looks at before it does.
        """
        if walk.slices is None:
            return []
        stored = {s.column for s in walk.elements.of(Store)}
        if stored & set(walk.slices.columns):
            raise NotPrintableError("slices of what the same walk over rows writes, on CUDA")
        share = f"(({self._end_of_slice('size')} + wide * tall - 1) // (wide * tall))"
        end = f"tl.minimum(part * {share} + {share}, {self._end_of_slice('size')})"
        return self.walk_slice(k, walk.slices, f"part * {share}", end)

    def _is_same_in_tile(self, v: Var) -> bool:
        return self._kind(v) == "lane" and self.frame.without_lane(v.level) == self.group

    def _read_lanes(self, v: Var, at: str, source: Runs) -> str:
        place = f"{self._place(at, source, v.level)} + (left + lane){self.stride}"
        return self._read_array(v, place, ", mask, other=0.0")

    def _row_body(self, k: int, walk: Walk, once: list[Var]) -> list[str]:
        lines = []
        for v in walk.elements.arrays:
            if self._kind(v) == "row":
                place = self._place("r", self.frame.rows, v.level)
                lines.append(self._read_array(v, place, ""))
            elif v not in once:
                lines.append(self._read_lanes(v, "r", self.frame.rows))
        sums = self._sums(walk, "row")
        lines += [self.zero(walk, s) for s in sums]
        lines.append(self.call(k, walk, "start", "mask"))
        for n, s in enumerate(sums):
            target = f"row_parts + {n} * wide * rows + part % wide * rows + r"
            lines.append(f"tl.store({target}, {self.total(s)})")
        return lines

    def _tile_end(self, walk: Walk) -> list[str]:
        lines = []
        for n, s in enumerate(self._sums(walk, "lane")):
            target = f"lane_parts + {n} * tall * cols + tile * cols + left + lane"
            lines.append(f"tl.store({target}, r{s.var.index}, mask)")
        for n, s in enumerate(self._sums(walk, "tile")):
            target = f"tile_parts + part * {self.memory.tile_sums} + {n}"
            lines.append(f"tl.store({target}, {self.total(s)})")
        return lines
