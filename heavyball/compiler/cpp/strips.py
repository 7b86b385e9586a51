"""Sums of which no step is made, in the type of the elements and so at the full width of a vector.

A float64 sum of float32 values takes two conversions and two additions where float32 takes one. So
what is only measured is added up in float32 over a strip of elements, and strips in float64.

The sum of n squares is then within n 2^-24 of itself, n = 512; where a vector has 8 lanes, each
adds up an eighth, and it is (n / 8 + 3) 2^-24. The sum of n products is within n 2^-24 of the sum
of their absolute values. A strip whose sum leaves the range in which that holds is added up again
in float64, from what is still there or was put aside.
"""

from typing import TYPE_CHECKING

import torch

from heavyball.compiler.frontend.symbols import Op, Var, variables
from heavyball.compiler.passes.loops import Column, Let, Load, Loop, Reduce, Statement, Store

if TYPE_CHECKING:
    from heavyball.compiler.cpp.printer import CppPrinter

STRIP = 512
# Of squares below 2^-126 digits are lost or, where the processor is told so, all is: at most
# 512 2^-126 of a strip, 2^-27 of a sum of 2^-90.
HELPERS = """\
static inline bool in_range(float square) {
    return square >= 8.077935669463161e-28f && square <= std::numeric_limits<float>::max();
}
"""


def fits(loop: Loop) -> bool:
    """Whether the sums of a loop may be added up so: none of them is needed, and there are some."""
    added = [s for s in loop.sums if s.how == "add"]
    return bool(added) and all(
        s.passing and _source(s).type == torch.float32 and _source(s).level == "element"
        for s in added
    )


def _source(s: Reduce) -> Var:
    return next(variables(s.expr))


def _is_square(s: Reduce) -> bool:
    return isinstance(s.expr, Op) and s.expr.name == "mul"


class Strips:
    """The sums of one loop.

    saved: the values that a strip puts aside, which cannot be made again from what it leaves behind.
    """

    def __init__(self, printer: "CppPrinter", name: str, loop: Loop):
        self._printer, self._name, self._loop = printer, name, loop
        self._made: dict[Var, Statement] = {s.var: s for s in loop.of(Load, Let)}
        stores = loop.of(Store)
        self._overwritten = {s.column for s in stores}
        self._left = {
            s.expr: s.column for s in stores if isinstance(s.expr, Var) and _is_plain(s.column)
        }
        self.sums: list[Reduce] = [s for s in loop.sums if s.how == "add"]
        self.saved: list[Var] = []
        for s in self.sums:
            if not self._is_there(_source(s)):
                self.saved.append(_source(s))

    def _is_there(self, v: Var) -> bool:
        """Whether a value can be had once the strip has been walked."""
        if v.level == "scalar" or v in self.saved or v in self._left:
            return True
        s = self._made.get(v)
        if isinstance(s, Load):
            return s.column not in self._overwritten and s.column.scale is None
        return isinstance(s, Let) and all(map(self._is_there, variables(s.expr)))

    # ---- in the loop

    def reduce(self, s: Reduce) -> str:
        """Add to the sum of a strip."""
        v = self._printer.name(_source(s))
        return f"f{s.var.index} += {f'{v} * {v}' if _is_square(s) else v};"

    def wrapped(self, statements: list[str]) -> list[str]:
        """The loop over a part of a tensor, strip by strip."""
        others = [s for s in self._loop.sums if s.how != "add"]
        names = [f" reduction(+:f{s.var.index})" for s in self.sums]
        return [
            *(f"    T w{v.index}[{STRIP}];" for v in self.saved),
            f"    for (int64_t strip = low, last = high; strip < last; strip += {STRIP}) {{",
            f"    const int64_t low = strip, high = last - strip < {STRIP} ? last : strip + {STRIP};",
            *(f"    T f{s.var.index} = 0;" for s in self.sums),
            f"    {self._printer.simd(others)}{''.join(names)}",
            "    for (int64_t i = low; i < high; ++i) {",
            *(f"        {line}" for line in statements),
            *(f"        w{v.index}[i - low] = {self._printer.name(v)};" for v in self.saved),
            "    }",
            *(f"    r{s.var.index} += {self._checked(n, s)};" for n, s in enumerate(self.sums)),
            "    }",
        ]

    def _checked(self, n: int, s: Reduce) -> str:
        f = f"f{s.var.index}"
        saved = "".join(f", w{v.index}" for v in self.saved)
        return f"{self._test(s, f)} ? {f} : {self._name}_{n}(row, s, low, high{saved})"

    @staticmethod
    def _test(s: Reduce, text: str) -> str:
        if _is_square(s):
            return f"in_range({text})"
        return f"math::fabs({text}) <= std::numeric_limits<T>::max()"

    # ---- once more

    def functions(self) -> str:
        """For each sum the function that adds up a strip in float64."""
        return "\n".join(self._function(n, s) for n, s in enumerate(self.sums))

    def _function(self, n: int, s: Reduce) -> str:
        body: list[Statement] = []
        self._make(_source(s), body)
        loop, printer = Loop("element", [*body, s]), self._printer
        used = {v for each in body if isinstance(each, Let) for v in variables(each.expr)}
        saved = [v for v in self.saved if v in used | {_source(s)}]
        given = "".join(f", const T* w{v.index}" for v in self.saved)
        lines = [
            f"PART double {self._name}_{n}(const int64_t* row, const double* s, int64_t low,"
            f" int64_t high{given}) {{",
            *printer.pointers([loop]),
            *printer.constants([loop]),
            f"    double r{s.var.index} = 0;",
            f"    {printer.simd([s])}",
            "    for (int64_t i = low; i < high; ++i) {",
            *(f"        const T {printer.name(v)} = w{v.index}[i - low];" for v in saved),
            *(f"        {printer.statement(each)}" for each in loop.body),
            "    }",
            f"    return r{s.var.index};",
            "}\n",
        ]
        return "\n".join(lines)

    def _make(self, v: Var, body: list[Statement]) -> None:
        """Append the statements that make a value again."""
        if v.level == "scalar" or v in self.saved or any(s.var == v for s in body):  # type: ignore[union-attr]
            return
        if v in self._left:
            body.append(Load(v, self._left[v]))
            return
        s = self._made[v]
        if isinstance(s, Let):
            for used in variables(s.expr):
                self._make(used, body)
        body.append(s)


def _is_plain(c: Column) -> bool:
    """Whether a tensor holds the very values that are stored in it."""
    return c.dtype == torch.float32 and c.kept == (c,) and not c.is_root and c.word is None
