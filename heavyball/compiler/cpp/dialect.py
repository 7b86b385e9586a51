"""How C++ spells values and operations."""

import torch

from heavyball.compiler.dialect import Dialect, is_number
from heavyball.compiler.formats import Function
from heavyball.compiler.frontend.ops import Operation
from heavyball.compiler.frontend.symbols import Number, Op

TYPES = {
    torch.bool: "bool",
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.int16: "int16_t",
    torch.uint16: "uint16_t",
    torch.int32: "uint32_t",
}
# Of a condition and one that is a number per tensor: gcc vectorizes no loop with a plain `&` of them.
MIXED = {
    "and": "(({0} ? {1} : 0.0f) != 0)",
    "or": "(({0} ? 1.0f : {1}) != 0)",
    "xor": "(({0} ? 1.0f - {1} : {1}) != 0)",
}
HALVES = (torch.bfloat16, torch.float16)
# Types that C++ lacks are structs around these bits, so that functions can be overloaded for them.
STRUCTS = {torch.float16: "uint16_t", torch.bfloat16: "uint16_t"}


class Cpp(Dialect):
    """C++ 17."""

    language = "C++"
    types = TYPES

    def form(self, operation: Operation) -> str | None:
        return operation.cpp

    def literal(self, value: Number, dtype: torch.dtype) -> str:
        if dtype == torch.bool:
            return "true" if value else "false"
        if dtype == torch.int32:
            return f"{int(value) & 0xFFFFFFFF:#x}u"
        text = _float(float(value)) if dtype.is_floating_point else str(int(value))
        return f"{TYPES[dtype]}({text})"

    def cast(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        if source in HALVES:
            return f"wide({text})"
        if target in HALVES:
            return f"to_{TYPES[target]}({text})"
        # signed words convert to and from numbers faster, and no word that does is above 2^31
        signed = source == torch.int32 and target.is_floating_point
        signed |= source.is_floating_point and not target.is_floating_point
        return f"({TYPES[target]}){'(int32_t)' if signed else ''}{text}"

    def view(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        if source in STRUCTS:
            return f"{text}.bits"
        if target in STRUCTS:
            return f"{TYPES[target]}{{{text}}}"
        return f"{'float_of' if target == torch.float32 else 'word_of'}({text})"

    def nearest(self, text: str, target: torch.dtype) -> str:
        return f"nearest_{TYPES[target]}({text})"

    def declared(self, name: str, text: str, dtype: torch.dtype) -> str:
        return f"const {TYPES[dtype]} {name} = {text};"

    def operation(self, e: Op, arguments: list[str]) -> str:
        numbers = [is_number(a) for a in e.args]
        if e.name in MIXED and e.type == torch.bool and numbers[0] != numbers[1]:
            of_element, number = arguments if numbers[1] else reversed(arguments)
            return MIXED[e.name].format(of_element, f"(float)({number})")
        return super().operation(e, arguments)

    def function(self, f: Function) -> str:
        """A function; one of several results writes them to where its last arguments point."""
        several = len(f.results) > 1
        lines, found = self.computed(f.results, lambda v: str(v.index))
        given = [f"{TYPES[v.type]} {v.index}" for v in f.arguments]
        given += [f"{TYPES[e.dtype]}* to{n}" for n, e in enumerate(f.results) if several]
        # of 16 bits the word: gcc vectorizes no copy of a struct
        fields = [".bits" if e.dtype in STRUCTS else "" for e in f.results]
        places = [f"to{n}->bits" if bits else f"*to{n}" for n, bits in enumerate(fields)]
        ends = [f"{p} = {x}{bits};" for p, x, bits in zip(places, found, fields, strict=True)]
        kind = "void" if several else TYPES[f.results[0].dtype]
        head = f"static inline {kind} {f.name}({', '.join(given)}) {{"
        lines += ends if several else [f"return {found[0]};"]
        return "\n".join([head, *(f"    {line}" for line in lines), "}"])


def _float(value: float) -> str:
    if value != value:
        return '__builtin_nan("")'
    if value in (float("inf"), float("-inf")):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return repr(value)
