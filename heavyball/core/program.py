"""A program: what runs for one parameter, transforms at their places in order."""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from heavyball.core.combine import Parallel, When
from heavyball.core.hyper import by_name
from heavyball.core.rate import Rate
from heavyball.core.transform import Transform
from heavyball.core.whole import Whole
from heavyball.state.declare import Holds
from heavyball.state.formats import Storage
from heavyball.state.held import COMPANIONS

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
class WholeNode(Node):
    """A transform of whole tensors at its place."""

    transform: Whole


@dataclass(frozen=True, eq=False)
class RateNode(Node):
    """What decides on the learning rate, at its place."""

    transform: Rate


@dataclass(frozen=True, eq=False)
class HiddenNode(Node):
    """A node that is not an element of the chain: a gate, or the unit of moments after one."""


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


class Program:
    """What runs for one parameter: nodes and forks, no switches left, ending in the write."""

    def __init__(
        self,
        nodes: tuple[Node | Fork, ...],
        storage: Storage | None = None,
        watchers: tuple[Node, ...] = (),
    ):
        self.nodes = nodes
        self._watchers = watchers  # which print-outs leave out
        self.storage = storage or Storage()
        self.flat = tuple(flatten(nodes))
        self.total_keys = tuple(n.key for n in self.flat if n.transform.over_all is not None)
        self.has_whole = any(isinstance(n, WholeNode) for n in self.flat)
        self.has_post = any(n.transform.kind == "post" for n in self.flat)
        self.has_noise = any(n.transform.asks_for("noise") for n in self.flat)
        self.evaluators = tuple(n for n in self.flat if n.transform.evaluate is not None)
        self.rate = next((n for n in self.flat if isinstance(n, RateNode)), None)
        # the numbers of the group that it makes
        self.common = frozenset(self.rate.transform.numbers) if self.rate else frozenset()
        # what nodes make of their state for others, of those names that somebody asks for
        asked = set[str]().union(*(n.transform.asked for n in self.flat))
        self.offers = {name: n for n in self.flat for name in n.transform.offers if name in asked}
        # what moments are multiplied by, and hyper-parameters in their unit
        self.moment_change = self.rate.transform.moment_change if self.rate else ""
        self.hyper_change = self.rate.transform.hyper_change if self.rate else {}
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
            if s.needed_by in n.transform.hyper or s.until is not None or s.passing
            for part in ("", *COMPANIONS)
        }
        # numbers of the last step, of which nothing is made
        self.passing = frozenset(n.state_key(k) for n, k, s in self.states if s.passing)
        # state of one number, which is float64
        self.numbers = ("step", *(n.state_key(k) for n, k, s in self.states if s.is_number))
        # the shape and dtype of each state, by shape and dtype of the parameter, see `optim/checks.py`
        self.expected: dict[Any, dict[str, Any]] = {}
        # the shape of the values of a state, by key, shape and dtype of the parameter
        self.shapes: dict[Any, torch.Size] = {}
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
        """Whether it contains no user code, so that it may outlive its optimizers."""
        return _is_library(tuple(node.transform for node in self.flat), set())

    def __repr__(self) -> str:
        hidden = {node.key for node in self._watchers}
        shown = [n for n in visible(self.nodes) if not (isinstance(n, Node) and n.key in hidden)]
        return by_name(" | ".join(map(_shown, shown)))


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
    declared = (t.kind, states, t.provides, tuple(t.hyper))
    if isinstance(t, Rate):
        numbers = (tuple(t.numbers), tuple(t.past.items()), tuple(t.hyper_change.items()))
        declared = (*declared, *numbers, t.gives, t.moment_change)  # type: ignore[assignment]
    inner = tuple(n.key for n in node.inner)
    offers = tuple(sorted(t.offers.items()))
    return (
        t.update,
        t.over_all,
        offers,
        options,
        declared,
        node.key,
        tuple(node.hyper.items()),
        inner,
    )


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
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))
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
    """Leaves out what runs before or behind a transform of whole tensors and prints as part of it, and
    hidden nodes."""
    nodes = tuple(n for n in nodes if not isinstance(n, HiddenNode))
    whole = {n.key for n in nodes if isinstance(n, WholeNode)}
    return [
        n
        for n in nodes
        if not isinstance(n, Node) or isinstance(n, WholeNode) or n.key not in whole
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


def kind_of(node: Node | Fork) -> str:
    return node.transform.kind if isinstance(node, Node) else "transform"
