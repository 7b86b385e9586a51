"""How Triton spells values and operations."""

import torch

from heavyball.compiler.dialect import Dialect, is_number
from heavyball.compiler.formats import Function
from heavyball.compiler.frontend.ops import Operation
from heavyball.compiler.frontend.symbols import Number, Op

TYPES = {
    torch.bool: "tl.int1",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.int16: "tl.int16",
    torch.uint16: "tl.uint16",
    torch.int32: "tl.uint32",
}
# Of conditions as numbers, where one is per tensor, which the interpreter cannot spread.
MIXED = {"and": "({0} * {1} != 0)", "or": "({0} + {1} != 0)", "xor": "({0} != {1})"}


class Triton(Dialect):
    """Triton, whose functions besides `tl` are those of `PRELUDE`."""

    language = "Triton"
    types = TYPES

    def form(self, operation: Operation) -> str | None:
        return operation.triton

    def literal(self, value: Number, dtype: torch.dtype) -> str:
        """A constant of exactly this type, and not of the type that Triton would take it for."""
        if dtype == torch.bool:
            return "True" if value else "False"
        if dtype == torch.int32:
            return f"tl.full([], {int(value) & 0xFFFFFFFF:#x}, tl.uint32)"
        if not dtype.is_floating_point:
            return f"tl.full([], {int(value)}, {TYPES[dtype]})"
        value = float(value)
        text = repr(value) if value - value == 0 else f'float("{value}")'
        return f"tl.full([], {text}, {TYPES[dtype]})"

    def cast(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        return f"{text}.to({TYPES[target]})"

    def view(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        return f"{text}.to({TYPES[target]}, bitcast=True)"

    def nearest(self, text: str, target: torch.dtype) -> str:
        name = "finite_half" if target == torch.float16 else "nearest_bf16"
        return f"{name}({text})"

    def declared(self, name: str, text: str, dtype: torch.dtype) -> str:
        return f"{name} = {text}"

    def function(self, f: Function) -> str:
        """A function; one of several results returns all of them."""
        lines, found = self.computed(f.results, lambda v: str(v.index))
        head = f"@triton.jit\ndef {f.name}({', '.join(str(v.index) for v in f.arguments)}):"
        return "\n".join(f"    {line}" for line in (*lines, f"return {', '.join(found)}")).join(
            (f"{head}\n", "\n")
        )

    def operation(self, e: Op, arguments: list[str]) -> str:
        if e.name in MIXED and e.type == torch.bool and len(set(map(is_number, e.args))) > 1:
            ones = [
                f"tl.where({a}, {self.literal(1, torch.float32)}, {self.literal(0, torch.float32)})"
                for a in arguments
            ]
            return MIXED[e.name].format(*ones)
        return super().operation(e, arguments)
