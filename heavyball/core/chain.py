"""A chain that has been checked: its elements have keys, its hyper-parameters names in the group."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from heavyball.core.check import check, excluded
from heavyball.core.combine import Element, Parallel, Route, When, Within, as_chain, chain_repr
from heavyball.core.hyper import (
    Hyper,
    LargestLr,
    Shared,
    check_live,
    is_real,
    is_sequence,
    nonnegative,
)
from heavyball.core.loss import KEY, with_loss_gate
from heavyball.core.program import (
    Fork,
    Node,
    Program,
    RateNode,
    Switch,
    WholeNode,
    flatten,
    kind_of,
)
from heavyball.core.rate import Rate
from heavyball.core.reshape import is_reshaping, reshaped
from heavyball.core.route import branches_of, every_node, picks_of, reasons_of, resolved
from heavyball.core.schedule import (
    COUNT,
    LR,
    ROUNDING,
    SCHEDULED_LR,
    SCHEDULES,
    Followed,
    Scheduled,
    corners,
    is_scheduled,
    told,
    value_at,
)
from heavyball.core.transform import DEFAULTS, FED, Rules, Transform, transform
from heavyball.core.unit import with_units
from heavyball.core.whole import Whole
from heavyball.errors import nearest
from heavyball.state.formats import Storage


class Chain:
    """The elements as given, completed with the default decay and write, checked and named."""

    def __init__(
        self,
        elements: tuple[Any, ...],
        owner: str = "ChainOpt",
        storage: Storage | None = None,
        around: tuple[Transform, ...] = (),
    ):
        given = elements if is_sequence(elements) else (elements,)
        # what numbers of the groups follow, and what happens to the gradient
        self.followed = tuple(e for e in given if isinstance(e, Followed))
        self.elements = as_chain(tuple(e for e in given if not isinstance(e, Followed)), owner)
        self.storage = storage or Storage()
        self.hyper: dict[str, Hyper] = {}
        self._counts: Counter[str] = Counter()
        self._programs: dict[tuple[int, ...], Program] = {}
        self._parts = [(element, self._bind((element,))) for element in self.elements]
        self._nodes = tuple(node for _, nodes in self._parts for node in nodes)
        self._tail = {kind: self._bind_leaf(DEFAULTS[kind]) for kind in ("decay", "writer")}
        # what is put before the first element and behind the write, and changes nothing
        self.around = around
        self._watchers = tuple(map(self._bind_leaf, around))
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
        self.schedules = self._schedules(owner)

    def __repr__(self) -> str:
        return " | ".join([*map(repr, self.followed), chain_repr(self.completed)])

    @property
    def given(self) -> tuple[Any, ...]:
        """The elements that it was made of."""
        return (*self.followed, *self.elements)

    @property
    def completed(self) -> tuple[Element, ...]:
        """The elements in the order in which they run, the default decay and write among them.

        As given where parameters have different programs, which are completed one by one.
        """
        if len(self._programs) > 1:
            return self.elements
        (program,) = self._programs.values()
        tail = [(node.transform, (node,)) for node in self._tail.values()]
        first = {_mark(nodes[0]): element for element, nodes in [*self._parts, *tail] if nodes}
        marks = dict.fromkeys(map(_mark, program.nodes))  # one for a whole transform and its lead
        return tuple(first[mark] for mark in marks if mark in first)

    def __reduce__(self) -> tuple:
        return Chain, (self.given, "ChainOpt", self.storage, self.around)

    def __deepcopy__(self, memo: dict) -> "Chain":
        return self

    def _only_rate(self, owner: str) -> RateNode | None:
        """The element that decides on the learning rate, of which a chain can have one."""
        rates = [n for n in every_node(self._nodes) if isinstance(n, RateNode)]
        if len(rates) > 1:
            names = " and ".join(n.key for n in rates)
            raise ValueError(f"{owner}: {names} both decide on the learning rate")
        for name in rates[0].transform.numbers if rates else ():
            if name in self.hyper or name in RESERVED or name in BOOKKEEPING:
                raise ValueError(
                    f"{rates[0].key} keeps {name!r} in the parameter group, where "
                    f"{self.hyper[name].owner if name in self.hyper else 'the optimizer'} has it too"
                )
        return rates[0] if rates else None

    def _schedules(self, owner: str) -> dict[str, Scheduled]:
        """The schedules by the names of the numbers that follow them.

        Errors: ValueError for what is no live number, or follows two schedules.
        """
        found = {key: h.given for key, h in self.hyper.items() if is_scheduled(h.given)}
        for element in self.followed:
            name = element.name
            if name in found:
                raise ValueError(f"{owner}: {element!r}, but {name} follows {told(found[name])}")
            found[name] = element.fn
        for name, fn in found.items():
            self.check_schedule(name, fn, owner)
        return found

    def check_schedule(self, name: str, fn: Scheduled, owner: str) -> Any:
        """The first value that a schedule gives to a number of a group.

        Errors: ValueError for what is no live number; TypeError or ValueError for a value that it cannot
            have, of those that are known.
        """
        said = f"{owner}: schedule({name!r}, {told(fn)})"
        if reason := self._unscheduled(name):
            raise ValueError(f"{said}: {reason}")
        for n in corners(fn):
            value = value_at(fn, n)
            try:
                self.check_scheduled_value(name, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{said}: {error}, in step {n}") from None
        return value_at(fn, 1)

    def check_scheduled_value(self, name: str, value: Any) -> Any:
        """What a schedule gives to a number in a step, as floats; of `lr` the factor.

        Errors: TypeError or ValueError naming the number and a value that it cannot have.
        """
        if name != LR:
            return self.hyper[name].check(name, value)
        if is_real(value) and -ROUNDING <= value < 0:
            return 0.0
        return check_live("the factor of lr", value, 0.0, nonnegative)

    def _unscheduled(self, name: str) -> str | None:
        """Why a number cannot follow a schedule, if it cannot."""
        if name == "warmup_steps":
            return "warmup_steps is a number of steps; a warm-up may be part of the schedule of lr"
        begins = self.rate.transform.numbers.items() if self.rate else ()
        for number, start in begins:
            if name in (start, number):
                return f"{self.rate.key} estimates {number} during training"  # type: ignore[union-attr]
        if name == LR or name in self.hyper:
            return None
        for node in every_node(self._nodes):
            if name in node.transform.options:
                return f"{name!r} of {node.key} is fixed when the chain is built"
        return f"no live number has this name; {nearest(name, (LR, *self.hyper))}"

    @functools.cached_property
    def largest_lr_keys(self) -> frozenset[str]:
        """Entries of a group that stand for the largest rate of its schedule while they are 0."""
        nodes = (node for program in self.programs for node in program.flat)
        found = (
            (n.transform.rules.domains.get(name), n.hyper[name]) for n in nodes for name in n.hyper
        )
        return frozenset(key for domain, (key, _) in found if isinstance(domain, LargestLr))

    @functools.cached_property
    def measures(self) -> bool:
        """Whether some element keeps numbers of the last step, for `ChainOpt.metrics`."""
        return any(s.passing for program in self.programs for _, _, s in program.states)

    @property
    def reads_loss(self) -> bool:
        """Whether an element asks for the loss of a step."""
        return any(n.transform.reads_loss for n in every_node(self._nodes))

    @property
    def perturbs(self) -> bool:
        """Whether a step takes a second gradient, at perturbed weights."""
        return any(n.transform.perturb for program in self.programs for n in program.flat)

    @property
    def signals(self) -> dict[str, bool]:
        """The names under which `feed` gives something before a step, and whether it must."""
        found: dict[str, bool] = {}
        for t in (n.transform for program in self.programs for n in program.flat):
            if t.signal is not None:
                found[t.signal] = found.get(t.signal, False) or FED in t.context
        return found

    @property
    def programs(self) -> tuple[Program, ...]:
        return tuple(self._programs.values())

    @property
    def total_keys(self) -> list[str]:
        """Keys of the elements that sum over all parameters, in the order of the chain."""
        nodes = _rate_first(tuple(every_node(self._nodes)))
        return [n.key for n in flatten(nodes) if n.transform.over_all is not None]

    def program_for(self, name: str | None, param: Tensor) -> Program:
        """The program of one parameter; raises where no rule of a router matches it."""
        return self._program(tuple(picks_of(self._nodes, name, param)))

    def reasons_for(self, program: Program, name: str | None, param: Tensor) -> list[str]:
        """Why a parameter has its program: what has decided in each router."""
        picks = next(picks for picks, made in self._programs.items() if made is program)
        return list(reasons_of(self._nodes, iter(picks), name, param))

    def _bind(self, elements: tuple[Element, ...]) -> tuple[Any, ...]:
        bound: list[Any] = []
        for element in elements:
            if isinstance(element, Within) and is_reshaping(element):
                bound += self._bind_transform(reshaped(element))
            elif isinstance(element, Within):
                (*first, enter), inner = self._bind((element.enter,)), self._bind(element.chain)
                bound += [*first, _changed(enter, inner=tuple(every_node(inner))), *inner]
                bound += self._bind((element.leave,))
            elif isinstance(element, Transform):
                bound += self._bind_transform(element)
            else:
                bound.append(self._bind_one(element))
        return tuple(bound)

    def _bind_transform(self, element: Transform) -> tuple[Any, ...]:
        """A node, with those that run before and after it as part of it."""
        other = element.instead and element.instead(element.options)
        if other:
            names = ("name", "hyper", "options", "given")
            element = replace(other, **{n: getattr(element, n) for n in names})
        if not isinstance(element, Whole):
            return (_by_name(self._bind_leaf(element)),)
        lead: tuple[Node, ...] = ()
        if element.lead is not None:
            *before, node = self._bind_led(element, element.lead)
            lead = tuple(before)
        else:
            node = self._bind_leaf(element)
        if element.kind != "writer":
            return (*lead, _by_name(node))
        # what is written is made by plain torch, and the write itself by the kernel behind it
        made = _by_name(replace(node, transform=replace(element, kind="transform")))
        return (*lead, made, Node(_written(element.rules), node.key, {}))

    def _bind_one(self, element: Parallel | Route) -> Fork | Switch:
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
        if {key, *(f"{key}.{name}" for name in transform.all_states)} & {
            "step",
            "train_param",
            KEY,
        }:
            raise ValueError(
                f"a transform cannot be called {transform.name!r}: its state would be the optimizer's"
            )
        where = {name: self._name(transform, key, name) for name in transform.hyper}
        if isinstance(transform, Whole):
            return WholeNode(transform, key, where)
        if isinstance(transform, Rate):
            return RateNode(transform, key, where)
        return Node(transform, key, where)

    def _bind_led(self, transform: Whole, lead: Transform) -> tuple[Node, Node]:
        """A whole transform and the one before it: two nodes with one key and one set of names."""
        node = self._bind_leaf(transform)
        hyper = {n: v for n, v in transform.hyper.items() if n in lead.defaults}
        options = {n: v for n, v in transform.options.items() if n in lead.defaults}
        where = {n: place for n, place in node.hyper.items() if n in hyper}
        return Node(replace(lead, hyper=hyper, options=options), node.key, where), node

    def _name(self, transform: Transform, key: str, name: str) -> tuple[str, int | None]:
        """The group entry of a hyper-parameter: `name`, or `key.name` if that is taken."""
        value, domain = transform.hyper[name], transform.domain(name)
        if isinstance(value, Shared):
            first = Hyper(value_at(value.value, 1), (), "shared", value.value)
            known = self.hyper.setdefault(value.name, first)
            if known.owner != "shared" or known.given != value.value:
                raise ValueError(
                    f"{key}: shared {value.name!r} is {value.value}, but the chain already has "
                    f"{value.name!r} = {known.given} ({known.owner})"
                )
            domains = (*known.domains, (value.index, domain))
            self.hyper[value.name] = replace(known, domains=domains)
            return value.name, value.index
        taken = name in self.hyper or name in RESERVED or name in BOOKKEEPING
        place = f"{key}.{name}" if taken else name
        self.hyper[place] = Hyper(value_at(value, 1), ((None, domain),), key, value)
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
            for index, branch in enumerate(branches_of(node)):
                for rest in self._all_picks(branch):
                    yield (index, *rest)

    def _program(self, picks: tuple[int, ...]) -> Program:
        if picks not in self._programs:
            choices = iter(picks)
            nodes = self._complete(tuple(resolved(self._nodes, choices)))
            check(nodes)
            nodes = with_units(nodes)
            if self.reads_loss:  # a step is left out for all parameters, whatever runs for each
                nodes = with_loss_gate(nodes)
            self._programs[picks] = Program(nodes, self.storage, self._watchers)
        return self._programs[picks]

    def _complete(self, nodes: tuple[Node | Fork, ...]) -> tuple[Node | Fork, ...]:
        """Add the default decay and write; move observers after the write, and a rate to the front."""
        nodes = _rate_first(nodes)
        kinds = [kind_of(node) for node in nodes]
        body = [n for n, kind in zip(nodes, kinds, strict=True) if kind != "observer"]
        observers = [n for n, kind in zip(nodes, kinds, strict=True) if kind == "observer"]
        if "writer" not in kinds:
            behind = [n for n in body if kind_of(n) == "post"]
            body = [*(n for n in body if kind_of(n) != "post"), self._tail["writer"], *behind]
        # a chain that decays in another way has that way's coefficient
        decay = self._tail["decay"]
        if not any(
            decay.hyper.keys() & n.hyper.keys() or _refuses(n, decay) for n in flatten(nodes)
        ):
            first = next(i for i, n in enumerate(body) if kind_of(n) == "writer")
            body.insert(first, decay)
        ahead = [n for n in self._watchers if kind_of(n) != "observer"]
        behind = [n for n in self._watchers if kind_of(n) == "observer"]
        return (*ahead, *body, *observers, *behind)


def _mark(node: Node | Fork | Switch) -> Any:
    """The identity of a node across programs, for which nodes are recreated."""
    if isinstance(node, Switch):
        return node
    return (node.merge if isinstance(node, Fork) else node).key


@transform(kind="writer")
def written(update: Tensor) -> Tensor:
    """The parameter that a transform of whole tensors has made."""
    return update


def _written(rules: Rules) -> Transform:
    """The write of a transform of whole tensors."""
    return replace(written, rules=replace(written.rules, excludes=rules.excludes))


def _by_name(node: Node) -> Node | Switch:
    """A node of which an option depends on the parameter's name becomes one node for each value."""
    options = node.transform.options
    name = next((n for n, value in options.items() if isinstance(value, Mapping)), None)
    if name is None:
        return node

    def chosen(value: Any) -> Node:
        return replace(node, transform=replace(node.transform, options={**options, name: value}))

    rules = tuple(
        (When((node.transform,), name=pattern), (_by_name(chosen(value)),))
        for pattern, value in options[name].items()
    )
    default = node.transform.defaults[name]
    return Switch(rules, (_by_name(chosen(default)),))


