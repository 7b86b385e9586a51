"""A chain that has been checked: its elements have keys, its hyper-parameters names in the group."""

import functools
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heavyball.combine import Element, Parallel, Route, When, Within, as_chain, chain_repr
from heavyball.formats import Storage
from heavyball.storage import COMPANIONS
from heavyball.transform import (
    CONTEXT,
    WHOLE_CONTEXT,
    Holds,
    Interval,
    Shared,
    Transform,
    check_live,
)
from heavyball.transforms.decay import decoupled
from heavyball.transforms.descend import descend

# What holds nothing else.
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Node:
    """A transform at its place: where its state and its hyper-parameters are found."""

    transform: Transform
    key: str
    hyper: dict[str, tuple[str, int | None]]
    inner: "tuple[Node, ...]" = ()  # those that `within` puts inside it

    def state_key(self, state: str) -> str:
        return self.key if state == self.transform.name else f"{self.key}.{state}"


@dataclass(frozen=True, eq=False)
class Fork:
    """Branches that see the same update, and the node that makes one update of theirs."""

    branches: "tuple[tuple[Node | Fork, ...], ...]"
    merge: Node


@dataclass(frozen=True, eq=False)
class Switch:
    """Rules that pick a branch for each parameter."""

    rules: "tuple[tuple[When, tuple[Node | Fork | Switch, ...]], ...]"
    otherwise: "tuple[Node | Fork | Switch, ...] | None"


@dataclass(frozen=True)
class Hyper:
    """One entry of the parameter group: its default and where it may lie."""

    default: Any
    domains: tuple[tuple[int | None, Interval], ...]
    owner: str

    def check(self, key: str, value: Any) -> Any:
        """The value as floats; raises where one of the transforms that use it would not take it."""
        for index, domain in self.domains:
            checked = check_live(key, value, self.default, domain, index)
        return checked


class Program:
    """What runs for one parameter: nodes and forks, no switches left, ending in the write."""

    def __init__(self, nodes: tuple[Node | Fork, ...], storage: Storage | None = None):
        self.nodes = nodes
        self.storage = storage or Storage()
        self.flat = tuple(flatten(nodes))
        self.total_keys = tuple(n.key for n in self.flat if n.transform.over_all is not None)
        self.has_whole = any(n.transform.whole for n in self.flat)
        self.has_noise = any(n.transform.asks_for("noise") for n in self.flat)
        self.evaluators = tuple(n for n in self.flat if n.transform.evaluate is not None)
        self.rate = next((n for n in self.flat if n.transform.kind == "rate"), None)
        self.common = frozenset(self.rate.transform.common) if self.rate else frozenset()
        self.states = tuple(
            (n, name, declared)
            for n in self.flat
            for name, declared in n.transform.states.items()
            if n.transform.options.get(declared.needed_by or "", True)
        )
        # the keys of states of several tensors, by state, shape and dtype of the parameter
        self.pieces: dict[Any, tuple[str | None, ...]] = {}
        # state that comes only when a hyper-parameter asks for it, or goes before the end
        self.lazy_keys = {
            n.state_key(name) + part
            for n, name, s in self.states
            if s.needed_by in n.transform.hyper or s.until is not None
            for part in ("", *COMPANIONS)
        }
        # state of one number, which is float64
        self.numbers = ("step", *(n.state_key(k) for n, k, s in self.states if s.is_number))
        # the shape and dtype of each state, by shape and dtype of the parameter, see `checks.py`
        self.expected: dict[Any, dict[str, Any]] = {}
        self._owned: set[str] = set()  # keys that were found to be the optimizer's own
        # what each state holds, numbers excepted
        self.holds: dict[str, Holds] = {
            n.state_key(name): s.holds for n, name, s in self.states if not s.is_number
        }

    def owns(self, keys: Iterable[Any]) -> bool:
        """Whether these keys of a state are the optimizer's own; others may keep entries there too."""
        new = set(keys) - self._owned
        found = {key for key in new if self._is_own(key)}
        self._owned |= found
        return len(found) == len(new)

    def _is_own(self, key: Any) -> bool:
        if not isinstance(key, str):
            return False
        main = key.split(":")[0]
        name, _, index = main.rpartition(".")
        one = {"step", "train_param", "param"} | {n.state_key(x) for n, x, s in self.states}
        several = {n.state_key(x) for n, x, s in self.states if s.several}
        return main in one or (index.isdigit() and name in several)

    def holds_of(self, key: str) -> Holds | None:
        """What a state tensor holds, one of several under one name too; None for a number."""
        name, _, index = key.rpartition(".")
        return self.holds.get(key) or (self.holds.get(name) if index.isdigit() else None)

    @functools.cached_property
    def identity(self) -> Any:
        """Equal for programs that compute the same: their functions, options and names."""
        return tuple(map(_identity, self.nodes))

    @functools.cached_property
    def is_library(self) -> bool:
        """Whether nothing in it is the user's, so that it may be kept when its optimizers are gone."""
        return _is_library(tuple(node.transform for node in self.flat), set())

    def __repr__(self) -> str:
        return " | ".join(map(_shown, visible(self.nodes)))


