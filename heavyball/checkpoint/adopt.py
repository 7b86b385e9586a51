"""Loads state saved by other optimizers."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.checkpoint.meanings import Record, entry, given_to
from heavyball.checkpoint.sources import SOURCES, Source, source_of
from heavyball.core.chain import BOOKKEEPING
from heavyball.core.combine import plain_names
from heavyball.core.program import Node, Program, WholeNode
from heavyball.numerics import lasting
from heavyball.optim.checkpoint import DESCRIPTION, SAVED_WEIGHTS, description, expected_state
from heavyball.optim.optimizer import ChainOpt
from heavyball.optim.validation import check_form
from heavyball.runtime.place import Place
from heavyball.runtime.state import add_missing_state


@dataclass(frozen=True)
class AdoptionReport:
    """The result of `adopt`, as `<parameter>.<name>` and `param_groups.<number>.<name>`.

    source: the optimizer that wrote the state dict. matching: whether the chain continues as that
        optimizer would.
    taken: saved entries that are used; invented: state that was not saved and is initialized;
        left: saved entries that are ignored.
    """

    source: str
    matching: bool
    taken: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        way = "goes on as it would" if self.matching else "begins what does not fit"
        lines = [f"{self.source}: the chain {way}"]
        for name in ("taken", "invented", "left"):
            entries = getattr(self, name)
            lines.append(f"  {name}: {', '.join(entries) or 'nothing'}")
        return "\n".join(lines)


def adopt(opt: ChainOpt, state_dict: Mapping[str, Any]) -> AdoptionReport:
    """Load the state dict of another optimizer.

    If the chain implements the same method, everything is loaded, hyper-parameters included, and it
    continues as the original would. Otherwise, moments are loaded by their meaning (Adam's first
    moment becomes Muon's momentum), other state is initialized, and hyper-parameters do not change.

    Load the model's weights first: a schedule-free dict that was saved in evaluation mode leaves the
    optimizer in that mode, and the training weights are computed from the parameters.

    state_dict: of torch.optim (SGD, Adam, AdamW, NAdam, RMSprop, Adagrad, Adafactor, Muon), schedulefree
        1.4.1, prodigyopt, prodigy-plus-schedule-free 1.9.0 or the PyPI package heavyball 3.2.1 (AdamW,
        SFAdamW, SOAP, PSGDKron, Muon). Parameters are matched by name if both sides have names, else by
        position.

    Errors: ValueError for anything that is not a state dict of one of these, has other parameters, or
        contains impossible values. Nothing is changed.
    """
    if not isinstance(opt, ChainOpt):
        raise TypeError(f"adopt: expected an optimizer of heavyball, got {type(opt).__name__}")
    saved = _plain(state_dict)
    check_form(saved)
    source = source_of(saved["param_groups"])
    if source is None:
        known = ", ".join(sorted({each.named for each in SOURCES}))
        raise ValueError(f"adopt: the state dict is not of a known optimizer: {known}")
    with _named(source):
        found = list(_found(opt, saved, source))
        matching = all(each.matches(source) for each in found) and bool(found)
        # a group takes one group's numbers
        mixed = [
            _mixed([e for e in found if e.place.index == i]) for i in range(len(opt.param_groups))
        ]
        matching = matching and not any(mixed)
        report = AdoptionReport(source.named, matching)
        groups = _groups(opt, found, source, report)
        evaluating = "train_mode" in opt.defaults and any(
            source.evaluates(each.group) for each in found if each.group
        )
    states: dict[int, dict[str, Any]] = {}
    for each in found:
        group = {**opt.defaults, **groups[each.place.index]}
        state = each.state(group, evaluating, report)
        if state:
            states[each.place.number] = state
    for group in groups:
        if "train_mode" in opt.defaults:
            group["train_mode"] = not evaluating
    loading = {"state": states, "param_groups": groups, DESCRIPTION: description(opt.chain)}
    opt.load_state_dict(loading)
    return report


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Report errors as a state dict that is not as its optimizer writes it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if str(error).startswith("adopt: "):
            raise
        raise ValueError(
            f"adopt: the state dict is not as {source.named} writes it: {error!r}"
        ) from error


def _plain(state_dict: Any) -> Any:
    """A state dict without what the PyPI package heavyball nests and adds.

    Errors: ValueError for one of this library.
    """
    if not isinstance(state_dict, Mapping):
        return state_dict
    described = state_dict.get(DESCRIPTION)
    if isinstance(described, Mapping) and "chain" in described:
        raise ValueError("adopt: the state dict is of this library: use load_state_dict")
    saved = {key: value for key, value in state_dict.items() if key != DESCRIPTION}
    states = saved.get("state")
    if isinstance(states, Mapping):
        saved["state"] = {number: _flat(state) for number, state in states.items()}
    return saved


def _flat(state: Any) -> Any:
    if not isinstance(state, Mapping) or not state or not all(isinstance(k, int) for k in state):
        return state
    if len(state) > 1:
        raise ValueError("adopt: a parameter was saved in several parts, which is not supported")
    return next(iter(state.values()))


# ---- which parameter is which


@dataclass(eq=False)
class _Found:
    """A parameter, its saved state, and the part of it that its program takes."""

    place: Place
    program: Program
    group: Mapping[str, Any]
    number: int
    record: Record
    given: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.place.name or str(self.place.number)

    def matches(self, source: Source) -> bool:
        """Whether the program goes on as the source would."""
        if not self.group:
            return True
        names = {node.transform.name for node in self.program.flat}
        needs = source.needs(self.group)
        if not all(names & set(several) for several in needs):
            return False
        if not needs and any(n for n, *_ in self.program.states if n.transform.kind == "transform"):
            lazy = self.program.lazy_keys
            if any(n.state_key(name) not in lazy for n, name, _ in self.program.states):
                return False
        if any(
            _has(self.program, what) != bool(self.group.get(flag))
            for flag, what in source.flags.items()
        ):
            return False
        known = source.known(self.group)
        if known is not None and _has_others(self.program, known):
            return False
        hyper = source.hyper(self.group)
        if any(_differs(node, hyper.get(node.transform.name, {})) for node in self.program.flat):
            return False
        if entry(self.group, "weight_decay", 0.0) and source.decay(self.group) not in names:
            return False
        return not set(self.record.keys) - self.used - _COUNTS

    def state(
        self, group: Mapping[str, Any], evaluating: bool, report: AdoptionReport
    ) -> dict[str, Any]:
        """The parameter's state here; records its sources in the report."""
        unused = [key for key in self.record.keys if key not in self.used | _COUNTS]
        report.left.extend(f"{self.name}.{key}" for key in (*unused, *self.record.aside))
        if not self.given and self.record.count is None:
            return {}
        param = self.place.param
        expected = expected_state(self.program, param, group, all_lazy=True)
        wanted = expected_state(self.program, param, group)
        made: dict[str, Any] = {}
        for key, value in _pieces(self.given, expected).items():
            if key in wanted:
                made[key] = _shaped(value, expected[key])
        with lasting():
            step = float(self.record.count or 1)
            made["step"] = torch.tensor(step, dtype=torch.float64, device=param.device)
            report.taken.extend(f"{self.name}.{key}" for key in sorted(self.used))
            missing = [key for key in wanted if key not in made and ":" not in key]
            report.invented.extend(f"{self.name}.{key}" for key in missing)
            add_missing_state(self.program, param.detach(), group, made)
            if evaluating and self.program.evaluators:
                trained = self.record.trained
                made[SAVED_WEIGHTS] = (
                    (param if trained is None else trained(param)).detach().clone()
                )
        return made


# Counts, and what says how a state is kept; they are read, and are not states.
_COUNTS = frozenset({"step", "muon", "is_initialized"})


def _has(program: Program, what: str) -> bool:
    return any(
        node.transform.name == what or node.transform.options.get(what) is True
        for node in program.flat
    )


# Writers that add nothing, and what only looks.
_PASSING = {"descend", "probe", "flight_recorder"}


def _has_others(program: Program, known: set[str]) -> bool:
    """Whether something makes other steps than a chain of these transforms and a decay.

    What only changes gradients before them is what a user does outside of other optimizers.
    """
    inside = False
    for node in program.flat:
        t = node.transform
        inside |= t.name in known
        own = t.kind in ("rate", "writer", "post") or isinstance(node, WholeNode)
        if t.name not in known | _PASSING and (own or (inside and t.kind == "transform")):
            return True
    return False


def _differs(node: Node, values: Mapping[str, Any]) -> bool:
    """Whether an option of a transform, or a number that it cannot be given, is another one."""
    options = node.transform.options
    return any(
        value is None
        if name in node.hyper
        else name in options and value not in (None, options[name])
        for name, value in values.items()
    )


def _pieces(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States of several tensors by the keys of each; means of rows and columns as they are here."""
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        if isinstance(value, tuple):
            found.update({f"{key}.{i}": v for i, v in enumerate(value) if v is not None})
        else:
            found[key] = value
    for key in [key for key in found if key.endswith(".row")]:
        other = f"{key.removesuffix('row')}col"
        shape = expected[key].shape if key in expected else None
        if found[key].shape != shape and other in found and found[other].shape == shape:
            found[key], found[other] = found[other], found[key]
    return {key: value for key, value in found.items() if key in expected}


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    value = value.detach()
    return value.reshape(like.shape) if value.numel() == like.numel() else value


def _found(opt: ChainOpt, saved: Mapping[str, Any], source: Source) -> Iterator[_Found]:
    places, programs = list(opt.registry.places()), opt.registry.programs()
    listed = [
        (number, group, name)
        for group in saved["param_groups"]
        for number, name in zip(group["params"], _names(group), strict=True)
    ]
    if len(listed) != len(places):
        raise ValueError(
            f"adopt: {len(listed)} parameters were saved, this optimizer has {len(places)}"
        )
    theirs, own = [name for *_, name in listed], [place.name for place in places]
    if None not in theirs and None not in own:
        by_name = dict(zip(plain_names(theirs), listed, strict=True))
        lacking = [name for name in plain_names(own) if name not in by_name]  # type: ignore[arg-type]
        if lacking:
            raise ValueError(f"adopt: nothing was saved for the parameter {lacking[0]!r}")
        listed = [by_name[name] for name in plain_names(own)]  # type: ignore[arg-type]
    for place, (number, group, _) in zip(places, listed, strict=True):
        state = saved["state"].get(number) or {}
        record = source.record(state, group) if state else Record()
        each = _Found(place, programs[place.param], group, number, record)
        each.given, each.used, _ = given_to(each.program.flat, record)
        yield each


def _names(group: Mapping[str, Any]) -> list[Any]:
    names = group.get("param_names")
    return [None] * len(group["params"]) if names is None else list(names)


# ---- groups


def _groups(
    opt: ChainOpt, found: list[_Found], source: Source, report: AdoptionReport
) -> list[dict[str, Any]]:
    """The groups as they are to be: with the hyper-parameters that were saved, if the chain matches."""
    made = []
    for index, own in enumerate(opt.param_groups):
        new = {key: value for key, value in own.items() if key != "params"}
        members = [each for each in found if each.place.index == index]
        new["params"] = [each.place.number for each in members]
        theirs = {id(each.group): each.group for each in members}
        if report.matching and theirs:
            group = next(iter(theirs.values()))
            splits = _splits(opt)
            records = [each.record for each in found if id(each.group) in theirs or not splits]
            _take(
                opt, new, group, [each.program for each in members], source, records, report, index
            )
        else:
            names = {"lr", "weight_decay", *source.flags} | {
                name for g in theirs.values() for each in source.hyper(g).values() for name in each
            }
            shown = sorted(n for n in names if any(n in g for g in theirs.values()))
            report.left.extend(f"param_groups.{index}.{name}" for name in shown)
        made.append(new)
    return made


def _mixed(members: list[_Found]) -> bool:
    """Whether the parameters of a group come from groups with different numbers."""
    numbers = [
        {k: entry(each.group, k) for k in each.group if k not in ("params", "param_names")}
        for each in {id(each.group): each for each in members}.values()
    ]
    return any(other != numbers[0] for other in numbers[1:])


def _splits(opt: ChainOpt) -> bool:
    """Whether each group has an estimate of its own."""
    rate = opt.chain.rate
    return rate is None or bool(rate.transform.options.get("split_groups", True))


def _take(
    opt: ChainOpt,
    new: dict[str, Any],
    group: Mapping[str, Any],
    programs: list[Program],
    source: Source,
    records: list[Record],
    report: AdoptionReport,
    index: int,
) -> None:
    """Put the hyper-parameters of a saved group into one of this optimizer's."""
    taken = {"lr"}
    new["lr"] = entry({"lr": source.lr(group)}, "lr")
    hyper, decay = source.hyper(group), source.decay(group)
    nodes = [node for program in programs for node in program.flat]
    own = {n.hyper["weight_decay"][0] for n in nodes if n.transform.name == decay}
    for node in nodes:
        values = dict(hyper.get(node.transform.name, {}))
        if node.transform.name == decay:
            values["weight_decay"] = entry(group, "weight_decay")
        elif "weight_decay" in node.hyper and node.hyper["weight_decay"][0] not in own:
            values["weight_decay"] = 0.0  # the original has no such decay
        for name, value in values.items():
            if name in node.hyper and value is not None:
                key, part = node.hyper[name]
                new[key] = value if part is None else _with(new[key], part, value)
                taken |= {name, _THEIRS.get(name, name)}
    if "warmup_steps" in group and "scheduled_lr" in group:  # its rule is the same
        new["warmup_steps"] = float(entry(group, "warmup_steps"))
        taken.add("warmup_steps")
    for key in BOOKKEEPING:
        if key in group:
            new[key] = entry(group, key) if key != "name" else group[key]
    common = opt.registry.rates.common
    numbers = source.common(group, records)
    new |= {name: value for name, value in numbers.items() if name in common}
    report.taken.extend(f"param_groups.{index}.{name}" for name in sorted(taken & group.keys()))


# How other libraries call some hyper-parameters.
_THEIRS = {
    "beta": "betas",
    "beta2": "betas",
    "beta2_scale": "beta2_decay",
    "threshold": "d",
    "decay": "lr_decay",
}


def _with(values: Any, index: int, value: float) -> tuple[float, ...]:
    return (*values[:index], value, *values[index + 1 :])
