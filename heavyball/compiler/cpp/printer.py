"""Spells a kernel of the loop form as C++: one function that steps every tensor of a table."""

import re
from collections.abc import Iterable

import torch

from heavyball.compiler.cpp.dialect import TYPES, Cpp
from heavyball.compiler.cpp.storage import WIDE, blocks_of
from heavyball.compiler.cpp.strips import HELPERS, Strips, fits
from heavyball.compiler.cpp.templates import CHUNKED, DRIVER, KEYS, MATH, PRELUDE, WALK
from heavyball.compiler.dialect import KernelPrinter
from heavyball.compiler.formats import needed, short
from heavyball.compiler.frontend.ops import NotPrintableError
from heavyball.compiler.frontend.symbols import Input, Var
from heavyball.compiler.passes.loops import (
    PLACE,
    Column,
    Let,
    Load,
    Loop,
    Reduce,
    Save,
    Statement,
    Store,
    Walk,
)

# A tensor up to this size goes whole to one thread; a larger one is cut into chunks.
SMALL, CHUNK = 65536, 16384
# How many steps of the walk over every k-th element follow on a bit of the walk over all: whole vectors,
# and few enough for the second walk to find in the cache what the first has read.
STEPS = 32
# A walk that only reads, and from no more tensors than this, goes through four parts of a bit at once.
FEW = 3
# Large tensors take their passes together in batches of about this many elements.
BATCH = 2**20


