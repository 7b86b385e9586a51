"""Prints a graph as Triton: one kernel per pass over a table of tensors, one program per chunk."""

from collections.abc import Callable, Iterable

import torch

from heavyball.compiler.cpp.printer import PICKS, Printer, refuse_codes
from heavyball.compiler.frontend.graph import Graph, Ref
from heavyball.compiler.frontend.ops import NotPrintableError
from heavyball.compiler.passes.stages import Pass
from heavyball.compiler.triton.dialect import TYPES, Triton
from heavyball.compiler.triton.storage import CORRECTED, ROOTS
from heavyball.state.held import CORRECTION, word_of

# The types of device whose tensors go to Triton; its interpreter works on tensors of the CPU.
DEVICES = {"cuda"}
# A program walks through a chunk a block at a time.
CHUNK, BLOCK, WARPS = 8192, 1024, 4
# It walks through every k-th element in blocks of its own.
SLICE = 128
# A tile of a matrix is a block wide and has so many rows.
HEIGHT = 64

PRELUDE = '''\
@triton.jit
def divide(x, y):
    """The quotient, correctly rounded: `/` of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def remainder_of(x, y):
    """With the sign of y, and exact, as torch's."""
    rest = libdevice.fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def pointer(cell, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor whose address is in a cell of the table."""
    found = tl.load(cell).to(tl.pointer_type(KIND))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def mix(x):
    """The same bits as heavyball/numerics/random.py."""
    x = (x ^ (x >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def step_key(stream, step):
    word = step.to(tl.int64).to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)
    return mix(stream.to(tl.uint32) + word)


@triton.jit
def round_at_random(x, key, index):
    word = x.to(tl.uint32, bitcast=True)
    bits = mix((index.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)) ^ key) & 0xFFFF
    finite = (word & 0x7F800000) != 0x7F800000
    kept = tl.where(x != x, tl.full([], 0x7FC00000, tl.uint32), word)
    top = tl.where(finite, word + bits, kept) >> 16
    return top.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def finite_half(x):
    """float16, to nearest; a finite value stays finite."""
    size = tl.abs(x)
    over = (size > 65504.0) & (size <= 3.4028234663852886e38)
    most = tl.full([], 65504.0, tl.float32)
    return tl.where(over, tl.where(x < 0, 0.0 - most, most), x).to(tl.float16)


@triton.jit
def larger(x, y):
    return tl.where(x < y, y, x)


@triton.jit
def add_up(parts, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum what the chunks left behind, in an order that depends on their number alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        here = lane < count - start
        total += tl.load(parts + (start + lane) * STRIDE, here, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def find_largest(parts, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, count, BLOCK):
        here = lane < count - start
        low = float("-inf")
        part = tl.load(parts + (start + lane) * STRIDE, here, other=low, cache_modifier=".cg")
        found = larger(found, part)
    return tl.max(found, 0)
'''

# What programs share: a chunk is (row of the table, number within the tensor). A pass ends with the
# last program of each tensor: it alone knows all partial sums, and that every other program has read
# the numbers which it may now overwrite.
KERNEL = """\
@triton.jit
def pass_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * piece)
    part = tl.load(chunks + 2 * piece + 1)
    row = table + index * {columns}
    size = tl.load(row)
    kept = scratch + index * {slots}
    group = hyper + tl.load(row + 1) * {width}
{numbers}
{pointers}
{totals}
    low = part * {chunk}
    high = tl.minimum(low + {chunk}, size)
    even = low + (high - low) // {block} * {block}
    lane = tl.arange(0, {block})
{slices}
    for start in range(low, even, {block}):
        {call}
    if even < high:
        {masked_call}
{leave}
    tl.debug_barrier()
    pieces = (size + {chunk} - 1) // {chunk}
    if tl.atomic_add(arrived + index, 1) == pieces - 1:
        tl.store(arrived + index, 0)
        first = parts + (piece - part) * {parts}
{finish}
"""


