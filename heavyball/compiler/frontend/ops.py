"""The table of operations: how each is recorded, decomposed and printed.

A new operation is a row: `tests/operations.py` runs every row eagerly, in C++ and in Triton.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.compiler.frontend.symbols import Const, Expr, Op, as_type, lifted


class NotPrintableError(Exception):
    """The graph cannot be printed as a kernel; the message gives the reason."""


# When a result is never below zero: always, if no argument is, or if one argument is not.
Sign = Literal["always", "all", "any"]


@dataclass(frozen=True)
class Operation:
    """One operation on values of one type.

    takes: a letter for each argument, "n" a number and "b" a condition. gives: the same of the result.
    eager: what torch calls so, on arguments of one dtype.
    cpp, triton: how a printer spells it; {0} and on are the arguments, {zero}, {one} and {minus} numbers
        of their type. For float64 and float32 alike, and NaN passes as in torch.
    rule: the same made of other operations, as torch code; it gives None where it does not apply. A
        printer without a form and a rule refuses the operation.
    aten: the names under which the recorder sees it.
    positive: when the result is never below zero.
    """

    name: str
    takes: str
    eager: Callable[..., Tensor]
    cpp: str | None = None
    triton: str | None = None
    rule: Callable[..., Any] | None = None
    gives: str = "n"
    aten: tuple[str, ...] = ()
    positive: Sign | None = None

    @property
    def is_logic(self) -> bool:
        """Whether it takes conditions alone, and of numbers whether they are not zero."""
        return set(self.takes) == {"b"} and self.gives == "b"


def _row(
    name: str, takes: str, eager: Callable[..., Tensor], *forms: Any, **rest: Any
) -> Operation:
    """An operation that the recorder sees as `name.default`."""
    return Operation(name, takes, eager, *forms, **{"aten": (f"{name}.default",), **rest})


def _infix(name: str, sign: str, eager: Callable[..., Tensor], **rest: Any) -> Operation:
    text = f"({{0}} {sign} {{1}})"
    return Operation(name, "nn", eager, text, text, aten=(f"{name}.Tensor",), **rest)


def _compared(name: str, sign: str, eager: Callable[..., Tensor]) -> Operation:
    text = f"({{0}} {sign} {{1}})"
    aten = f"{name}.Tensor", f"{name}.Scalar"
    return Operation(name, "nn", eager, text, text, gives="b", aten=aten)


def _logic(name: str, sign: str, eager: Callable[..., Tensor]) -> Operation:
    text = f"({{0}} {sign} {{1}})"
    aten = f"bitwise_{name}.Tensor", f"logical_{name}.default"
    return Operation(name, "bb", eager, text, text, gives="b", aten=aten)


def _function(name: str, **rest: Any) -> Operation:
    """A function of one number that has the same name everywhere."""
    forms = f"math::{name}({{0}})", f"libdevice.{name}({{0}})"
    return _row(name, "n", getattr(torch, name), *forms, **rest)


# ---- what is made of others


def _larger(x: Any, y: Any) -> Any:
    # a comparison is false for a NaN on the left, which so passes, as one on the right does
    return torch.where(x < y, y, x if _is_known(y) else torch.where(torch.ne(y, y), y, x))


def _smaller(x: Any, y: Any) -> Any:
    return torch.where(y < x, y, x if _is_known(y) else torch.where(torch.ne(y, y), y, x))


def _is_known(x: Any) -> bool:
    """Whether this is a constant, and not NaN."""
    return isinstance(x, Const) and x.value == x.value


def _lerp(x: Any, y: Any, weight: Any) -> Any:
    # as torch, exact at both ends: x + weight * (y - x), or y - (1 - weight) * (y - x)
    near = torch.abs(weight) < 0.5
    start, part = torch.where(near, x, y), torch.where(near, weight, -(1 - weight))
    return start + part * (y - x)


def _power(x: Any, y: Any) -> Any:
    if not isinstance(y, Const) or y.value not in (2.0, 0.5):
        return None
    return x * x if y.value == 2.0 else torch.sqrt(x)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + torch.exp(-x))


def _sign(x: Any) -> Any:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def _isfinite(x: Any) -> Any:
    return torch.abs(x) <= torch.finfo(x.dtype).max


POW = "pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar"
CLAMP_MIN = "clamp_min.default", "clamp_min.Tensor"
CLAMP_MAX = "clamp_max.default", "clamp_max.Tensor"
REMAINDER = "remainder.Tensor", "remainder.Scalar"
TABLE = (
    _infix("add", "+", torch.add, positive="all"),
    _infix("sub", "-", torch.sub),
    _infix("mul", "*", torch.mul, positive="all"),
    _row(
        *("div", "nn", torch.div, "({0} / {1})", "divide({0}, {1})"),
        aten=("div.Tensor",),
        positive="all",
    ),
    # Triton's own minus loses the sign of zero
    _row("neg", "n", torch.neg, "(-{0})", "({0} * {minus})"),
    _row("abs", "n", torch.abs, "math::fabs({0})", "tl.abs({0})", positive="always"),
    _row("sqrt", "n", torch.sqrt, "math::sqrt({0})", "root({0})", positive="always"),
    _row("rsqrt", "n", torch.rsqrt, rule=lambda x: 1 / torch.sqrt(x), positive="always"),
    _row("reciprocal", "n", torch.reciprocal, rule=lambda x: 1 / x, positive="all"),
    _row("square", "n", torch.square, rule=lambda x: x * x, aten=(), positive="always"),
    _function("exp", positive="always"),
    _function("expm1"),
    _function("log"),
    _function("log1p"),
    _function("tanh"),
    _function("erf"),
    _row("sigmoid", "n", torch.sigmoid, rule=_sigmoid),
    _row("sign", "n", torch.sign, rule=_sign),
    _row("ceil", "n", torch.ceil, "math::ceil({0})", "tl.ceil({0})"),
    _row("floor", "n", torch.floor, "math::floor({0})", "tl.floor({0})"),
    _row("round", "n", torch.round, "math::nearbyint({0})", "libdevice.nearbyint({0})"),
    _row("isfinite", "n", torch.isfinite, rule=_isfinite, gives="b"),
    _row("isnan", "n", torch.isnan, rule=lambda x: torch.ne(x, x), gives="b"),
    _row("clamp_min", "nn", torch.clamp_min, rule=_larger, aten=CLAMP_MIN, positive="any"),
    _row("clamp_max", "nn", torch.clamp_max, rule=_smaller, aten=CLAMP_MAX, positive="all"),
    _row("maximum", "nn", torch.maximum, rule=_larger, positive="any"),
    _row("minimum", "nn", torch.minimum, rule=_smaller, positive="all"),
    _row("atan2", "nn", torch.atan2, "math::atan2({0}, {1})", "libdevice.atan2({0}, {1})"),
    _row("remainder", "nn", torch.remainder, *["remainder_of({0}, {1})"] * 2, aten=REMAINDER),
    _row(
        *("pow", "nn", torch.pow, "math::pow({0}, {1})", "libdevice.pow({0}, {1})"),
        aten=POW,
        rule=_power,
    ),
    _row("lerp", "nnn", torch.lerp, rule=_lerp, aten=("lerp.Tensor", "lerp.Scalar")),
    _row(
        *("where", "bnn", torch.where, "({0} ? {1} : {2})", "tl.where({0}, {1}, {2})"),
        aten=("where.self",),
    ),
    _compared("gt", ">", torch.gt),
    _compared("ge", ">=", torch.ge),
    _compared("lt", "<", torch.lt),
    _compared("le", "<=", torch.le),
    _compared("eq", "==", torch.eq),
    _compared("ne", "!=", torch.ne),
    _logic("and", "&", torch.logical_and),
    _logic("or", "|", torch.logical_or),
    _logic("xor", "^", torch.logical_xor),
    _row(
        *("not", "b", torch.logical_not, "(!{0})", "(~{0})"),
        gives="b",
        aten=("bitwise_not.default", "logical_not.default"),
    ),
    # what the recorder makes of a change of dtype
    _row(
        *("to_float", "b", lambda x: x.to(torch.get_default_dtype())),
        *("({0} ? {one} : {zero})", "tl.where({0}, {one}, {zero})"),
        aten=(),
        positive="always",
    ),
    _row(
        "to_bool",
        "n",
        lambda x: x.to(torch.bool),
        rule=lambda x: x.to(torch.bool),
        gives="b",
        aten=(),
    ),
)
OPERATIONS = {operation.name: operation for operation in TABLE}
# aten name -> our operation, whose arguments are in the same order
RECORDED = {name: operation.name for operation in TABLE for name in operation.aten}
# by the names of torch's functions and methods
_NAMED = {name.split(".")[0]: operation for name, operation in RECORDED.items()}


# ---- expressions


def make(name: str, *args: Any, **options: Any) -> Expr:
    """An operation on expressions and numbers; `name` is ours or that of torch's function."""
    if name == "clamp":
        return _clamped(*args, **options)
    operation = OPERATIONS[_NAMED.get(name, name)]
    types = [a.dtype for a in args if isinstance(a, Expr | Tensor) and a.dtype != torch.bool]
    dtype = types[0] if types else torch.bool
    is_word = dtype == torch.int32
    wanted = [torch.bool if t == "b" and not is_word else dtype for t in operation.takes]
    if operation.name == "where":
        wanted[0] = torch.bool
    given = tuple(as_type(lifted(a, t), t) for a, t in zip(args, wanted, strict=True))
    if operation.rule is not None:
        made = operation.rule(*given)
        if made is not None:
            return made
    gives_truth = operation.gives == "b" and not (operation.is_logic and is_word)
    return Op(operation.name, given, torch.bool if gives_truth else dtype)


def _clamped(value: Expr, low: Any = None, high: Any = None, **options: Any) -> Expr:
    low, high = options.get("min", low), options.get("max", high)
    value = value if low is None else make("clamp_min", value, low)
    return value if high is None else make("clamp_max", value, high)


Expr.make = make


def expression(op: str, args: Sequence[Expr | float], dtype: torch.dtype, kind: str) -> Expr:
    """A node of a graph as an expression of what it is computed from.

    dtype: of numbers. kind: the node's, "float" or "bool"; torch multiplies truth values, for one.

    Errors: NotPrintableError for an operation that is not in the table.
    """
    if op not in OPERATIONS:
        raise NotPrintableError(f"the operation {op} is not supported")
    operation = OPERATIONS[op]
    given = [
        as_type(lifted(a, dtype), torch.bool if t == "b" else dtype)
        for a, t in zip(args, operation.takes, strict=True)
    ]
    made = given[0].to(dtype) if op == "to_float" else make(op, *given)
    return made if kind == "float" else made.to(torch.bool)
