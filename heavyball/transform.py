"""A transform: a pure function of one tensor whose state and hyper-parameters are declared.

`@transform` reads the function's signature once and yields a frozen `Transform`.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# A live hyper-parameter of a transform: a float (or a tuple of floats) where it is declared, a 0-d
# tensor (or a tuple of them) when the function runs.
Live: TypeAlias = Any

Kind = Literal["transform", "decay", "writer", "observer", "rate"]

# What the runner offers to any transform that names it as a keyword-only argument.
CONTEXT = {
    "step": "how many gradients this parameter has had, from 1",
    "param": "the parameter (after the write, for an observer)",
    "grad": "the gradient the chain started from",
    "raw_grad": "the gradient as it came, before saturation",
    "lr": "the learning rate of this step, warm-up included",
    "base_lr": "the learning rate of the group, without warm-up",
}
# What the runner offers to transforms of whole tensors besides.
WHOLE_CONTEXT = {
    "count": "`step` as a Python int, for decisions on the host",
    "places": "the places of the B parameters in the optimizer, counted from 0, as a tuple",
    "noise": "`noise(shape, salt=0)`: standard normals from the optimizer's own seed",
    "chance": "`chance(salt=0)`: a Python float in [0, 1) from the seed and `count`, the same for "
    "every parameter",
}


# What a state tensor holds, which decides how it may be stored: a mean of gradients or updates, a mean
# of squares (never negative), weights or an average of them, or anything else.
Holds = Literal["moment", "square", "weights", "values"]


@dataclass(frozen=True)
class State:
    """How one state begins: `init(param, options)` gives a tensor, or None where there is none.

    holds: what it is, so that `storage.py` knows which formats lose nothing that matters; a "moment"
        and a "square" also turn with the basis that they are kept in, see `within`, and are in the unit
        of the gradient and in its square, see `unit_change` in the runner.
    several: for transforms of whole tensors: `init` gives a tuple of tensors (or None), kept as
        `<key>.0`, `<key>.1`, ... It also runs on meta tensors.
    slice_by: the option k of a state with an entry for every k-th element, see `numerics.every`.
    low: of a number, the least that it can be; what is loaded is held against it.
    until: (option, counter): it is given up one step before the group's counter reaches the option;
        0 keeps it for good.
    """

    init: Callable[[Tensor, Mapping[str, Any]], Any]
    rule: str
    needed_by: str | None = None
    is_number: bool = False
    holds: Holds = "values"
    several: bool = False
    slice_by: str | None = None
    until: tuple[str, str] | None = None
    low: float = -math.inf

    def needs(self, name: str) -> "State":
        """The same state, held only while the option or hyper-parameter `name` is not zero."""
        return replace(self, needed_by=name, rule=f"{self.rule}, if {name}")

    def holding(self, what: Holds) -> "State":
        """The same state, declared to hold something else."""
        return replace(self, holds=what)

    def gone_at(self, option: str, counter: str) -> "State":
        """The same state, given up one step before the group's `counter` reaches the option."""
        return replace(self, until=(option, counter), rule=f"{self.rule}, until {option}")

    def given_up(self, options: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
        """Whether the steps of this group have come to the point where the state is not needed."""
        if self.until is None:
            return False
        option, counter = self.until
        return bool(options[option]) and group.get(counter, 0) + 1 >= options[option]

    def __str__(self) -> str:
        return self.rule


zeros = State(
    lambda param, options: torch.zeros_like(param), "zeros like the parameter", holds="moment"
)
# for a mean of squares, which is never negative
squares = zeros.holding("square")
copy_of_param = State(
    lambda param, options: param.clone(), "a copy of the parameter", holds="weights"
)


def scalar(value: float, low: float = -math.inf) -> State:
    """A float64 number per parameter, never below `low`."""

    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=param.device)

    return State(init, f"a number, at first {value:g}", is_number=True, low=low)


