"""Fits a state dict to an optimizer: all of it or an error, or what matches and a list of the rest."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.chain import BOOKKEEPING
from heavyball.core.combine import plain_names
from heavyball.core.program import Program
from heavyball.core.schedule import COUNT, LR, SCHEDULED_LR, SCHEDULES
from heavyball.numerics import lasting
from heavyball.optim import migrations  # noqa: F401  (it registers them)
from heavyball.optim.checkpoint import (
    DESCRIPTION,
    SAVED_WEIGHTS,
    LoadResult,
    by_transform,
    convert,
    expected_state,
    misfits,
    structure,
    value_shapes,
)
from heavyball.optim.checks import labelled
from heavyball.optim.registry import Registry
from heavyball.optim.scheduling import BEGUN, differing
from heavyball.optim.validation import check_hyper, check_source, impossible
from heavyball.runtime.place import describe
from heavyball.runtime.rates import WAITING
from heavyball.runtime.state import SHOWN, add_missing_state

if TYPE_CHECKING:
    from heavyball.distributed.sharded import Sharded

HINT = "load_state_dict(..., strict=False) loads what matches and returns what it left"


@dataclass
class Match:
    """A parameter of the optimizer, and the state that was saved for it, if any."""

    label: str
    short: str
    param: Tensor
    program: Program
    group: Mapping[str, Any]
    known: bool
    saved: Mapping[str, Any]
    here: Tensor
    parts: "Sharded | None"
    expected: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self, same_chain: bool) -> None:
        """Find out what fits. `same_chain`: what the chain does not know are then entries of others.

        Errors: ValueError for what fits nowhere.
        """
        self.expected = self.expecting()
        if self.saved:
            full = self.expecting(all_lazy=True)
            shapes = self.shapes({**full, **self.expected})
            for fault in impossible(self.saved, full, self.program, self.here, shapes):
                raise ValueError(f"load_state_dict: of the state saved for {self.label}, {fault}")
            own = {k: v for k, v in self.saved.items() if self.program.owns((k,)) or not same_chain}
            found = misfits(own, self.expected, self.program, self.here, shapes, full)
            self.missing, self.extra, self.wrong = found

    def expecting(
        self, group: Mapping[str, Any] | None = None, all_lazy: bool = False
    ) -> dict[str, Tensor]:
        """The state that this process should have, without memory."""
        group = self.group if group is None else group
        if self.parts is not None:
            return self.parts.states.expected(self.param, group, all_lazy)
        return expected_state(self.program, self.param, group, all_lazy)

    def shapes(self, expected: Mapping[str, Tensor]) -> Callable[[str], torch.Size]:
        """Gives the shape of the values that this process should have of each state, by key."""
        if self.parts is not None:
            return self.parts.states.value_shapes(self.param)
        return value_shapes(self.program, self.param, expected)

    def lacks_weights(self) -> bool:
        """Whether the parameters hold an average and nothing holds what it is an average of."""
        evaluating = not self.group.get("train_mode", True) and self.program.evaluators
        return bool(evaluating and SAVED_WEIGHTS not in self.saved and self.saved.get("step"))

    def usable(self) -> dict[str, Any]:
        """What of the saved state can be loaded."""
        taken = {k: v for k, v in self.saved.items() if k not in self.extra}
        if not self.program.evaluators:
            taken.pop(SAVED_WEIGHTS, None)
        # a count of steps without what was gathered in them would be worse than nothing
        if self.wrong or (self.missing and taken.keys() <= {"step", SAVED_WEIGHTS}):
            return {}
        return taken


@dataclass
class Fitted:
    """The content to load: state by parameter, groups, other entries, and what was skipped."""

    states: dict[Tensor, dict[str, Any]]
    groups: list[dict[str, Any]]
    others: dict[Any, Any]
    left: LoadResult

    def numbered(self) -> dict[str, Any]:
        """A state dict for `torch.optim.Optimizer`, of everything but the state by parameter."""
        numbers = iter(range(sum(len(group["params"]) for group in self.groups)))
        groups = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in self.groups]
        return {"state": self.others, "param_groups": groups}


@contextlib.contextmanager
def all_or_nothing(attributes: dict[str, Any]) -> Iterator[None]:
    """Give an optimizer its attributes back where loading raises."""
    before = dict(attributes)
    try:
        yield
    except BaseException:
        shown = attributes.get(SHOWN, 0)
        attributes.clear()  # new state and groups took the place of the old ones, if any did
        attributes.update(before)
        attributes[SHOWN] = shown + 1
        raise


def fit(registry: Registry, loading: Mapping[str, Any], strict: bool) -> Fitted:
    """The content of a state dict to load, copied, and what was skipped.

    Errors: ValueError with `strict` if anything is left; else if it cannot be said which parameter is
        which, or a number cannot be. Nothing has been changed then.
    """
    if strict:
        check_source(loading)
    for index, group in enumerate(loading["param_groups"]):
        check_hyper(registry.chain, index, group, strict)
    counts = [[len(g["params"]) for g in gs] for gs in (loading["param_groups"], registry.groups)]
    _refuse_other_groups(counts[0], counts[1], strict)
    by_name = _by_name(registry, loading, counts, strict)
    sources = _sources(registry, loading, by_name)
    matches = _matches(registry, loading, by_name, sources)
    for match in matches:
        match.compare(_same_chain(registry, loading))
    for match in matches:
        if match.lacks_weights():
            raise ValueError(
                f"load_state_dict: the state saved for {match.label} is of evaluation mode, but the "
                f"training weights, {SAVED_WEIGHTS!r}, are missing; see docs/checkpoints.md"
            )
    left = LoadResult([], [])
    if strict:
        _refuse(registry, loading, matches)
        _refuse_schedules(registry, loading, sources)
        _check_common(registry, loading)
        groups = [dict(loading["param_groups"][source]) for source in sources]
        states = {match.param: dict(match.saved) for match in matches}
    else:
        if not registry.training:
            raise RuntimeError(
                "load_state_dict(strict=False) in evaluation mode: call train() first"
            )
        saved_groups = loading["param_groups"]
        groups = [_entries(registry, i, saved_groups[n], left) for i, n in enumerate(sources)]
        states = {}
        for match in matches:
            if match.param not in states:
                states[match.param] = _state(registry, match, left)
        left.unexpected_keys.extend(_nowhere(registry, loading, by_name))
    known = {number for group in loading["param_groups"] for number in group["params"]}
    others = {key: value for key, value in loading["state"].items() if key not in known}
    groups = [_with_own(registry, index, group) for index, group in enumerate(groups)]
    groups_of = {
        p: g for own, g in zip(registry.groups, groups, strict=True) for p in own["params"]
    }
    ready = {
        match.param: _ready(match, states[match.param], groups_of[match.param])
        for match in matches
        if states[match.param]
    }
    return Fitted(ready, groups, others, left)


@lasting()
def _ready(match: Match, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what is loaded, on the parameter's device and in the formats of this optimizer."""
    made = {
        key: value.detach().clone().to(match.here.device)
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for key, value in state.items()
    }
    expected = match.expecting(group)
    convert(made, expected, match.program, match.shapes(expected))
    return made


