"""Prints a graph as C++: one function that steps every tensor of a table, with OpenMP."""

from collections.abc import Callable, Iterable

import torch

from heavyball.compiler.cpp.dialect import TYPES as CTYPES
from heavyball.compiler.cpp.dialect import Cpp, _float
from heavyball.compiler.cpp.storage import CODES, CORRECTED, ROOTS, WIDE
from heavyball.compiler.dialect import Dialect
from heavyball.compiler.frontend.graph import Graph, Ref, Value
from heavyball.compiler.frontend.ops import NotPrintableError, expression
from heavyball.compiler.frontend.symbols import Expr, Var
from heavyball.compiler.passes.stages import Pass, Schedule, schedule
from heavyball.state.held import COMPANIONS, CORRECTION, SCALE, is_companion, word_of

# A tensor up to this size goes whole to one thread; a larger one is cut into chunks.
SMALL, CHUNK = 65536, 16384
# How many steps of the walk over every k-th element follow on a bit of the walk over all: whole vectors,
# and few enough for the second walk to find in the cache what the first has read.
STEPS = 32
# Large tensors take their passes together in batches of about this many elements.
BATCH = 2**20

# How many values there are of each level; {k} is how far those of a slice are apart.
SIZES = {
    "numel": "(double)row[0]",
    "slices": "(double)((row[0] + {k} - 1) / {k})",
}
PICKS = ("load", "pick")

PRELUDE = """\
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// Called for small and for large tensors: inlined, everything would be compiled twice.
#define PART static __attribute__((noinline))
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

static inline float load(const float* p) { return *p; }
static inline double load(const double* p) { return *p; }
static inline uint32_t word_of(float v) { uint32_t w; std::memcpy(&w, &v, 4); return w; }
static inline float float_of(uint32_t w) { float v; std::memcpy(&v, &w, 4); return v; }
// With integers, since the compiler's own conversions are not vectorized.
static inline float load(const f16* p) {
    const uint32_t sign = (uint32_t)(p->bits & 0x8000u) << 16, size = p->bits & 0x7fffu;
    const uint32_t normal = (size << 13) + (size < 0x7c00u ? 0x38000000u : 0x70000000u);
    const uint32_t small = word_of((float)(int32_t)size * 5.9604644775390625e-8f);
    return float_of(sign | (size < 0x400u ? small : normal));
}
static inline float load(const bf16* p) {
    uint32_t word = (uint32_t)p->bits << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
static inline void store(float* p, double v) { *p = (float)v; }
static inline void store(float* p, float v) { *p = v; }
static inline void store(double* p, double v) { *p = v; }
static inline void store(f16* p, float v) {
    const uint32_t sign = word_of(v) & 0x80000000u, word = word_of(v) & 0x7fffffffu;
    const uint32_t normal = (word + 0xfffu + ((word >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t small = word_of(float_of(word) + 0.5f) - 0x3f000000u;
    uint32_t bits = word < 0x38800000u ? small : normal;
    bits = word > 0x477fe000u ? 0x7bffu : bits;  // a finite value stays finite
    bits = word >= 0x7f800000u ? (word > 0x7f800000u ? 0x7e00u : 0x7c00u) : bits;
    p->bits = (uint16_t)(bits | (sign >> 16));
}
static inline void store(f16* p, double v) { store(p, (float)v); }
static inline void store_finite(f16* p, float v) { store(p, v); }
static inline void store(bf16* p, float v) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    p->bits = (uint16_t)(v != v ? 0x7fc0u : rounded);
}
static inline void store(bf16* p, double v) { store(p, (float)v); }

// With the sign of y, and exact, as torch's.
template <typename F> static inline F remainder_of(F x, F y) {
    const F rest = std::fmod(x, y);
    return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
}

// The same bits as heavyball/numerics/random.py.
static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}
static inline uint32_t step_key(int64_t stream, double step) {
    return mix((uint32_t)stream + (uint32_t)(int64_t)step * 0x9e3779b1u);
}
static inline void store_random(bf16* p, float v, uint32_t key, int64_t index) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    uint32_t bits = mix(((uint32_t)index * 0x9e3779b1u) ^ key) & 0xffffu;
    bool finite = (word & 0x7f800000u) != 0x7f800000u;
    uint32_t kept = v != v ? 0x7fc00000u : word;
    p->bits = (uint16_t)((finite ? word + bits : kept) >> 16);
}
"""


