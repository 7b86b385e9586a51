"""A number on the host in place of a 0-d tensor: the same values in a fraction of the time."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heavyball.numerics.dtypes import SCALAR


class Number:
    """A float64 number, or a truth value, that torch's functions take as they take a 0-d tensor.

    What is computed with these has the bits that 0-d tensors on the CPU give. Arithmetic, comparisons
    and choices are Python's, in a tenth of the time; torch does the rest. Methods such as `x.where(...)`
    are faster than functions of torch.
    """

    __slots__ = ("value",)

    def __init__(self, value: float):
        self.value = value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {name: _tensor(value) for name, value in (kwargs or {}).items()}
        return _number(func(*map(_tensor, args), **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_"):  # in place, or none of a tensor's
            raise AttributeError(f"a number of a group has no {name!r}: it is never written to")
        value = getattr(_tensor(self), name)
        if not callable(value):
            return value
        method = getattr(Tensor, name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __repr__(self) -> str:
        return f"Number({self.value!r})"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def item(self) -> float:
        return self.value

    def __neg__(self) -> "Number":
        return Number(-self.value)

    def __invert__(self) -> "Number":
        return Number(not self.value)

    def where(self, condition: Any, other: Any) -> "Number":
        if isinstance(condition, Tensor) or isinstance(other, Tensor):
            return self.__torch_function__(Tensor.where, (), (self, condition, other))
        return self if condition else Number(_plain(other))

    def sqrt(self) -> "Number":
        return Number(math.sqrt(self.value) if self.value >= 0 else math.nan)

    def clamp(self, min: Any = None, max: Any = None) -> "Number":
        above = self if min is None else self.maximum(min)
        return above if max is None else above.minimum(max)


def on_host(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _plain(value: Any) -> float:
    return value.value if type(value) is Number else float(value)


def _tensor(value: Any) -> Any:
    """What torch can compute with."""
    if isinstance(value, Number):
        kind = torch.bool if isinstance(value.value, bool) else SCALAR
        return torch.full((), value.value, dtype=kind, device="cpu")
    if isinstance(value, list | tuple):
        return type(value)(map(_tensor, value))
    return value


def _number(value: Any) -> Any:
    """A result of torch, as a host number if it is a number."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in (SCALAR, torch.bool):
        return Number(value.reshape(1).tolist()[0]) if on_host(value) else value
    return value


def _divided(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _largest(a: float, b: float) -> float:
    return a if a >= b or a != a else b


def _least(a: float, b: float) -> float:
    return a if a <= b or a != a else b


def _defined(name: str, function: Callable[[Any, Any], Any]) -> None:
    """Define a method of two numbers; where the other is none it is torch's."""
    torchs = getattr(Tensor, name)

    def method(self: Number, other: Any) -> Any:
        kind = type(other)
        if kind is Number:
            return Number(function(self.value, other.value))
        if kind is float or kind is int:
            return Number(function(self.value, float(other)))
        return Number.__torch_function__(torchs, (), (self, other))

    setattr(Number, name, method)


def _left_to_torch(name: str) -> None:
    """Define an operator by torch's: Python's raises where torch gives infinity or NaN."""
    torchs = getattr(Tensor, name)
    setattr(Number, name, lambda *args: Number.__torch_function__(torchs, (), args))


for _name, _function in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("truediv", _divided),
    ("and", operator.and_),
    ("or", operator.or_),
    ("xor", operator.xor),
):
    _defined(f"__{_name}__", _function)
    _defined(f"__r{_name}__", lambda a, b, f=_function: f(b, a))  # type: ignore[misc]
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _defined(f"__{_name}__", getattr(operator, _name))
for _name, _function in (("maximum", _largest), ("minimum", _least), ("atan2", math.atan2)):
    _defined(_name, _function)
for _name in ("pow", "rpow", "mod", "rmod", "floordiv", "rfloordiv", "abs"):
    _left_to_torch(f"__{_name}__")
