"""Combinators of chains: `parallel` and `graft` join several, `route` selects one."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from heavyball.core.hyper import Live, check_scheduled, finite, is_sequence, nonnegative
from heavyball.core.schedule import Followed, is_scheduled
from heavyball.core.transform import Transform, transform
from heavyball.numerics import norm


@transform(domains={"weights": finite})
def weighted_sum(updates: tuple[Tensor, ...], *, weights: Live = (1.0,)) -> Tensor:
    """The weighted sum of the updates of several chains."""
    return sum(weight * update for weight, update in zip(weights, updates, strict=True))  # type: ignore[return-value]


@transform(domains={"start": nonnegative})
def transplant(updates: tuple[Tensor, Tensor], *, step: Tensor, start: int = 0) -> Tensor:
    """The direction of the first update with the magnitude of the second.

    result = d * ||m|| / max(||d||, 1e-6), norms over the whole tensor;  before step `start`: m
    """
    direction, magnitude = updates
    result = direction * (norm(magnitude) / norm(direction).clamp(min=1e-6))
    return torch.where(step < start, magnitude, result) if start else result


@dataclass(frozen=True)
class Parallel:
    """Several chains on the same update; `merge` combines their results."""

    name: str
    branches: tuple[tuple[Any, ...], ...]
    merge: Transform

    def __reduce__(self) -> tuple:
        if self.name == "graft":
            return graft, (*self.branches, self.merge.options["start"])
        return _weighted, (self.branches, self.merge.hyper["weights"])

    def __repr__(self) -> str:
        start = self.merge.options.get("start", 0)
        more = f", start={start}" if start else ""
        if self.name != "graft":
            more = f", weights={self.merge.hyper['weights']}"
        return f"{self.name}({', '.join(map(chain_repr, self.branches))}{more})"


# What torch.compile, shards and checkpoints put before the names of parameters, anywhere.
PRIVATE_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What a replica puts before the names of all.
REPLICA = "module."


def private_name(name: str) -> str:
    """A name without what torch.compile, shards and checkpoints have put into it."""
    parts = name.split(".")
    return ".".join([p for p in parts[:-1] if p not in PRIVATE_WRAPPERS] + parts[-1:])


def plain_names(names: Sequence[str]) -> list[str]:
    """The names of an optimizer's parameters in the model itself, whatever wraps it."""
    found = [private_name(name) for name in names]
    while found and all(name.startswith(REPLICA) for name in found):
        found = [name[len(REPLICA) :] for name in found]
    return found


class GivenName(str):
    """A parameter's name as given, and without the prefixes of wrappers."""

    plain: str

    def __new__(cls, given: str, plain: str) -> Self:
        made = super().__new__(cls, given)
        made.plain = plain
        return made


def as_given(name: str) -> GivenName:
    """A name without knowledge of the optimizer's other names."""
    return name if isinstance(name, GivenName) else GivenName(name, private_name(name))


def _matches(name: GivenName, pattern: str) -> bool:
    """Whether a pattern matches the parameter's name, with or without prefixes of wrappers."""
    names = {str(name), private_name(name), name.plain}
    patterns = {pattern}
    for wrapper in PRIVATE_WRAPPERS:
        patterns |= {p.replace(f"{wrapper}.", "") for p in patterns}
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)


