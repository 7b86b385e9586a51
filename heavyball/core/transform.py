"""A transform: a pure function of one tensor whose state and hyper-parameters are declared.

`@transform` reads the function's signature once and yields a frozen `Transform`.
"""

import contextlib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from heavyball.core.hyper import (
    Interval,
    Shared,
    allows_none,
    check_live,
    check_option,
    fraction,
    is_live,
    may_be_live,
    nonnegative,
)
from heavyball.errors import nearest
from heavyball.state.declare import State

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
            if default is None and value is not None and may_be_live(self.annotations[name]):
                default = 0.0
            if not is_live(default):
                value = check_option(name, value, default, self.annotations[name])
                if name in self.domains and value is not None and value not in self.domains[name]:
                    raise ValueError(f"{name}={value!r}: expected in {self.domains[name]}")
                return False, value
            if value is None and allows_none(self.annotations[name]):
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
    finish: `fn(members, options)` makes the new common numbers from the sums, see `runtime/rates.py`: of
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
            hyper={n: v for n, v in defaults.items() if is_live(v)},
            options={n: v for n, v in defaults.items() if not is_live(v)},
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
