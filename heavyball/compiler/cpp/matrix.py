"""Prints graphs with values along some of the axes: every tensor is walked row by row."""

from heavyball.compiler.cpp.arrays import ArrayPrinter
from heavyball.compiler.cpp.printer import _kind
from heavyball.compiler.frontend.graph import Ref
from heavyball.compiler.passes.axes import is_along
from heavyball.compiler.passes.stages import Pass

# A large tensor is cut into this many blocks of rows, whatever the number of threads.
BLOCKS = 16
# Rows with a period are walked in pieces of about this many elements, for which there are buffers.
PIECE = 512
# As in cpp.py; more, since the steps of a few rows are not a multiple of a vector.
STEPS = 192


class MatrixPrinter(ArrayPrinter):
    """Prints the passes as walks over rows, see `Frame`.

    What a block of rows has in `sums` are its parts of the sums that other blocks add to. Where rows
    have a period there is a buffer besides for each value or sum that is the same along the lane: so
    the innermost loop is long although a period is short.
    """

    first = "begin * COLS"

    def _row(self) -> str:
        frame, lines = self.frame, [super()._row()]
        walked = [k for k in frame.all if k not in frame.outer]
        lines += [f"#define COLS {frame.size(walked)}", "#define ROWS (row[0] / COLS)"]
        levels = [level for level in frame.levels for _ in range(self._most_parts(level))]
        lines.append(f"#define SUMS ({frame.sizes(levels)} + 1)")
        if frame.period is not None:
            lines.append(f"#define WIDTH width_of(N{frame.lane}, N{frame.period})")
            lines.append(_HELPERS.format(piece=PIECE))
        return "\n".join(lines)

    # ---- sums

    def _to_scalar(self, planned: Pass) -> list[int]:
        """The sums that a block of rows leaves behind, in the order of its parts."""
        return self._of_elements(planned) + self._split_reductions(planned)[0]

    def _of_elements(self, planned: Pass) -> list[int]:
        values = self.graph.values
        return [
            i
            for i in planned.reductions
            if values[i].level == "scalar" and self._level(values[i].args[0].index) == "element"
        ]

    def _complete(self, i: int) -> bool:
        """Whether a row has all that a sum adds up."""
        runs = self.frame.runs(self._level(i))
        return self.frame.lane not in runs and not self.frame.missing(
            self._level(i), self.frame.outer
        )

    def _has_lane(self, i: int) -> bool:
        return self.frame.lane in self.frame.runs(self._level(i))

    def _repeats(self, i: int) -> bool:
        """Whether a value is the same along the lane and differs along the period."""
        return not self._has_lane(i) and self.frame.period in self.frame.runs(self._level(i))

    def _parts(self, planned: Pass) -> list[int]:
        """The sums that several rows add to, by level and so by their place in `sums`."""
        found = [i for i in self._reduced(planned, "element") if not self._complete(i)]
        return sorted(found, key=lambda i: (self.frame.levels.index(self._level(i)), i))

    def _most_parts(self, level: str) -> int:
        found = [[self._level(i) for i in self._parts(p)].count(level) for p in self.plan.passes]
        return max(found, default=0)

    def _buffers(self, planned: Pass) -> list[int]:
        """The values and sums of a pass for which a piece of a row has a buffer."""
        sums = [i for i in self._reduced(planned, "element") if self._repeats(i)]
        return [i for i in sorted(self._vectors_read(planned)) if self._repeats(i)] + sums

    # ---- elements

    def _pass(self, k: int, planned: Pass) -> str:
        of_slice, of_elements = self._split_reductions(planned)[0], self._of_elements(planned)
        sliced, used = self._slice(planned, of_slice)
        lines = [
            self._vectors(k, planned),
            f"PART void pass_{k}(const int64_t* row, const double* s, T* memory,"
            " int64_t low, int64_t high, double* part, double* sums) {",
            *self._memory(),
            *self._pointers(planned),
            *self._keys({**planned.stores, **planned.slice_stores}),
        ]
        lines += [self._constant(i) for i in sorted(used | self._body(planned)[1])]
        lines += self._begin_parts(planned)
        lines += [
            f"    {self._sum_type(i)} r{i} = {self._neutral(i)};" for i in of_elements + of_slice
        ]
        walk: list[str] = []
        if planned.stores or of_elements or self._reduced(planned, "element"):
            walk += ["    for (int64_t r = low; r < high; ++r) {"]
            walk += [f"        {line}" for line in self._walk(planned)]
            walk += ["    }"]
        lines += self._in_bits(planned, walk, sliced) if sliced else walk
        lines += [f"    part[{n}] = r{i};" for n, i in enumerate(of_elements + of_slice)]
        return "\n".join([*lines, "}\n"])

    def _in_bits(self, planned: Pass, walk: list[str], sliced: list[str]) -> list[str]:
        """Both walks by turns, a few rows at a time."""
        bit = STEPS * self.graph.every  # type: ignore[operator]
        old = [self.tensors.index(name) for name in self._kept_old(planned)]
        return [
            f"    const int64_t rows = COLS < {bit} ? {bit} / COLS : 1;",
            *(f"    std::vector<T> room{n}(rows * COLS);" for n in old),
            *(f"    T* __restrict old{n} = room{n}.data();" for n in old),
            "    for (int64_t begin = low, last = high; begin < last; begin += rows) {",
            "    const int64_t low = begin, high = last - begin < rows ? last : begin + rows;",
            *walk,
            *(line.format(low="low * COLS", high="high * COLS") for line in sliced),
            "    }",
        ]

    def _begin_parts(self, planned: Pass) -> list[str]:
        """Where a block adds up its parts, from zero, and its buffers."""
        lines, place = list[str](), "sums"
        parts = self._parts(planned)
        for i in parts:
            size = self._size(self._level(i))
            lines.append(f"    double* __restrict part_{i} = {place};")
            lines.append(f"    for (int64_t c = 0; c < {size}; ++c) part_{i}[c] = 0;")
            place = f"part_{i} + {size}"
        if buffers := self._buffers(planned):
            lines.append(f"    std::vector<double> buffers({len(buffers)} * WIDTH);")
        for n, i in enumerate(buffers):
            is_sum = i in planned.reductions
            kind = "double" if is_sum else "T"
            start = f"(buffers.data() + {n} * WIDTH)"
            lines.append(f"    {kind}* __restrict b{i} = ({kind}*){start};")
        return lines

    def _walk(self, planned: Pass) -> list[str]:
        """The statements for one row, number r."""
        sums, read = self._reduced(planned, "element"), self._vectors_read(planned)
        lines, inner = list[str](), list[str]()
        for i in sorted(read):
            array, kind = f"m{i} + {self._at(i)}", _kind(self.graph, i)
            if self._has_lane(i):
                lines.append(f"const T* __restrict l{i} = {array};")
                inner.append(f"const {kind} w{i} = l{i}[c];")
            elif self._repeats(i):
                lines.append(f"repeat(b{i}, {array}, N{self.frame.period}, WIDTH);")
                inner.append(f"const {kind} w{i} = b{i}[n];")
            else:
                lines.append(f"const {kind} w{i} = *({array});")
        names, numbers, ends = self._names(), list[int](), list[str]()
        inner += [line for line in self._body(planned)[0] if not line.startswith("r")]
        inner += [self._accumulate(i, names) for i in self._of_elements(planned)]
        for i in sums:
            text, complete = self._accumulate(i, names), self._complete(i)
            target = f"{f'm{i}' if complete else f'part_{i}'} + {self._at(i)}"
            if self._has_lane(i):
                lines.append(f"double* __restrict l{i} = {target};")
                inner.append(text.replace(f"r{i} +=", f"l{i}[c] +="))
            elif self._repeats(i):
                lines.append(f"for (int64_t n = 0; n < WIDTH; ++n) b{i}[n] = 0;")
                inner.append(text.replace(f"r{i} +=", f"b{i}[n] +="))
                fold = "fold" if complete else "add_folded"
                ends.append(f"{fold}({target}, b{i}, N{self.frame.period}, WIDTH);")
            else:
                lines.append(f"{self._sum_type(i)} r{i} = 0;")
                numbers.append(i)
                inner.append(text)
                ends.append(f"*({target}) {f'= (T)r{i}' if complete else f'+= r{i}'};")
        return [*lines, *self._loop(self._of_elements(planned) + numbers, inner), *ends]

    def _loop(self, reductions: list[int], inner: list[str]) -> list[str]:
        """The loop over the elements of a row, in pieces where buffers repeat."""
        head = f"#pragma omp simd{self._clauses(reductions)}"
        if self.frame.period is None:
            lines = ["const int64_t i = r * COLS + c;", *inner]
            loop = "for (int64_t c = 0; c < COLS; ++c) {"
            return [head, loop, *(f"    {line}" for line in lines), "}"]
        return [
            "for (int64_t first = 0; first < COLS; first += WIDTH) {",
            "    const int64_t count = COLS - first < WIDTH ? COLS - first : WIDTH;",
            f"    {head}",
            "    for (int64_t n = 0; n < count; ++n) {",
            "        const int64_t c = first + n, i = r * COLS + c; (void)c;",
            *(f"        {line}" for line in inner),
            "    }",
            "}",
        ]

    def _at(self, i: int) -> str:
        """Where the values of row r begin in an array."""
        mine = self.frame.runs(self._level(i))
        outer = tuple(k for k in mine if k in self.frame.outer)
        inside = [k for k in mine if k not in self.frame.outer]
        place = self.frame.place("r", self.frame.outer, outer)
        return f"({place}) * {self.frame.size(inside)}" if inside and outer else place

    def _vectors_read(self, planned: Pass) -> set[int]:
        """The values along some axes that the elements of a pass need."""
        values = self.graph.values
        read = {a.index for i in planned.elements for a in values[i].args if isinstance(a, Ref)}
        return {i for i in read | set(planned.stores.values()) if is_along(values[i].level)}

    # ---- driver

    def _join_blocks(self, planned: Pass) -> str:
        """Add up what the blocks of rows left behind, in their order."""
        lines, place = list[str](), "sums"
        for n, i in enumerate(self._to_scalar(planned)):
            is_max = self.graph.values[i].op == "amax"
            step = f"if (s[{i}] < p[{n}]) s[{i}] = p[{n}];" if is_max else f"s[{i}] += p[{n}];"
            lines.append(f"s[{i}] = {self._neutral(i)};")
            lines.append(
                f"for (const double* p = parts; p < parts + blocks * PARTS; p += PARTS) {step}"
            )
        for i in self._parts(planned):
            size = self._size(self._level(i))
            lines += [
                f"for (int64_t c = 0; c < {size}; ++c) {{",
                "    double total = 0;",
                f"    for (int64_t b = 0; b < blocks; ++b) total += ({place})[b * (SUMS) + c];",
                f"    (memory + {self._before(i)})[c] = (T)total;",
                "}",
            ]
            place += f" + {size}"
        return "\n".join(lines)

    def _driver(self) -> str:
        passes = self.plan.passes
        whole, shared = [], []
        for k, planned in enumerate(passes):
            begin = f"scalars_{k}(row, hyper, s); vectors_{k}(row, s, memory);"
            join = self._join_blocks(planned)
            whole += [begin, f"pass_{k}(row, s, memory, 0, ROWS, parts, sums);", join]
            shared.append(_SHARED.format(k=k, begin=begin, join=join))
        return _DRIVER.format(
            parts=max([len(self._to_scalar(p)) for p in passes] + [1]),
            blocks=BLOCKS,
            whole="\n    ".join(whole),
            shared="".join(shared),
        )


