"""Spells kernels with values along some of the axes as C++: every tensor is walked row by row."""

from heavyball.compiler.cpp.printer import CppPrinter
from heavyball.compiler.cpp.storage import BITS
from heavyball.compiler.cpp.templates import (
    BANDS,
    BUFFER,
    HELPERS,
    ROWS_DRIVER,
    ROWS_SHARED,
    ROWS_WALK,
)
from heavyball.compiler.frontend.ops import NotPrintableError
from heavyball.compiler.frontend.symbols import Input, Var
from heavyball.compiler.passes.axes import Frame, FrameText, is_along
from heavyball.compiler.passes.loops import (
    PLACE,
    Column,
    Fold,
    Keep,
    Kernel,
    Loop,
    Read,
    Reduce,
    Save,
    Statement,
    Store,
    Walk,
)

# A large tensor is cut into this many blocks of rows, whatever the number of threads.
BLOCKS = 16
# Rows with a period are walked in pieces of about this many elements, for which there are buffers.
PIECE = 512
# As in `printer.py`; more, since the steps of a few rows are not a multiple of a vector.
STEPS = 192


class RowPrinter(CppPrinter):
    """Spells the walks as walks over rows, see `Frame`.

    Arrays that are kept are in `memory`, one after the other. What a block of rows has in `sums` are its
    parts of the sums that other blocks add to. Where rows have a period there is a buffer besides for
    each value or sum that is the same along the lane: so the innermost loop is long although a period is
    short. With tensors of codes a thread has bands of rows that are whole blocks of these.

    Errors: NotPrintableError for codes of values along some axes, and beside every k-th element.
    """

    first = "begin * COLS"

    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        assert kernel.frame is not None
        self.frame: Frame = kernel.frame
        self.sizes = FrameText(self.frame, lambda k: f"N{k}", "/", kernel.kept)
        walks = kernel.walks
        self.codes = max(
            [c.code_bits and (128 if c.code_bits == 4 else 32) for c in kernel.tensors]
        )
        for w in walks:
            several = [part for part in w.arrays if isinstance(part, Loop)]
            several += [w.elements] if w.slices else []
            for c in (c for loop in several for c in self.coded(loop)):
                where = "beside every k-th element" if w.slices else "of values along some axes"
                raise NotPrintableError(f"{c.code_bits}-bit state ({c.name}) {where}")

    def _row(self) -> str:
        frame, sizes, lines = self.frame, self.sizes, [BUFFER, super()._row()]
        first = len(self.kernel.leading) - len(frame.later)
        lines += [f"#define N{k} (row[{first + k - 1}])" for k in frame.all[1:]]
        lines.append(f"#define N0 (row[0] / {sizes.size(frame.all[1:])})")
        lines.append(f"#define KEPT ({self.sizes.before(None)} + 1)")
        walked = [k for k in frame.all if k not in frame.outer]
        lines += [f"#define COLS {sizes.size(walked)}", "#define ROWS (row[0] / COLS)"]
        lines.append(f"#define BAND {f'band_of(COLS, {self.codes})' if self.codes else '1'}")
        lines.append(BANDS)
        levels = [level for level in frame.levels for _ in range(self._most_parts(level))]
        lines.append(f"#define SUMS ({sizes.levels(levels)} + 1)")
        if any(c.is_bits for c in self.kernel.tensors):
            assert self.kernel.view is not None
            behind = [k for k in frame.all if frame.starts[k] >= self.kernel.view.rows]
            lines += [f"#define SIDE {sizes.size(behind)}", BITS]
        if frame.period is not None:
            lines.append(f"#define WIDTH width_of(N{frame.lane}, N{frame.period})")
            lines.append(HELPERS.format(piece=PIECE))
        return "\n".join(lines)

    def _input(self, e: Input) -> str:
        members = e.name == "members"
        return f"(double){self.sizes.members(*e.args)}" if members else super()._input(e)

    # ---- arrays

    def _memory(self) -> list[str]:
        """Names for the arrays that are kept."""
        return [
            f"    T* __restrict m{v.index} = memory + {self.sizes.before(v)}; (void)m{v.index};"
            for v in self.kernel.kept
        ]

    def _vectors(self, k: int, walk: Walk) -> str:
        """The function that computes arrays before a walk, the shorter ones first."""
        head = f"PART void vectors_{k}(const int64_t* row, double* s, T* memory) {{"
        lines = [head, *self._memory()]
        for part in walk.arrays:
            lines += self._folded(part) if isinstance(part, Fold) else self._along(part)
        return "\n".join([*lines, "}\n"])

    def _along(self, loop: Loop) -> list[str]:
        if self.kernel.placed and loop.random:
            raise NotPrintableError("values along some axes of a part, rounded stochastically")
        return [
            "    {",
            *self.pointers([loop]),
            *self.keys([loop]),
            *self.constants([loop]),
            *(f"    double r{s.var.index} = 0;" for s in loop.sums),
            f"    for (int64_t i = 0; i < {self.sizes.level(loop.level)}; ++i) {{",
            *(f"        {self._of_array(s, loop)}" for s in loop.body),
            "    }",
            *(f"    s[{s.var.index}] = r{s.var.index};" for s in loop.sums),
            "    }",
        ]

    def _of_array(self, s: Statement, loop: Loop) -> str:
        if isinstance(s, Keep):
            return f"m{s.var.index}[i] = {self.name(s.var)};"
        if isinstance(s, Read):
            runs = self.frame.runs
            place = self.sizes.place("i", runs(loop.level), runs(s.var.level))
            return self._declared(s.var, f"m{s.var.index}[{place}]")
        return self.statement(s)

    def _folded(self, fold: Fold) -> list[str]:
        """An array of sums over one of more axes."""
        frame, sizes, i = self.frame, self.sizes, fold.var.index
        mine, inside = frame.runs(fold.var.level), frame.runs(fold.source.level)
        gone = frame.missing(fold.var.level, inside)
        place = f"{sizes.place('i', mine, inside)} + {sizes.place('j', gone, inside)}"
        return [
            f"    for (int64_t i = 0; i < {sizes.size(mine)}; ++i) {{",
            "        double total = 0;",
            f"        for (int64_t j = 0; j < {sizes.size(gone)}; ++j) {{",
            f"            const double x = (double)m{fold.source.index}[{place}];",
            f"            total += {'x * x' if fold.squared else 'x'};",
            "        }",
            f"        m{i}[i] = (T)total;",
            "    }",
        ]

    # ---- sums of a walk over rows

    @staticmethod
    def _arrays_of(walk: Walk) -> list[Reduce]:
        """The sums over elements that are one for each place along some axes."""
        return [s for s in walk.sums if is_along(s.var.level)]

    @staticmethod
    def _plain(walk: Walk) -> list[Reduce]:
        """The sums to one number: those over elements, then those over a slice."""
        of_slice = walk.slices.sums if walk.slices else []
        left = [s for s in walk.sums if not is_along(s.var.level)]
        return [s for s in left if s not in of_slice] + [s for s in left if s in of_slice]

    def _is_complete(self, var: Var) -> bool:
        """Whether a row has all that a sum adds up."""
        has_lane = self.frame.has_lane(var.level)
        return not has_lane and not self.frame.missing(var.level, self.frame.outer)

    def _repeats(self, var: Var) -> bool:
        """Whether a value is the same along the lane and differs along the period."""
        has_lane = self.frame.has_lane(var.level)
        return not has_lane and self.frame.period in self.frame.runs(var.level)

    def _parts(self, walk: Walk) -> list[Reduce]:
        """The sums that several rows add to, by level and so by their place in `sums`."""
        found = [s for s in self._arrays_of(walk) if not self._is_complete(s.var)]
        levels = self.frame.levels
        return sorted(found, key=lambda s: (levels.index(s.var.level), s.var.index))

    def _most_parts(self, level: str) -> int:
        walks = self.kernel.walks
        return max([s.var.level for s in self._parts(w)].count(level) for w in walks)

    # ---- walks

    def _walk(self, k: int, walk: Walk) -> str:
        plain = self._plain(walk)
        lines = [
            self._vectors(k, walk),
            f"PART void pass_{k}(const int64_t* row, const double* s, T* memory,"
            " int64_t low, int64_t high, double* part, double* sums) {",
            *self._memory(),
            *self.pointers(walk.loops),
            *self.keys(walk.loops),
            *self.constants(walk.loops),
            *self._begin_parts(walk),
            *(f"    {self.accumulator(s)}" for s in plain),
        ]
        if self.kernel.placed:  # parts are whole rows
            lines.append(f"    const int64_t shift = row[{self.kernel.columns.index(PLACE[0])}];")
        inner: list[str] = []
        if walk.elements.body:
            inner += ["    for (int64_t r = low; r < high; ++r) {"]
            inner += [f"        {line}" for line in self._one_row(walk)]
            inner += ["    }"]
            inner = self._in_bands(walk.elements, inner)
        lines += self._by_turns(walk, inner) if walk.slices else inner
        lines += [f"    part[{n}] = r{s.var.index};" for n, s in enumerate(plain)]
        return "\n".join([*lines, "}\n"])

    def _in_bands(self, loop: Loop, inner: list[str]) -> list[str]:
        """A loop over rows; with tensors of codes, band by band through buffers."""
        coded = self.coded(loop)
        if not coded:
            return inner
        begin, ends = self.recoded(loop, "base", "(high - low) * COLS")
        rooms = [f"{kind}{c.number}" for c in coded for kind in "qo"]
        return [
            "    const int64_t band = BAND;",
            *(f"    Buffer<float> room_{name}(band * COLS);" for name in rooms),
            *(f"    float* __restrict {name} = room_{name}.data();" for name in rooms),
            "    for (int64_t begin = low, last = high; begin < last; begin += band) {",
            "    const int64_t low = begin, high = last - begin < band ? last : begin + band;",
            "    const int64_t base = low * COLS;",
            *begin,
            *inner,
            *ends,
            "    }",
        ]

    def _by_turns(self, walk: Walk, inner: list[str]) -> list[str]:
        """Both loops alternately, a few rows at a time."""
        bit = STEPS * self.kernel.every  # type: ignore[operator]
        old = [s.column.number for s in walk.elements.of(Save)]
        return [
            f"    const int64_t rows = COLS < {bit} ? {bit} / COLS : 1;",
            *(f"    Buffer<T> room{n}(rows * COLS);" for n in old),
            *(f"    T* __restrict old{n} = room{n}.data();" for n in old),
            "    for (int64_t begin = low, last = high; begin < last; begin += rows) {",
            "    const int64_t low = begin, high = last - begin < rows ? last : begin + rows;",
            *inner,
            *self.sliced(walk.slices, "low * COLS", "high * COLS"),  # type: ignore[arg-type]
            "    }",
        ]

    def _begin_parts(self, walk: Walk) -> list[str]:
        """Where a block adds up its parts, from zero, and its buffers."""
        lines, place = list[str](), "sums"
        for s in self._parts(walk):
            v, size = s.var, self.sizes.level(s.var.level)
            lines.append(f"    double* __restrict part_{v.index} = {place};")
            start = f"part_{v.index}[c] = {self.start(s)};"
            lines.append(f"    for (int64_t c = 0; c < {size}; ++c) {start}")
            place = f"part_{v.index} + {size}"
        for c in self._bits(walk):
            lines.append(f"    Buffer<uint8_t> bits{c.number}(COLS);")
            lines.append(f"    uint8_t* __restrict u{c.number} = bits{c.number}.data();")
        read = [v for v in walk.elements.arrays if self._repeats(v)]
        sums = [s.var for s in self._arrays_of(walk) if self._repeats(s.var)]
        if read or sums:
            lines.append(f"    Buffer<double> buffers({len(read + sums)} * WIDTH);")
        for n, v in enumerate(read + sums):
            kind = "T" if n < len(read) else "double"
            start = f"(buffers.data() + {n} * WIDTH)"
            lines.append(f"    {kind}* __restrict b{v.index} = ({kind}*){start};")
        return lines

    def _one_row(self, walk: Walk) -> list[str]:
        """The statements for row r: its prologue, its elements, and its results."""
        begin, inner, ends = list[str](), list[str](), list[str]()
        for c in self._bits(walk):
            begin.append(f"unpack_bits(u{c.number}, t{c.number}, r * COLS, COLS, SIDE);")
            if any(s.column == c for s in walk.elements.of(Store)):
                ends.append(f"pack_bits(t{c.number}, u{c.number}, r * COLS, COLS, SIDE);")
        numbers = [s for s in walk.elements.sums if not is_along(s.var.level)]
        for s in walk.elements.body:
            if isinstance(s, Read):
                first, here = self._read_in_row(s.var)
                begin.append(first)
                inner += here
            elif isinstance(s, Reduce) and is_along(s.var.level):
                first, each, after = self._reduced_in_row(s)
                begin.append(first)
                inner.append(each)
                ends += after
                if not self.frame.has_lane(s.var.level) and not self._repeats(s.var):
                    numbers.append(s)
            else:
                inner.append(self.statement(s))
        return [*begin, *self._row_loop(numbers, inner), *ends]

    @staticmethod
    def _bits(walk: Walk) -> list[Column]:
        """The tensors of bits, of which a row is unpacked at a time."""
        return [c for c in walk.elements.columns if c.is_bits]

    def _value(self, c: Column, at: str) -> str:
        return f"(u{c.number}[{at} - r * COLS] != 0)" if c.is_bits else super()._value(c, at)

    def _store(self, c: Column, value: str, at: str) -> str:
        return (
            f"u{c.number}[{at} - r * COLS] = {value};"
            if c.is_bits
            else super()._store(c, value, at)
        )

    def _read_in_row(self, v: Var) -> tuple[str, list[str]]:
        array = f"m{v.index} + {self._at(v)}"
        if self.frame.has_lane(v.level):
            return f"const T* __restrict l{v.index} = {array};", [
                self._declared(v, f"l{v.index}[c]")
            ]
        if self._repeats(v):
            begin = f"repeat(b{v.index}, {array}, N{self.frame.period}, WIDTH);"
            return begin, [self._declared(v, f"b{v.index}[n]")]
        return self._declared(v, f"*({array})"), []

    def _reduced_in_row(self, s: Reduce) -> tuple[str, str, list[str]]:
        v, complete = s.var, self._is_complete(s.var)
        target = f"{f'm{v.index}' if complete else f'part_{v.index}'} + {self._at(v)}"
        if self.frame.has_lane(v.level):
            begin = f"double* __restrict l{v.index} = {target};"
            return begin, self.reduce(s, f"l{v.index}[c]"), []
        if self._repeats(v):
            begin = f"for (int64_t n = 0; n < WIDTH; ++n) b{v.index}[n] = {self.start(s)};"
            fold = f"{'fold' if complete else 'add_folded'}<{str(s.how == 'max').lower()}>"
            end = f"{fold}({target}, b{v.index}, N{self.frame.period}, WIDTH);"
            if s.is_mean and complete:
                raise NotPrintableError("means of which a row of a kernel has several")
            return begin, self.reduce(s, f"b{v.index}[n]"), [end]
        part = f"r{v.index}"
        whole = f"*({target}) = (T)({part}{self._over(s)});"
        end = whole if complete else self.joined(s, f"*({target})", part)
        return self.accumulator(s), self.reduce(s, f"r{v.index}"), [end]

    def _over(self, s: Reduce) -> str:
        """What a complete sum is divided by."""
        return f" / {self.sizes.members('element', s.var.level)}" if s.is_mean else ""

    def _row_loop(self, sums: list[Reduce], inner: list[str]) -> list[str]:
        """The loop over the elements of a row, in pieces where buffers repeat."""
        if self.frame.period is None:
            lines = ["const int64_t i = r * COLS + c;", *inner]
            loop = "for (int64_t c = 0; c < COLS; ++c) {"
            return [self.simd(sums), loop, *(f"    {line}" for line in lines), "}"]
        return [
            "for (int64_t first = 0; first < COLS; first += WIDTH) {",
            "    const int64_t count = COLS - first < WIDTH ? COLS - first : WIDTH;",
            f"    {self.simd(sums)}",
            "    for (int64_t n = 0; n < count; ++n) {",
            "        const int64_t c = first + n, i = r * COLS + c; (void)c;",
            *(f"        {line}" for line in inner),
            "    }",
            "}",
        ]

    def _at(self, v: Var) -> str:
        """The offset of the values of row r in an array."""
        mine, rows = self.frame.runs(v.level), self.frame.outer
        outer = tuple(k for k in mine if k in rows)
        inside = [k for k in mine if k not in rows]
        place = self.sizes.place("r", rows, outer)
        return f"({place}) * {self.sizes.size(inside)}" if inside and outer else place

    # ---- driver

    def _join(self, k: int, walk: Walk) -> str:
        """The function that adds the partial sums of the blocks of rows, in order."""
        lines = [
            f"PART void join_{k}(const int64_t* row, double* s, T* memory, const double* parts,"
            " const double* sums, int64_t blocks) {",
            *self.summed(self._plain(walk), "parts", "parts + blocks * PARTS"),
        ]
        place = "sums"
        for s in self._parts(walk):
            size = self.sizes.level(s.var.level)
            step = self.joined(s, "total", f"({place})[b * (SUMS) + c]")
            lines += [
                f"for (int64_t c = 0; c < {size}; ++c) {{",
                f"    double total = {self.start(s)};",
                f"    for (int64_t b = 0; b < blocks; ++b) {step}",
                f"    (memory + {self.sizes.before(s.var)})[c] = (T)(total{self._over(s)});",
                "}",
            ]
            place += f" + {size}"
        return "\n    ".join(lines) + "\n}\n"

    def _driver(self) -> str:
        whole, shared, joins = list[str](), list[str](), list[str]()
        for k, walk in enumerate(self.kernel.walks):
            joins.append(self._join(k, walk))
            begin = f"scalars_{k}(row, hyper, s); vectors_{k}(row, s, memory);"
            whole += [begin, f"pass_{k}(row, s, memory, 0, ROWS, parts, sums);"]
            whole.append(f"join_{k}(row, s, memory, parts, sums, blocks);")
            shared.append(ROWS_SHARED.format(k=k, begin=begin))
        parts = max([len(self._plain(w)) for w in self.kernel.walks] + [1])
        head = f"enum {{ PARTS = {parts}, BLOCKS = {BLOCKS} }};\n"
        run = ROWS_DRIVER.format(whole="\n    ".join(whole), shared="".join(shared))
        vectors = ", ".join(f"vectors_{k}" for k in range(len(self.kernel.walks)))
        one = ROWS_WALK.format(**self._functions(), vectors=vectors)
        return "\n".join([head, *joins, run, one])
