"""The meaning of optimizer states, so that one optimizer can continue from another.

A `Record` says what is known of a parameter: moments by their meaning rather than by their name.
`SOURCES` (`sources.py`) makes records from the dicts of other libraries; `TARGETS` here says which
states of a transform a record gives, and in which form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Node


@dataclass(frozen=True)
class Moment:
    """A running mean, as it was stored.

    raw: the tensor. beta: of what came before. count: of how many values it is, None where that is
    not known, and is taken to be many. form: "mean" is divided by 1 - beta^count, "ema" is not, "sum"
    has no factor 1 - beta either. key: under which name it was kept.
    """

    raw: Tensor
    beta: float
    count: int | None
    form: str
    key: str

    @property
    def _bias(self) -> float:
        return 1.0 if self.count is None or not self.beta else 1 - self.beta**self.count

    def ema(self) -> Tensor:
        """The mean as it grows from zero."""
        if self.form == "sum":
            return self.raw * (1 - self.beta)
        return self.raw * self._bias if self.form == "mean" else self.raw

    def mean(self) -> Tensor:
        """The unbiased mean."""
        return self.raw if self.form == "mean" else self.ema() / self._bias

    def sum(self) -> Tensor:
        """The sum, whose newest value counts once."""
        if self.form == "sum" or self.beta == 1:
            return self.raw
        return self.ema() / (1 - self.beta)


@dataclass(frozen=True)
class Kept:
    """A state that has one form only, and under which name it was kept."""

    value: Any
    key: str


@dataclass
class Record:
    """What another optimizer knew of one parameter.

    count: its steps, None where it does not say. moments: by their meaning, "mean" and "square" of
    gradients. others: states that some transform keeps in the same form.
    keys: the names of all that was saved for it. aside: those without which a method goes on all the
    same, such as what says how to fit a preconditioner.
    """

    count: int | None = None
    moments: dict[str, Moment] = field(default_factory=dict)
    others: dict[str, Kept] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    # weights to train with, where the parameters hold an average
    trained: Callable[[Tensor], Tensor] | None = None


@dataclass
class Given:
    """States of one transform, and the names of their sources."""

    states: dict[str, Any]
    keys: set[str]


Target = Callable[[Node, Record], Given]


def keeps(node: Node, state: str) -> bool:
    """Whether a transform has a state, as it is configured."""
    declared = node.transform.states.get(state)
    return declared is not None and bool(node.transform.options.get(declared.needed_by or "", True))


def _moments(**wanted: tuple[str, str]) -> Target:
    """States that are moments: by state its meaning and its form."""

    def give(node: Node, record: Record) -> Given:
        given = Given({}, set())
        for state, (meaning, form) in wanted.items():
            moment = record.moments.get(meaning)
            if keeps(node, state) and moment is not None:
                given.states[state] = getattr(moment, form)()
                given.keys.add(moment.key)
        return given

    return give


def _kept(*names: str) -> Target:
    """States that are copied unchanged, under these names."""

    def give(node: Node, record: Record) -> Given:
        there = [n for n in names if n in record.others and keeps(node, n)]
        kept = {name: record.others[name] for name in there}
        return Given({n: k.value for n, k in kept.items()}, {k.key for k in kept.values()})

    return give


def _both(*targets: Target) -> Target:
    def give(node: Node, record: Record) -> Given:
        found = [target(node, record) for target in targets]
        states = {name: value for each in found for name, value in each.states.items()}
        return Given(states, set().union(*(each.keys for each in found)))

    return give


def _buffer(node: Node, record: Record) -> Given:
    """SGD's momentum, which is a sum; `buffer_steps` is 0 where it is to begin with a gradient."""
    own = record.others.get("momentum_buffer")
    if own is None and "mean" not in record.moments:
        return Given({}, set())
    value = record.moments["mean"].sum() if own is None else own.value
    key = record.moments["mean"].key if own is None else own.key
    steps = torch.tensor(float(max(1, record.count or 1)), dtype=torch.float64, device="cpu")
    states = {"momentum_buffer": value, "buffer_steps": steps}
    return Given({n: v for n, v in states.items() if keeps(node, n)}, {key})


def _square(node: Node, record: Record) -> Given:
    """A second moment, which grows from zero where its bias is not corrected."""
    form = "mean" if node.transform.options.get("correct_bias", True) else "ema"
    return _moments(exp_avg_sq=("square", form))(node, record)


_ADAM = _moments(exp_avg=("mean", "mean"), exp_avg_sq=("square", "mean"))
_EMA = _moments(momentum_buffer=("mean", "ema"))

# By transform, what a record gives it.
TARGETS: dict[str, Target] = {
    "scale_by_adam": _both(_ADAM, _kept("max_exp_avg_sq")),
    "scale_by_nadam": _both(
        _moments(exp_avg=("mean", "ema"), exp_avg_sq=("square", "mean")), _kept("mu_product")
    ),
    "scale_by_adam_atan2": _ADAM,
    "scale_by_exp_avg_sq": _square,
    "scale_by_rms": _moments(exp_avg_sq=("square", "ema"), grad_avg=("centre", "ema")),
    "scale_by_adagrad": _kept("square_sum"),
    "factored_rms": _both(_square, _kept("row", "col")),
    "exp_avg": _moments(exp_avg=("mean", "mean")),
    "scale_by_lion": _moments(exp_avg=("mean", "ema")),
    "heavyball_momentum": _buffer,
    "nesterov_momentum": _buffer,
    "muon_momentum": _EMA,  # also of `muon` and `scale_by_normuon`
    "schedule_free": _kept("z", "weight_sum", "lr_max", "last_beta"),
    "prodigy_d": _kept("p0", "s", "unit"),
    "prodigy_plus_d": _kept("p0", "s", "unit"),
    "to_eigenbasis": _kept("gram", "basis"),
    "psgd_kron": _kept("factors"),
}
# Moments that are given to one transform alone, the first that takes them.
SINGLE = ("mean", "square")


def given_to(nodes: tuple[Node, ...], record: Record) -> tuple[dict[str, Any], set[str], set[str]]:
    """The states of a program that a record gives, by key; the names used; the transforms served."""
    states: dict[str, Any] = {}
    keys: set[str] = set()
    served: set[str] = set()
    left = Record(record.count, dict(record.moments), dict(record.others))
    for node in nodes:
        target = TARGETS.get(node.transform.name)
        if target is None:
            continue
        given = target(node, left)
        for name, value in given.states.items():
            states[node.state_key(name)] = value
        keys |= given.keys
        if given.states:
            served.add(node.transform.name)
        for meaning in SINGLE:
            if meaning in left.moments and left.moments[meaning].key in given.keys:
                del left.moments[meaning]
    return states, keys, served


def number(value: Any) -> float:
    """A number that was kept as one or as a tensor of one element."""
    return float(value.item() if isinstance(value, Tensor) else value)


def entry(group: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A group's entry as plain numbers."""
    value = group.get(name, default)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    several = isinstance(value, list | tuple) and None not in value
    return tuple(map(number, value)) if several else value