def _same_chain(registry: Registry, loading: Mapping[str, Any]) -> bool:
    described = loading.get(DESCRIPTION)
    return isinstance(described, Mapping) and described.get("chain") == structure(registry.chain)


def _refuse_other_groups(saved: list[int], own: list[int], strict: bool) -> None:
    """Refuse groups that cannot be told which is which; in torch's words, with the numbers."""
    if len(saved) != len(own):
        raise ValueError(
            "load_state_dict: loaded state dict has a different number of parameter groups: "
            f"{len(saved)} were saved, this optimizer has {len(own)}"
        )
    for index, (there, here) in enumerate(zip(saved, own, strict=True) if strict else ()):
        if there != here:
            raise ValueError(
                "load_state_dict: loaded state dict contains a parameter group that doesn't match the "
                f"size of optimizer's group: of group {index} {there} parameters were saved, here it "
                f"has {here}. {HINT}"
            )


def _refuse(registry: Registry, loading: Mapping[str, Any], matches: list[Match]) -> None:
    missing = by_transform(key for match in matches for key in match.missing)
    extra = by_transform(key for match in matches for key in match.extra)
    keys = f"missing state: {missing}; state that has no place: {extra}"
    described, own = loading.get(DESCRIPTION), structure(registry.chain)
    if isinstance(described, Mapping) and described.get("chain") != own:
        raise ValueError(
            "load_state_dict: the state was saved by a different chain\n"
            f"  saved:     {described.get('chain')}\n  this one:  {own}\n  {keys}\n  {HINT}"
        )
    for match in matches:
        if match.missing or match.extra:
            raise ValueError(
                f"load_state_dict: the state saved for {match.label} is not that of the chain {own}: "
                f"{keys}. {HINT}"
            )
        for fault in match.wrong:
            raise ValueError(f"load_state_dict: of the state saved for {match.label}, {fault}")


def _refuse_schedules(
    registry: Registry, loading: Mapping[str, Any], sources: Sequence[int]
) -> None:
    for index, (group, source) in enumerate(zip(registry.groups, sources, strict=True)):
        if wrong := differing(loading["param_groups"][source], group):
            raise ValueError(
                f"load_state_dict: parameter group {index}: {wrong}; with strict=False this optimizer "
                "keeps its schedules and goes on with the count of steps that was saved, if one was"
            )


