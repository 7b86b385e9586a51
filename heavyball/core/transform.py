"""A transform: a pure function of one tensor whose state and hyper-parameters are declared.

`@transform` reads the function's signature once and yields a frozen `Transform`.
"""

import contextlib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from heavyball.core.hyper import (
    Domain,
    Interval,
    Intervals,
    Shared,
    allows_none,
    check_option,
    check_scheduled,
    fraction,
    is_live,
    may_be_live,
    nonnegative,
)
from heavyball.core.schedule import is_scheduled
from heavyball.errors import nearest
from heavyball.state.declare import State

Kind = Literal["transform", "decay", "writer", "post", "observer", "rate"]
# The loss of the step.
LOSS = "loss"
FED = "fed"
# What a second gradient replaces, see `perturb`.
FIRST = "first_grad"
# Context that any transform may request as a keyword-only argument.
CONTEXT = {
    "step": "how many gradients this parameter has had, from 1",
    "param": "the parameter (after the write, for an observer)",
    "grad": "the gradient at the start of the chain",
    "raw_grad": "the gradient before it is clamped",
    "lr": "the learning rate of this step, warm-up included",
    "base_lr": "the learning rate of the group, without warm-up",
    LOSS: "the loss that `step` was given, or its closure has returned",
    FED: "what `feed` was given under the name that the option `signal` has",
}
# Additional context for elements after the writer.
WRITTEN_CONTEXT = {
    "old_param": "the parameter before the write",
    "written": "the update that the writer got, decay included",
}
# Additional context for transforms of whole tensors.
WHOLE_CONTEXT = {
    "count": "`step` as a Python int, for decisions on the host",
    "places": "the places of the B parameters in the optimizer, counted from 0, as a tuple",
    "noise": "`noise(shape, salt=0)`: standard normals from the optimizer's own seed",
    "chance": "`chance(salt=0)`: a Python float in [0, 1) from the seed and `count`, the same for "
    "every parameter",
}


# The transforms that complete a chain which has none of their kind, by kind.
DEFAULTS: dict[str, "Transform"] = {}


@dataclass(frozen=True)
class Signature:
    """The arguments of a function after the update and the states.

    defaults, annotations: of its hyper-parameters and options, in order. context: required context.
    optional: context that may be missing.
    """

    defaults: dict[str, Any]
    annotations: dict[str, Any]
    context: tuple[str, ...]
    optional: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """Where a transform may be placed, and what it applies to; see `transform`."""

    domains: dict[str, Domain]
    excludes: dict[str, str]
    before_state: str
    modifier: bool
    requires: Callable[[torch.Size, Mapping[str, Any]], str | None] | None
    opens_once: bool


