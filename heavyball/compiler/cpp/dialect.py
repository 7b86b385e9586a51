"""How C++ spells values and operations."""

import torch

from heavyball.compiler.dialect import Dialect
from heavyball.compiler.frontend.ops import Operation
from heavyball.compiler.frontend.symbols import Number

TYPES = {
    torch.bool: "bool",
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.int16: "int16_t",
    torch.int32: "uint32_t",
}


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
        return f"{TYPES[dtype]}({_float(float(value))})"

    def cast(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        return f"({TYPES[target]}){text}"


def _float(value: float) -> str:
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return repr(value)
