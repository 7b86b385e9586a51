"""Prints graphs with sums over rows or columns: every tensor is walked as a matrix."""

from typing import Any

from heavyball.compiler.cpp import Printer, _kind, refuse_codes
from heavyball.compiler.graph import Ref
from heavyball.compiler.stages import Pass

# A large matrix is cut into this many blocks of rows, whatever the number of threads.
BLOCKS = 16
# As in cpp.py; more, since the steps of a few rows are not a multiple of a vector.
STEPS = 192


class MatrixPrinter(Printer):
    """Prints one graph with a number of columns in each row of the table.

    Values per row and per column that are needed later are kept in `memory`, one array each.
    """

    leading = ("numel", "group", "stream", "columns")
    first = "first * COLS"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        refuse_codes(
            self, "walked by rows, where a block of it may begin in one and end in the next"
        )

    def source(self) -> str:
        """The whole file."""
        text = super().source()
        return text.replace("#include <limits>", "#include <limits>\n#include <vector>")

    def _along(self, index: int) -> str:
        return "ROWS" if self.graph.values[index].level == "row" else "COLS"

    def _memory(self) -> list[str]:
        """Names for the arrays of kept values."""
        lines, rows, cols = [], 0, 0
        for i in self.plan.kept:
            lines.append(
                f"    T* __restrict m{i} = memory + {rows} * ROWS + {cols} * COLS; (void)m{i};"
            )
            rows, cols = rows + (self._along(i) == "ROWS"), cols + (self._along(i) == "COLS")
        return lines

    def _kept(self, level: str) -> int:
        return sum(self.graph.values[i].level == level for i in self.plan.kept)

    def _reduced(self, planned: Pass, source: str, target: str) -> list[int]:
        """The sums of a pass from one level to another."""
        values = self.graph.values
        return [
            i
            for i in planned.reductions
            if values[i].level == target and values[values[i].args[0].index].level == source
        ]

    def _to_scalar(self, planned: Pass) -> list[int]:
        """The sums that a block of rows leaves behind, in the order of its parts."""
        return self._reduced(planned, "element", "scalar") + self._reduced(
            planned, "slice", "scalar"
        )

    # ---- one per row, one per column

    def _vectors(self, name: str, planned: Pass | None, level: str) -> str:
        along = "ROWS" if level == "row" else "COLS"
        head = f"PART void {name}(const int64_t* row, double* s, T* memory) {{"
        lines = [head, *self._memory()]
        nodes = [] if planned is None else (planned.rows if level == "row" else planned.cols)
        sums = [] if planned is None else self._reduced(planned, level, "scalar")
        stores = [] if planned is None else self._vector_stores(planned, level)
        if nodes or sums or stores:
            body, used = self._vector_body(nodes, sums, stores, level)
            lines += self._keys(name for name, _ in stores)
            lines += [self._constant(i) for i in sorted(used)]
            lines += [f"    double r{i} = 0;" for i in sums]
            lines += [f"    for (int64_t i = 0; i < {along}; ++i) {{"]
            lines += [f"        {line}" for line in body]
            lines += ["    }"]
            lines += [f"    s[{i}] = r{i};" for i in sums]
        return "\n".join([*lines, "}\n"])

    def _vector_stores(self, planned: Pass, level: str) -> list[tuple[str, int]]:
        return [(n, i) for n, i in planned.vector_stores.items() if self.graph.tensors[n] == level]

    def _vector_body(
        self, nodes: list[int], sums: list[int], stores: list[tuple[str, int]], level: str
    ) -> tuple[list[str], set[int]]:
        names, here, used, lines = self._names(), set(nodes), set[int](), []
        values = self.graph.values

        def read(index: int) -> None:
            if values[index].level == level and index not in here:
                here.add(index)
                lines.append(f"const {_kind(self.graph, index)} {names[index]} = m{index}[i];")
            elif values[index].level == "scalar":
                used.add(index)

        for i in nodes:
            v = values[i]
            for a in v.args:
                if isinstance(a, Ref):
                    read(a.index)
            is_load = v.op == "load"
            text = (
                self._load(v.args[0], self._tensor) if is_load else self._expression(v, names, "T")
            )
            lines.append(f"const {_kind(self.graph, i)} {names[i]} = {text};")
            if i in self.plan.kept:
                lines.append(f"m{i}[i] = {names[i]};")
        for i in sums:
            source = values[values[i].args[0].index]
            read(values[i].args[0].index)
            if source.op in ("square", "to_float"):  # taken from what they were made of
                read(source.args[0].index)
            lines.append(self._accumulate(i, names))
        for name, i in stores:
            read(i)
            lines.append(self._store(name, names[i], self._tensor))
        return lines, used

    # ---- elements

    def _pass(self, k: int, planned: Pass) -> str:
        to_scalar = self._reduced(planned, "element", "scalar")
        to_row = self._reduced(planned, "element", "row")
        to_col = self._reduced(planned, "element", "col")
        of_slice = self._reduced(planned, "slice", "scalar")
        body, used = self._body(planned)
        body = [line for line in body if not line.startswith("r")]
        sliced, used_there = self._slice(planned, of_slice)
        used |= used_there
        names = self._names()
        body += [self._accumulate(i, names) for i in to_scalar + to_row]
        body += [self._accumulate(i, names).replace(f"r{i} +=", f"part_{i}[c] +=") for i in to_col]
        rows, cols = self._vectors_read(planned)
        lines = [
            self._vectors(f"rows_{k}", planned, "row"),
            self._vectors(f"cols_{k}", planned, "col"),
        ]
        lines.append(
            f"PART void pass_{k}(const int64_t* row, const double* s, T* memory,"
            " int64_t low, int64_t high, double* part, double* sums) {"
        )
        lines += [
            *self._memory(),
            *self._pointers(planned),
            *self._keys({**planned.stores, **planned.slice_stores}),
        ]
        lines += [self._constant(i) for i in sorted(used)]
        lines += [
            f"    double* __restrict part_{i} = sums + {n} * COLS;\n"
            f"    for (int64_t c = 0; c < COLS; ++c) part_{i}[c] = 0;"
            for n, i in enumerate(to_col)
        ]
        lines += [
            f"    {self._sum_type(i)} r{i} = {self._neutral(i)};" for i in to_scalar + of_slice
        ]
        walk: list[str] = []
        if planned.stores or to_scalar or to_row or to_col:
            walk += ["    for (int64_t r = low; r < high; ++r) {"]
            walk += [f"        const {_kind(self.graph, i)} k{i} = m{i}[r];" for i in sorted(rows)]
            walk += [f"        {self._sum_type(i)} r{i} = 0;" for i in to_row]
            walk += [f"        #pragma omp simd{self._clauses(to_scalar + to_row)}"]
            walk += ["        for (int64_t c = 0; c < COLS; ++c) {"]
            walk += ["            const int64_t i = r * COLS + c;"]
            walk += [
                f"            const {_kind(self.graph, i)} w{i} = m{i}[c];" for i in sorted(cols)
            ]
            walk += [f"            {line}" for line in body]
            walk += ["        }"]
            walk += [f"        m{i}[r] = (T)r{i};" for i in to_row]
            walk += ["    }"]
        lines += self._in_bits(planned, walk, sliced) if sliced else walk
        lines += [f"    part[{n}] = r{i};" for n, i in enumerate(to_scalar + of_slice)]
        return "\n".join([*lines, "}\n"])

    def _in_bits(self, planned: Pass, walk: list[str], sliced: list[str]) -> list[str]:
        """Both walks by turns, a few rows at a time."""
        bit = STEPS * self.graph.every  # type: ignore[operator]
        old = [self.tensors.index(name) for name in self._kept_old(planned)]
        return [
            f"    const int64_t rows = COLS < {bit} ? {bit} / COLS : 1;",
            *(f"    std::vector<T> room{n}(rows * COLS);" for n in old),
            *(f"    T* __restrict old{n} = room{n}.data();" for n in old),
            "    for (int64_t first = low, last = high; first < last; first += rows) {",
            "    const int64_t low = first, high = last - first < rows ? last : first + rows;",
            *walk,
            *(line.format(low="low * COLS", high="high * COLS") for line in sliced),
            "    }",
        ]

    def _vectors_read(self, planned: Pass) -> tuple[set[int], set[int]]:
        """The values per row and per column that the elements of a pass need."""
        values = self.graph.values
        read = {a.index for i in planned.elements for a in values[i].args if isinstance(a, Ref)}
        read |= set(planned.stores.values())
        rows = {i for i in read if values[i].level == "row"}
        return rows, {i for i in read if values[i].level == "col"}

    # ---- driver

    def _join_blocks(self, planned: Pass) -> str:
        """Add up what the blocks of rows left behind, in their order."""
        lines = []
        for n, i in enumerate(self._to_scalar(planned)):
            is_max = self.graph.values[i].op == "amax"
            step = f"if (s[{i}] < p[{n}]) s[{i}] = p[{n}];" if is_max else f"s[{i}] += p[{n}];"
            lines.append(f"s[{i}] = {self._neutral(i)};")
            lines.append(
                f"for (const double* p = parts; p < parts + blocks * PARTS; p += PARTS) {step}"
            )
        for n, i in enumerate(self._reduced(planned, "element", "col")):
            lines += [
                "for (int64_t c = 0; c < COLS; ++c) {",
                "    double total = 0;",
                f"    for (int64_t b = 0; b < blocks; ++b) total += sums[(b * SUMS + {n}) * COLS + c];",
                f"    {self._kept_name(i)}[c] = (T)total;",
                "}",
            ]
        return "\n".join(lines)

    def _kept_name(self, index: int) -> str:
        rows = cols = 0
        for i in self.plan.kept:
            if i == index:
                return f"(memory + {rows} * ROWS + {cols} * COLS)"
            rows, cols = rows + (self._along(i) == "ROWS"), cols + (self._along(i) == "COLS")
        raise AssertionError(index)

    def _driver(self) -> str:
        passes = self.plan.passes
        parts = max([len(self._to_scalar(p)) for p in passes] + [1])
        sums = max([len(self._reduced(p, "element", "col")) for p in passes] + [1])
        whole, shared = [], []
        for k, planned in enumerate(passes):
            begin = (
                f"scalars_{k}(row, hyper, s); rows_{k}(row, s, memory); cols_{k}(row, s, memory);"
            )
            join = self._join_blocks(planned)
            whole += [begin, f"pass_{k}(row, s, memory, 0, ROWS, parts, sums);", join]
            shared.append(_SHARED.format(k=k, begin=begin, join=join))
        return _DRIVER.format(
            parts=parts,
            sums=sums,
            rows=self._kept("row"),
            cols=self._kept("col"),
            blocks=BLOCKS,
            whole="\n    ".join(whole),
            shared="".join(shared),
        )

    def _row(self) -> str:
        return super()._row() + "\n#define ROWS (row[0] / row[3])\n#define COLS (row[3])"


