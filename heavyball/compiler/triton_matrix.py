"""Prints graphs with sums over rows or columns as Triton: every tensor is walked as a matrix."""

from heavyball.compiler.graph import Ref
from heavyball.compiler.stages import Pass
from heavyball.compiler.triton_printer import (
    BLOCK,
    HEIGHT,
    PRELUDE,
    TYPES,
    TritonPrinter,
    _as_number,
    _indented,
)

MATRIX_PRELUDE = '''\
@triton.jit
def join(target, parts, count, length, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the arrays that the tiles left behind, in their order, into one."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        here = lane < length - start
        total = tl.full([BLOCK], 0.0, tl.float64)
        for n in range(0, count):
            total += tl.load(parts + n * length + start + lane, here, other=0.0)
        tl.store(target + start + lane, total.to(KIND).to(tl.float64), here)
'''

HEAD = """\
    row = table + index * {columns}
    size = tl.load(row)
    cols = tl.load(row + {width})
    rows = size // cols
    kept = scratch + index * {slots}
    group = hyper + tl.load(row + 1) * {hypers}
    wide = (cols + {block} - 1) // {block}
    tall = (rows + {height} - 1) // {height}
    lane = tl.arange(0, {block})
    memory = pointer(row + {memory}, tl.float64, False)
{arrays}
    row_parts = memory + {kept_rows} * rows + {kept_cols} * cols
    col_parts = row_parts + {row_sums} * wide * rows
    tile_parts = col_parts + {col_sums} * tall * cols
"""
BETWEEN = """\
@triton.jit
def between_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
{head}
{body}
"""
TILE = """\
@triton.jit
def pass_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * piece)
    part = tl.load(chunks + 2 * piece + 1)
{head}
{begin}
    top = part // wide * {height}
    left = part % wide * {block}
    mask = lane < cols - left
{columns}
    for r in range(top, tl.minimum(top + {height}, rows)):
        start = r * cols + left
{body}
{end}
"""