@dataclass(frozen=True)
class When:
    """A chain and the parameters that it is for."""

    chain: tuple[Any, ...]
    name: str | None = None
    ndim: int | None = None
    min_ndim: int | None = None
    max_ndim: int | None = None
    predicate: Callable[[str | None, Tensor], bool] | None = None

    def matches(self, name: str | None, param: Tensor) -> bool:
        """Whether every condition holds for this parameter."""
        if self.name is not None:
            if name is None:
                raise ValueError(
                    f"{self!r} asks for names, but a parameter of shape {tuple(param.shape)} has "
                    "none: pass model.named_parameters()"
                )
            if not _matches(as_given(name), self.name):
                return False
        if self.ndim is not None and param.ndim != self.ndim:
            return False
        if self.min_ndim is not None and param.ndim < self.min_ndim:
            return False
        if self.max_ndim is not None and param.ndim > self.max_ndim:
            return False
        name = None if name is None else as_given(name).plain
        return self.predicate is None or bool(self.predicate(name, param))

    def told(self, name: str | None, param: Tensor) -> str:
        """The predicate's reason for its choice, if it gives one."""
        reason = getattr(self.predicate, "reason", None)
        plain = None if name is None else as_given(name).plain
        return reason(plain, param)[1] if reason is not None else ""

    def reasons(self, name: str | None, param: Tensor) -> Iterator[str]:
        """Why the rule is for this parameter, which it matches."""
        told = self.told(name, param)
        for condition in ("name", "ndim", "min_ndim", "max_ndim", "predicate"):
            value = getattr(self, condition)
            if condition == "predicate" and told:
                yield told
            elif value is not None:
                yield f"{condition}={getattr(value, '__name__', None) or repr(value)}"

    def __repr__(self) -> str:
        names = ("name", "ndim", "min_ndim", "max_ndim", "predicate")
        given = [(n, getattr(self, n)) for n in names if getattr(self, n) is not None]
        shown = (f"{n}={getattr(v, '__name__', None) or repr(v)}" for n, v in given)
        return f"when({', '.join([chain_repr(self.chain), *shown])})"


@dataclass(frozen=True)
class Route:
    """Selects the chain of the first rule that matches a parameter."""

    rules: tuple[When, ...]
    otherwise: tuple[Any, ...] | None

    def __repr__(self) -> str:
        parts = [repr(rule) for rule in self.rules]
        if self.otherwise is not None:
            parts.append(f"otherwise={chain_repr(self.otherwise)}")
        return f"route({', '.join(parts)})"


@dataclass(frozen=True)
class Within:
    """A chain between two transforms, of which the first may rotate the chain's states."""

    name: str
    enter: Transform
    chain: tuple[Any, ...]
    leave: Transform

    def __repr__(self) -> str:
        return f"{self.name}({self.enter!r}, {chain_repr(self.chain)}, {self.leave!r})"


Element = Transform | Parallel | Route | Within


def chain_repr(chain: Iterable[Element]) -> str:
    """A chain as the command line writes it."""
    return " | ".join(map(repr, chain)) or "()"


def as_chain(chain: Any, owner: str, allow_empty: bool = False) -> tuple[Element, ...]:
    """One element or a sequence of them as a checked tuple; errors name `owner` and the position."""
    elements = tuple(chain) if is_sequence(chain) else (chain,)
    if not elements and not allow_empty:
        raise ValueError(f"{owner}: an empty chain; give at least one transform")
    for position, element in enumerate(elements):
        if not isinstance(element, Transform | Parallel | Route | Within):
            hint = ""
            if isinstance(element, When):
                hint = "; `when` belongs inside `route`"
            elif isinstance(element, Followed):
                hint = "; it is of the groups' numbers, so it belongs at the head of the chain"
            elif inspect.isfunction(element) or inspect.isbuiltin(element):
                hint = "; declare it with @transform, or wrap it as C.apply(function)"
            raise TypeError(
                f"{owner}: element {position} is {element!r} ({type(element).__name__}), "
                f"expected a transform{hint}"
            )
    return elements


def parallel(*chains: Any, weights: tuple[float, ...] | None = None) -> Parallel:
    """Run several chains on the same update and add their results.

    result = sum_i weights_i * chain_i(update); the weights are a live hyper-parameter, 1 by default.
    """
    if len(chains) < 2:
        raise ValueError(f"parallel: {len(chains)} chain(s) given, expected at least two")
    default = (1.0,) * len(chains)
    weights = default if weights is None else weights
    try:
        first = check_scheduled("weights", weights, default, finite)
        weights = tuple(weights) if is_scheduled(weights) else first
    except (TypeError, ValueError) as error:
        raise type(error)(f"parallel: {error}") from None
    merge = replace(weighted_sum, name="parallel", hyper={"weights": weights})
    return Parallel("parallel", tuple(as_chain(c, "parallel") for c in chains), merge)