class Printer:
    """Prints one graph for tensors of given dtypes, as walks over flat memory."""

    dialect: Dialect = Cpp()
    leading: tuple[str, ...] = ("numel", "group", "stream")
    # the first element of a bit
    first = "first"
    # whether every k-th element may be looked at in the last pass
    slices_wait = True

    def __init__(
        self,
        graph: Graph,
        dtypes: dict[str, torch.dtype],
        compute: torch.dtype,
        random: bool = False,
        roots: frozenset[str] = frozenset(),
    ):
        self.graph, self.dtypes, self.random, self.roots = graph, dtypes, random, roots
        self.compute, self.type = compute, CTYPES[compute]
        self.plan: Schedule = schedule(graph, dtypes, compute, self.slices_wait)
        ops = {"load": [], "pick": [], "number": [], "hyper": [], "total": []}  # type: dict[str, list]
        for value in graph.values:
            if value.op in ops and value.args not in ops[value.op]:
                ops[value.op].append(value.args)
        self.hypers: list[tuple[str, int]] = ops["hyper"]
        self.totals: list[str] = [args[0] for args in ops["total"]]
        tensors = {args[0] for args in ops["load"] + ops["pick"]} | {
            n for n in graph.outputs if n not in self.plan.numbers
        }
        self.tensors = sorted(self._with_companions(tensors))
        for name in self.tensors:
            kind = dtypes[name]
            plain = kind.is_floating_point or is_companion(name) or name + SCALE in dtypes
            if not plain or kind not in CTYPES:
                raise NotPrintableError(f"a tensor of {kind}, {name}")
        numbers = {args[0] for args in ops["number"]} | set(self.plan.numbers)
        self.numbers = sorted(numbers)

    def source(self) -> str:
        """The whole file."""
        parts = [PRELUDE, *self._formats(), f"typedef {self.type} T;", self._row()]
        for k, planned in enumerate(self.plan.passes):
            parts += [self._scalars(f"scalars_{k}", planned.scalars), self._pass(k, planned)]
        parts += [self._scalars("scalars_end", self.plan.final), self._numbers(), self._driver()]
        return "\n".join(parts)

    def _formats(self) -> list[str]:
        """The functions for formats of fewer bits that this kernel needs."""
        uses = {part for n in self.tensors for part in COMPANIONS if n.endswith(part)}
        found = {CORRECTED: CORRECTION in uses, CODES: SCALE in uses, ROOTS: bool(self.roots)}
        return [text for text, needed in found.items() if needed]

    # ---- layout

    def _with_companions(self, names: Iterable[str]) -> set[str]:
        """The tensors under these names as they are kept in memory."""
        kept = {name + part for name in names for part in ("", *COMPANIONS)}
        return {name for name in kept if name in self.dtypes}

    @property
    def names(self) -> tuple:
        """What the columns and the numbers of a table are, which the source does not say."""
        names = (tuple(self.tensors), tuple(self.numbers), tuple(self.hypers), tuple(self.totals))
        return (*names, self.graph.starts)

    @property
    def columns(self) -> list[str]:
        """What a row of the table holds: the size, the group, a pointer for each tensor and number."""
        return [*self.leading, *self.tensors, *self.numbers]

    def _row(self) -> str:
        width = len(self.columns)
        lines = [f"enum {{ COLUMNS = {width}, VALUES = {len(self.graph.values)} }};"]
        for name in self.tensors:
            column = self.columns.index(name)
            kind = CTYPES[self.dtypes[name]]
            lines.append(f"#define {self._tensor(name)} (({kind}*)row[{column}])  // {name}")
        for name in self.numbers:
            lines.append(
                f"#define {self._number(name)} ((double*)row[{self.columns.index(name)}])  // {name}"
            )
        return "\n".join(lines)

    def _tensor(self, name: str) -> str:
        return f"TENSOR_{self.tensors.index(name)}"

    def _number(self, name: str) -> str:
        return f"NUMBER_{self.numbers.index(name)}"

    # ---- expressions

    def _expression(self, value: Value, names: dict[int, str], dtype: torch.dtype) -> str:
        def argument(a: object) -> Expr | float:
            if not isinstance(a, Ref):
                return a  # type: ignore[return-value]
            source = self.graph.values[a.index]
            kind = torch.bool if source.kind == "bool" else dtype
            return Var(a.index, kind, source.level)

        made = expression(value.op, [argument(a) for a in value.args], dtype, value.kind)
        return self.dialect.text(made, lambda v: names[v.index])  # type: ignore[index]

    # ---- functions

    def _scalars(self, name: str, nodes: list[int]) -> str:
        lines = [f"PART void {name}(const int64_t* row, const double* hyper, double* s) {{"]
        names = {i: f"s[{i}]" for i in range(len(self.graph.values))}
        width = len(self.hypers) + len(self.totals)
        for i in nodes:
            v = self.graph.values[i]
            if v.op == "number":
                text = f"*{self._number(v.args[0])}"
            elif v.op == "hyper":
                text = f"hyper[row[1] * {width} + {self.hypers.index(v.args)}]"
            elif v.op == "total":
                text = (
                    f"hyper[row[1] * {width} + {len(self.hypers) + self.totals.index(v.args[0])}]"
                )
            elif v.op in (*SIZES, "members"):
                text = self._count(v)
            elif v.op == "const":
                text = _float(v.args[0])
            else:
                text = self._expression(v, _booleans(self.graph, names), torch.float64)
            lines.append(f"    s[{i}] = {text};")
        return "\n".join([*lines, "}\n"])

    def _count(self, value: Value) -> str:
        """How many values a sum adds up."""
        return SIZES[value.op].format(k=self.graph.every)

    def _pass(self, k: int, planned: Pass) -> str:
        lines = [
            f"PART void pass_{k}(const int64_t* row, const double* s,"
            " int64_t low, int64_t high, double* part) {"
        ]
        of_slice, summed = self._split_reductions(planned)
        body, used = self._body(planned)
        sliced, used_there = self._slice(planned, of_slice)
        lines += self._pointers(planned) + self._keys({**planned.stores, **planned.slice_stores})
        lines += [self._constant(i) for i in sorted(used | used_there)]
        lines += [f"    {self._sum_type(i)} r{i} = {self._neutral(i)};" for i in planned.reductions]
        walk = [f"    #pragma omp simd{self._clauses(summed)}"]
        walk += ["    for (int64_t i = low; i < high; ++i) {"]
        walk += [f"        {line}" for line in body]
        walk += ["    }"]
        walk = self._in_blocks(planned, walk)
        lines += self._in_bits(planned, walk, sliced) if sliced else walk
        lines += [f"    part[{n}] = r{i};" for n, i in enumerate(planned.reductions)]
        return "\n".join([*lines, "}\n"])

    def _in_blocks(self, planned: Pass, walk: list[str]) -> list[str]:
        """A walk over a part of a tensor; with 8-bit tensors, block by block through buffers."""
        read = {*planned.loads, *planned.reloads.values()}
        touched = [n for n in sorted(read | planned.stores.keys()) if n + SCALE in self.dtypes]
        if not touched:
            return walk
        numbers = [self.tensors.index(n) for n in touched]
        lines = [f"    float q{n}[{WIDE}], o{n}[{WIDE}];" for n in numbers]
        lines += [f"    for (int64_t base = low, last = high; base < last; base += {WIDE}) {{"]
        lines += [
            f"    const int64_t low = base, high = last < base + {WIDE} ? last : base + {WIDE};"
        ]
        ends = []
        for name, n in zip(touched, numbers, strict=True):
            place = f"t{n} + base, t{self.tensors.index(name + SCALE)} + base / 32"
            lines.append(f"    decode({place}, o{n}, high - low);")
            if name in read:
                lines.append(f"    std::memcpy(q{n}, o{n}, sizeof(q{n}));")
            if name in planned.stores:
                how, key = ("true", f"key{n}") if self.random else ("false", "0")
                ends.append(f"    encode<{how}>({place}, o{n}, q{n}, high - low, {key}, base);")
        return [*lines, *walk, *ends, "    }"]

    def _in_bits(self, planned: Pass, walk: list[str], sliced: list[str]) -> list[str]:
        """Both walks by turns; the second finds in the cache what the first has read."""
        bit = STEPS * self.graph.every  # type: ignore[operator]
        return [
            *(f"    T old{self.tensors.index(name)}[{bit}];" for name in self._kept_old(planned)),
            f"    for (int64_t first = low, last = high; first < last; first += {bit}) {{",
            f"    const int64_t low = first, high = last < first + {bit} ? last : first + {bit};",
            *walk,
            *(line.format(low="low", high="high") for line in sliced),
            "    }",
        ]

    def _kept_old(self, planned: Pass) -> list[str]:
        """The tensors that the walk over all elements overwrites before every k-th is looked at."""
        values = self.graph.values
        picked = {values[i].args[0] for i in planned.slices if values[i].op == "pick"}
        return sorted(picked & planned.stores.keys())

    def _split_reductions(self, planned: Pass) -> tuple[list[int], list[int]]:
        """The sums of a pass over its slice, and those over its elements."""
        values = self.graph.values
        level = {i: values[values[i].args[0].index].level for i in planned.reductions}
        of_slice = [i for i in planned.reductions if level[i] == "slice"]
        return of_slice, [i for i in planned.reductions if level[i] != "slice"]

    def _slice(self, planned: Pass, reductions: list[int]) -> tuple[list[str], set[int]]:
        """The loop over every k-th element between {{low}} and {{high}}, and the numbers it reads."""
        if not planned.slices:
            return [], set()
        names, used, body = self._names(), set[int](), list[str]()
        k = self.graph.every
        loaded = {v.args[0] for i in planned.slices if (v := self.graph.values[i]).op in PICKS}
        for name in {*loaded, *planned.slice_stores}:
            if name + SCALE in self.dtypes:
                raise NotPrintableError(f"8-bit state ({name}) of which every k-th element is used")
        old = self._kept_old(planned)
        for i in planned.slices:
            v = self.graph.values[i]
            if v.op == "pick" and v.args[0] in old:
                text = f"old{self.tensors.index(v.args[0])}[i * {k} - {self.first}]"
            elif v.op in PICKS:
                place = "i" if v.op == "load" else f"(i * {k})"
                text = self._load(v.args[0], self._local, place)
            else:
                used |= {a.index for a in v.args if isinstance(a, Ref)}
                text = self._expression(v, names, self.compute)
            body.append(f"const {_kind(self.graph, i)} {names[i]} = {text};")
        body += [self._accumulate(i, names) for i in reductions]
        for name, i in planned.slice_stores.items():
            used.add(i)
            body.append(self._store(name, names[i], self._local))
        clauses = self._clauses(reductions)
        lines = [
            f"    #pragma omp simd{clauses}",
            f"    for (int64_t i = ({{low}} + {k - 1}) / {k}; i < ({{high}} + {k - 1}) / {k}; ++i) {{{{",  # type: ignore[operator]
            *(f"        {line}" for line in body),
            "    }}",
        ]
        return lines, {i for i in used if self.graph.values[i].level == "scalar"}

    def _pointers(self, planned: Pass) -> list[str]:
        lines = []
        values = self.graph.values
        picked = {values[i].args[0] for i in planned.slices if values[i].op in ("load", "pick")}
        touched = {*planned.loads, *planned.reloads.values(), *planned.stores, *picked}
        for name in sorted(self._with_companions(touched | set(planned.slice_stores))):
            kind, index = CTYPES[self.dtypes[name]], self.tensors.index(name)
            lines.append(f"    {kind}* __restrict t{index} = {self._tensor(name)};")
        return lines

    def _constant(self, index: int) -> str:
        return f"    const {_kind(self.graph, index)} c{index} = {_read(self.graph, index)};"

    def _neutral(self, reduction: int) -> str:
        is_max = self.graph.values[reduction].op == "amax"
        return "-std::numeric_limits<double>::infinity()" if is_max else "0"

    def _clauses(self, reductions: list[int]) -> str:
        signs = {i: "max" if self.graph.values[i].op == "amax" else "+" for i in reductions}
        return "".join(f" reduction({sign}:r{i})" for i, sign in signs.items())

    def _names(self) -> dict[int, str]:
        """How a loop body calls each value, by where the value lives."""
        prefix = {"scalar": "c", "element": "v", "slice": "q"}
        return {i: f"{prefix.get(v.level, 'w')}{i}" for i, v in enumerate(self.graph.values)}

    def _body(self, planned: Pass) -> tuple[list[str], set[int]]:
        """The statements for one element, and the numbers that they read."""
        names, used = self._names(), set[int]()
        lines = []
        for i, name in planned.reloads.items():
            lines.append(f"const T v{i} = {self._load(name, self._local)};")
        for i in planned.elements:
            v = self.graph.values[i]
            if v.op == "load":
                text = self._load(v.args[0], self._local)
            else:
                used |= {a.index for a in v.args if isinstance(a, Ref)}
                text = self._expression(v, names, self.compute)
            lines.append(f"const {_kind(self.graph, i)} v{i} = {text};")
        for i in self._split_reductions(planned)[1]:
            lines.append(self._accumulate(i, names))
        for name in self._kept_old(planned):
            place = f"old{self.tensors.index(name)}[i - {self.first}]"
            lines.append(f"{place} = {self._load(name, self._local)};")
        for name, i in planned.stores.items():
            used.add(i)
            lines.append(self._store(name, names[i], self._local))
        return lines, {i for i in used if self.graph.values[i].level == "scalar"}

    def _local(self, name: str) -> str:
        return f"t{self.tensors.index(name)}"

    def _load(self, name: str, pointer: Callable[[str], str], place: str = "i") -> str:
        """One value as the mathematics sees it, however it is kept."""
        if name + SCALE in self.dtypes:
            text = f"q{self.tensors.index(name)}[i - base]"
        elif name + CORRECTION in self.dtypes:
            text = (
                f"load_corrected({pointer(name)} + {place}, {pointer(name + CORRECTION)} + {place})"
            )
        else:
            text = f"load({pointer(name)} + {place})"
        return f"squared({text})" if name in self.roots else text

    def _store(self, name: str, value: str, pointer: Callable[[str], str]) -> str:
        target, is_root = f"{pointer(name)} + i", name in self.roots
        if name + SCALE in self.dtypes:
            value = f"root((float){value})" if is_root else f"(float){value}"
            return f"q{self.tensors.index(name)}[i - base] = {value};"
        if name + CORRECTION in self.dtypes:
            value = f"root((float){value})" if is_root else f"(float){value}"
            return f"store_corrected({target}, {pointer(name + CORRECTION)} + i, {value});"
        if is_root:
            return f"store({target}, raised_root((float){value}));"
        if self._is_random(name):
            return f"store_random({target}, {value}, key{self.tensors.index(name)}, i);"
        return f"store({target}, {value});"

    def _is_random(self, name: str) -> bool:
        """Whether a tensor is rounded stochastically when it is written."""
        corrected, coded = (name + part in self.dtypes for part in COMPANIONS)
        narrow = self.dtypes[name] == torch.bfloat16 and not corrected
        return self.random and (narrow or coded)

    def _keys(self, stores: Iterable[str]) -> list[str]:
        """The words from which the tensors that a walk rounds take their bits."""
        lines = []
        for name in stores:
            if self._is_random(name):
                stream = f"row[2] ^ {word_of(name):#x}"
                step = self.graph.counted
                n = self.tensors.index(name)
                lines.append(f"    const uint32_t key{n} = step_key({stream}, s[{step}]);")
        return lines

    def _counted(self, reduction: int) -> int | None:
        """The truth value that a sum counts, if that is what it does."""
        source = self.graph.values[self.graph.values[reduction].args[0].index]
        return source.args[0].index if source.op == "to_float" else None

    def _sum_type(self, reduction: int) -> str:
        # counting in int is exact and twice as wide as in double; no part of a tensor has 2^31 elements
        return "double" if self._counted(reduction) is None else "int32_t"

    def _accumulate(self, i: int, names: dict[int, str]) -> str:
        source = self.graph.values[i].args[0].index
        name = names[source]
        if self.graph.values[i].op == "amax":
            return f"r{i} = r{i} < {name} ? {name} : r{i};"
        if (counted := self._counted(i)) is not None:
            return f"r{i} += {names[counted]} ? 1 : 0;"
        if self.graph.values[source].op == "square":
            # squared in double, or the sum could overflow where the elements do not
            base = names[self.graph.values[source].args[0].index]
            return f"r{i} += (double){base} * (double){base};"
        return f"r{i} += {name};"

    def _numbers(self) -> str:
        lines = ["PART void write_numbers(const int64_t* row, const double* s) {"]
        lines += [f"    *{self._number(n)} = s[{i}];" for n, i in self.plan.numbers.items()]
        return "\n".join([*lines, "}\n"])

    def _driver(self) -> str:
        count = max([len(p.reductions) for p in self.plan.passes])
        last = len(self.plan.passes) - 1
        whole, chunked = [], []
        for k, planned in enumerate(self.plan.passes):
            whole += [f"scalars_{k}(row, hyper, s);", f"pass_{k}(row, s, 0, row[0], part);"]
            whole += [f"s[{i}] = part[{n}];" for n, i in enumerate(planned.reductions)]
            after = f"scalars_{k + 1}" if k < last else "scalars_end"
            chunked.append(_CHUNKED.format(k=k, join=self._join(planned), after=after))
        whole += ["scalars_end(row, hyper, s);", "write_numbers(row, s);"]
        return _DRIVER.format(
            parts=max(count, 1),
            whole="\n    ".join(whole),
            chunked="".join(chunked),
        )

    def _join(self, planned: Pass) -> str:
        lines = []
        for n, i in enumerate(planned.reductions):
            if self.graph.values[i].op == "amax":
                lines.append(f"s[{i}] = -std::numeric_limits<double>::infinity();")
                step = f"if (s[{i}] < p[{n}]) s[{i}] = p[{n}];"
            else:
                lines.append(f"s[{i}] = 0;")
                step = f"s[{i}] += p[{n}];"
            lines.append(f"for (const double* p = first; p < last; p += PARTS) {step}")
        return "\n                ".join(lines)