class _Signature:
    """The `inspect.signature` of a transform: its hyper-parameters and options."""

    def __get__(self, transform: "Transform | None", owner: type) -> inspect.Signature:
        if transform is None:  # the class has its constructor's
            raise AttributeError("__signature__")
        values = {**transform.defaults, **transform.options, **transform.hyper}
        return inspect.Signature(
            [
                inspect.Parameter(
                    name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=values[name]
                )
                for name in transform.defaults
            ],
            return_annotation=Transform,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """One element of a chain: a pure function and what it declares.

    `update` is the function itself. `hyper` are the live hyper-parameters (floats and tuples of floats,
    stored in the parameter group), `options` the fixed ones. Calling a transform with some of either
    returns a configured copy.
    """

    name: str
    update: Callable[..., Any]
    signature: Signature
    states: dict[str, State]
    hyper: dict[str, Any]
    options: dict[str, Any]
    provides: tuple[str, ...]
    kind: Kind
    rules: Rules
    over_all: Callable[..., Any] | None = None
    evaluate: Callable[..., Tensor] | None = None
    perturb: Callable[..., Tensor] | None = None
    perturb_every: str = ""
    offers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    given: frozenset[str] = field(default_factory=frozenset)
    instead: "Callable[[Mapping[str, Any]], Transform | None] | None" = None

    __signature__ = _Signature()

    # whether the function gets whole tensors, see `heavyball.core.whole`
    whole: ClassVar[bool] = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Of hyper-parameters and options, in order."""
        return self.signature.defaults

    @property
    def annotations(self) -> dict[str, Any]:
        """Of hyper-parameters and options, in order."""
        return self.signature.annotations

    @property
    def context(self) -> tuple[str, ...]:
        """What the function cannot do without."""
        return self.signature.context

    @property
    def optional(self) -> tuple[str, ...]:
        """What the function is given if it is there."""
        return self.signature.optional

    @property
    def results(self) -> tuple[str, ...]:
        """The results of the function after the update and the states."""
        return self.provides

    @property
    def signal(self) -> str | None:
        """The name of the signal that it reads from `feed`."""
        return self.options["signal"] if FED in (*self.context, *self.optional) else None

    def refused_fed(self, shape: torch.Size, count: int) -> str:
        """The expected number of `fed` values for this shape, if `count` is wrong, else ""."""
        return "" if count == 1 else "one number"

    @property
    def reads_loss(self) -> bool:
        """Whether it reads the loss of the step."""
        return LOSS in (*self.context, *keyword_names(self.over_all))

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.update) or ""

    @property
    def summary(self) -> str:
        return self.doc.split("\n\n")[0].replace("\n", " ")

    @property
    def all_states(self) -> dict[str, State]:
        """Its states, and those of its `lead` transform."""
        return self.states

    def asks_for(self, name: str) -> bool:
        """Whether it has an argument of this name that the runner gives."""
        return name in self.context

    @property
    def asked(self) -> set[str]:
        """Every name that the function, or its share of a sum, may be given by the runner."""
        return {*self.context, *self.optional, *keyword_names(self.over_all)}

    def domain(self, name: str) -> Intervals:
        """The interval of the hyper-parameter `name`: by default [0, 1) for betas, else [0, inf)."""
        default = fraction if name.startswith("beta") else nonnegative
        domain = self.rules.domains.get(name, default)
        return domain(self.options) if callable(domain) else domain

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
        made = replace(self, hyper=hyper, options=fixed, given=self.given | options.keys())
        for name, value in hyper.items():
            if callable(self.rules.domains.get(name)):  # it may depend on an option given with it
                made._checked(name, value)
        return made

    def _checked(self, name: str, value: Any) -> tuple[bool, Any]:
        """Whether `value` makes `name` a live hyper-parameter, and its checked value."""
        default = self.defaults[name]
        try:
            if default is None and value is not None and may_be_live(self.annotations[name]):
                default = 0.0
            if not is_live(default, self.annotations[name]):
                value = check_option(name, value, default, self.annotations[name])
                domain = self.rules.domains.get(name)
                if isinstance(domain, Interval) and value is not None and value not in domain:
                    raise ValueError(f"{name}={value!r}: expected in {domain}")
                return False, value
            if value is None and allows_none(self.annotations[name]):
                return False, None
            plain = value.item if isinstance(value, Shared) else value
            plain = check_scheduled(name, plain, default, self.domain(name))
            if is_scheduled(value):
                return True, tuple(value) if isinstance(value, list) else value
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


def _restore(module: str, qualname: str, given: dict[str, Any]) -> Transform:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        if part == "<locals>":
            raise AttributeError(
                f"{qualname}: a transform must be defined in a module to be pickled"
            )
        found = getattr(found, part)
    return found(**given) if given else found


def transform(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    kind: Literal["transform", "decay", "writer", "post", "observer"] = "transform",
    provides: tuple[str, ...] = (),
    domains: Mapping[str, Domain] | None = None,
    excludes: Mapping[str, str] | None = None,
    before_state: str = "",
    modifier: bool = False,
    over_all: Callable[..., Any] | None = None,
    evaluate: Callable[..., Tensor] | None = None,
    perturb: Callable[..., Tensor] | None = None,
    offers: Mapping[str, Callable[..., Tensor]] | None = None,
    requires: Callable[[torch.Size, Mapping[str, Any]], str | None] | None = None,
    opens_once: bool = False,
    instead: Callable[[Mapping[str, Any]], Transform | None] | None = None,
    **states: State,
) -> Any:
    """Declare a transform: `@transform(mean=zeros)` above a function of one tensor.

    The function is `fn(update, *states, *, context, hyper-parameters) -> (update, *states)`; without
    state it returns just the update. Keyword-only arguments without a default (or annotated `Tensor
    | None`) are context provided by the chain; floats and tuples of floats are live hyper-parameters
    and arrive as 0-d tensors; every other default is a fixed option.

    kind: "decay" runs right before the write, "writer" returns the new parameter instead of an
        update, "post" runs after the writer and returns the parameter again, "observer" runs after both.
    provides: names of additional results, which become context for later elements. `gate` (a 0-d
        bool that freezes all later elements while it is false), `step`, `lr` and `grad` are replaced
        for them.
    domains: the interval of a hyper-parameter, a tuple with one for each of its numbers, or a
        function of the options that returns either. The default is [0, 1) for names that start with
        `beta`, else [0, inf).
    excludes: names of transforms that cannot be in the same chain, with the reason. "decay" means all of
        that kind; the chain then adds no decay by default.
    before_state: the reason why the transform must be before every transform with state, if it must.
    modifier: it acts only through what it provides, so a later element must use that.
    over_all: `fn(update, ...)`, one tensor's share of a sum over all parameters; the sum arrives as
        the context `total`.
    evaluate: `fn(param, *states, hyper-parameters)`, the weights to evaluate with.
    perturb: `fn(param, *, hyper-parameters)`, the metric w in which the weights are moved by `rho` for a
        second gradient: by rho w^2 g over the norm of w g.
    offers: context for all elements, earlier ones included, computed from its state after the last step:
        by name, `fn(param, *states, *, context, hyper-parameters)`.
    requires: `fn(shape, options)`, the reason why a parameter of this shape is not supported, or
        None; called when the parameter is added.
    opens_once: the `gate` that it provides is closed only in a parameter's first steps.
    instead: `fn(options)`, a transform with the same hyper-parameters that replaces this one in a
        chain for these options, or None.
    `@transform` without parentheses declares a transform without state.

    Use `@whole_transform` for transforms of whole tensors, and `@rate` for learning-rate estimators.

    Errors: TypeError if the signature and the declared state differ.
    """
    _check_states(states)
    for name, state in states.items():
        if state.several:
            raise TypeError(f"state {name}: only a @whole_transform can hold several tensors")
    if kind not in ORDINARY:
        hint = "; it is declared with @rate" if kind == "rate" else ""
        raise TypeError(f"kind={kind!r}: expected one of {', '.join(map(repr, ORDINARY))}{hint}")
    rules = Rules(
        dict(domains or {}),
        dict(excludes or {}),
        before_state,
        modifier,
        requires,
        opens_once,
    )

    def declare(fn: Callable[..., Any]) -> Transform:
        parts = signed(fn, states)
        made = Transform(
            *parts,
            provides,
            kind,
            rules,
            over_all,
            evaluate,
            perturb,
            offers=dict(offers or {}),
            instead=instead,
        )
        return checked(made)

    return declare if fn is None else declare(fn)


ORDINARY = ("transform", "decay", "writer", "post", "observer")
# Which decorator takes what, for those that are given to another.
_BELONGS = {
    **dict.fromkeys(
        ("kind", "modifier", "over_all", "evaluate", "perturb", "offers"), "@transform"
    ),
    **dict.fromkeys(
        (
            "whole",
            "opaque",
            "host",
            "after",
            "due",
            "lead",
            "noise_every",
            "inner_shape",
            "fed_numbers",
            "perturb_every",
            "rounds",
        ),
        "@whole_transform",
    ),
    **dict.fromkeys(
        ("numbers", "past", "made_from", "from_sums", "gives", "finish", "shared"), "@rate"
    ),
}


def _check_states(states: Mapping[str, Any]) -> None:
    for name, state in states.items():
        if not isinstance(state, State):
            hint = f"; {name!r} belongs to {_BELONGS[name]}" if name in _BELONGS else ""
            raise TypeError(
                f"state {name}={state!r}: expected zeros, copy_of_param, or a State{hint}"
            )


def signed(
    fn: Callable[..., Any], states: Mapping[str, State], lead: Transform | None = None
) -> tuple[str, Callable[..., Any], Signature, dict[str, State], dict[str, Any], dict[str, Any]]:
    """Read the signature of a function: the first fields of its declaration.

    lead: a transform that is configured as part of it.

    Errors: TypeError if the signature and the declared state differ.
    """
    _check_states(states)
    positional: list[inspect.Parameter] = []
    keywords: list[inspect.Parameter] = []
    for p in inspect.signature(fn, eval_str=True).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise TypeError(f"{fn.__name__}: {p} cannot be declared, name every argument")
        (keywords if p.kind is p.KEYWORD_ONLY else positional).append(p)
    # an underscore sets a state apart from an option of its name
    if [p.name.rstrip("_") for p in positional[1:]] != list(states) or not positional:
        found = ", ".join(p.name for p in positional)
        raise TypeError(
            f"{fn.__name__}({found}): expected the update and then the declared state, "
            f"{', '.join(['update', *states])}"
        )
    needed = [p.name for p in keywords if p.default is p.empty]
    optional = [p.name for p in keywords if p.default is None and _mentions_tensor(p.annotation)]
    rest = {p.name: p for p in keywords if p.name not in needed and p.name not in optional}
    defaults = {**(lead.defaults if lead else {}), **{n: p.default for n, p in rest.items()}}
    annotations = {
        **(lead.annotations if lead else {}),
        **{n: p.annotation for n, p in rest.items()},
    }
    hyper = {n: v for n, v in defaults.items() if is_live(v, annotations[n])}
    options = {n: v for n, v in defaults.items() if n not in hyper}
    signature = Signature(defaults, annotations, tuple(needed), tuple(optional))
    return fn.__name__, fn, signature, dict(states), hyper, options


T = TypeVar("T", bound=Transform)


def checked(declared: T) -> T:
    """Check the defaults of a declaration, and give it the docstring of its function."""
    if FED in (*declared.context, *declared.optional) and not isinstance(
        declared.options.get("signal"), str
    ):
        raise TypeError(f"{declared.name}: `fed` needs an option `signal`, the name that is fed")
    if FED in declared.optional and not declared.whole:
        raise TypeError(
            f"{declared.name}: only a transform of whole tensors may have optional `fed`; "
            "leave out the default None"
        )
    for name, value in declared.defaults.items():
        declared._checked(name, value)
    object.__setattr__(declared, "__doc__", declared.update.__doc__)
    return declared


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
