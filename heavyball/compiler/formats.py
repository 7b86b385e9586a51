"""The arithmetic of the formats of `state/` and of random rounding as functions to be printed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from heavyball.compiler.frontend.symbols import Expr, Var
from heavyball.compiler.passes.loops import Column
from heavyball.numerics import round_stochastically
from heavyball.numerics.random import element_bits, mix
from heavyball.state import four_bit, packing

F32, WORD = torch.float32, torch.int32


@dataclass(frozen=True)
class Function:
    """One function of values: its arguments, and what it returns."""

    name: str
    arguments: tuple[Var, ...]
    results: tuple[Expr, ...]


def short(dtype: torch.dtype) -> str:
    """The dtype in the name of a function."""
    return str(dtype).removeprefix("torch.")


def mixed() -> Function:
    """The words of random bits."""
    x = Var("x", WORD)
    return Function("mix", (x,), (mix(x),))  # type: ignore[type-var]


def joined(kept: torch.dtype, rest: torch.dtype) -> Function:
    """A value of 16 bits and a correction."""
    given = Var("kept", kept), Var("rest", rest)
    return Function(f"joined_{short(kept)}_{short(rest)}", given, (packing.join(*given),))  # type: ignore[arg-type]


def split(kept: torch.dtype, rest: torch.dtype) -> Function:
    """What `joined` puts together."""
    x = Var("x", F32)
    return Function(f"split_{short(kept)}_{short(rest)}", (x,), packing.split(x, kept, rest))  # type: ignore[arg-type]


def squared() -> Function:
    x = Var("x", F32)
    return Function("squared", (x,), (x * x,))


def root() -> Function:
    x = Var("x", F32)
    return Function("root_of", (x,), (packing.root(x),))  # type: ignore[arg-type]


def nearest_root() -> Function:
    x = Var("x", F32)
    return Function("half_root_of", (x,), (packing.nearest_root(x),))  # type: ignore[arg-type]


def rounded_at_random() -> Function:
    """A bfloat16 value with the random bits of an element."""
    x, key, index = Var("x", F32), Var("key", WORD), Var("index", WORD)
    made = round_stochastically(x, element_bits(index, key))  # type: ignore[arg-type]
    return Function("rounded_at_random", (x, key, index), (made,))  # type: ignore[arg-type]


def codes(dtype: torch.dtype) -> list[Function]:
    """Values of codes and codes of values, with and without random bits."""
    code, x, scale = Var("code", dtype), Var("x", F32), Var("scale", F32)
    key, index, name = Var("key", WORD), Var("index", WORD), short(dtype)
    bits = element_bits(index, key)
    return [
        Function(f"value_of_{name}", (code, scale), (packing.value_of(code, scale),)),  # type: ignore[arg-type]
        Function(f"{name}_of", (x, scale), (packing.code_of(x, scale, dtype, None),)),  # type: ignore[arg-type]
        Function(
            f"random_{name}_of",
            (x, scale, key, index),
            (packing.code_of(x, scale, dtype, bits),),  # type: ignore[arg-type]
        ),
    ]


def scale() -> Function:
    largest = Var("largest", F32)
    return Function("scale_of", (largest,), (packing.scale_of(largest),))  # type: ignore[arg-type]


def four_bit_codes(signed: bool) -> list[Function]:
    """The same for codes of 4 bits, and how far a scale must reach for a value."""
    code, x, scale = Var("code", torch.uint8), Var("x", F32), Var("scale", F32)
    key, index, name = Var("key", WORD), Var("index", WORD), "moment" if signed else "square"
    bits = element_bits(index, key)
    return [
        Function(f"four_bit_{name}", (code, scale), (four_bit.value_of(code, scale, signed),)),  # type: ignore[arg-type]
        Function(f"four_bits_of_{name}", (x, scale), (four_bit.code_of(x, scale, signed, None),)),  # type: ignore[arg-type]
        Function(
            f"random_four_bits_of_{name}",
            (x, scale, key, index),
            (four_bit.code_of(x, scale, signed, bits),),  # type: ignore[arg-type]
        ),
        Function(f"reach_of_{name}", (x,), (four_bit.reach_of(x, signed),)),  # type: ignore[arg-type]
    ]


def four_bit_scale() -> Function:
    largest = Var("largest", F32)
    return Function("four_bit_scale_of", (largest,), (four_bit.scale_of(largest),))  # type: ignore[arg-type]


def needed(columns: Iterable[Column]) -> list[Function]:
    """The functions that a kernel of these tensors calls, each before those that it is used by."""
    columns = list(columns)
    found = [mixed()]
    pairs = {(c.dtype, c.correction.dtype): None for c in columns if c.correction is not None}
    for pair in pairs:
        found += [joined(*pair), split(*pair)]
    if any(c.is_root for c in columns):
        found += [squared(), root(), nearest_root()]
    if any(c.word is not None and c.scale is None for c in columns):
        found.append(rounded_at_random())
    coded = {c.dtype: None for c in columns if c.code_bits == 8}
    for dtype in coded:
        found += codes(dtype)
    if coded:
        found.append(scale())
    if any(c.code_bits == 4 for c in columns):
        found += [*four_bit_codes(True), *four_bit_codes(False), four_bit_scale()]
    return found
