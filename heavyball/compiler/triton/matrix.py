"""Prints graphs with values along some of the axes as Triton: every tensor is walked row by row."""

from collections.abc import Iterable

from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.compiler.passes.axes import Runs, is_along
from heavyball.compiler.passes.stages import Pass
from heavyball.compiler.triton.arrays import TritonArrayPrinter
from heavyball.compiler.triton.printer import BLOCK, PRELUDE, _indented

TILE = """\
@triton.jit
def pass_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * piece)
    part = tl.load(chunks + 2 * piece + 1)
{head}
{begin}
    tile = part // wide
    g = tile // high
    top = tile % high * {height}
    left = part % wide * {block}
    mask = lane < cols - left
{columns}
    for a in range(top, tl.minimum(top + {height}, span)):
        r = {row}
        start = {start}
{body}
{end}
"""


class TritonMatrixPrinter(TritonArrayPrinter):
    """Prints the passes as walks over tiles: a block of the lane of some rows.

    Where sums belong to places along the lane, the rows of a tile are of one group, for which the sum
    has one value each; rows are numbered by group, and then by `a`.
    """

    def source(self) -> str:
        """The whole module."""
        parts = [PRELUDE, *self._formats()]
        for k, planned in enumerate(self.plan.passes):
            blocks = self._slice_block(k, planned) + self._block(k, planned)
            parts += [self._between(k), blocks + self._kernel(k, planned)]
        return "\n\n".join([*parts, self._between(len(self.plan.passes))])

    @property
    def functions(self) -> list[str]:
        """The kernels in the order in which they run."""
        count = len(self.plan.passes)
        steps = [name for k in range(count) for name in (f"between_{k}", f"pass_{k}")]
        return [*steps, f"between_{count}"]

    def _vectors_read(self, planned: Pass) -> list[int]:
        return sorted(i for i in self._body(planned)[1] if is_along(self._level(i)))

    def _signature(self, planned: Pass) -> list[str]:
        names = self._names()
        found = [f"c{i}" for i in sorted(self._scalars_of(self._body(planned)[1]))]
        found += [names[i] for i in self._vectors_read(planned)]
        return found + [f"r{i}" for i in self._sums(planned)]

    def _kernel(self, k: int, planned: Pass) -> str:
        needs = self._walk_needs(planned)
        begin = self._fetch(needs)
        for i in sorted(needs):
            is_bool = self.graph.values[i].kind == "bool"
            begin.append(f"c{i} = x{i}" + ("" if is_bool else f".to({self.type})"))
        begin += self._key_lines({**planned.stores, **planned.slice_stores})
        touched = {*self._touched(planned), *self._slice_touched(planned)}
        begin += [self._pointer(n) for n in sorted(touched)]
        once = [i for i in self._vectors_read(planned) if self._is_same_in_tile(i)]
        columns = [self._read_lanes(i, "g", self.group) for i in once]
        columns += [self._zero(i) for t in ("lane", "tile") for i in self._reduced(planned, t)]
        columns += self._slice_of_tile(k, planned)
        frame, rows = self.frame, self.frame.rows
        rest = tuple(k for k in rows if k not in self.group)
        return TILE.format(
            k=k,
            head=self._head(),
            begin=_indented(begin, 1),
            height=self.height,
            block=BLOCK,
            columns=_indented(columns, 1),
            row=f"{frame.place('a', rest, rows)} + {frame.place('g', self.group, rows)}",
            start=f"{frame.place('r', rows, frame.all)} + left{self.stride}",
            body=_indented(self._row_body(k, planned, once), 2),
            end=_indented(self._tile_end(planned), 1),
        )

    def _slice_of_tile(self, k: int, planned: Pass) -> list[str]:
        """The walk over a program's share of a slice, whatever its own rows are.

        Errors: NotPrintableError if another program might write what it looks at before it does.
        """
        if not planned.slices:
            return []
        picked = {self.graph.values[i].args[0] for i in planned.slices if self._is_pick(i)}
        if picked & planned.stores.keys():
            raise NotPrintableError("slices of what the same walk over rows writes, on CUDA")
        share = f"(({self._end_of_slice('size')} + wide * tall - 1) // (wide * tall))"
        end = f"tl.minimum(part * {share} + {share}, {self._end_of_slice('size')})"
        return self._walk_slice(k, planned, f"part * {share}", end)

    def _is_pick(self, i: int) -> bool:
        return self.graph.values[i].op == "pick"

    def _is_same_in_tile(self, i: int) -> bool:
        level = self._level(i)
        return self._kind(level) == "lane" and self.frame.without_lane(level) == self.group

    def _read_lanes(self, i: int, at: str, source: Runs) -> str:
        place = f"{self._place(at, source, self._level(i))} + (left + lane){self.stride}"
        return self._read_array(i, place, ", mask, other=0.0")

    def _row_body(self, k: int, planned: Pass, once: Iterable[int]) -> list[str]:
        lines = []
        for i in self._vectors_read(planned):
            if self._kind(self._level(i)) == "row":
                place = self._place("r", self.frame.rows, self._level(i))
                lines.append(self._read_array(i, place, ""))
            elif i not in once:
                lines.append(self._read_lanes(i, "r", self.frame.rows))
        sums = self._reduced(planned, "row")
        lines += [self._zero(i) for i in sums]
        lines.append(self._call(k, planned, "start", "mask"))
        for n, i in enumerate(sums):
            target = f"row_parts + {n} * wide * rows + part % wide * rows + r"
            lines.append(f"tl.store({target}, tl.sum(r{i}, 0))")
        return lines

    def _tile_end(self, planned: Pass) -> list[str]:
        lines = []
        for n, i in enumerate(self._reduced(planned, "lane")):
            target = f"lane_parts + {n} * tall * cols + tile * cols + left + lane"
            lines.append(f"tl.store({target}, r{i}, mask)")
        for n, i in enumerate(self._reduced(planned, "tile")):
            over = "max" if self.graph.values[i].op == "amax" else "sum"
            target = f"tile_parts + part * {self.memory.tile_sums} + {n}"
            lines.append(f"tl.store({target}, tl.{over}(r{i}, 0))")
        return lines
