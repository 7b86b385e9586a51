"""Spells a kernel of the loop form as Triton: one launch per walk, one program per chunk."""

from collections.abc import Iterable

import torch

from heavyball.compiler.dialect import KernelPrinter
from heavyball.compiler.formats import needed, short
from heavyball.compiler.frontend.ops import NotPrintableError
from heavyball.compiler.frontend.symbols import Input, Var, variables
from heavyball.compiler.passes.loops import (
    Column,
    Kernel,
    Let,
    Load,
    Loop,
    Read,
    Reduce,
    Statement,
    Store,
    Walk,
)
from heavyball.compiler.triton.dialect import TYPES, Triton
from heavyball.compiler.triton.templates import CODES, KERNEL, KEYS, PRELUDE

# The types of device whose tensors go to Triton; its interpreter works on tensors of the CPU.
DEVICES = {"cuda"}
# A program walks through a chunk a block at a time.
CHUNK, BLOCK, WARPS = 8192, 1024, 4
# It walks through every k-th element in blocks of its own.
SLICE = 128


class TritonPrinter(Triton, KernelPrinter):
    """Spells one kernel, as walks over flat memory.

    Errors: NotPrintableError for a tensor of another dtype.
    """

    lanes = "lane"  # the elements of a block, counted from where it begins

    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        for c in kernel.tensors:
            if c.dtype not in TYPES:
                raise NotPrintableError(f"a tensor of {c.dtype}")
        self.bound = self._bound()

    def source(self) -> str:
        """The whole module; the loader provides the names `triton`, `tl` and `libdevice`."""
        walks = [
            self._slice_block(k, w) + self._block(k, w) + self._kernel(k, w)
            for k, w in enumerate(self.kernel.walks)
        ]
        return "\n\n".join([PRELUDE, *self._formats(), *walks])

    def _formats(self) -> list[str]:
        """The functions for formats of fewer bits that this kernel needs."""
        columns = self.kernel.tensors
        packed = any(c.scale is not None or c.is_bits for c in columns)
        return [*map(self.function, needed(columns)), KEYS, *([CODES] if packed else [])]

    @property
    def functions(self) -> list[str]:
        """The kernels in the order in which they run."""
        return [f"pass_{k}" for k in range(len(self.kernel.walks))]

    def _column(self, name: str) -> int:
        return self.kernel.columns.index(name)

    # ---- numbers per tensor

    def _bound(self) -> list[set[Var]]:
        """For each walk, the numbers per tensor that its programs know without reading scratch."""
        known = []
        for k, walk in enumerate(self.kernel.walks):
            lets = [*self._end(k), *(walk.numbers if k == 0 else ())]
            known.append({s.var for s in (*walk.sums, *lets)})
        return known

    def _end(self, k: int) -> list[Let]:
        """The numbers that can be computed once walk k is over."""
        later = self.kernel.walks[k + 1 :]
        return later[0].numbers if later else self.kernel.final

    @staticmethod
    def _needs(lets: Iterable[Let]) -> set[Var]:
        """The numbers that others are computed from."""
        return {v for let in lets for v in variables(let.expr)}

    def _loop_needs(self, loops: Iterable[Loop]) -> set[Var]:
        """The numbers that loops need, in float64."""
        loops = list(loops)
        found = {self._wide(v) for loop in loops for v in loop.numbers}
        if any(loop.random for loop in loops):
            found.add(self.kernel.counted)  # type: ignore[arg-type]
        return found

    @staticmethod
    def _wide(v: Var) -> Var:
        return v if v.type == torch.bool else Var(v.index, torch.float64, v.level)

    def _end_needs(self, k: int) -> set[Var]:
        last = k == len(self.kernel.walks) - 1
        written = set(self.kernel.written.values()) if last else set[Var]()
        return self._needs(self._end(k)) | written

    def _wanted_after(self, k: int) -> set[Var]:
        """The numbers that programs of later walks have to read."""
        wanted: set[Var] = set()
        for later, walk in enumerate(self.kernel.walks[k + 1 :], start=k + 1):
            needs = self._loop_needs(walk.loops) | self._end_needs(later)
            wanted |= needs - self.bound[later]
        return wanted

    @staticmethod
    def number(v: Var) -> str:
        """A number per tensor among its like, in float64."""
        return f"x{v.index}"

    def lets(self, numbers: Iterable[Let]) -> list[str]:
        """The statements that compute numbers."""
        return [f"x{let.var.index} = {self._number(let)}" for let in numbers]

    def _number(self, let: Let) -> str:
        if not isinstance(let.expr, Input):
            return self.text(let.expr, self.number)
        text = self._input(let.expr)
        is_bool = let.var.type == torch.bool
        return f"{text} != 0" if is_bool and let.expr.name == "number" else text

    def _input(self, e: Input) -> str:
        if e.name == "number":
            return f"tl.load(pointer(row + {self._column(e.args[0])}, tl.float64, False))"
        if e.name in ("hyper", "total"):
            return f"tl.load(group + {self.place_in_group(e)})"
        return f"{self._end_of_slice('size') if e.name == 'slices' else 'size'}.to(tl.float64)"

    @staticmethod
    def fetch(numbers: Iterable[Var]) -> list[str]:
        """Read numbers that an earlier kernel kept."""
        lines = []
        for v in sorted(numbers, key=lambda v: v.index):
            test = " != 0" if v.type == torch.bool else ""
            lines.append(f"x{v.index} = tl.load(kept + {v.index}){test}")
        return lines

    def keep(self, v: Var) -> str:
        """Write a number where later kernels read it."""
        return f"tl.store(kept + {v.index}, {self.text(v.to(torch.float64), self.number)})"

    def constants(self, numbers: Iterable[Var]) -> list[str]:
        """Numbers as the elements see them."""
        lines = []
        for v in sorted(numbers, key=lambda v: v.index):
            change = "" if v.type == torch.bool else f".to({self.type})"
            lines.append(f"c{v.index} = x{v.index}{change}")
        return lines

    def keys(self, loops: Iterable[Loop]) -> list[str]:
        """The words from which tensors that are rounded take their bits."""
        place, lines = self._column("stream"), []
        for c in (c for loop in loops for c in loop.random):
            stream = f"tl.load(row + {place}) ^ {c.word}"
            step = self.kernel.counted.index  # type: ignore[union-attr]
            lines.append(f"key{c.number} = step_key({stream}, x{step})")
        return lines

    def write_numbers(self) -> list[str]:
        """The states that are numbers."""
        return [
            f"tl.store(pointer(row + {self._column(name)}, tl.float64, False), x{v.index})  # {name}"
            for name, v in self.kernel.written.items()
        ]

    # ---- statements

    def statements(self, s: Statement, at: str, number: str) -> list[str]:
        """A statement of a loop for a block of elements, which lie at `at` and have this number."""
        if isinstance(s, Load):
            place = at if s.step == 1 else f"{at} * {s.step}"
            if s.column.scale is not None and s.step != 1:
                what = f"{s.column.code_bits}-bit state ({s.column.name})"
                raise NotPrintableError(f"{what} of which every k-th element is used")
            return [f"{self.name(s.var)} = {self._value(s.column, place, number)}"]
        if isinstance(s, Reduce):
            return self._reduced(s)
        if isinstance(s, Store):
            return self._stored(s.column, self.expr(s.expr), at, number)
        assert not isinstance(s, Read)
        return [f"{self.name(s.var)} = {self.expr(s.expr)}"]  # type: ignore[union-attr]

    def _value(self, c: Column, at: str, number: str) -> str:
        """Values as the mathematics sees them, however they are kept; `number` is the element's."""
        text = f"tl.load(t{c.number} + {at}, mask)"
        if c.is_bits:
            place = f"byte_place({number}, side)"
            byte = f"tl.load(t{c.number} + {place}, mask).to(tl.int32)"
            return f"(({byte} >> (({number}) % side % 8).to(tl.int32)) & 1) != 0"
        if c.scale is not None:
            text = self._decoded(c, at, number)
        if (rest := c.correction) is not None:
            name = f"joined_{short(c.dtype)}_{short(rest.dtype)}"
            text = f"{name}({text}, tl.load(t{rest.number} + {at}, mask))"
        if c.is_root:
            text = f"squared({text}.to(tl.float32))"
        return f"{text}.to({self.type})"

    def _stored(self, c: Column, value: str, at: str, number: str) -> list[str]:
        """Store values; `number` is that of the element, from which its random bits come."""
        kind, target, n = TYPES[c.dtype], f"t{c.number} + {at}", c.number
        if c.is_bits:
            first = f"begin + tl.arange(0, {BLOCK // 8}) * 8"
            byte, lanes = (
                f"bits_of({value}, mask, {BLOCK // 8})",
                f"kept_lanes(mask, {BLOCK // 8}, 8)",
            )
            return [f"tl.store(t{n} + byte_place({first}, side), {byte}, {lanes})"]
        if c.scale is not None:
            return self._encoded(c, value, at, number)
        if self.type == "tl.float64" and kind in ("tl.bfloat16", "tl.float16"):
            value += ".to(tl.float32)"
        if (rest := c.correction) is not None:
            value = f"root_of({value})" if c.is_root else value
            return [
                f"kept{n}, rest{n} = split_{short(c.dtype)}_{short(rest.dtype)}({value})",
                f"tl.store({target}, kept{n}, mask)",
                f"tl.store(t{rest.number} + {at}, rest{n}, mask)",
            ]
        if c.word is not None:
            value = f"rounded_at_random({value}, key{n}, ({number}).to(tl.uint32))"
        elif kind == "tl.float16":
            value = f"half_root_of({value})" if c.is_root else f"finite_half({value})"
        else:
            value = f"{value}.to({kind})"
        return [f"tl.store({target}, {value}, mask)"]

    @staticmethod
    def _code(c: Column, at: str, number: str) -> str:
        if c.code_bits == 8:
            return f"tl.load(t{c.number} + {at}, mask)"
        return f"nibble(tl.load(t{c.number} + ({number}) // 2, mask), {number})"

    def _decoded(self, c: Column, at: str, number: str) -> str:
        """The values of codes."""
        assert c.scale is not None
        size, name = (32, f"value_of_{short(c.dtype)}") if c.code_bits == 8 else (128, _four(c))
        scale = f"tl.load(t{c.scale.number} + ({number}) // {size}, mask).to(tl.float32)"
        return f"{name}({self._code(c, at, number)}, {scale})"

    def _encoded(self, c: Column, value: str, at: str, number: str) -> list[str]:
        """Store values as codes; a block that did not change keeps its bits."""
        assert c.scale is not None
        n, wide = c.number, f"({value}).to(tl.float32)"
        eight = c.code_bits == 8
        size = 32 if eight else 128
        blocks = f"{BLOCK // size}, {size}"
        first = f"t{c.scale.number} + begin // {size} + tl.arange(0, {BLOCK // size})"
        kind = short(c.dtype) if eight else f"four_bits_of_{'moment' if c.signed else 'square'}"
        encode = f"{kind}_of" if eight else kind
        reach = f"new{n}" if eight else f"reach_of_{'moment' if c.signed else 'square'}(new{n})"
        random = f", key{n}, ({number}).to(tl.uint32)"
        name, rest = (encode, "") if c.word is None else (f"random_{encode}", random)
        lines = [
            f"old{n} = {self._decoded(c, at, number)}",
            f"new{n} = {f'root_of({wide})' if c.is_root else wide}",
            f"same{n} = unchanged(old{n}, new{n}, mask, {blocks})",
            f"some{n} = kept_lanes(mask, {blocks})",
            f"most{n} = largest_of({reach}, mask, {blocks})",
            f"made{n} = {'' if eight else 'four_bit_'}scale_of(most{n})",
            f"scale{n} = tl.where(same{n}, tl.load({first}, some{n}), made{n})",
            f"over{n} = spread(scale{n}.to(tl.float32), {blocks})",
            f"code{n} = {name}(new{n}, over{n}{rest})",
            f"code{n} = tl.where(spread(same{n}, {blocks}), {self._code(c, at, number)}, code{n})",
            "tl.debug_barrier()",
            f"tl.store({first}, scale{n}, some{n})",
        ]
        if eight:
            return [*lines, f"tl.store(t{n} + {at}, code{n}, mask)"]
        half = BLOCK // 2
        place = f"t{n} + begin // 2 + tl.arange(0, {half})"
        return [
            *lines,
            f"tl.store({place}, bytes_of(code{n}, {half}), kept_lanes(mask, {half}, 2))",
        ]

    def _reduced(self, s: Reduce) -> list[str]:
        i = s.var.index
        rest = 'float("-inf")' if s.how == "max" else "0.0"
        lines = [f"a{i} = {self.expr(s.expr.to(torch.float64))}", "if mask is not None:"]
        lines.append(f"    a{i} = tl.where(mask, a{i}, {rest})")
        return [*lines, f"r{i} = larger(r{i}, a{i})" if s.how == "max" else f"r{i} += a{i}"]

    # ---- blocks

    def _given(self, loop: Loop) -> list[str]:
        """The arguments of a loop's block besides its lanes: keys, tensors, numbers, partial sums."""
        return [
            *(f"key{c.number}" for c in loop.random),
            *(f"t{c.number}" for c in loop.columns),
            *(f"c{v.index}" for v in loop.numbers),
            *(self.name(v) for v in loop.arrays),
            *(f"r{s.var.index}" for s in loop.sums),
        ]

    def _function(self, name: str, head: list[str], loop: Loop, number: str) -> str:
        body = [s for s in loop.body if not isinstance(s, Read)]
        lines = [line for s in body for line in self.statements(s, "lane", number)]
        if loop.sums:
            lines.append("return " + ", ".join(f"r{s.var.index}" for s in loop.sums))
        arguments = ", ".join([*head, *self._given(loop)])
        return f"@triton.jit\ndef {name}({arguments}):\n{indented(lines or ['pass'], 1)}\n\n\n"

    def _block(self, k: int, walk: Walk) -> str:
        loop = walk.elements
        begin = ["begin"] if self._counts(loop) else []
        return self._function(f"block_{k}", ["lane", "mask", *begin], loop, "begin + lane")

    def call(self, k: int, walk: Walk, start: str, mask: str) -> str:
        """The block of elements that begins at `start`."""
        loop = walk.elements
        begin = [start] if self._counts(loop) else []
        given = [
            f"{a} + {start}" if a[0] == "t" and a not in self._apart(loop) else a
            for a in self._given(loop)
        ]
        call = f"block_{k}({', '.join([self.lanes, mask, *begin, *given])})"
        return self._assigned(loop, call)

    @staticmethod
    def _counts(loop: Loop) -> bool:
        """Whether the numbers of the elements are asked for, and not their places alone."""
        return bool(loop.random) or any(c.scale is not None or c.is_bits for c in loop.columns)

    @staticmethod
    def _apart(loop: Loop) -> set[str]:
        """The tensors that do not have one entry for each element."""
        columns = loop.columns
        found = {c.scale for c in columns if c.scale is not None}
        found |= {c for c in columns if c.is_bits or c.code_bits == 4}
        return {f"t{c.number}" for c in found}

    @staticmethod
    def _assigned(loop: Loop, call: str) -> str:
        results = ", ".join(f"r{s.var.index}" for s in loop.sums)
        return f"{results} = {call}" if results else call

    # ---- every k-th element

    def _end_of_slice(self, end: str) -> str:
        """How many of the slice's elements lie before an element."""
        every = self.kernel.every
        return f"(({end} + {every - 1}) // {every})"  # type: ignore[operator]

    def _slice_block(self, k: int, walk: Walk) -> str:
        if walk.slices is None:
            return ""
        return self._function(f"slice_{k}", ["lane", "mask"], walk.slices, "lane")

    def walk_slice(self, k: int, loop: Loop, first: str, end: str) -> list[str]:
        """The walk over a slice, before that over all elements, which may write what it looks at."""
        call = f"slice_{k}({', '.join(['spot', 'spot < end', *self._given(loop)])})"
        return [
            f"end = {end}",
            f"for place in range({first}, end, {SLICE}):",
            f"    spot = place + tl.arange(0, {SLICE})",
            f"    {self._assigned(loop, call)}",
            "tl.debug_barrier()",
        ]

    # ---- kernels

    def _kernel(self, k: int, walk: Walk) -> str:
        slices = list[str]()
        if walk.slices is not None:
            low, high = map(self._end_of_slice, ("low", "high"))
            slices = self.walk_slice(k, walk.slices, low, high)
        parts = self.kernel.parts
        return KERNEL.format(
            k=k,
            columns=len(self.kernel.columns),
            slots=self.kernel.slots,
            width=self.width,
            parts=parts,
            chunk=CHUNK,
            block=BLOCK,
            numbers=indented(self._begin(k, walk), 1),
            pointers=indented(self.pointers(walk.loops), 1),
            totals=indented([self.zero(walk, s) for s in walk.sums], 1),
            slices=indented(slices, 1),
            call=self.call(k, walk, "start", "None"),
            masked_call=self.call(k, walk, "even", "lane < high - even"),
            leave=indented(
                [
                    f"tl.store(parts + piece * {parts} + {n}, {self.total(s)})"
                    for n, s in enumerate(walk.sums)
                ],
                1,
            ),
            finish=indented(self._finish(k, walk), 2),
        )

    def _begin(self, k: int, walk: Walk) -> list[str]:
        """Numbers per tensor that every program of a walk needs, computed or read."""
        needs = self._loop_needs(walk.loops)
        lines = self.lets(walk.numbers) if k == 0 else self.fetch(needs)
        return [*lines, *self.constants(needs), *self.keys(walk.loops)]

    def pointers(self, loops: Iterable[Loop], aligned: str = "ALIGNED") -> list[str]:
        """The tensors that loops touch."""
        columns = {c for loop in loops for c in loop.columns}
        return [
            f"t{c.number} = pointer(row + {self._column(c.name)}, {TYPES[c.dtype]}, {aligned})"
            f"  # {c.name}"
            for c in sorted(columns, key=lambda c: c.number)
        ]

    def zero(self, walk: Walk, s: Reduce) -> str:
        """The initial value of a sum."""
        start = 'float("-inf")' if s.how == "max" else "0.0"
        width = SLICE if walk.slices and s in walk.slices.body else BLOCK
        return f"r{s.var.index} = tl.full([{width}], {start}, tl.float64)"

    @staticmethod
    def total(s: Reduce) -> str:
        """Store a program's partial sum."""
        return f"tl.{'max' if s.how == 'max' else 'sum'}(r{s.var.index}, 0)"

    @staticmethod
    def joined(s: Reduce, first: str, count: str, stride: int) -> str:
        """Add the partial sums of a tensor's programs."""
        over = "find_largest" if s.how == "max" else "add_up"
        return f"x{s.var.index} = {over}({first}, {count}, {stride}, 128)"

    def _finish(self, k: int, walk: Walk) -> list[str]:
        """The last program of a tensor: sums, numbers that follow from them, stored values."""
        lines = [
            self.joined(s, f"first + {n}", "pieces", self.kernel.parts)
            for n, s in enumerate(walk.sums)
        ]
        here = self.bound[k] | (self._loop_needs(walk.loops) if k else set())
        lines += self.fetch(self._end_needs(k) - here)
        lines += self.lets(self._end(k))
        kept = self._wanted_after(k) & self.bound[k]
        lines += [self.keep(v) for v in sorted(kept, key=lambda v: v.index)]
        last = k == len(self.kernel.walks) - 1
        return [*lines, *(self.write_numbers() if last else ())]


def _four(c: Column) -> str:
    return f"four_bit_{'moment' if c.signed else 'square'}"


def indented(lines: Iterable[str], depth: int) -> str:
    return "\n".join("    " * depth + line for line in lines)
