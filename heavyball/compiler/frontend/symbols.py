"""Expressions of one value, written as torch code: `torch.where(x > 0, x, 0.5 * x)` of a `Var` x.

So what is written once as a function of tensors, such as the rules of `ops.py`, becomes what a printer
spells. Types are torch's dtypes; int32 stands for a word of 32 bits, whose sums and products wrap around
and whose shifts fill with zeros.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Number = bool | int | float


class Expr:
    """One value. Operators and functions of torch give new expressions."""

    type: torch.dtype
    # how operations are made, from the table of operations, which needs this class
    make: ClassVar[Callable[..., "Expr"]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        return Expr.make(name.strip("_"), *args, **(kwargs or {}))

    @property
    def dtype(self) -> torch.dtype:
        return self.type

    def to(self, dtype: torch.dtype) -> "Expr":
        """The value in another type, to nearest; a condition is 0 or 1."""
        if dtype == self.type:
            return self
        if dtype == torch.bool:
            return Expr.make("ne", self, 0)
        return Op("to_float" if self.type == torch.bool else "cast", (self,), dtype)

    def view(self, dtype: torch.dtype) -> "Expr":
        """The same bits as a value of another type."""
        return Op("view", (self,), dtype)

    def nearest_finite(self, dtype: torch.dtype) -> "Expr":
        """As `to`, but a finite value stays finite."""
        return Op("nearest", (self,), dtype)

    def contiguous(self) -> "Expr":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Expr.make(name, self, *args, **kwargs)

    def __add__(self, other: Any) -> "Expr":
        return Expr.make("add", self, other)

    def __radd__(self, other: Any) -> "Expr":
        return Expr.make("add", other, self)

    def __sub__(self, other: Any) -> "Expr":
        return Expr.make("sub", self, other)

    def __rsub__(self, other: Any) -> "Expr":
        return Expr.make("sub", other, self)

    def __mul__(self, other: Any) -> "Expr":
        return Expr.make("mul", self, other)

    def __rmul__(self, other: Any) -> "Expr":
        return Expr.make("mul", other, self)

    def __truediv__(self, other: Any) -> "Expr":
        return Expr.make("div", self, other)

    def __rtruediv__(self, other: Any) -> "Expr":
        return Expr.make("div", other, self)

    def __neg__(self) -> "Expr":
        return Expr.make("neg", self)

    def __and__(self, other: Any) -> "Expr":
        return Expr.make("and", self, other)

    def __or__(self, other: Any) -> "Expr":
        return Expr.make("or", self, other)

    def __xor__(self, other: Any) -> "Expr":
        return Expr.make("xor", self, other)

    def __invert__(self) -> "Expr":
        return Expr.make("not", self)

    def __rshift__(self, other: int) -> "Expr":
        return Op("shift", (self, Const(other, self.type)), self.type)

    def __gt__(self, other: Any) -> "Expr":
        return Expr.make("gt", self, other)

    def __ge__(self, other: Any) -> "Expr":
        return Expr.make("ge", self, other)

    def __lt__(self, other: Any) -> "Expr":
        return Expr.make("lt", self, other)

    def __le__(self, other: Any) -> "Expr":
        return Expr.make("le", self, other)


@dataclass(frozen=True)
class Var(Expr):
    """A value that a statement has made: a node of the graph, or an argument of a function.

    level: of a node, see `Value`.
    """

    index: int | str
    type: torch.dtype
    level: str = ""


@dataclass(frozen=True)
class Const(Expr):
    value: Number
    type: torch.dtype


@dataclass(frozen=True)
class Op(Expr):
    """An operation of the table `ops.py`, or "cast", "view", "nearest", "shift"."""

    name: str
    args: tuple[Expr, ...]
    type: torch.dtype


def lifted(value: Any, dtype: torch.dtype) -> Expr:
    """An argument as an expression: numbers take the type of what they meet."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, Tensor):
        return Const(value.item(), value.dtype)
    return Const(value, dtype)


def as_type(value: Expr, dtype: torch.dtype) -> Expr:
    """A condition where a number is wanted, or the other way round."""
    if (value.type == torch.bool) == (dtype == torch.bool):
        return value
    if isinstance(value, Const):
        return Const(bool(value.value) if dtype == torch.bool else float(value.value), dtype)
    return value.to(dtype)


@dataclass(frozen=True)
class Input(Expr):
    """A number per tensor that a kernel is given: "number", "hyper", "total", or a count of values."""

    name: str
    args: tuple[Any, ...]
    type: torch.dtype


def parts(e: Expr) -> Iterator[Expr]:
    """An expression and all that it is made of."""
    yield e
    for a in e.args if isinstance(e, Op) else ():
        yield from parts(a)


def variables(e: Expr) -> Iterator[Var]:
    """The variables of an expression."""
    return (part for part in parts(e) if isinstance(part, Var))
