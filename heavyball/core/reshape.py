"""A chain that works in another shape than the parameter's: one transform of whole tensors.

`enter` makes tensors of another shape, the chain runs on them and keeps its states in that shape, and
`leave` comes back. What it is told of the parameter is told to `enter` and `leave` alone.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heavyball.core.combine import Within, leaves
from heavyball.core.transform import Rules, Signature, Transform, keyword_names
from heavyball.core.whole import Whole
from heavyball.state.declare import State

# What has the shape of the parameter.
OUTER = ("param", "grad", "raw_grad", "total", "noise", "chance", "places")


class _Part:
    """A transform with the names under which the whole has its states and its hyper-parameters."""

    def __init__(self, transform: Transform, key: str, taken: Counter[str], names: dict[str, str]):
        """names: those of the transform in front that is configured as a part of this one."""
        self.transform = transform
        self.accepted = keyword_names(transform.update)
        self.states = {name: _free(name, key, taken) for name in self._held()}
        mine = (*transform.hyper, *transform.options)
        self.names = {n: names.get(n) or _free(n, key, taken) for n in mine}

    def _held(self) -> Iterator[str]:
        options = self.transform.options
        for name, state in self.transform.states.items():
            if options.get(state.needed_by or "", True):
                yield name

    def arguments(self, given: Mapping[str, Any], env: Mapping[str, Any]) -> dict[str, Any]:
        """Its hyper-parameters, options and context."""
        t = self.transform
        found = {n: given[name] for n, name in self.names.items() if n in self.accepted}
        if isinstance(t, Whole):
            found |= {n: float(found[n]) for n in t.host if n in found}
        found |= {n: env[n] for n in t.context}
        return found | {n: env.get(n) for n in t.optional}

    def run(self, update: Tensor, states: Iterator[Any], arguments: dict[str, Any]) -> tuple:
        """What its function returns, with the states that it does not hold left out."""
        t = self.transform
        old = [next(states) if name in self.states else None for name in t.states]
        result = t.update(update, *old, **arguments)
        parts = result if isinstance(result, tuple) else (result,)
        kept = [
            value for name, value in zip(t.states, parts[1:], strict=False) if name in self.states
        ]
        provided = dict(zip(t.results, parts[1 + len(t.states) :], strict=True))
        return parts[0], kept, provided


def _free(name: str, key: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{key.replace('.', '_')}_{name}"


@functools.lru_cache(maxsize=256)
def reshaped(within: Within) -> Transform:
    """The one transform that a chain in another shape is.

    Errors: ValueError for an element that cannot work in another shape.
    """
    enter, leave = within.enter, within.leave
    pairs = [(_lead(t), t) for t in leaves(within.chain)]
    leads = {u for lead, _ in pairs for u in lead}
    inner = [u for lead, t in pairs for u in (*lead, t)]
    for t in inner:
        _check(t, within.name)
    keys: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    first, last = (_Part(t, within.name, taken, {}) for t in (enter, leave))
    middle: list[_Part] = []
    led: dict[str, str] = {}
    for t in inner:
        key = f"{t.name}.{keys[t.name]}" if keys[t.name] else t.name
        keys[t.name] += t not in leads
        middle.append(_Part(t, key, taken, led))
        led = middle[-1].names if t in leads else {}
    parts = [first, *middle, last]
    own = set(first.transform.results)
    context = {n for p in parts for n in p.transform.context if n not in own} | {"step"}
    fields: dict[str, dict[str, Any]] = {"hyper": {}, "options": {}, "defaults": {}}
    annotations: dict[str, Any] = {}
    domains: dict[str, Any] = {}
    for part in parts:
        for n, name in part.names.items():
            t = part.transform
            kind = "hyper" if n in t.hyper else "options"
            fields[kind][name] = (t.hyper if n in t.hyper else t.options)[n]
            fields["defaults"][name], annotations[name] = t.defaults[n], t.annotations[n]
            if n in t.hyper:
                domains[name] = t.domain(n)
    states = {
        name: _state(part.transform, n, enter if part in middle else None)
        for part in parts
        for n, name in part.states.items()
    }
    requires = functools.partial(_problem, enter, tuple(p.transform for p in middle))
    excludes: dict[str, str] = {**enter.rules.excludes, **leave.rules.excludes}
    return Whole(
        name=within.name,
        update=_function(first, middle, last, sorted(context), [*annotations]),
        signature=Signature(fields["defaults"], annotations, tuple(sorted(context)), ()),
        states=states,
        hyper=fields["hyper"],
        options=fields["options"],
        provides=(),
        kind="transform",
        rules=Rules(domains, excludes, "", False, requires, False),
        given=frozenset(p.names[n] for p in (first, last) for n in p.transform.given),
    )


def is_reshaping(within: Within) -> bool:
    """Whether its entrance makes tensors of another shape."""
    return isinstance(within.enter, Whole) and within.enter.inner_shape is not None


def _lead(t: Transform) -> tuple[Transform, ...]:
    if not isinstance(t, Whole) or t.lead is None:
        return ()
    mine = t.lead.defaults
    hyper = {n: v for n, v in t.hyper.items() if n in mine}
    return (
        replace(t.lead, hyper=hyper, options={n: t.options[n] for n in t.options if n in mine}),
    )


def _check(t: Transform, name: str) -> None:
    for wrong in OUTER:
        if wrong in t.context or t.over_all:
            raise ValueError(
                f"{t.name} reads {wrong!r}, so it cannot be inside {name}, which works in "
                "another shape than the parameter's"
            )
    decides = {"gate", "lr", "grad", "step"} & set(t.provides)
    turns = isinstance(t, Whole) and t.after is not None
    if t.kind != "transform" or turns or decides:
        raise ValueError(
            f"{t.name} provides more than the update, so it cannot be inside {name}, which works "
            "in another shape than the parameter's"
        )


def _state(t: Transform, name: str, enter: Transform | None) -> State:
    declared = t.states[name]
    if enter is None:
        return declared
    assert isinstance(enter, Whole)
    assert enter.inner_shape is not None
    shape_of = enter.inner_shape

    def init(param: Tensor, options: Mapping[str, Any]) -> Any:
        shape = shape_of(tuple(param.shape), _own(enter, options))
        return declared.init(param.new_zeros(shape), t.options)

    return replace(declared, init=init, needed_by=None)


def _own(enter: Transform, options: Mapping[str, Any]) -> dict[str, Any]:
    """The entrance's options, whose names it has first, with what a parameter's name has decided."""
    return {name: options.get(name, value) for name, value in enter.options.items()}


def _problem(
    enter: Transform,
    inner: tuple[Transform, ...],
    shape: torch.Size,
    options: Mapping[str, Any],
) -> str | None:
    mine = _own(enter, options)
    why = enter.rules.requires(shape, mine) if enter.rules.requires else None
    assert isinstance(enter, Whole)
    if why is not None or enter.inner_shape is None:
        return why
    other = torch.Size(enter.inner_shape(tuple(shape), mine))
    for t in inner:
        why = t.rules.requires(other, t.options) if t.rules.requires else None
        if why is not None:
            return f"works in the shape {tuple(other)}, of which {t.name} {why}"
    return None


def _function(
    first: _Part, middle: list[_Part], last: _Part, context: list[str], options: list[str]
) -> Callable[..., Any]:
    def run(update: Tensor, *states: Any, **given: Any) -> tuple:
        left = iter(states)
        x, new, found = first.run(update, left, first.arguments(given, given))
        env = {**given, **found}
        for part in middle:
            x, kept = _inner(part, x, left, given, env)
            new = [*new, *kept]
        x, kept, _ = last.run(x, left, last.arguments(given, env))
        return x, *new, *kept

    # what the runner reads of a function
    keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in (*context, *options)]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def _inner(
    part: _Part, x: Tensor, states: Iterator[Any], given: Mapping[str, Any], env: dict[str, Any]
) -> tuple[Tensor, list[Any]]:
    """One element of the chain, on a batch or, where it is written for one tensor, on each."""
    old = [next(states) for _ in part.states]
    if part.transform.whole:
        x, kept, found = part.run(x, iter(old), part.arguments(given, env))
        env |= found
        return x, kept
    results = []
    for index, one in enumerate(x):
        mine = {n: _one(v, index, len(x)) for n, v in env.items()}
        arguments = part.arguments(given, mine)
        update, kept, found = part.run(one, iter([_at(s, index) for s in old]), arguments)
        results.append((update.to(x.dtype), kept, found))
    env |= results[0][2]  # a schedule depends on the step, which all of a batch share
    updates, kept, _ = zip(*results, strict=True)
    return torch.stack(updates), [_stacked(values) for values in zip(*kept, strict=True)]


def _one(value: Any, index: int, size: int) -> Any:
    """One parameter's number of those for a batch."""
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size:
        return value[index].reshape(()) if value[index].numel() == 1 else value[index]
    return value


def _at(state: Any, index: int) -> Any:
    return None if state is None else state[index]


def _stacked(values: Any) -> Any:
    """States of several parameters together; None where there is none of that shape."""
    return None if values[0] is None else torch.stack(values)
