"""Numbers of the groups that follow schedules: given to each step, counted, saved and loaded.

A group says in `schedules` which of its numbers follow what. Every step puts their values there, on the
host, so kernels read them as they read any number of the group. `lr` alone is multiplied, for as long as
a step takes: what the group holds is the base, which schedulers of torch may write.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import frozen, is_real
from heavyball.core.schedule import (
    BASE_LR,
    COUNT,
    LR,
    SCHEDULED_LR,
    SCHEDULES,
    Schedule,
    Scheduled,
    follows,
    is_scheduled,
    largest,
    told,
    value_at,
)
from heavyball.errors import warn
from heavyball.numerics import host
from heavyball.runtime.place import Place

# The entry of a group while a step goes on: the positions of the parameters that were stepped in it one
# at a time. It is saved and copied with the group.
BEGUN = "_scheduled"
# A default learning rate below it says that 1 is hardly meant.
SMALL_LR = 0.1
# Why a CUDA graph cannot have schedules.
CAPTURED = (
    "the schedules of {} are evaluated on the host, so a CUDA graph would keep the values of one step; "
    "change numbers in tensors of the groups instead"
)
# A group, the name of an entry, and what it held.
Replaced: TypeAlias = tuple[dict[str, Any], str, Any]
# A group before it began a step: the entries that this writes, and the numbers that were put there.
Before: TypeAlias = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


class Schedules(Mapping[str, Scheduled]):
    """The schedules of a group by the names of the numbers that follow them; it does not change."""

    def __init__(self, schedules: Mapping[str, Scheduled]):
        self._schedules = dict(schedules)

    def __getitem__(self, name: str) -> Scheduled:
        return self._schedules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schedules)

    def __len__(self) -> int:
        return len(self._schedules)

    def __deepcopy__(self, memo: dict) -> "Schedules":
        return self

    def __reduce__(self) -> tuple:
        return Schedules, (self._schedules,)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}: {text}' for name, text in texts(self).items())}}}"


def texts(schedules: Mapping[str, Any] | None) -> dict[str, str]:
    """Schedules as a state dict has them.

    Errors: TypeError for what is no dict of them.
    """
    if schedules is not None:
        _check_mapping("parameter group", schedules)
    return {n: fn if isinstance(fn, str) else told(fn) for n, fn in (schedules or {}).items()}


def base_and_schedule(lr: Any) -> tuple[Any, Schedule | None]:
    """The base of a learning rate, and the schedule that multiplies it; the base is 1 without a peak."""
    if not isinstance(lr, Schedule):
        return lr, None
    return (1.0, lr) if lr.peak is None else (lr.peak, lr.with_peak(1.0))


def warn_of_peak(owner: type, lr: Any) -> None:
    """Warn of a learning rate that follows a schedule up to 1 because nobody gave a peak."""
    default = default_lr(owner)
    if isinstance(lr, Schedule) and not lr.is_peak_given and lr.peak and default < SMALL_LR:
        warn(
            f"{owner.__name__}: the peak of lr={lr!r} is {lr.peak:g}, where lr is {default:g} by "
            f"default; give one, such as {lr.with_peak(default)!r}, or peak={lr.peak:g} if that is meant"
        )


def default_lr(owner: type) -> float:
    """The default learning rate of an optimizer class; infinite if it has none."""
    for cls in owner.__mro__:
        init = vars(cls).get("__init__")
        parameter = inspect.signature(init).parameters.get(LR) if inspect.isfunction(init) else None
        if parameter is not None:
            return parameter.default if is_real(parameter.default) else math.inf
    return math.inf


def separated(
    chain: Chain, group: Mapping[str, Any], inherited: Mapping[str, Any]
) -> dict[str, Any]:
    """A new group with numbers in place of schedules, which it has in an entry of their own.

    A number that is given takes the place of a schedule that all groups have; `lr` is multiplied by it.

    Errors: TypeError or ValueError naming what cannot follow a schedule.
    """
    made = dict(group)
    known = made.pop(SCHEDULES, None)
    if known is not None:
        _check_mapping("parameter group", known)
    for name in (COUNT, SCHEDULED_LR, BEGUN, BASE_LR):  # of another optimizer, they begin anew
        made.pop(name, None)
    found = {name: fn for name, fn in inherited.items() if name == LR or name not in made}
    found |= known or {}
    for name, value in group.items():
        if name == LR and isinstance(value, Schedule):
            made[LR], found[LR] = base_and_schedule(value)
        elif is_scheduled(value):
            found[name] = value
    for name, fn in found.items():
        if fn is inherited.get(name):  # as the defaults have it
            continue
        first = chain.check_schedule(name, fn, "parameter group")
        if name != LR:
            made[name] = first
    if found or inherited:
        made[SCHEDULES] = Schedules(found)
    return made


class Scheduling:
    """Gives the groups of an optimizer the numbers of each step."""

    def __init__(self, chain: Chain):
        self._chain = chain
        # whether any group has a schedule
        self.active = False
        # by a group's identity: the schedules that were checked, and the numbers that were put there
        self._known: dict[int, Schedules] = {}
        self._put: dict[int, dict[str, Any]] = {}
        # what is given the largest learning rate, where it is known and nobody has set it
        self._peaks = chain.largest_lr_keys

    def settle(self, index: int, groups: list[dict[str, Any]]) -> None:
        """Bring the numbers of a group to where its count is."""
        group = groups[index]
        self._forget(group)
        if SCHEDULES in group:
            schedules = self._checked(index, group)
            group[SCHEDULES] = self._known[id(group)] = schedules
            n = max(1, group.setdefault(COUNT, 0))
            self._give(group, self._values(index, schedules, n))
        self.active = any(SCHEDULES in g or BEGUN in g for g in groups)

    def begins(self, groups: Iterable[dict[str, Any]]) -> bool:
        """Whether a step has schedules to follow; they may have been put into a group since the last."""
        if not self.active:
            for group in groups:
                if SCHEDULES in group:
                    self.active = True
        return self.active

    def _forget(self, group: dict[str, Any]) -> None:
        """Forget a group's schedules, and remove what they stored."""
        self._known.pop(id(group), None)
        self._put.pop(id(group), None)
        if SCHEDULES not in group:
            for name in (COUNT, SCHEDULED_LR):
                group.pop(name, None)

    def release(self, group: dict[str, Any], name: str) -> None:
        """Let a number of a group follow no schedule any more."""
        if name in group.get(SCHEDULES, ()):
            rest = {key: fn for key, fn in group[SCHEDULES].items() if key != name}
            group[SCHEDULES] = self._known[id(group)] = Schedules(rest)
            group.pop(SCHEDULED_LR if name == LR else "", None)
            self._put.get(id(group), {}).pop(name, None)

    def ahead(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        """A group as its next step sees it."""
        if SCHEDULES not in group:
            return group
        n = self._count(index, group) + (BEGUN not in group)
        values = self._values(index, self._checked(index, group), n)
        if LR in values:
            values[LR] = _scaled(group.get(LR), values[LR])
        return {**group, **values}

    @contextlib.contextmanager
    def during(self, groups: list[dict[str, Any]], place: Place | None = None) -> Iterator[None]:
        """The numbers of a step of all parameters, or of the one at `place`, while it is made.

        A step of parameters one at a time begins with the first of them, and ends with a step of all or
        when one of them comes again.

        Errors: TypeError or ValueError naming the group and what is no schedule, a value that its number
            cannot have, or a number that was set although it follows a schedule. Where anything raises,
            the numbers and the counts are as before.
        """
        here = list(enumerate(groups)) if place is None else [(place.index, place.group)]
        _refuse_capture(group for _, group in here)
        if self._has_ended(groups, place):
            self._close(groups)
        begun: list[Before] = []
        replaced: list[Replaced] = []
        try:
            new = any(BEGUN not in group for _, group in here)
            for index, group in enumerate(groups) if new else ():
                if BEGUN not in group:
                    begun.append(self._begin(index, group))
            for index, group in here:
                # as they were when the step began
                schedules = self._known.get(id(group), Schedules({}))
                if LR in schedules:
                    replaced += self._multiply(index, group, schedules[LR])
            yield
        except BaseException:
            _put_back(replaced)
            for before in begun:
                self._undo(before)
            raise
        _put_back(replaced)
        if place is None:
            self._close(groups)
        else:
            place.group[BEGUN][place.position] = True

    def _has_ended(self, groups: list[dict[str, Any]], place: Place | None) -> bool:
        """Whether a parameter to be stepped already was, in the current step."""
        if place is not None:
            return place.position in place.group.get(BEGUN, ())
        return any(
            position < len(group["params"]) and group["params"][position].grad is not None
            for group in groups
            for position in group.get(BEGUN, ())
        )

    def _close(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group.pop(BEGUN, None)
        self.active = any(SCHEDULES in group for group in groups)

    def _begin(self, index: int, group: dict[str, Any]) -> Before:
        """Count a step of a group and set its scheduled numbers; return the previous ones."""
        put = self._put.get(id(group), {})
        schedules = self._checked(index, group) if SCHEDULES in group else Schedules({})
        names = (SCHEDULES, COUNT, SCHEDULED_LR, *schedules)
        before = group, {name: group[name] for name in names if name in group}, put
        if SCHEDULES in group:
            self._refuse_set(index, group, schedules)
            count = self._count(index, group) + 1
            self._give(group, self._values(index, schedules, count))
            group[SCHEDULES] = self._known[id(group)] = schedules
            group[COUNT] = count
        else:
            self._forget(group)
        group[BEGUN] = {}
        return before

    def _undo(self, before: Before) -> None:
        """Leave a group as it was before it began a step."""
        group, entries, put = before
        for name in (BEGUN, SCHEDULES, COUNT, SCHEDULED_LR):
            if name not in entries:
                group.pop(name, None)
        group.update(entries)
        self._put[id(group)] = put

    def _count(self, index: int, group: Mapping[str, Any]) -> int:
        count = group.get(COUNT, 0)
        if not _is_count(count):
            raise ValueError(
                f"parameter group {index}: {COUNT}={count!r}: expected a count of steps"
            )
        return count

    def _checked(self, index: int, group: Mapping[str, Any]) -> Schedules:
        """The schedules of a group, which may have been put there by hand.

        Errors: TypeError or ValueError naming the group and what is no schedule.
        """
        given, known = group[SCHEDULES], self._known.get(id(group))
        if known is not None and known is given:
            return known
        owner = f"parameter group {index}"
        _check_mapping(owner, given)
        for name, fn in given.items():
            if not follows(fn):
                raise TypeError(
                    f"{owner}: schedule({name!r}, {fn!r}): expected a function of steps"
                )
            self._chain.check_schedule(name, fn, owner)
        return Schedules(given)

    def _refuse_set(self, index: int, group: Mapping[str, Any], schedules: Schedules) -> None:
        for name, value in self._put.get(id(group), {}).items():
            if name not in schedules:
                continue
            if name not in group:
                raise ValueError(f"parameter group {index} is missing its entry {name!r}")
            now = group[name]
            if now is not value and (isinstance(now, Tensor) or frozen(now) != value):
                raise ValueError(
                    f"parameter group {index}: {name}={now!r} was set, but it follows "
                    f"{told(schedules[name])}: remove it from group[{SCHEDULES!r}] first; for torch's "
                    "schedulers, pass cycle_momentum=False"
                )

    def _values(self, index: int, schedules: Schedules, n: int) -> dict[str, Any]:
        """The numbers of the n-th step; of `lr` the factor."""
        return {name: self._value(index, name, fn, n) for name, fn in schedules.items()}

    def _value(self, index: int, name: str, fn: Scheduled, n: int) -> Any:
        """What a schedule gives in the n-th step, which of a function nobody knew before.

        Errors: TypeError or ValueError naming the group, the number and the step.
        """
        try:
            return self._chain.check_scheduled_value(name, value_at(fn, n))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"parameter group {index}: {error}, in step {n} of schedule({name!r}, {told(fn)})"
            ) from None

    def _give(self, group: dict[str, Any], values: dict[str, Any]) -> None:
        """Put the numbers of a step into a group."""
        if LR in values:
            group[SCHEDULED_LR] = _scaled(group.get(LR), values.pop(LR))
        else:
            group.pop(SCHEDULED_LR, None)
        group.update(values)
        self._put[id(group)] = values

    def _multiply(self, index: int, group: dict[str, Any], fn: Scheduled) -> Iterator[Replaced]:
        """Put the learning rate of the step into a group; yields what to put back after it."""
        base = group.get(LR)
        if not isinstance(base, Tensor) and not is_real(base):
            return  # which is refused where all numbers are
        factor = self._value(index, LR, fn, group[COUNT])
        yield group, LR, base
        group[BASE_LR] = base
        group[LR] = group[SCHEDULED_LR] = _scaled(base, factor)
        peak = _peak(group, fn, base) if self._peaks else None
        for key in self._peaks if peak is not None else ():
            if is_real(group.get(key)) and not group[key]:
                yield group, key, group[key]
                group[key] = peak


def _check_mapping(owner: str, schedules: Any) -> None:
    if not isinstance(schedules, Mapping):
        raise TypeError(f"{owner}: {SCHEDULES}={schedules!r}: expected a dict of schedules by name")


def _refuse_capture(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse to be captured in a CUDA graph, which would keep the values of one step."""
    groups = list(groups)
    on_cuda = any(p.is_cuda for group in groups for p in group["params"][:1])
    if on_cuda and torch.cuda.is_current_stream_capturing():
        names = sorted({name for group in groups for name in group.get(SCHEDULES, ())})
        raise RuntimeError(CAPTURED.format(", ".join(names)))


def _put_back(replaced: list[Replaced]) -> None:
    for group, key, value in replaced:
        group[key] = value
        group.pop(BASE_LR, None)


def _scaled(base: Any, factor: float) -> Any:
    """A learning rate times its schedule's factor; unchanged if it is not a number."""
    return base * factor if isinstance(base, Tensor) or is_real(base) else base


def _peak(group: Mapping[str, Any], fn: Scheduled, base: Any) -> float | None:
    """The largest learning rate of a group's schedule; None where it would have to be waited for."""
    high, rates = largest(fn), (base, group.get("initial_lr", base))
    known = high is not None and math.isfinite(high)
    if not known or any(isinstance(lr, Tensor) and not host.on_host(lr) for lr in rates):
        return None
    return max(map(float, rates)) * high  # type: ignore[operator]


# ---- saved and loaded


def check_saved(group: Mapping[str, Any]) -> None:
    """Refuse invalid entries about schedules in a saved group.

    Errors: ValueError naming the entry.
    """
    schedules, count, begun = (group.get(key, {}) for key in (SCHEDULES, COUNT, BEGUN))
    if SCHEDULES in group and not isinstance(schedules, Mapping):
        raise ValueError(f"{SCHEDULES}={schedules!r}: expected a dict of schedules by name")
    if COUNT in group and not _is_count(count):
        raise ValueError(f"{COUNT}={count!r}: expected a count of steps")
    if not isinstance(begun, Mapping) or not all(map(_is_count, begun)):
        raise ValueError(f"{BEGUN}={begun!r}: expected positions of parameters")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The difference between the schedules of a saved group and this one, if any."""
    there, here = texts(saved.get(SCHEDULES)), texts(own.get(SCHEDULES))
    if there == here:
        return None
    name = next(n for n in (*there, *here) if there.get(n) != here.get(n))
    said = [f"follows {s[name]}" if name in s else "follows no schedule" for s in (there, here)]
    return f"{name} {said[0]} in the state dict, and {said[1]} here"