def _identity(node: Node | Fork) -> Any:
    if isinstance(node, Fork):
        branches = tuple(tuple(map(_identity, branch)) for branch in node.branches)
        return (branches, _identity(node.merge))
    t = node.transform
    try:
        options = tuple(sorted(t.options.items()))
        hash(options)
    except TypeError:
        options = (("unhashable", t),)
    states = tuple((name, state.holds) for name, state in t.states.items())
    numbers = (tuple(t.hyper), tuple(t.common), tuple(t.past.items()))
    declared = (t.kind, states, t.provides, numbers, t.gives)
    inner = tuple(n.key for n in node.inner)
    return (t.update, t.over_all, options, declared, node.key, tuple(node.hyper.items()), inner)


def _is_library(value: Any, seen: set[int]) -> bool:
    """Whether a value is plain, or a function or declaration of the library's that holds only such."""
    if id(value) in seen or value is None or isinstance(value, PLAIN):
        return True
    seen.add(id(value))
    inner: Iterable[Any]
    if isinstance(value, types.FunctionType):
        if value.__module__.partition(".")[0] != "heavyball":
            return False
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        inner = (*cells, value.__defaults__, value.__kwdefaults__)
    elif isinstance(value, types.BuiltinFunctionType):  # of a module or class, not of an object
        return isinstance(value.__self__, (types.ModuleType, type))
    elif type(value) in (tuple, list, set, frozenset):
        inner = value
    elif isinstance(value, Mapping):
        inner = (*value.keys(), *value.values())
    elif type(value).__module__.partition(".")[0] == "heavyball" and is_dataclass(value):
        inner = (part for name, part in vars(value).items() if name != "annotations")
    else:
        return False
    return all(_is_library(part, seen) for part in inner)


def _shown(node: Node | Fork) -> str:
    if isinstance(node, Node):
        return repr(node.transform)
    branches = tuple(tuple(_Shown(_shown(n)) for n in visible(b)) for b in node.branches)
    return repr(Parallel(node.merge.transform.name, branches, node.merge.transform))


def visible(nodes: tuple[Node | Fork, ...]) -> list[Node | Fork]:
    """Without what runs before a transform as a part of it."""
    keys = [n.key if isinstance(n, Node) else "" for n in nodes[1:]]
    return [
        n
        for n, after in zip(nodes, [*keys, ""], strict=True)
        if not (isinstance(n, Node) and n.key == after)
    ]


class _Shown(str):
    __repr__ = str.__str__


def flatten(nodes: tuple[Node | Fork, ...]) -> Iterator[Node]:
    """Every node of a program, in the order in which they run."""
    for node in nodes:
        if isinstance(node, Node):
            yield node
        else:
            for branch in node.branches:
                yield from flatten(branch)
            yield node.merge