def _check_common(registry: Registry, loading: Mapping[str, Any]) -> None:
    for index, group in enumerate(loading["param_groups"]):
        for name in group:
            try:
                registry.rates.check_saved(index, name, group)
            except (TypeError, ValueError) as error:
                raise ValueError(f"load_state_dict: {error}") from None


# ---- which parameter is which


def _names(groups: Sequence[Mapping[str, Any]], ids: bool) -> list[list[str]] | None:
    """The names of the parameters in each group; None where not all have one, or two the same.

    ids: whether a parameter's number in the dict, where it is a string, is its name.
    """
    named: list[list[str]] = []
    for group in groups:
        names = group.get("param_names")
        if names is None and ids and all(isinstance(n, str) for n in group["params"]):
            names = group["params"]
        if names is None:
            return None
        named.append(list(names))
    flat = [name for names in named for name in names]
    for plainly in (plain_names(flat), flat):  # two that differ in what wraps them keep that
        rest = iter(plainly)
        found = [list(itertools.islice(rest, len(names))) for names in named]
        places = {
            (name, number)
            for names, group in zip(found, groups, strict=True)
            for name, number in zip(names, map(_place, group["params"]), strict=True)
        }
        if len({name for name, _ in places}) == len(places):
            return found
    return None


def _place(number: Any) -> Any:
    return id(number) if isinstance(number, Tensor) else number


def _by_name(
    registry: Registry, loading: Mapping[str, Any], counts: list[list[int]], strict: bool
) -> list[list[int | None]] | None:
    """Where each parameter of each group was saved: the saved group's number, None for nowhere.

    None where parameters are matched by their places.

    Errors: ValueError with `strict` if the names of both sides are not the same, group by group.
    """
    saved, own = _names(loading["param_groups"], True), _names(registry.groups, False)
    given = any("param_names" in group for group in loading["param_groups"])
    if saved is not None and own is not None:
        there = {name: index for index, names in enumerate(saved) for name in names}
        shared = there.keys() & {name for names in own for name in names}
        # strings in place of numbers may be anything, so without a match they are just numbers
        if strict and (given or len(shared) == len(there)):
            _refuse_other_names(saved, own)
        if given or (shared and (not strict or len(shared) == len(there))):
            return [[there.get(name) for name in names] for names in own]
    if counts[0] != counts[1]:
        raise ValueError(
            f"load_state_dict: the groups saved have {counts[0]} parameters, those here {counts[1]}; "
            "pass model.named_parameters(), so that they can be matched by name"
        )
    return None


def _refuse_other_names(saved: list[list[str]], own: list[list[str]]) -> None:
    for index, (there, here) in enumerate(zip(saved, own, strict=True)):
        if set(there) != set(here):
            missing = ", ".join(n for n in here if n not in there) or "none"
            extra = ", ".join(n for n in there if n not in here) or "none"
            raise ValueError(
                f"load_state_dict: group {index} was saved with other parameters: not saved there: "
                f"{missing}; saved there and not here: {extra}. {HINT}"
            )


def _sources(
    registry: Registry, loading: Mapping[str, Any], by_name: list[list[int | None]] | None
) -> list[int]:
    """The saved group that each group gets its entries from: that of its parameters, if it is one."""
    found = list(range(len(registry.groups)))
    for index, places in enumerate(by_name or ()):
        several = set(places) - {None}
        if len(several) == 1:
            found[index] = several.pop()  # type: ignore[assignment]
    return found


def _matches(
    registry: Registry,
    loading: Mapping[str, Any],
    by_name: list[list[int | None]] | None,
    sources: list[int],
) -> list[Match]:
    programs, state, number = registry.programs(), loading["state"], 0
    saved_names, own_names = _names(loading["param_groups"], True), _names(registry.groups, False)
    numbers: dict[str, Any] = {}
    for names, saved_group in zip(saved_names or (), loading["param_groups"], strict=False):
        numbers.update(zip(names, saved_group["params"], strict=True))
    matches, parts = list[Match](), registry.parts
    for index, (group, source) in enumerate(zip(registry.groups, sources, strict=True)):
        saved_group = loading["param_groups"][source]
        values = {**registry.defaults, **saved_group}
        for position, (name, param) in enumerate(labelled(index, group)):
            if by_name is None:
                known, place = True, saved_group["params"][position]
            else:
                known = by_name[index][position] is not None
                place = numbers.get(own_names[index][position]) if known else None  # type: ignore[index]
            label, short = describe(name, index, position, param), name or str(number)
            program = programs[param]
            found = _present(state.get(place, {}) if known else {}, program)
            matches.append(Match(label, short, param, program, values, known, found, param, parts))
            number += 1
    if parts is not None:
        asked = [(match.param, match.label, match.saved) for match in matches]
        for match, (here, taken) in zip(matches, parts.saving.taken(asked), strict=True):
            match.here, match.saved = here, taken
    return matches