def _changed(node: Any, **changes: Any) -> Any:
    """A node, or every node of a switch, with other fields."""
    if isinstance(node, Node):
        return replace(node, **changes)
    rules = tuple(
        (rule, tuple(_changed(n, **changes) for n in nodes)) for rule, nodes in node.rules
    )
    return Switch(rules, tuple(_changed(n, **changes) for n in node.otherwise))


# Every combination of what routers may pick is built and checked when the chain is.
MOST_PROGRAMS = 1024
# Names of the group that are the optimizer's own.
RESERVED = (
    "params",
    "param_names",
    "lr",
    "warmup_steps",
    "seed",
    "train_mode",
    "differentiable",
    SCHEDULES,
    COUNT,
    SCHEDULED_LR,
)
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
    place = next((i for i, n in enumerate(nodes) if kind_of(n) == "rate"), None)
    if place is None:
        return nodes
    start = 0
    for i, node in enumerate(nodes[:place]):
        if isinstance(node, Node):
            t = node.transform
            start = i + 1 if t.rules.before_state or "grad" in t.provides else start
    rest = (*nodes[:place], *nodes[place + 1 :])
    for i in range(start, len(rest)):
        if any(_has_unit(n) for n in flatten(rest[i : i + 1])):
            break
        node = rest[i]
        if isinstance(node, Node) and {"grad", "gate"} <= set(node.transform.provides):
            start = i + 1
    return (*rest[:start], nodes[place], *rest[start:])


def _refuses(node: Node, other: Node) -> bool:
    return excluded(node.transform, other.transform) is not None


def _has_unit(node: Node) -> bool:
    """Whether a node keeps something in the unit of the gradient."""
    kept = node.transform.all_states.values()
    return isinstance(node, WholeNode) or any(s.holds in ("moment", "square") for s in kept)