_DRIVER = """\
enum {{ PARTS = {parts} }};

static void whole(const int64_t* row, const double* hyper) {{
    double s[VALUES], part[PARTS];
    {whole}
}}

// table: COLUMNS numbers per tensor, the small ones first. large: (row, first chunk, end) for each of
// the others. chunks: (row, low, high, which large one). batches: (first large, end, first chunk, end);
// all passes of a batch are done before the next, while its tensors are still in the cache.
extern "C" void run(const int64_t* table, int64_t small, const int64_t* large, const int64_t* chunks,
                    const int64_t* batches, int64_t count, const double* hyper, double* scratch,
                    double* parts, int threads) {{
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {{
        #pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < small; ++i) whole(table + i * COLUMNS, hyper);
        for (const int64_t* b = batches; b < batches + 4 * count; b += 4) {{
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i)
                scalars_0(table + large[3 * i] * COLUMNS, hyper, scratch + i * VALUES);{chunked}
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i)
                write_numbers(table + large[3 * i] * COLUMNS, scratch + i * VALUES);
        }}
    }}
}}
"""
# Every other pass goes backwards and meets first what the pass before it has just left in the cache.
_CHUNKED = """
            #pragma omp for schedule(dynamic, 1)
            for (int64_t n = b[2]; n < b[3]; ++n) {{
                const int64_t i = {k} % 2 ? b[2] + b[3] - 1 - n : n;
                const int64_t* c = chunks + 4 * i;
                pass_{k}(table + c[0] * COLUMNS, scratch + c[3] * VALUES, c[1], c[2], parts + i * PARTS);
            }}
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i) {{
                double* s = scratch + i * VALUES;
                const double* first = parts + large[3 * i + 1] * PARTS;
                const double* last = parts + large[3 * i + 2] * PARTS;
                (void)first; (void)last;
                {join}
                {after}(table + large[3 * i] * COLUMNS, hyper, s);
            }}"""


def refuse_codes(printer: Printer, where: str) -> None:
    """Refuse 8-bit tensors, for a printer that has no blocks."""
    for name in printer.tensors:
        if name.endswith(SCALE):
            raise NotPrintableError(f"8-bit state ({name.removesuffix(SCALE)}) {where}")


def _kind(graph: Graph, index: int) -> str:
    return "bool" if graph.values[index].kind == "bool" else "T"


def _read(graph: Graph, index: int) -> str:
    return f"s[{index}] != 0" if graph.values[index].kind == "bool" else f"(T)s[{index}]"


def _booleans(graph: Graph, names: dict[int, str]) -> dict[int, str]:
    return {i: f"({n} != 0)" if graph.values[i].kind == "bool" else n for i, n in names.items()}