def _present(saved: Mapping[str, Any], program: Program) -> dict[str, Any]:
    """The state that was saved, without dicts that torch puts where a flat dict has no entry."""
    return {k: v for k, v in saved.items() if not (isinstance(v, Mapping) and program.owns((k,)))}


# ---- what matches


def _state(registry: Registry, match: Match, left: LoadResult) -> dict[str, Any]:
    """The state of one parameter: saved entries, and current ones where nothing was saved."""
    parts = match.parts
    held = registry.state.get(match.param, {}) if parts is None else parts.states.held(match.param)
    own, taken = dict(held), match.usable()
    missing = match.missing if taken else match.expected if match.saved or not match.known else own
    left.missing_keys.extend(f"{match.short}.{key}" for key in missing)
    left.unexpected_keys.extend(f"{match.short}.{key}" for key in match.saved if key not in taken)
    if not taken:
        return own
    kept = {**{key: own[key] for key in missing if key in own}, **taken}
    if parts is not None:
        parts.states.begin(match.param, kept)
    else:
        add_missing_state(match.program, match.param.detach(), match.group, kept)
    return kept


def _nowhere(
    registry: Registry, loading: Mapping[str, Any], by_name: list[list[int | None]] | None
) -> Iterator[str]:
    """The state of saved parameters whose names no parameter has."""
    if by_name is None:
        return
    groups = loading["param_groups"]
    own = {name for names in _names(registry.groups, False) or () for name in names}
    for names, group in zip(_names(groups, True) or (), groups, strict=True):
        for name, number in zip(names, group["params"], strict=True):
            if name not in own:
                yield from (f"{name}.{key}" for key in loading["state"].get(number, ()))


def _entries(
    registry: Registry, index: int, saved: Mapping[str, Any], left: LoadResult
) -> dict[str, Any]:
    """A group's hyper-parameters: saved ones that are known and valid, else its own."""
    group = {k: v for k, v in registry.groups[index].items() if k != "params"}
    if "train_mode" in group:
        group["train_mode"] = True  # where nothing else was saved
    for key in (WAITING, BEGUN):  # of the state that is replaced
        group.pop(key, None)
    # the peak of an own schedule is a part of it
    keeps_base = LR in group.get(SCHEDULES, ()) and saved.get(LR) != group[LR]
    for key, value in saved.items():
        if key in ("params", "param_names") or (key == SCHEDULES and not differing(saved, group)):
            continue
        is_base = keeps_base and key in (LR, "initial_lr")
        known = (
            key != SCHEDULES
            and not is_base
            and (
                key in group
                or key in registry.defaults
                or key in BOOKKEEPING
                or key.startswith("_")
            )
        )
        if known and _accepts(registry, index, key, saved):
            group[key] = value
        else:
            left.unexpected_keys.append(f"param_groups.{index}.{key}")
    common = registry.rates.common
    loaded = {
        n: group[n] for n in common if f"param_groups.{index}.{n}" not in left.unexpected_keys
    }
    following = registry.rates.following(
        {n: v for n, v in loaded.items() if n in saved}, registry.groups
    )
    group |= following
    lacking = [k for k in (*registry.defaults, *common) if k not in saved and k not in following]
    left.missing_keys.extend(f"param_groups.{index}.{k}" for k in lacking if k != "differentiable")
    return group


def _accepts(registry: Registry, index: int, key: str, saved: Mapping[str, Any]) -> bool:
    try:
        if key in registry.values.keys:
            registry.values.checked(key, saved[key])
        else:
            registry.rates.check_saved(index, key, saved)
    except (TypeError, ValueError):
        return False
    return True


def _with_own(registry: Registry, index: int, loaded: dict[str, Any]) -> dict[str, Any]:
    """A loaded group with what it does not decide: our names, and what it does not know."""
    own, group = registry.groups[index], dict(loaded)
    if "param_names" in own:  # else it brings its own along, as in torch
        group.pop("param_names", None)
    for key in ("param_names", *registry.defaults, *registry.rates.common, COUNT):
        if key in own:
            group.setdefault(key, own[key])
    # a schedule is a part of the program, as the chain is
    for key in (SCHEDULES, SCHEDULED_LR):
        group.pop(key, None)
    if SCHEDULES in own:
        group[SCHEDULES] = own[SCHEDULES]
    group["params"] = own["params"]
    registry.rates.settle(group)
    return group