@dataclass(frozen=True)
class Interval:
    """The values that a live hyper-parameter may take."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = True

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        known = math.isfinite(value) or (value == self.high and not self.high_open)
        return known and above and below

    def __str__(self) -> str:
        left, right = "(["[not self.low_open], "])"[self.high_open]
        return f"{left}{self.low:g}, {self.high:g}{right}"


nonnegative = Interval(0, math.inf)
positive = Interval(0, math.inf, low_open=True)
fraction = Interval(0, 1)
open_fraction = Interval(0, 1, low_open=True)
closed_fraction = Interval(0, 1, high_open=False)
finite = Interval(-math.inf, math.inf, low_open=True)


@dataclass(frozen=True)
class Shared:
    """A hyper-parameter that several transforms of a chain use under one name in the group."""

    name: str
    value: float | tuple[float, ...]
    index: int | None = None

    def __getitem__(self, index: int) -> "Shared":
        if self.index is not None or not isinstance(self.value, tuple):
            raise TypeError(f"shared {self.name!r} is one number, it has no element {index}")
        if not 0 <= index < len(self.value):
            raise IndexError(f"shared {self.name!r} has {len(self.value)} numbers, none is {index}")
        return replace(self, index=index)

    @property
    def item(self) -> float | tuple[float, ...]:
        return self.value if self.index is None else self.value[self.index]  # type: ignore[index]

    def __repr__(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


def shared(name: str, value: float | Iterable[float]) -> Shared:
    """Name a hyper-parameter once and give it, or one element of it, to several transforms.

    `betas = shared("betas", (0.9, 0.999))`, then `scale_by_exp_avg_sq(beta2=betas[1])` and
    `schedule_free(beta=betas[0])`: the group holds one `betas`, as in torch.
    """
    return Shared(name, _number(name, value) if _is_real(value) else _numbers(name, value))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what is known, and the nearest of it."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        lower = {text.lower(): text for text in known}
        close = [lower[t] for t in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {', '.join(known) if known else 'none'}{hint}"


def no_attribute(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error for a name that a module does not have, with the nearest of those that it has."""
    if name.startswith("__"):  # asked for by Python and by tools, not by people
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    return AttributeError(f"{module} has no {name!r}; {nearest(name, known)}")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if not _is_real(value):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    return float(value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not is_sequence(value):
        raise TypeError(f"{name}={value!r}: expected a sequence of numbers")
    return tuple(_number(name, v) for v in value)


# What is neither in order nor numbers, although it has a length.
_NO_SEQUENCES = (str, bytes, bytearray, Mapping, Set, Tensor)


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it can hold numbers in order: a tuple, a list, an array, a configuration's own kind."""
    if isinstance(value, float):  # by far the most frequent
        return False
    if isinstance(value, tuple | list):
        return True
    ordered = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return ordered and not isinstance(value, _NO_SEQUENCES) and getattr(value, "ndim", 1) > 0


def frozen(value: Any) -> Any:
    """A copy that does not change with a sequence in the group, and that can be compared."""
    if isinstance(value, float | tuple):
        return value
    return tuple(value) if is_sequence(value) else value


def check_live(name: str, value: Any, like: Any, domain: Interval, index: int | None = None) -> Any:
    """A live hyper-parameter's value as floats, or an error that names it and what was expected.

    `like` gives the kind: one number, or so many. `index`: only this one must lie in `domain`.
    """
    if isinstance(like, tuple):
        value = _numbers(name, value)
        if len(value) != len(like):
            raise ValueError(f"{name}={value!r}: expected {len(like)} numbers, got {len(value)}")
        parts = value
    else:
        value = _number(name, value)
        parts = (value,)
    for position, part in enumerate(parts):
        if index in (None, position) and part not in domain:
            which = "" if len(parts) == 1 else "each " if index is None else f"number {index} "
            raise ValueError(f"{name}={value!r}: expected {which}in {domain}")
    return value


def _allows_none(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _check_option(name: str, value: Any, default: Any, annotation: Any) -> Any:
    """The value of a fixed option, checked against its annotation or the type of its default."""
    if value is None and (default is None or _allows_none(annotation)):
        return value
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
        return value
    accepted: Any = type(default)
    if annotation is not inspect.Parameter.empty:
        parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        accepted = tuple(typing.get_origin(p) or p for p in parts)
    if isinstance(value, bool) and accepted not in (bool, (bool,)):
        raise TypeError(f"{name}={value!r}: expected {annotation}, got a bool")
    names = accepted if isinstance(accepted, tuple) else (accepted,)
    if not isinstance(value, accepted):
        # numbers of numpy
        if int in names and isinstance(value, numbers.Integral):
            return int(value)
        if float in names and _is_real(value):
            return float(value)
        if tuple in names and is_sequence(value):
            return tuple(value.tolist() if hasattr(value, "tolist") else value)
        expected = " or ".join(getattr(t, "__name__", str(t)) for t in names)
        raise TypeError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")
    return value


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


@dataclass(frozen=True)
class Member:
    """One group as `finish` sees it.

    sums: what its parameters gave, added up; None if none of them had a gradient in this step, or a
        gate has left it out.
    values: the element's common numbers (after this step, for its count) and hyper-parameters.
    """

    sums: tuple[Tensor, ...] | None
    values: Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """One element of a chain: a pure function and what it declares.

    `update` is the function itself. `hyper` are the live hyper-parameters (floats and tuples of
    floats: they go to the parameter group), `options` the fixed ones. Calling a transform with some
    of either gives a configured copy.
    """

    name: str
    update: Callable[..., Any]
    states: dict[str, State]
    hyper: dict[str, Any]
    options: dict[str, Any]
    defaults: dict[str, Any]
    annotations: dict[str, Any]
    context: tuple[str, ...]
    optional: tuple[str, ...]
    provides: tuple[str, ...]
    kind: Kind
    domains: dict[str, Interval]
    excludes: dict[str, str]
    before_state: str
    modifier: bool
    over_all: Callable[..., Any] | None
    over_all_context: tuple[str, ...]
    evaluate: Callable[..., Tensor] | None
    requires: Callable[[torch.Size, Mapping[str, Any]], str | None] | None = None
    whole: bool = False
    opaque: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    after: Callable[..., Any] | None = None
    due: Callable[..., bool] | None = None
    lead: "Transform | None" = None
    common: dict[str, str | float] = field(default_factory=dict)
    past: dict[str, str] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    gives: tuple[str, ...] = ()
    finish: Callable[..., Any] | None = None
    given: frozenset[str] = field(default_factory=frozenset)

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.update) or ""

    @property
    def summary(self) -> str:
        return self.doc.split("\n\n")[0].replace("\n", " ")

    @property
    def all_states(self) -> dict[str, State]:
        """Its states and those of the transform that runs right before it."""
        return {**(self.lead.states if self.lead else {}), **self.states}

    def asks_for(self, name: str) -> bool:
        """Whether the function or what it does after the write has an argument of this name."""
        return name in self.context or name in keyword_names(self.after)

    def domain(self, name: str) -> Interval:
        """Where the live hyper-parameter `name` may lie: [0, 1) for betas, else not negative."""
        default = fraction if name.startswith("beta") else nonnegative
        return self.domains.get(name, default)

    def __call__(self, *args: Any, **options: Any) -> "Transform":
        names = [n for n in self.annotations if n in self.hyper or n in self.options]
        if len(args) > len(names):
            raise TypeError(
                f"{self.name}: {len(args)} arguments given, it has {len(names)} options"
            )
        for name, value in zip(names, args, strict=False):
            if name in options:
                raise TypeError(f"{self.name}: {name!r} was given twice")
            options[name] = value
        hyper, fixed = dict(self.hyper), dict(self.options)
        for name, value in options.items():
            if name not in self.annotations:
                raise TypeError(f"{self.name} has no option {name!r}; {nearest(name, names)}")
            hyper.pop(name, None)
            fixed.pop(name, None)
            target, checked = self._checked(name, value)
            (hyper if target else fixed)[name] = checked
        return replace(self, hyper=hyper, options=fixed, given=self.given | options.keys())

    def _checked(self, name: str, value: Any) -> tuple[bool, Any]:
        """Whether `value` makes `name` a live hyper-parameter, and its checked value."""
        default = self.defaults[name]
        try:
            if default is None and value is not None and _may_be_live(self.annotations[name]):
                default = 0.0
            if not _is_live(default):
                value = _check_option(name, value, default, self.annotations[name])
                if name in self.domains and value is not None and value not in self.domains[name]:
                    raise ValueError(f"{name}={value!r}: expected in {self.domains[name]}")
                return False, value
            if value is None and _allows_none(self.annotations[name]):
                return False, None
            plain = value.item if isinstance(value, Shared) else value
            plain = check_live(name, plain, default, self.domain(name))
            return True, value if isinstance(value, Shared) else plain
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None

    def __repr__(self) -> str:
        values = {**self.hyper, **self.options}
        shown = [f"{n}={values[n]!r}" for n in self.annotations if n in self.given]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __deepcopy__(self, memo: dict) -> "Transform":
        return self

    def __reduce__(self) -> tuple:
        # The module holds the Transform where pickle would look for the function.
        given = {n: v for n, v in {**self.hyper, **self.options}.items() if n in self.given}
        return _restore, (self.update.__module__, self.update.__qualname__, given)


def _may_be_live(annotation: Any) -> bool:
    """Whether the annotation is `Live | None`, of a hyper-parameter that is None unless given."""
    return Any in typing.get_args(annotation) and _allows_none(annotation)


def _restore(module: str, qualname: str, given: dict[str, Any]) -> Transform:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        if part == "<locals>":
            raise AttributeError(
                f"{qualname}: a transform must be defined in a module to be pickled"
            )
        found = getattr(found, part)
    return found(**given) if given else found


def _is_live(default: Any) -> bool:
    return isinstance(default, float) or (
        isinstance(default, tuple) and bool(default) and all(isinstance(v, float) for v in default)
    )


def transform(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    kind: Kind = "transform",
    provides: tuple[str, ...] = (),
    domains: Mapping[str, Interval] | None = None,
    excludes: Mapping[str, str] | None = None,
    before_state: str = "",
    modifier: bool = False,
    over_all: Callable[..., Any] | None = None,
    evaluate: Callable[..., Tensor] | None = None,
    requires: Callable[[torch.Size, Mapping[str, Any]], str | None] | None = None,
    whole: bool = False,
    opaque: tuple[str, ...] = (),
    host: tuple[str, ...] = (),
    after: Callable[..., Any] | None = None,
    due: Callable[..., bool] | None = None,
    lead: Transform | None = None,
    common: Mapping[str, str | float] | None = None,
    past: Mapping[str, str] | None = None,
    made_from: Mapping[str, str] | None = None,
    gives: tuple[str, ...] = (),
    finish: Callable[..., Any] | None = None,
    **states: State,
) -> Any:
    """Declare a transform: `@transform(mean=zeros)` above a function of one tensor.

    The function is `fn(update, *states, *, context, hyper-parameters) -> (update, *states)`, or just
    the update where there is no state. Keyword-only arguments without a default (or annotated
    `Tensor | None`) are context that the runner gives; floats and tuples of floats are live
    hyper-parameters and arrive as 0-d tensors; every other default is a fixed option.

    kind: "decay" goes right before the write, "writer" returns the new parameter in place of an
        update, "observer" runs after the write, "rate" decides on the learning rate: wherever it is
        written, it runs before every element whose state it may have to rescale.
    provides: names of further results, context for the elements behind it. `gate` (a 0-d bool that
        freezes everything behind while it is false), `step`, `lr` and `grad` are replaced for them.
    domains: the interval of a hyper-parameter; without one, a float lies in [0, inf), one whose name
        begins with `beta` in [0, 1).
    excludes: names of transforms that cannot stand in the same chain, with the reason.
    before_state: why the transform must stand before every transform that holds state, if it must.
    modifier: acts only through what it provides, so something behind it must ask for that.
    over_all: `fn(update, ...)`, one tensor's share of a sum over all parameters; the sum arrives as
        the context `total`. With `finish` it is a tuple of shares, and there is no `total`.
    common: numbers of the parameter group, each with a hyper-parameter that it begins at, or a float;
        an int counts the group's steps. They are entries of the group and context for every element.
    past: those of the common numbers that keep what another was before `finish`, by their names.
    made_from: those that `finish` makes from another in every step, by their names.
    gives: names of further results, behind those of `provides`: shares of sums over all parameters
        that are not needed in this step. Only with `finish`.
    finish: `fn(members, options)` makes the new common numbers from the sums, see `together.py`: of
        `over_all` before the step goes on, of `gives` after it.
    evaluate: `fn(param, *states, hyper-parameters)`, the weights to evaluate with.
    requires: `fn(shape, options)`, why a parameter of this shape cannot have the transform, or None;
        asked when the parameter is added.
    whole: the function does linear algebra on whole tensors. It gets the update and the states of B
        parameters of one shape, stacked to (B, *shape), and returns them so; it is plain torch, may
        decide on the host by `count`, and is not run while a `gate` before it is false. What it
        `provides` are numbers for the elements behind it: one Python number or B values; a `gate`
        that is the Python value False ends the step of these parameters.
    opaque: names of results after those of `provides`, handed to whole transforms behind it as they
        are: tensors that begin with B, tuples of such, or Python values.
    host: hyper-parameters of a whole transform that arrive as Python numbers.
    after: `fn(*states, *, vectors, squares, ...)`, run after the write with the new states; returns
        (*states, vectors, squares). `vectors` and `squares` are the rotating states of the elements
        that `within` puts inside this one. Other keywords are options, hyper-parameters, `count`,
        `step`, `noise`, `chance`.
    due: `fn(count, **options)`, whether `after` has anything to do at this count.
    lead: an ordinary transform that runs right before a whole one and is configured as part of it, so
        that its elementwise part is compiled with the elements around.
    `@transform` without parentheses declares one with no state.

    Errors: TypeError if the signature and the declared state differ.
    """
    for name, state in states.items():
        if not isinstance(state, State):
            raise TypeError(f"state {name}={state!r}: expected zeros, copy_of_param, or a State")
        if state.several and not whole:
            raise TypeError(
                f"state {name}: only a transform with whole=True can hold several tensors"
            )
    if whole and (kind != "transform" or over_all or evaluate):
        raise TypeError("whole=True: only for kind 'transform', without over_all and evaluate")
    if (opaque or host or after or due or lead) and not whole:
        raise TypeError("opaque, host, after, due and lead are for transforms with whole=True")

    def declare(fn: Callable[..., Any]) -> Transform:
        signature = inspect.signature(fn, eval_str=True)
        positional: list[inspect.Parameter] = []
        keywords: list[inspect.Parameter] = []
        for p in signature.parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise TypeError(f"{fn.__name__}: {p} cannot be declared, name every argument")
            (keywords if p.kind is p.KEYWORD_ONLY else positional).append(p)
        if [p.name for p in positional[1:]] != list(states) or not positional:
            found = ", ".join(p.name for p in positional)
            raise TypeError(
                f"{fn.__name__}({found}): expected the update and then the declared state, "
                f"{', '.join(['update', *states])}"
            )
        needed = [p.name for p in keywords if p.default is p.empty]
        optional = [
            p.name for p in keywords if p.default is None and _mentions_tensor(p.annotation)
        ]
        rest = {p.name: p for p in keywords if p.name not in needed and p.name not in optional}
        defaults = {n: p.default for n, p in rest.items()}
        annotations = {n: p.annotation for n, p in rest.items()}
        if lead is not None:
            defaults = {**lead.defaults, **defaults}
            annotations = {**lead.annotations, **annotations}
        result = Transform(
            name=fn.__name__,
            update=fn,
            states=dict(states),
            hyper={n: v for n, v in defaults.items() if _is_live(v)},
            options={n: v for n, v in defaults.items() if not _is_live(v)},
            defaults=defaults,
            annotations=annotations,
            context=tuple(needed),
            optional=tuple(optional),
            provides=provides,
            kind=kind,
            domains={**(lead.domains if lead else {}), **(domains or {})},
            excludes=dict(excludes or {}),
            before_state=before_state,
            modifier=modifier,
            over_all=over_all,
            over_all_context=keyword_names(over_all),
            evaluate=evaluate,
            requires=requires,
            whole=whole,
            opaque=opaque,
            host=host,
            after=after,
            due=due,
            lead=lead,
            common=dict(common or {}),
            past=dict(past or {}),
            made_from=dict(made_from or {}),
            gives=gives,
            finish=finish,
        )
        if bool(finish) != bool(common) or (gives and (over_all or not finish)):
            raise TypeError(
                f"{fn.__name__}: `common` and `finish` go together, with either `over_all` or `gives`"
            )
        for name, value in defaults.items():
            result._checked(name, value)
        object.__setattr__(result, "__doc__", fn.__doc__)
        return result

    return declare if fn is None else declare(fn)


# By function, which is not kept alive: it may be a user's and hold much.
_keyword_names = WeakIdKeyDictionary()


def keyword_names(fn: Callable[..., Any] | None) -> tuple[str, ...]:
    if fn is None:
        return ()
    names = _keyword_names.get(fn)
    if names is None:
        names = tuple(inspect.getfullargspec(fn).kwonlyargs)
        with contextlib.suppress(
            TypeError
        ):  # there are callables that cannot be referred to weakly
            _keyword_names[fn] = names
    return names


def _mentions_tensor(annotation: Any) -> bool:
    return annotation is Tensor or Tensor in typing.get_args(annotation)
