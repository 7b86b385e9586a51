"""A number on the host computes what a 0-d tensor computes, bit for bit."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from test_together import Waits
from torch import Tensor

from heavyball import chainable as C
from heavyball.core.rate import Member
from heavyball.numerics import Number

UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "sqrt": lambda a: a.sqrt(),
    "abs": abs,
    "clamp": lambda a: a.clamp(min=-1.0, max=2.0),
    "clamp min": lambda a: a.clamp(min=0),
    "not": lambda a: ~(a > 0),
    "power": lambda a: a**0.975,
    "square": lambda a: a**2,
    "of two": lambda a: 2.0**a,
    "exp": lambda a: a.exp(),
    "log1p": torch.log1p,
    "half": lambda a: 0.5 - a,
    "inverse": lambda a: 1 / a,
    "in float64": lambda a: (a > 1).to(torch.float64),
    "like": lambda a: torch.zeros_like(a),
    "dimensions": lambda a: a + a.ndim,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": lambda a, b: (a > 0) & (b > 0),
    "or": lambda a, b: (a > 0) | (b > 0),
    "maximum": lambda a, b: a.maximum(b),
    "minimum": torch.minimum,
    "atan2": lambda a, b: a.atan2(b),
    "where": lambda a, b: a.where(b > a, 0.0),
    "torch's where": lambda a, b: torch.where(b > a, a, b),
    "stacked": lambda a, b: torch.stack([a, b]).sum(),
    "a row": lambda a, b: torch.stack([a, b])[1] * a,
}
numbers = st.floats() | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e300]
)


def tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def bits(value: Any) -> tuple[type, str]:
    value = value.item()
    return type(value), "nan" if value != value else repr(value)


@pytest.mark.parametrize("name", UNARY)
@given(a=numbers)
@examples(30)
def test_one_number_has_the_bits_of_a_tensor(name: str, a: float) -> None:
    assert bits(UNARY[name](Number(a))) == bits(UNARY[name](tensor(a)))


@pytest.mark.parametrize("name", BINARY)
@given(a=numbers, b=numbers)
@examples(40)
def test_two_numbers_have_the_bits_of_tensors(name: str, a: float, b: float) -> None:
    expected = bits(BINARY[name](tensor(a), tensor(b)))
    assert bits(BINARY[name](Number(a), Number(b))) == expected
    assert bits(BINARY[name](tensor(a), Number(b))) == expected
    assert bits(BINARY[name](Number(a), tensor(b))) == expected


def test_a_number_is_not_written_to() -> None:
    with pytest.raises(AttributeError, match="'add_'"):
        Number(1.0).add_(1.0)


# ---- what makes the numbers of groups, on the host as on tensors


def member(t: Any, kind: Callable[[float], Any], values: list[float], gives: bool) -> Member:
    """A group in the middle of a training."""
    draw = iter(values)
    known: dict[str, Any] = {}
    for name, first in t.numbers.items():
        known[name] = 3 if isinstance(first, int) else kind(next(draw))
    for name, first in t.hyper.items():
        known[name] = tuple(map(kind, first)) if isinstance(first, tuple) else kind(first)
    if "loss" in t.context:
        known["loss"] = kind(next(draw))
    sums = tuple(kind(next(draw)) for _ in range(number_of_sums(t))) if gives else None
    return Member(sums, known)


@functools.cache
def number_of_sums(t: C.Rate) -> int:
    """How many sums a rate is given, as a step of it shows."""
    seen = []

    def finish(members: Any, options: Any) -> Any:
        seen.append(len(members[0].sums))
        return t.finish(members, options)

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    rate = dataclasses.replace(t, finish=finish)
    C.ChainOpt([param], 1.0, rate, compile=False).step(lambda: torch.ones(()))
    return seen[0]


SPLIT = "split_groups"
RATES = [
    t(**{SPLIT: split}) if SPLIT in t.options else t
    for t in C.TRANSFORMS.values()
    for split in (False, True)
    if isinstance(t, C.Rate) and (split or SPLIT in t.options)
]


@pytest.mark.parametrize("t", RATES, ids=repr)
@given(data=st.data())
@examples(15)
def test_a_rate_finds_the_same_on_the_host(t: Any, data: Any) -> None:
    drawn = st.lists(st.floats(0, 10) | st.floats(-1e-3, 1e-3), min_size=40, max_size=40)
    groups = data.draw(st.lists(st.tuples(drawn, st.booleans()), min_size=1, max_size=3))
    found = t.finish([member(t, Number, *g) for g in groups], t.options)
    with Waits() as waits:
        expected = t.finish([member(t, tensor, *g) for g in groups], t.options)
    assert waits.count == 0  # on a device, nothing may wait
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert type(value.item()) is type(other[name].item())
            # torch's square root of one float64 may be off by its last bit
            assert value.item() == pytest.approx(other[name].item(), rel=1e-9, abs=0, nan_ok=True)