_HELPERS = """\
// How long a piece of a row is, a whole number of periods.
static inline int64_t width_of(int64_t lane, int64_t period) {{
    const int64_t pieces = (lane * period + {piece} / 2) / {piece};
    return pieces > 1 ? (lane + pieces - 1) / pieces * period : lane * period;
}}
// The values of one period again and again, and the sums for each place in a period.
static inline void repeat(T* __restrict out, const T* __restrict from, int64_t period, int64_t width) {{
    std::memcpy(out, from, period * sizeof(T));
    for (int64_t done = period; done < width; done *= 2)
        std::memcpy(out + done, out, (width - done < done ? width - done : done) * sizeof(T));
}}
// Adds up the periods in the first one, by halves, so that the loops stay long.
static inline void folded(double* __restrict sums, int64_t period, int64_t width) {{
    for (int64_t count = width / period; count > 1; count -= count / 2) {{
        const int64_t half = count / 2 * period, other = (count - count / 2) * period;
        for (int64_t n = 0; n < half; ++n) sums[n] += sums[other + n];
    }}
}}
static inline void fold(T* __restrict out, double* sums, int64_t period, int64_t width) {{
    folded(sums, period, width);
    for (int64_t n = 0; n < period; ++n) out[n] = (T)sums[n];
}}
static inline void add_folded(double* __restrict out, double* sums, int64_t period, int64_t width) {{
    folded(sums, period, width);
    for (int64_t n = 0; n < period; ++n) out[n] += sums[n];
}}
"""
_DRIVER = """\
enum {{ PARTS = {parts}, BLOCKS = {blocks} }};

static void whole(const int64_t* row, const double* hyper) {{
    const int64_t blocks = 1;
    double s[VALUES], parts[PARTS];
    std::vector<T> kept(KEPT);
    std::vector<double> added(SUMS);
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
                kept.resize(KEPT);
                added.resize(BLOCKS * (SUMS));
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
                         parts + b * PARTS, sums + b * (SUMS));
            #pragma omp single
            {{
                {join}
            }}"""