class CppPrinter(Cpp, KernelPrinter):
    """Spells one kernel, as walks over flat memory."""

    first = "first"  # the first element of a bit

    def source(self) -> str:
        """The whole file.

        Errors: NotPrintableError for an operation or a tensor that C++ has no form for.
        """
        walks = self.kernel.walks
        lines = [PRELUDE, HELPERS, *self._formats(), f"typedef {self.type} T;", self._row()]
        for k, walk in enumerate(walks):
            lines += [self._numbers(f"scalars_{k}", walk.numbers), self._walk(k, walk)]
        lines += [self._numbers("scalars_end", self.kernel.final), self._written(), self._driver()]
        text = "\n".join(lines)
        called = sorted(set(re.findall(r"\bmath::(\w+)", text)))
        return "".join(MATH.format(name=name) for name in called) + text

    def _formats(self) -> list[str]:
        """The functions for formats of fewer bits that this kernel needs."""
        columns = self.kernel.tensors
        return [*map(self.function, needed(columns)), KEYS, *blocks_of(columns)]

    # ---- layout

    def _row(self) -> str:
        columns = self.kernel.columns
        lines = [f"enum {{ COLUMNS = {len(columns)}, VALUES = {self.kernel.slots} }};"]
        for c in self.kernel.tensors:
            place = columns.index(c.name)
            lines.append(
                f"#define TENSOR_{c.number} (({TYPES[c.dtype]}*)row[{place}])  // {c.name}"
            )
        for name in self.kernel.numbers:
            place = columns.index(name)
            lines.append(f"#define {self._state(name)} ((double*)row[{place}])  // {name}")
        return "\n".join(lines)

    def _state(self, name: str) -> str:
        return f"NUMBER_{self.kernel.numbers.index(name)}"

    # ---- numbers per tensor

    def _number(self, var: Var) -> str:
        """A number per tensor among its like, where all are double."""
        return f"(s[{var.index}] != 0)" if var.type == torch.bool else f"s[{var.index}]"

    def _numbers(self, name: str, lets: list[Let]) -> str:
        lines = [f"PART void {name}(const int64_t* row, const double* hyper, double* s) {{"]
        for let in lets:
            made = let.expr
            text = self._input(made) if isinstance(made, Input) else self.text(made, self._number)
            lines.append(f"    s[{let.var.index}] = {text};")
        return "\n".join([*lines, "}\n"])

    def _input(self, e: Input) -> str:
        if e.name == "number":
            return f"*{self._state(e.args[0])}"
        if e.name in ("hyper", "total"):
            return f"hyper[row[1] * {self.width} + {self.place_in_group(e)}]"
        if e.name == "slices":
            return f"(double)((row[0] + {self.kernel.every} - 1) / {self.kernel.every})"
        return "(double)row[0]"

    def _written(self) -> str:
        lines = ["PART void write_numbers(const int64_t* row, const double* s) {"]
        lines += [f"    *{self._state(n)} = s[{v.index}];" for n, v in self.kernel.written.items()]
        return "\n".join([*lines, "}\n"])

    # ---- statements

    def statement(self, s: Statement, at: str = "i") -> str:
        """A statement of a loop at the place `at`; arrays are of the element itself."""
        if isinstance(s, Load):
            return self._declared(s.var, self._loaded(s, at))
        if isinstance(s, Let):
            return self._declared(s.var, self.expr(s.expr))
        if isinstance(s, Reduce):
            return self.reduce(s, f"r{s.var.index}")
        if isinstance(s, Save):
            return f"old{s.column.number}[i - {self.first}] = {self._value(s.column, at)};"
        if isinstance(s, Store):
            return self._store(s.column, self.expr(s.expr), at)
        raise NotImplementedError(type(s).__name__)

    def _declared(self, var: Var, text: str) -> str:
        return f"const {TYPES[var.type]} {self.name(var)} = {text};"

    def reduce(self, s: Reduce, target: str) -> str:
        """Add to a sum, wherever it is."""
        text = self.expr(s.expr)
        if s.how == "max":
            return f"{target} = {target} < {text} ? {text} : {target};"
        return f"{target} += {text} ? 1 : 0;" if s.how == "count" else f"{target} += {text};"

    def _loaded(self, s: Load, at: str) -> str:
        if s.old:
            return f"old{s.column.number}[{at} * {s.step} - {self.first}]"
        return self._value(s.column, at if s.step == 1 else f"({at} * {s.step})")

    def _value(self, c: Column, at: str) -> str:
        """One value as the mathematics sees it, however it is kept."""
        if c.scale is not None:
            text = f"q{c.number}[{at} - base]"
        elif (rest := c.correction) is not None:
            name = f"joined_{short(c.dtype)}_{short(rest.dtype)}"
            text = f"{name}(t{c.number}[{at}], t{rest.number}[{at}])"
        else:
            text = f"load(t{c.number} + {at})"
        return f"squared({text})" if c.is_root else text

    def _store(self, c: Column, value: str, at: str) -> str:
        target, wide = f"t{c.number}[{at}]", f"(float){value}"
        if c.scale is not None:
            return f"q{c.number}[{at} - base] = {f'root_of({wide})' if c.is_root else wide};"
        if (rest := c.correction) is not None:
            value = f"root_of({wide})" if c.is_root else wide
            name = f"split_{short(c.dtype)}_{short(rest.dtype)}"
            return f"{name}({value}, &{target}, &t{rest.number}[{at}]);"
        if c.is_root:
            return f"{target} = half_root_of({wide});"
        if c.word is not None:
            return f"{target} = rounded_at_random({wide}, key{c.number}, {self._number_of(at)});"
        return f"store(t{c.number} + {at}, {value});"

    def _number_of(self, at: str) -> str:
        """The number of an element from which its random bits come."""
        return f"(uint32_t)({at}{' + shift' if self.kernel.placed else ''})"

    # ---- what a loop needs before it begins

    def pointers(self, loops: Iterable[Loop]) -> list[str]:
        columns = {c for loop in loops for c in loop.columns}
        return [
            f"    {TYPES[c.dtype]}* __restrict t{c.number} = TENSOR_{c.number};"
            for c in sorted(columns, key=lambda c: c.number)
        ]

    def keys(self, loops: Iterable[Loop]) -> list[str]:
        """The words from which the tensors that are rounded take their bits."""
        found = []
        for c in (c for loop in loops for c in loop.random):
            step = self.kernel.counted.index  # type: ignore[union-attr]
            found.append(
                f"    const uint32_t key{c.number} = step_key(row[2] ^ {c.word:#x}, s[{step}]);"
            )
        return found

    def constants(self, loops: Iterable[Loop]) -> list[str]:
        """Numbers per tensor as the elements see them."""
        found = {v.index: v for loop in loops for v in loop.numbers}
        return [
            f"    const {TYPES[v.type]} c{i} = "
            + (f"s[{i}] != 0;" if v.type == torch.bool else f"(T)s[{i}];")
            for i, v in sorted(found.items())  # type: ignore[type-var]
        ]

    @staticmethod
    def start(s: Reduce) -> str:
        """What a sum, or the largest of no values, is."""
        return "-std::numeric_limits<double>::infinity()" if s.how == "max" else "0"

    @staticmethod
    def accumulator(s: Reduce) -> str:
        # counting in int is exact and twice as wide as in double; no part of a tensor has 2^31 elements
        kind = {"count": "int32_t", "max": "T"}.get(s.how, "double")
        return f"{kind} r{s.var.index} = {CppPrinter.start(s)};"

    @staticmethod
    def joined(s: Reduce, total: str, part: str) -> str:
        """The statement that takes a part into a sum, or into the largest."""
        if s.how == "max":
            return f"if ({total} < {part}) {total} = {part};"
        return f"{total} += {part};"

    @staticmethod
    def simd(sums: Iterable[Reduce]) -> str:
        clauses = (f" reduction({'max' if s.how == 'max' else '+'}:r{s.var.index})" for s in sums)
        return "#pragma omp simd" + "".join(clauses)

    # ---- walks

    def _walk(self, k: int, walk: Walk) -> str:
        """The functions of one walk; `pass_k` does it for the elements from low to high."""
        loop, lines = walk.elements, list[str]()
        if fits(loop):
            strips = Strips(self, f"again_{k}", loop)
            lines.append(strips.functions())
            inner = strips.wrapped(
                [strips.reduce(s) if s in strips.sums else self.statement(s) for s in loop.body]
            )
        elif self._reads_few(walk):
            inner = self._in_quarters(loop)
        else:
            inner = self._in_order(loop, "low", "high")
        inner = self._in_blocks(loop, inner)
        head = f"PART void pass_{k}(const int64_t* row, const double* s, int64_t low, int64_t high,"
        lines += [f"{head} double* part) {{", *self.pointers(walk.loops), *self.keys(walk.loops)]
        lines += self.constants(walk.loops)
        lines += [f"    {self.accumulator(s)}" for s in walk.sums]
        if self.kernel.placed and loop.random:
            inner = self._in_pieces(walk, inner)
        lines += self._by_turns(walk, inner) if walk.slices else inner
        lines += [f"    part[{n}] = r{s.var.index};" for n, s in enumerate(walk.sums)]
        return "\n".join([*lines, "}\n"])

    def _in_order(self, loop: Loop, low: str, high: str) -> list[str]:
        return [
            f"    {self.simd(loop.sums)}",
            f"    for (int64_t i = {low}; i < {high}; ++i) {{",
            *(f"        {self.statement(s)}" for s in loop.body),
            "    }",
        ]

    def _reads_few(self, walk: Walk) -> bool:
        """Whether a walk only adds up what it reads from a few tensors."""
        loop = walk.elements
        alone = not loop.of(Store, Save) and not walk.slices and not self.coded(loop)
        return alone and 0 < len(loop.columns) <= FEW

    def _in_quarters(self, loop: Loop) -> list[str]:
        """Four parts of a bit at once: a processor fetches several streams faster than a few."""
        each = [f"            {self.statement(s)}" for s in loop.body]
        lines = [
            "    const int64_t quarter = (high - low) / 4 & -16;",
            f"    {self.simd(loop.sums)}",
        ]
        lines.append("    for (int64_t n = low; n < low + quarter; ++n) {")
        for part in range(4):
            lines += ["        {", f"            const int64_t i = n + {part} * quarter;", *each]
            lines.append("        }")
        return [*lines, "    }", *self._in_order(loop, "low + 4 * quarter", "high")]

    def _in_pieces(self, walk: Walk, inner: list[str]) -> list[str]:
        """A loop over a part of a tensor, piece by piece; each is in one piece in the whole, too."""
        place, width, jump = (f"row[{self.kernel.columns.index(n)}]" for n in PLACE)
        return [
            "    for (int64_t from = low, to = high; from < to;) {",
            f"    const int64_t width = {width}, n = from / width, shift = {place} + n * {jump};",
            "    const int64_t low = from, high = (n + 1) * width < to ? (n + 1) * width : to;",
            *inner,
            "    from = high;",
            "    }",
        ]

    def _in_blocks(self, loop: Loop, inner: list[str]) -> list[str]:
        """A loop over a part of a tensor; with tensors of codes, block by block through buffers."""
        coded = self.coded(loop)
        if not coded:
            return inner
        begin, ends = self.recoded(loop, "base", "high - low")
        return [
            *(f"    float q{c.number}[{WIDE}], o{c.number}[{WIDE}];" for c in coded),
            f"    for (int64_t base = low, last = high; base < last; base += {WIDE}) {{",
            f"    const int64_t low = base, high = last < base + {WIDE} ? last : base + {WIDE};",
            *begin,
            *inner,
            *ends,
            "    }",
        ]

    @staticmethod
    def coded(loop: Loop) -> list[Column]:
        """The tensors of codes, which go through buffers."""
        return [c for c in loop.columns if c.scale is not None]

    def recoded(self, loop: Loop, base: str, count: str) -> tuple[list[str], list[str]]:
        """What decodes `count` elements from number `base` on, and what encodes them again."""
        read, stored = ({s.column for s in loop.of(kind)} for kind in (Load, Store))
        begin, ends = [], []
        for c in self.coded(loop):
            n, scales = c.number, f"t{c.scale.number}"  # type: ignore[union-attr]
            random, key = ("false", "0") if c.word is None else ("true", f"key{c.number}")
            if c.code_bits == 4:
                signed = "true" if c.signed else "false"
                place = f"t{n} + {base} / 2, {scales} + {base} / 128"
                decode, encode = (
                    f"decode_four_bit<{signed}>",
                    f"encode_four_bit<{signed}, {random}>",
                )
            else:
                place = f"t{n} + {base}, {scales} + {base} / 32"
                decode, encode = "decode", f"encode<{random}>"
            begin.append(f"    {decode}({place}, o{n}, {count});")
            if c in read:
                begin.append(f"    std::memcpy(q{n}, o{n}, ({count}) * sizeof(float));")
            if c in stored:
                first = f"{base} + shift" if self.kernel.placed and random == "true" else base
                ends.append(f"    {encode}({place}, o{n}, q{n}, {count}, {key}, {first});")
        return begin, ends

    def _by_turns(self, walk: Walk, inner: list[str]) -> list[str]:
        """Both loops alternately; that over a slice finds in the cache what the other has read."""
        # whole blocks of codes
        steps = 4 * STEPS if any(c.code_bits == 4 for c in walk.elements.columns) else STEPS
        bit = steps * self.kernel.every  # type: ignore[operator]
        return [
            *(f"    T old{s.column.number}[{bit}];" for s in walk.elements.of(Save)),
            f"    for (int64_t first = low, last = high; first < last; first += {bit}) {{",
            f"    const int64_t low = first, high = last < first + {bit} ? last : first + {bit};",
            *inner,
            *self.sliced(walk.slices, "low", "high"),  # type: ignore[arg-type]
            "    }",
        ]

    def sliced(self, loop: Loop, low: str, high: str) -> list[str]:
        """The loop over every k-th element of those from low to high."""
        for c in loop.columns:
            if c.scale is not None:
                raise NotPrintableError(
                    f"{c.code_bits}-bit state ({c.name}) of which every k-th element is used"
                )
        k = self.kernel.every
        ends = [f"({end} + {k - 1}) / {k}" for end in (low, high)]  # type: ignore[operator]
        return [
            f"    {self.simd(loop.sums)}",
            f"    for (int64_t i = {ends[0]}; i < {ends[1]}; ++i) {{",
            *(f"        {self.statement(s)}" for s in loop.body),
            "    }",
        ]

    # ---- driver

    def _join(self, k: int, walk: Walk) -> str:
        """The function that adds up the parts of a tensor, in their order."""
        head = f"PART void join_{k}(const double* first, const double* last, double* s) {{"
        lines = [head, *(f"    {line}" for line in self.summed(walk.sums, "first", "last")), "}\n"]
        return "\n".join(lines)

    @staticmethod
    def summed(sums: list[Reduce], first: str, last: str) -> list[str]:
        """Add up the parts from first to last, PARTS of them for each piece of a tensor."""
        lines = []
        for n, s in enumerate(sums):
            total = f"s[{s.var.index}]"
            step = CppPrinter.joined(s, total, f"p[{n}]")
            lines.append(f"{total} = {CppPrinter.start(s)};")
            lines.append(f"for (const double* p = {first}; p < {last}; p += PARTS) {step}")
        return lines

    def _functions(self) -> dict[str, str]:
        """The names of the functions of all walks, for a table of each."""
        count = len(self.kernel.walks)
        names = {
            kind: [f"{kind}_{k}" for k in range(count)] for kind in ("scalars", "pass", "join")
        }
        names["scalars"].append("scalars_end")
        begins, passes, joins = (", ".join(found) for found in names.values())
        return {"begins": begins, "passes": passes, "joins": joins, "walks": str(count)}

    def _driver(self) -> str:
        walks, whole, chunked, joins = self.kernel.walks, list[str](), list[str](), list[str]()
        for k, walk in enumerate(walks):
            joins.append(self._join(k, walk))
            whole += [f"scalars_{k}(row, hyper, s);", f"pass_{k}(row, s, 0, row[0], part);"]
            whole += [f"s[{s.var.index}] = part[{n}];" for n, s in enumerate(walk.sums)]
            after = f"scalars_{k + 1}" if k < len(walks) - 1 else "scalars_end"
            chunked.append(CHUNKED.format(k=k, after=after))
        whole += ["scalars_end(row, hyper, s);", "write_numbers(row, s);"]
        parts, text = f"enum {{ PARTS = {self.kernel.parts} }};\n", "\n    ".join(whole)
        run = DRIVER.format(whole=text, chunked="".join(chunked))
        return "\n".join([parts, *joins, run, WALK.format(**self._functions())])