def _weighted(branches: tuple[Any, ...], weights: tuple[float, ...]) -> Parallel:
    return parallel(*branches, weights=weights)


def graft(direction: Any, magnitude: Any, start: int = 0) -> Parallel:
    """The direction of one chain with the magnitude of another, per tensor.

    result = d * ||m|| / max(||d||, 1e-6);  before the parameter's step `start` the other chain's m
    """
    branches = as_chain(direction, "graft: direction"), as_chain(magnitude, "graft: magnitude")
    return Parallel("graft", branches, replace(transplant(start=start), name="graft"))


def within(enter: Transform, *chain: Any, leave: Transform, name: str = "within") -> Within:
    """Run a chain between two transforms of whole tensors, for example in a different basis.

    `enter` receives the states of the chain that rotate with the basis in its `after`; see
    `whole_transform`.
    """
    if not isinstance(enter, Transform) or not isinstance(leave, Transform):
        raise TypeError(f"{name}: enter={enter!r}, leave={leave!r}: expected two transforms")
    return Within(name, enter, as_chain(chain, name, True), leave)


def when(
    *chain: Any,
    name: str | None = None,
    ndim: int | None = None,
    min_ndim: int | None = None,
    max_ndim: int | None = None,
    predicate: Callable[[str | None, Tensor], bool] | None = None,
) -> When:
    """A rule for `route`: this chain for the parameters that meet all given conditions.

    name: a shell pattern such as "*.bias", for parameters with names. Prefixes of torch's wrappers are
        ignored: `_orig_mod.`, `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` anywhere, and
        `module.` if all names start with it.
    ndim, min_ndim, max_ndim: the number of dimensions.
    predicate: `fn(name, parameter) -> bool`; the name is without prefixes, or None.
    """
    if len(chain) == 1 and is_sequence(chain[0]):
        chain = tuple(chain[0])
    rule = When(as_chain(chain, "when", True), name, ndim, min_ndim, max_ndim, predicate)
    if (name, ndim, min_ndim, max_ndim, predicate) == (None,) * 5:
        raise ValueError(f"{rule!r} has no condition; a chain for the rest is `otherwise`")
    for label, count in (("ndim", ndim), ("min_ndim", min_ndim), ("max_ndim", max_ndim)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
            raise TypeError(f"when: {label}={count!r}: expected a whole number")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"when: name={name!r}: expected a pattern such as '*.bias'")
    if predicate is not None and not callable(predicate):
        raise TypeError(f"when: predicate={predicate!r}: expected a function of name and parameter")
    return rule


def route(*rules: When, otherwise: Any = None) -> Route:
    """Use different chains for different parameters: the first rule that matches decides.

    The choice is made once, when the parameter is added. `otherwise=()` leaves the update of the
    remaining parameters unchanged; without `otherwise`, a parameter that no rule matches raises.
    """
    for position, rule in enumerate(rules):
        if not isinstance(rule, When):
            raise TypeError(f"route: rule {position} is {rule!r}, expected when(...)")
    if not rules:
        raise ValueError("route: no rules given")
    rest = None if otherwise is None else as_chain(otherwise, "route: otherwise", True)
    return Route(rules, rest)


def leaves(chain: Iterable[Element]) -> Iterator[Transform]:
    """Every transform of a chain, those of its branches before the element that joins them."""
    for element in chain:
        if isinstance(element, Transform):
            yield element
        elif isinstance(element, Parallel):
            for branch in element.branches:
                yield from leaves(branch)
            yield element.merge
        elif isinstance(element, Within):
            yield from leaves((element.enter, *element.chain, element.leave))
        else:
            for rule in element.rules:
                yield from leaves(rule.chain)
            yield from leaves(element.otherwise or ())