_DRIVER = """\
enum {{ PARTS = {parts}, SUMS = {sums}, KEPT_ROWS = {rows}, KEPT_COLS = {cols}, BLOCKS = {blocks} }};

static void whole(const int64_t* row, const double* hyper) {{
    const int64_t blocks = 1;
    double s[VALUES], parts[PARTS];
    std::vector<T> kept(KEPT_ROWS * ROWS + KEPT_COLS * COLS + 1);
    std::vector<double> added(SUMS * COLS);
    T* memory = kept.data();
    double* sums = added.data();
    {whole}
    scalars_end(row, hyper, s);
    write_numbers(row, s);
}}

// table: COLUMNS numbers per tensor, the small ones first; `count` large ones follow, one at a time, so
// that their memory is used again. The other arguments belong to kernels for flat memory.
extern "C" void run(const int64_t* table, int64_t small, const int64_t*, const int64_t*,
                    const int64_t*, int64_t count, const double* hyper, double*, double*,
                    int threads) {{
    std::vector<T> kept;
    std::vector<double> added;
    double s[VALUES], parts[BLOCKS * PARTS];
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {{
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < small; ++i) whole(table + i * COLUMNS, hyper);
        for (int64_t t = small; t < small + count; ++t) {{
            const int64_t* row = table + t * COLUMNS;
            const int64_t blocks = ROWS < BLOCKS ? ROWS : BLOCKS;
            #pragma omp single
            {{
                kept.resize(KEPT_ROWS * ROWS + KEPT_COLS * COLS + 1);
                added.resize(BLOCKS * SUMS * COLS);
            }}
            T* memory = kept.data();
            double* sums = added.data();{shared}
            #pragma omp single
            {{
                scalars_end(row, hyper, s);
                write_numbers(row, s);
            }}
        }}
    }}
}}
"""
_SHARED = """
            #pragma omp single
            {{
                {begin}
            }}
            #pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; ++b)
                pass_{k}(row, s, memory, ROWS * b / blocks, ROWS * (b + 1) / blocks,
                         parts + b * PARTS, sums + b * SUMS * COLS);
            #pragma omp single
            {{
                {join}
            }}"""