class TritonPrinter(Printer):
    """Prints one graph for tensors of given dtypes, as walks over flat memory.

    Errors: NotPrintableError for a tensor of another dtype.
    """

    dialect = Triton()
    lanes = "lane"  # the elements of a block, counted from where it begins

    def __init__(
        self,
        graph: Graph,
        dtypes: dict[str, torch.dtype],
        compute: torch.dtype,
        random: bool = False,
        roots: frozenset[str] = frozenset(),
    ):
        super().__init__(graph, dtypes, compute, random, roots)
        self.type = TYPES[compute]
        refuse_codes(self, "on CUDA")
        for name in self.tensors:
            if dtypes[name] not in TYPES:
                raise NotPrintableError(f"a tensor of {dtypes[name]}")
        self.parts = max([len(p.reductions) for p in self.plan.passes] + [1])
        self.bound = self._bound()

    def source(self) -> str:
        """The whole module; its names `triton`, `tl` and `libdevice` come from whoever loads it."""
        passes = [
            self._slice_block(k, p) + self._block(k, p) + self._kernel(k, p)
            for k, p in enumerate(self.plan.passes)
        ]
        return "\n\n".join([PRELUDE, *self._formats(), *passes])

    def _formats(self) -> list[str]:
        corrected = any(name.endswith(CORRECTION) for name in self.tensors)
        found = {CORRECTED: corrected, ROOTS: bool(self.roots)}
        return [text for text, needed in found.items() if needed]

    @property
    def functions(self) -> list[str]:
        """The kernels in the order in which they run."""
        return [f"pass_{k}" for k in range(len(self.plan.passes))]

    def _sums(self, planned: Pass) -> list[int]:
        """The sums over elements that a pass leaves behind."""
        return [i for i in planned.reductions if self._level_of_terms(i) == "element"]

    def _slice_sums(self, planned: Pass) -> list[int]:
        """The sums over every k-th element."""
        return [i for i in planned.reductions if self._level_of_terms(i) == "slice"]

    def _level_of_terms(self, reduction: int) -> str:
        values = self.graph.values
        return values[values[reduction].args[0].index].level

    def _left(self, planned: Pass) -> list[int]:
        """All sums of which every program of a pass leaves its part behind, in that order."""
        return self._sums(planned) + self._slice_sums(planned)

    # ---- numbers per tensor

    def _bound(self) -> list[set[int]]:
        """For each pass, the numbers per tensor that its programs know without reading scratch."""
        passes = self.plan.passes
        ends = [*(p.scalars for p in passes[1:]), self.plan.final]
        known = [
            {*planned.reductions, *end, *(planned.scalars if k == 0 else ())}
            for k, (planned, end) in enumerate(zip(passes, ends, strict=True))
        ]
        return known

    def _end(self, k: int) -> list[int]:
        """The numbers that can be computed once pass k is over."""
        later = self.plan.passes[k + 1 :]
        return later[0].scalars if later else self.plan.final

    def _needs(self, nodes: Iterable[int]) -> set[int]:
        """The numbers that these nodes are computed from."""
        values = self.graph.values
        read = {a.index for i in nodes for a in values[i].args if isinstance(a, Ref)}
        return {i for i in read if values[i].level == "scalar"}

    def _walk_needs(self, planned: Pass) -> set[int]:
        """The numbers that the elements of a pass need."""
        read = self._body(planned)[1] | self._slice_body(planned)[1]
        if self._rounded({**planned.stores, **planned.slice_stores}):
            read.add(self.graph.counted)
        return self._scalars_of(read)

    def _scalars_of(self, nodes: set[int]) -> set[int]:
        return {i for i in nodes if self.graph.values[i].level == "scalar"}

    def _rounded(self, stores: Iterable[str]) -> list[str]:
        """The tensors among those to write that are rounded stochastically."""
        return [name for name in stores if self._is_random(name)]

    def _keys_of(self, stores: Iterable[str]) -> list[str]:
        return [f"key{self.tensors.index(name)}" for name in self._rounded(stores)]

    def _key_lines(self, names: Iterable[str]) -> list[str]:
        """The words from which tensors that are rounded take their bits."""
        place = self.columns.index("stream")
        lines = []
        for name in filter(self._is_random, names):
            stream = f"tl.load(row + {place}) ^ {word_of(name)}"
            lines.append(
                f"key{self.tensors.index(name)} = step_key({stream}, x{self.graph.counted})"
            )
        return lines

    def _end_needs(self, k: int) -> set[int]:
        last = k == len(self.plan.passes) - 1
        written = set(self.plan.numbers.values()) if last else set[int]()
        return self._needs(self._end(k)) | written

    def _wanted_after(self, k: int) -> set[int]:
        """The numbers that programs of later passes have to read."""
        wanted: set[int] = set()
        for later in range(k + 1, len(self.plan.passes)):
            needs = self._walk_needs(self.plan.passes[later]) | self._end_needs(later)
            wanted |= needs - self.bound[later]
        return wanted

    def _number_text(self, i: int) -> str:
        """One number per tensor as an expression, in float64."""
        v = self.graph.values[i]
        if v.op == "number":
            column = self.columns.index(v.args[0])
            text = f"tl.load(pointer(row + {column}, tl.float64, False))"
            return f"{text} != 0" if v.kind == "bool" else text
        if v.op == "hyper":
            return f"tl.load(group + {self.hypers.index(v.args)})"
        if v.op == "total":
            return f"tl.load(group + {len(self.hypers) + self.totals.index(v.args[0])})"
        if v.op == "numel":
            return "size.to(tl.float64)"
        if v.op == "slices":
            return f"{self._end_of_slice('size')}.to(tl.float64)"
        if v.op == "const":
            text = self.dialect.literal(v.args[0], torch.float64)
            return f"{text} != 0" if v.kind == "bool" else text
        names = {j: f"x{j}" for j in range(len(self.graph.values))}
        return self._expression(v, names, torch.float64)

    def _fetch(self, indices: Iterable[int]) -> list[str]:
        """Read numbers that the last program of an earlier pass kept."""
        lines = []
        for i in sorted(indices):
            test = " != 0" if self.graph.values[i].kind == "bool" else ""
            lines.append(f"x{i} = tl.load(kept + {i}){test}")
        return lines

    # ---- elements

    def _body(self, planned: Pass) -> tuple[list[str], set[int]]:
        """The statements for one block, and the values that they read."""
        names, used = self._names(), set[int]()
        lines = [self._read_block(i, name) for i, name in planned.reloads.items()]
        for i in planned.elements:
            v = self.graph.values[i]
            if v.op == "load":
                lines.append(self._read_block(i, v.args[0]))
            else:
                used |= {a.index for a in v.args if isinstance(a, Ref)}
                lines.append(f"v{i} = {self._expression(v, names, self.compute)}")
        for i in self._sums(planned):
            used.add(self.graph.values[i].args[0].index)
            lines += self._accumulation(i, names)
        for name, i in planned.stores.items():
            used.add(i)
            lines.append(self._write_block(name, i, names))
        return lines, used

    def _read_block(self, i: int, name: str) -> str:
        return f"v{i} = {self._read(name, self._local, 'lane')}"

    def _read(self, name: str, pointer: Callable[[str], str], lane: str) -> str:
        """Values as the mathematics sees them, however they are kept."""
        text = f"tl.load({pointer(name)} + {lane}, mask)"
        if name + CORRECTION in self.dtypes:
            rest = f"tl.load({pointer(name + CORRECTION)} + {lane}, mask)"
            text = f"corrected({text}, {rest})"
        if name in self.roots:
            text = f"squared({text}.to(tl.float32))"
        return f"{text}.to({self.type})"

    def _write_block(self, name: str, i: int, names: dict[int, str]) -> str:
        value = names[i]
        if self.graph.values[i].kind == "bool":
            value = f"({_as_number(value, self.type)})"
        return "\n    ".join(self._write(name, value, self._local, "lane", "begin + lane"))

    def _write(
        self, name: str, value: str, pointer: Callable[[str], str], lane: str, index: str
    ) -> list[str]:
        """Store values; `index` is the number of the element, from which its random bits come."""
        kind, target = TYPES[self.dtypes[name]], f"{pointer(name)} + {lane}"
        narrow, is_root = kind in ("tl.bfloat16", "tl.float16"), name in self.roots
        if self.type == "tl.float64" and narrow:
            value += ".to(tl.float32)"
        if name + CORRECTION in self.dtypes:
            rest = TYPES[self.dtypes[name + CORRECTION]]
            value = f"root32({value})" if is_root else value
            n, companion = self.tensors.index(name), f"{pointer(name + CORRECTION)} + {lane}"
            return [
                f"kept{n} = nearest_finite({value}, {kind})",
                f"tl.store({target}, kept{n}, mask)",
                f"tl.store({companion}, rest_of({value}, kept{n}, {rest}), mask)",
            ]
        if self._is_random(name):
            key = f"key{self.tensors.index(name)}"
            return [f"tl.store({target}, round_at_random({value}, {key}, {index}), mask)"]
        if kind == "tl.float16":
            value = f"raised_root({value})" if is_root else value
            return [f"tl.store({target}, finite_half({value}), mask)"]
        return [f"tl.store({target}, {value}.to({kind}), mask)"]

    def _accumulation(self, i: int, names: dict[int, str]) -> list[str]:
        source = self.graph.values[i].args[0].index
        is_max, value = self.graph.values[i].op == "amax", self.graph.values[source]
        term = f"{names[source]}.to(tl.float64)"
        lines = []
        if value.op == "square" and not is_max:
            # squared in float64, or the sum could overflow where the elements do not
            base = names[value.args[0].index]
            lines.append(f"a{i} = {base}.to(tl.float64)")
            term = f"a{i} * a{i}"
        lines.append(f"a{i} = {term}")
        rest = 'float("-inf")' if is_max else "0.0"
        lines += ["if mask is not None:", f"    a{i} = tl.where(mask, a{i}, {rest})"]
        return [*lines, f"r{i} = larger(r{i}, a{i})" if is_max else f"r{i} += a{i}"]

    def _touched(self, planned: Pass) -> list[int]:
        return self._places({*planned.loads, *planned.reloads.values(), *planned.stores})

    def _places(self, names: set[str]) -> list[int]:
        return sorted(self.tensors.index(name) for name in self._with_companions(names))

    def _signature(self, planned: Pass) -> list[str]:
        """What a block is given besides its lanes: numbers, sums so far."""
        numbers = [f"c{i}" for i in sorted(self._scalars_of(self._body(planned)[1]))]
        return [*numbers, *(f"r{i}" for i in self._sums(planned))]

    def _block(self, k: int, planned: Pass) -> str:
        tensors = [f"t{n}" for n in self._touched(planned)]
        keys = self._keys_of(planned.stores)
        rounding = ["begin", *keys] if keys else []
        arguments = ", ".join(["lane", "mask", *rounding, *tensors, *self._signature(planned)])
        lines = self._body(planned)[0]
        if self._sums(planned):
            lines.append("return " + ", ".join(f"r{i}" for i in self._sums(planned)))
        body = _indented(lines or ["pass"], 1)
        return f"@triton.jit\ndef block_{k}({arguments}):\n{body}\n\n\n"

    def _call(self, k: int, planned: Pass, start: str, mask: str) -> str:
        tensors = [f"t{n} + {start}" for n in self._touched(planned)]
        keys = self._keys_of(planned.stores)
        rounding = [start, *keys] if keys else []
        arguments = [self.lanes, mask, *rounding, *tensors, *self._signature(planned)]
        call = f"block_{k}({', '.join(arguments)})"
        results = ", ".join(f"r{i}" for i in self._sums(planned))
        return f"{results} = {call}" if results else call

    # ---- every k-th element

    def _end_of_slice(self, end: str) -> str:
        """How many of the slice's elements lie before an element."""
        every = self.graph.every
        return f"(({end} + {every - 1}) // {every})"  # type: ignore[operator]

    def _slice_body(self, planned: Pass) -> tuple[list[str], set[int]]:
        """The statements for a block of a slice, whose `lane` counts within the slice."""
        names, used, lines = self._names(), set[int](), list[str]()
        for i in planned.slices:
            v = self.graph.values[i]
            if v.op in PICKS:
                place = "lane" if v.op == "load" else f"lane * {self.graph.every}"
                lines.append(f"{names[i]} = {self._read(v.args[0], self._local, place)}")
            else:
                used |= {a.index for a in v.args if isinstance(a, Ref)}
                lines.append(f"{names[i]} = {self._expression(v, names, self.compute)}")
        for i in self._slice_sums(planned):
            used.add(self.graph.values[i].args[0].index)
            lines += self._accumulation(i, names)
        for name, i in planned.slice_stores.items():
            used.add(i)
            lines += self._write(name, names[i], self._local, "lane", "lane")
        return lines, used

    def _slice_touched(self, planned: Pass) -> list[int]:
        values = (self.graph.values[i] for i in planned.slices)
        return self._places({*planned.slice_stores, *(v.args[0] for v in values if v.op in PICKS)})

    def _slice_arguments(self, planned: Pass) -> list[str]:
        numbers = sorted(self._scalars_of(self._slice_body(planned)[1]))
        return [
            *self._keys_of(planned.slice_stores),
            *(f"t{n}" for n in self._slice_touched(planned)),
            *(f"c{i}" for i in numbers),
            *(f"r{i}" for i in self._slice_sums(planned)),
        ]

    def _slice_block(self, k: int, planned: Pass) -> str:
        if not planned.slices:
            return ""
        arguments = ", ".join(["lane", "mask", *self._slice_arguments(planned)])
        lines = self._slice_body(planned)[0]
        if self._slice_sums(planned):
            lines.append("return " + ", ".join(f"r{i}" for i in self._slice_sums(planned)))
        return f"@triton.jit\ndef slice_{k}({arguments}):\n{_indented(lines, 1)}\n\n\n"

    def _walk_slice(self, k: int, planned: Pass, first: str, end: str) -> list[str]:
        """The walk over a slice, before that over all elements, which may write what it looks at."""
        arguments = ["spot", "spot < end", *self._slice_arguments(planned)]
        call = f"slice_{k}({', '.join(arguments)})"
        results = ", ".join(f"r{i}" for i in self._slice_sums(planned))
        return [
            f"end = {end}",
            f"for place in range({first}, end, {SLICE}):",
            f"    spot = place + tl.arange(0, {SLICE})",
            f"    {results} = {call}" if results else f"    {call}",
            "tl.debug_barrier()",
        ]

    # ---- kernels

    def _kernel(self, k: int, planned: Pass) -> str:
        touched = sorted({*self._touched(planned), *self._slice_touched(planned)})
        slices = list[str]()
        if planned.slices:
            low, high = map(self._end_of_slice, ("low", "high"))
            slices = self._walk_slice(k, planned, low, high)
        return KERNEL.format(
            k=k,
            columns=len(self.columns),
            slots=len(self.graph.values),
            width=len(self.hypers) + len(self.totals),
            parts=self.parts,
            chunk=CHUNK,
            block=BLOCK,
            numbers=_indented(self._begin(k, planned), 1),
            pointers=_indented([self._pointer(n) for n in touched], 1),
            totals=_indented([self._zero(i) for i in self._left(planned)], 1),
            slices=_indented(slices, 1),
            call=self._call(k, planned, "start", "None"),
            masked_call=self._call(k, planned, "even", "lane < high - even"),
            leave=_indented([self._leave(n, i) for n, i in enumerate(self._left(planned))], 1),
            finish=_indented(self._finish(k, planned), 2),
        )

    def _begin(self, k: int, planned: Pass) -> list[str]:
        """Numbers per tensor that every program of a pass needs, computed or read."""
        needs = self._walk_needs(planned)
        if k == 0:
            lines = [f"x{i} = {self._number_text(i)}" for i in planned.scalars]
        else:
            lines = self._fetch(needs)
        for i in sorted(needs):
            is_bool = self.graph.values[i].kind == "bool"
            lines.append(f"c{i} = x{i}" + ("" if is_bool else f".to({self.type})"))
        return lines + self._key_lines({**planned.stores, **planned.slice_stores})

    def _pointer(self, n: int) -> str:
        name = self.tensors[n]
        cell = f"row + {self.columns.index(name)}"
        return f"t{n} = pointer({cell}, {TYPES[self.dtypes[name]]}, ALIGNED)  # {name}"

    def _zero(self, i: int) -> str:
        start = 'float("-inf")' if self.graph.values[i].op == "amax" else "0.0"
        width = SLICE if self._level_of_terms(i) == "slice" else BLOCK
        return f"r{i} = tl.full([{width}], {start}, tl.float64)"

    def _leave(self, n: int, i: int) -> str:
        over = "max" if self.graph.values[i].op == "amax" else "sum"
        return f"tl.store(parts + piece * {self.parts} + {n}, tl.{over}(r{i}, 0))"

    def _finish(self, k: int, planned: Pass) -> list[str]:
        """What the last program of a tensor does: sums, what follows from them, what is kept."""
        lines = []
        for n, i in enumerate(self._left(planned)):
            over = "find_largest" if self.graph.values[i].op == "amax" else "add_up"
            lines.append(f"x{i} = {over}(first + {n}, pieces, {self.parts}, 128)")
        here = self.bound[k] | (self._walk_needs(planned) if k else set())
        lines += self._fetch(self._end_needs(k) - here)
        lines += [f"x{i} = {self._number_text(i)}" for i in self._end(k)]
        for i in sorted(self._wanted_after(k) & self.bound[k]):
            value = f"x{i}"
            if self.graph.values[i].kind == "bool":
                value = _as_number(value, "tl.float64")
            lines.append(f"tl.store(kept + {i}, {value})")
        if k == len(self.plan.passes) - 1:
            for name, i in self.plan.numbers.items():
                cell = f"pointer(row + {self.columns.index(name)}, tl.float64, False)"
                lines.append(f"tl.store({cell}, x{i})  # {name}")
        return lines


def _indented(lines: list[str], depth: int) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _as_number(name: str, type_: str) -> str:
    return f"tl.where({name}, tl.full([], 1.0, {type_}), tl.full([], 0.0, {type_}))"