class TritonMatrixPrinter(TritonPrinter):
    """Prints one graph with a number of columns in each row of the table.

    A program of a pass walks through a tile of the matrix. Between the passes one program per tensor
    adds up what the tiles left behind, and computes the values per row, per column and per tensor.
    The last column of the table points to the memory for that, see `memory_size`.
    """

    leading = ("numel", "group", "stream", "columns")

    def source(self) -> str:
        """The whole module."""
        parts = [PRELUDE, MATRIX_PRELUDE, *self._formats()]
        for k, planned in enumerate(self.plan.passes):
            parts += [self._between(k), self._block(k, planned) + self._kernel(k, planned)]
        return "\n\n".join([*parts, self._between(len(self.plan.passes))])

    @property
    def functions(self) -> list[str]:
        """The kernels in the order in which they run."""
        count = len(self.plan.passes)
        steps = [name for k in range(count) for name in (f"between_{k}", f"pass_{k}")]
        return [*steps, f"between_{count}"]

    @property
    def counts(self) -> tuple[int, ...]:
        """Arrays per row and per column to keep; sums per row, per column and per tensor of a pass."""
        levels = [self.graph.values[i].level for i in self.plan.kept]
        most = [
            max([len(self._reduced(p, level)) for p in self.plan.passes] + [1])
            for level in ("row", "col", "scalar")
        ]
        return (levels.count("row"), levels.count("col"), *most)

    def _reduced(self, planned: Pass, target: str) -> list[int]:
        """The sums of a pass over elements, by what they belong to."""
        return [i for i in self._sums(planned) if self.graph.values[i].level == target]

    # ---- shared by all kernels

    def _head(self) -> str:
        kept_rows, kept_cols, row_sums, col_sums, _ = self.counts
        return HEAD.format(
            columns=len(self.columns) + 1,
            memory=len(self.columns),
            width=self.columns.index("columns"),
            slots=len(self.graph.values),
            hypers=len(self.hypers) + len(self.totals),
            block=BLOCK,
            height=HEIGHT,
            arrays=_indented(self._arrays(), 1),
            kept_rows=kept_rows,
            kept_cols=kept_cols,
            row_sums=row_sums,
            col_sums=col_sums,
        )

    def _arrays(self) -> list[str]:
        lines, rows, cols = [], 0, 0
        for i in self.plan.kept:
            lines.append(f"m{i} = memory + {rows} * rows + {cols} * cols")
            is_row = self.graph.values[i].level == "row"
            rows, cols = rows + is_row, cols + (not is_row)
        return lines

    def _number_text(self, i: int) -> str:
        sizes = {"rows": "rows.to(tl.float64)", "columns": "cols.to(tl.float64)"}
        return sizes.get(self.graph.values[i].op) or super()._number_text(i)

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
        here = set(nodes) | (set(self._reduced(passes[k - 1], "scalar")) if k else set())
        vectors = [] if last else [*passes[k].rows, *passes[k].cols]
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
            lines += self._along(passes[k], "row") + self._along(passes[k], "col")
        return BETWEEN.format(k=k, head=self._head(), body=_indented(lines, 1))

    def _is_number(self, i: int) -> bool:
        return self.graph.values[i].level == "scalar"

    def _keep(self, i: int) -> str:
        is_bool = self.graph.values[i].kind == "bool"
        return f"tl.store(kept + {i}, {_as_number(f'x{i}', 'tl.float64') if is_bool else f'x{i}'})"

    def _joined(self, planned: Pass) -> list[str]:
        """Add up what the tiles of a pass left behind."""
        lines = []
        for n, i in enumerate(self._reduced(planned, "row")):
            parts = f"row_parts + {n} * wide * rows"
            lines.append(f"join(m{i}, {parts}, wide, rows, {self.type}, {BLOCK})")
        for n, i in enumerate(self._reduced(planned, "col")):
            parts = f"col_parts + {n} * tall * cols"
            lines.append(f"join(m{i}, {parts}, tall, cols, {self.type}, {BLOCK})")
        for n, i in enumerate(self._reduced(planned, "scalar")):
            over = "find_largest" if self.graph.values[i].op == "amax" else "add_up"
            lines.append(f"x{i} = {over}(tile_parts + {n}, wide * tall, {self.counts[-1]}, 128)")
        return lines

    def _along(self, planned: Pass, level: str) -> list[str]:
        """One walk over the values per row or per column."""
        values = self.graph.values
        nodes = planned.rows if level == "row" else planned.cols
        sums = [i for i in planned.reductions if values[values[i].args[0].index].level == level]
        stores = {n: i for n, i in planned.vector_stores.items() if self._level_of(n) == level}
        if not (nodes or sums or stores):
            return []
        length = f"{level}s"
        lines = [f"r{i} = tl.full([{BLOCK}], 0.0, tl.float64)" for i in sums]
        body = ["at = b + lane", f"mask = at < {length}"]
        body += self._vector_body(nodes, sums, stores, level)
        lines += [f"for b in range(0, {length}, {BLOCK}):", *("    " + line for line in body)]
        for i in sums:
            lines += [f"x{i} = tl.sum(r{i}, 0)", self._keep(i)]
        return [*lines, "tl.debug_barrier()"]

    def _level_of(self, name: str) -> str:
        loads = (v for v in self.graph.values if v.op == "load" and v.args == (name,))
        return next(loads).level

    def _vector_body(
        self, nodes: list[int], sums: list[int], stores: dict[str, int], level: str
    ) -> list[str]:
        values, names, here = self.graph.values, self._names(), set(nodes)
        lines: list[str] = []

        def read(index: int) -> None:
            if values[index].level == level and index not in here:
                here.add(index)
                lines.append(self._read_array(index, "at", ", mask, other=0.0"))

        for i in nodes:
            v = values[i]
            for a in v.args:
                if isinstance(a, Ref):
                    read(a.index)
            if v.op == "load":
                lines.append(f"{names[i]} = {self._read(v.args[0], self._cell, 'at')}")
            else:
                lines.append(f"{names[i]} = {self._expression(v, names, self.type)}")
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

    # ---- tiles

    def _vectors_read(self, planned: Pass, level: str) -> list[int]:
        read = {i for i in self._body(planned)[1] if self.graph.values[i].level == level}
        return sorted(read)

    def _sums(self, planned: Pass) -> list[int]:
        values = self.graph.values
        return [i for i in planned.reductions if values[values[i].args[0].index].level == "element"]

    def _signature(self, planned: Pass) -> list[str]:
        names = self._names()
        vectors = self._vectors_read(planned, "row") + self._vectors_read(planned, "col")
        found = [f"c{i}" for i in sorted(self._walk_needs(planned))]
        return found + [names[i] for i in vectors] + [f"r{i}" for i in self._sums(planned)]

    def _kernel(self, k: int, planned: Pass) -> str:
        needs = self._walk_needs(planned)
        begin = self._fetch(needs)
        for i in sorted(needs):
            is_bool = self.graph.values[i].kind == "bool"
            begin.append(f"c{i} = x{i}" + ("" if is_bool else f".to({self.type})"))
        begin += self._key_lines(planned.stores)
        begin += [self._pointer(n) for n in self._touched(planned)]
        columns = [
            self._read_array(i, "left + lane", ", mask, other=0.0")
            for i in self._vectors_read(planned, "col")
        ]
        columns += [self._zero(i) for t in ("col", "scalar") for i in self._reduced(planned, t)]
        return TILE.format(
            k=k,
            head=self._head(),
            begin=_indented(begin, 1),
            height=HEIGHT,
            block=BLOCK,
            columns=_indented(columns, 1),
            body=_indented(self._row_body(k, planned), 2),
            end=_indented(self._tile_end(planned), 1),
        )

    def _row_body(self, k: int, planned: Pass) -> list[str]:
        rows = self._reduced(planned, "row")
        lines = [self._read_array(i, "r", "") for i in self._vectors_read(planned, "row")]
        lines += [self._zero(i) for i in rows]
        lines.append(self._call(k, planned, "start", "mask"))
        for n, i in enumerate(rows):
            target = f"row_parts + {n} * wide * rows + part % wide * rows + r"
            lines.append(f"tl.store({target}, tl.sum(r{i}, 0))")
        return lines

    def _tile_end(self, planned: Pass) -> list[str]:
        lines = []
        for n, i in enumerate(self._reduced(planned, "col")):
            target = f"col_parts + {n} * tall * cols + part // wide * cols + left + lane"
            lines.append(f"tl.store({target}, r{i}, mask)")
        for n, i in enumerate(self._reduced(planned, "scalar")):
            over = "max" if self.graph.values[i].op == "amax" else "sum"
            lines.append(
                f"tl.store(tile_parts + part * {self.counts[-1]} + {n}, tl.{over}(r{i}, 0))"
            )
        return lines


def memory_size(counts: tuple[int, ...], rows: int, cols: int) -> tuple[int, int]:
    """How many float64 numbers a matrix needs between the passes, and its number of tiles."""
    kept_rows, kept_cols, row_sums, col_sums, sums = counts
    wide, tall = -(-cols // BLOCK), -(-rows // HEIGHT)
    arrays = kept_rows * rows + kept_cols * cols
    return (
        arrays + row_sums * wide * rows + col_sums * tall * cols + sums * wide * tall,
        wide * tall,
    )