class Chain:
    """The elements as given, completed with the default decay and write, checked and named."""

    def __init__(
        self, elements: tuple[Any, ...], owner: str = "ChainOpt", storage: Storage | None = None
    ):
        self.elements = as_chain(elements, owner)
        self.storage = storage or Storage()
        self.hyper: dict[str, Hyper] = {}
        self._counts: Counter[str] = Counter()
        self._programs: dict[tuple[int, ...], Program] = {}
        self._nodes = self._bind(self.elements)
        self._tail = {
            "decay": self._bind_leaf(decoupled),
            "writer": self._bind_leaf(descend),
        }
        for number, picks in enumerate(self._all_picks(self._nodes)):
            if number == MOST_PROGRAMS:
                raise ValueError(
                    f"{owner}: the routes of the chain combine in over {MOST_PROGRAMS} ways, each of "
                    "which must be checked; put the rules of several into one route"
                )
            self._program(picks)
        self.storage.check(
            (n.state_key(name), name, declared)
            for program in self._programs.values()
            for n, name, declared in program.states
        )
        # bound in any case, so drop what no program uses
        used = {key for p in self._programs.values() for n in p.flat for key, _ in n.hyper.values()}
        self.hyper = {key: value for key, value in self.hyper.items() if key in used}
        self.rate = self._only_rate(owner)

    def __repr__(self) -> str:
        if len(self._programs) == 1:
            return repr(next(iter(self._programs.values())))
        return chain_repr(self.elements)

    def __reduce__(self) -> tuple:
        return Chain, (self.elements, "ChainOpt", self.storage)

    def __deepcopy__(self, memo: dict) -> "Chain":
        return self

    def _only_rate(self, owner: str) -> Node | None:
        """The element that decides on the learning rate, of which a chain can have one."""
        rates = [n for n in _every(self._nodes) if n.transform.kind == "rate"]
        if len(rates) > 1:
            names = " and ".join(n.key for n in rates)
            raise ValueError(f"{owner}: {names} both decide on the learning rate")
        for name in rates[0].transform.common if rates else ():
            if name in self.hyper or name in RESERVED or name in BOOKKEEPING:
                raise ValueError(
                    f"{rates[0].key} keeps {name!r} in the parameter group, where "
                    f"{self.hyper[name].owner if name in self.hyper else 'the optimizer'} has it too"
                )
        return rates[0] if rates else None

    @property
    def programs(self) -> tuple[Program, ...]:
        return tuple(self._programs.values())

    @property
    def total_keys(self) -> list[str]:
        """Keys of the elements that sum over all parameters, in the order of the chain."""
        nodes = _rate_first(tuple(_every(self._nodes)))
        return [n.key for n in flatten(nodes) if n.transform.over_all is not None]

    def program_for(self, name: str | None, param: Tensor) -> Program:
        """The program of one parameter; raises where no rule of a router matches it."""
        return self._program(tuple(_picks(self._nodes, name, param)))

    def _bind(self, elements: tuple[Element, ...]) -> tuple[Any, ...]:
        bound: list[Any] = []
        for element in elements:
            if isinstance(element, Within):
                (*first, enter), inner = self._bind((element.enter,)), self._bind(element.chain)
                bound += [*first, replace(enter, inner=tuple(_every(inner))), *inner]
                bound += self._bind((element.leave,))
            elif isinstance(element, Transform) and element.lead is not None:
                bound += self._bind_led(element)
            else:
                bound.append(self._bind_one(element))
        return tuple(bound)

    def _bind_one(self, element: Transform | Parallel | Route) -> Node | Fork | Switch:
        if isinstance(element, Transform):
            return self._bind_leaf(element)
        if isinstance(element, Parallel):
            branches = tuple(self._bind(branch) for branch in element.branches)
            return Fork(branches, self._bind_leaf(element.merge))
        rules = tuple((rule, self._bind(rule.chain)) for rule in element.rules)
        rest = None if element.otherwise is None else self._bind(element.otherwise)
        return Switch(rules, rest)

    def _bind_leaf(self, transform: Transform) -> Node:
        count = self._counts[transform.name]
        self._counts[transform.name] += 1
        key = f"{transform.name}.{count}" if count else transform.name
        if {key, *(f"{key}.{name}" for name in transform.all_states)} & {"step", "train_param"}:
            raise ValueError(
                f"a transform cannot be called {transform.name!r}: its state would be the optimizer's"
            )
        where = {name: self._name(transform, key, name) for name in transform.hyper}
        return Node(transform, key, where)

    def _bind_led(self, transform: Transform) -> tuple[Node, Node]:
        """A whole transform and the one before it: two nodes with one key and one set of names."""
        node = self._bind_leaf(transform)
        lead = transform.lead
        assert lead is not None
        hyper = {n: v for n, v in transform.hyper.items() if n in lead.defaults}
        options = {n: v for n, v in transform.options.items() if n in lead.defaults}
        where = {n: place for n, place in node.hyper.items() if n in hyper}
        return Node(replace(lead, hyper=hyper, options=options), node.key, where), node

    def _name(self, transform: Transform, key: str, name: str) -> tuple[str, int | None]:
        """Where the group keeps a hyper-parameter: `name`, or `key.name` where that is taken."""
        value, domain = transform.hyper[name], transform.domain(name)
        if isinstance(value, Shared):
            known = self.hyper.setdefault(value.name, Hyper(value.value, (), "shared"))
            if known.owner != "shared" or known.default != value.value:
                raise ValueError(
                    f"{key}: shared {value.name!r} is {value.value}, but the chain already has "
                    f"{value.name!r} = {known.default} ({known.owner})"
                )
            domains = (*known.domains, (value.index, domain))
            self.hyper[value.name] = Hyper(value.value, domains, "shared")
            return value.name, value.index
        taken = name in self.hyper or name in RESERVED or name in BOOKKEEPING
        place = f"{key}.{name}" if taken else name
        self.hyper[place] = Hyper(value, ((None, domain),), key)
        return place, None

    def _all_picks(self, nodes: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
        """Every combination of choices that the switches of the chain can make."""
        if not nodes:
            yield ()
            return
        for first in self._node_picks(nodes[0]):
            for rest in self._all_picks(nodes[1:]):
                yield first + rest

    def _node_picks(self, node: Any) -> Iterator[tuple[int, ...]]:
        if isinstance(node, Node):
            yield ()
        elif isinstance(node, Fork):
            yield from self._all_picks(tuple(n for branch in node.branches for n in branch))
        else:
            for index, branch in enumerate(_branches(node)):
                for rest in self._all_picks(branch):
                    yield (index, *rest)

    def _program(self, picks: tuple[int, ...]) -> Program:
        if picks not in self._programs:
            choices = iter(picks)
            nodes = self._complete(tuple(_resolve(self._nodes, choices)))
            check(nodes)
            self._programs[picks] = Program(nodes, self.storage)
        return self._programs[picks]

    def _complete(self, nodes: tuple[Node | Fork, ...]) -> tuple[Node | Fork, ...]:
        """Add the default decay and write; move observers behind the write, a rate to the front."""
        nodes = _rate_first(nodes)
        kinds = [_kind(node) for node in nodes]
        body = [n for n, kind in zip(nodes, kinds, strict=True) if kind != "observer"]
        observers = [n for n, kind in zip(nodes, kinds, strict=True) if kind == "observer"]
        if "writer" not in kinds:
            body.append(self._tail["writer"])
        # a chain that decays in another way has that way's `weight_decay`
        if not any("weight_decay" in n.hyper for n in flatten(nodes)):
            first = next(i for i, n in enumerate(body) if _kind(n) == "writer")
            body.insert(first, self._tail["decay"])
        return (*body, *observers)


# Every combination of what routers may pick is built and checked when the chain is.
MOST_PROGRAMS = 1024
# Names of the group that are the optimizer's own.
RESERVED = ("params", "param_names", "lr", "warmup_steps", "seed", "train_mode", "differentiable")
# Group entries that schedulers and trainers add; keys that begin with "_" are left alone too.
BOOKKEEPING = (
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
    "swa_lr",
)


def _rate_first(nodes: tuple[Node | Fork, ...]) -> tuple[Node | Fork, ...]:
    """Put a rate before everything whose state it rescales.

    It stays behind what must come first (a skipped step has no part in its sums) and behind what
    replaces the gradient that it looks at. What replaces it in some of the steps alone comes first
    wherever it is written, unless moments stand before it: they would miss changes of their unit.
    """
    place = next((i for i, n in enumerate(nodes) if _kind(n) == "rate"), None)
    if place is None:
        return nodes
    start = 0
    for i, node in enumerate(nodes[:place]):
        if isinstance(node, Node):
            t = node.transform
            start = i + 1 if t.before_state or "grad" in t.provides else start
    rest = (*nodes[:place], *nodes[place + 1 :])
    for i in range(start, len(rest)):
        if any(_has_unit(n) for n in flatten(rest[i : i + 1])):
            break
        node = rest[i]
        if isinstance(node, Node) and {"grad", "gate"} <= set(node.transform.provides):
            start = i + 1
    return (*rest[:start], nodes[place], *rest[start:])


def _has_unit(node: Node) -> bool:
    """Whether a node keeps something in the unit of the gradient."""
    kept = node.transform.all_states.values()
    return node.transform.whole or any(s.holds in ("moment", "square") for s in kept)


def _kind(node: Node | Fork) -> str:
    return node.transform.kind if isinstance(node, Node) else "transform"


def _every(nodes: tuple[Any, ...]) -> Iterator[Node]:
    """The nodes of all branches, in the order in which a program that had them would run them."""
    for node in nodes:
        if isinstance(node, Node):
            yield node
        elif isinstance(node, Fork):
            for branch in node.branches:
                yield from _every(branch)
            yield node.merge
        else:
            for branch in _branches(node):
                yield from _every(branch)


def _branches(switch: Switch) -> list[tuple[Any, ...]]:
    rest = [] if switch.otherwise is None else [switch.otherwise]
    return [branch for _, branch in switch.rules] + rest


def _picks(nodes: tuple[Any, ...], name: str | None, param: Tensor) -> Iterator[int]:
    """The choices that the switches make for one parameter, in the order of the chain."""
    for node in nodes:
        if isinstance(node, Fork):
            for branch in node.branches:
                yield from _picks(branch, name, param)
        elif isinstance(node, Switch):
            matching = (i for i, (rule, _) in enumerate(node.rules) if rule.matches(name, param))
            pick = next(matching, len(node.rules))
            if pick == len(node.rules) and node.otherwise is None:
                label = "a parameter" if name is None else repr(name)
                rules = ", ".join(repr(rule) for rule, _ in node.rules)
                raise ValueError(
                    f"route: no rule matches {label} of shape {tuple(param.shape)} (rules: {rules}); "
                    "add a rule, or otherwise=..."
                )
            yield pick
            yield from _picks(_branches(node)[pick], name, param)


def _resolve(nodes: tuple[Any, ...], picks: Iterator[int]) -> Iterator[Node | Fork]:
    """The nodes with every switch replaced by the branch that was picked."""
    for node in nodes:
        if isinstance(node, Switch):
            yield from _resolve(_branches(node)[next(picks)], picks)
        elif isinstance(node, Fork):
            yield Fork(tuple(tuple(_resolve(b, picks)) for b in node.branches), node.merge)
        else:
            yield node


def check(nodes: tuple[Node | Fork, ...]) -> None:
    """Refuse a program that cannot be right, with the reason."""
    _check_order(nodes)
    averages = [n.key for n in flatten(nodes) if n.transform.evaluate is not None]
    if len(averages) > 1:
        raise ValueError(
            f"{' and '.join(averages)}: only one can decide which weights are evaluated"
        )
    common = {name for n in flatten(nodes) for name in n.transform.common}
    _check_path((), nodes, set(CONTEXT) | common)


def _check_order(nodes: tuple[Node | Fork, ...]) -> None:
    writer = decay = None
    stateful: str | None = None
    for node in nodes:
        for inner in [] if isinstance(node, Node) else flatten((node,)):
            if inner.transform.kind != "transform":
                raise ValueError(
                    f"{inner.key} is a {inner.transform.kind}: it cannot stand inside "
                    f"{node.merge.key}, only in the chain itself"  # type: ignore[union-attr]
                )
        leaf = node if isinstance(node, Node) else node.merge
        kind = _kind(node)
        if kind == "writer" and writer:
            raise ValueError(f"two writers: {writer} and {leaf.key}; a chain writes once")
        if writer and kind != "observer":
            raise ValueError(f"{leaf.key} stands after the writer {writer}, which must be last")
        has_state = any(n.transform.states for n in flatten((node,)))
        if decay and kind == "transform" and has_state:
            raise ValueError(
                f"{leaf.key} stands after the decay {decay} and would average it; put {decay} right "
                "before the write, or use `coupled` for decay as part of the gradient"
            )
        if leaf.transform.before_state and stateful:
            raise ValueError(f"{leaf.key} stands after {stateful}: {leaf.transform.before_state}")
        writer = leaf.key if kind == "writer" else writer
        decay = leaf.key if kind == "decay" else decay
        stateful = leaf.key if has_state else stateful


def _check_path(
    before: tuple[Node, ...], nodes: tuple[Node | Fork, ...], context: set[str]
) -> tuple[Node, ...]:
    """Check what each node asks for and excludes, given the nodes that ran before it."""
    path = before
    for node in nodes:
        if isinstance(node, Fork):
            ends = [_check_path(path, branch, set(context)) for branch in node.branches]
            inner = [n for end in ends for n in end[len(path) :]]
            for n in inner:
                for name in {"lr", "decayed"} & set(n.transform.provides):
                    raise ValueError(
                        f"{n.key} decides on {name!r} for all that follows, so it cannot stand in one "
                        f"branch of {node.merge.key}"
                    )
            path = (*path, *inner, node.merge)
            continue
        t = node.transform
        known = context | ({"total"} if t.over_all and not t.finish else set())
        opaque = {name for other in path for name in other.transform.opaque}
        known = known | set(WHOLE_CONTEXT) if t.whole else known - opaque
        for name in t.context:
            if name not in known:
                raise ValueError(
                    f"{node.key} asks for {name!r}, which nothing before it provides; "
                    f"there is {', '.join(sorted(known))}"
                )
        for other in path:
            reason = t.excludes.get(other.transform.name) or other.transform.excludes.get(t.name)
            if reason:
                raise ValueError(f"{other.key} and {node.key} exclude each other: {reason}")
        context.update(t.provides, t.opaque)
        path = (*path, node)
    if not before:
        _check_modifiers(path)
    return path


def _check_modifiers(path: tuple[Node, ...]) -> None:
    for position, node in enumerate(path):
        asked = {n for later in path[position + 1 :] for n in _asks(later.transform)}
        if node.transform.modifier and not asked & set(node.transform.provides):
            raise ValueError(
                f"{node.key} has no effect: nothing behind it asks for "
                f"{', '.join(node.transform.provides)}"
            )


def _asks(transform: Transform) -> tuple[str, ...]:
    return transform.context + transform.optional
