"""Numbers that the parameters of a group decide on together, such as Prodigy's d.

They belong to the group, not to a parameter: entries of it that are saved with it, 0-d float64 tensors
on the device of its first parameter (an int counts its steps). A parameter that joins late sees the
present ones, and one without a gradient has no part in them.
"""

import itertools
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import finite, is_sequence
from heavyball.core.program import Program
from heavyball.core.rate import Member
from heavyball.core.transform import LOSS
from heavyball.numerics import SCALAR, Number, lasting, version_of
from heavyball.runtime.job import LOSS_KEY, Job, Scalars
from heavyball.runtime.place import Place
from heavyball.runtime.sums import Shares, Sums, by_group, stacked


class _Put(NamedTuple):
    """What was put into an entry of a group: the object, its version, and its value if that is known."""

    entry: Any
    version: int | None
    value: float | None

    def stands(self, entry: Any) -> bool:
        """Whether the entry is still what was put there."""
        return entry is self.entry and _version(entry) == self.version


def _is_gated(program: Program) -> bool:
    """Whether something in front of a program's rate may leave out steps."""
    before = itertools.takewhile(lambda node: node is not program.rate, program.flat)
    return any("gate" in node.transform.provides for node in before)


class Together:
    """Makes and renews the common numbers of an optimizer's groups. Nothing waits for the device.

    An entry may be set by hand. It is noticed by being another object, or another version of a tensor,
    than was put there, and only then is its value read.
    """

    def __init__(self, chain: Chain):
        self.node = chain.rate
        self.chain = chain
        # by a group's identity
        self._scalars: dict[int, Scalars] = {}
        self._gated = any(_is_gated(program) for program in chain.programs)
        # the entries that count the steps of a group
        self._counters = () if self.node is None else self.node.transform.counters
        # by a group's identity and an entry's name: what was put there
        self._put: dict[int, dict[str, _Put]] = {}
        # which entries are still what they begin at
        self._begun: dict[int, set[str]] = {}
        # a CUDA graph writes into the tensors that it was captured with
        self._captured = False

    @property
    def common(self) -> Mapping[str, str | float]:
        """The entries, and their initial values."""
        return {} if self.node is None else self.node.transform.numbers

    @property
    def _shared(self) -> bool:
        """Whether all groups have one estimate."""
        assert self.node is not None
        return self.node.transform.is_shared

    # ---- where they begin

    @lasting()
    def begin(self, index: int, groups: list[dict[str, Any]]) -> None:
        """Give a new group its numbers, ignoring those of another optimizer."""
        group = groups[index]
        group.pop(WAITING, None)
        for name in self.common:
            self._write(group, name, self._first(name, index, groups))
        self._begun[id(group)] = set(self.common)

    def begin_again(self, index: int, groups: list[dict[str, Any]]) -> None:
        """Give a group that has not stepped its numbers anew: a hyper-parameter has changed."""
        group = groups[index]
        if any(group[name] for name in self._counters):
            return
        for name in self.common:
            if name in self._begun.get(id(group), ()):
                self._write(group, name, self._first(name, index, groups))

    def _first(self, name: str, index: int, groups: list[dict[str, Any]]) -> Any:
        """The initial value of a group's entry: that of the other groups if they share one estimate."""
        first, group = self.common[name], groups[index]
        others = [g for i, g in enumerate(groups) if i != index and set(self.common) <= g.keys()]
        if others and self._shared:
            return others[0][name]
        return self._hyper(group, first) if isinstance(first, str) else first

    @lasting()
    def settle(self, group: dict[str, Any]) -> None:
        """Bring a group's numbers to where its parameters are, in memory of their own, as its own."""
        begun = self._begun[id(group)] = set()
        for name, first in self.common.items():
            value = group.get(name)
            if isinstance(value, Tensor | int | float):
                self._write(group, name, value)
                start = self._hyper(group, first) if isinstance(first, str) else first
                if float(value) == start:
                    begun.add(name)

    def _write(self, group: dict[str, Any], name: str, value: Any) -> None:
        """Put a number into a group: in a tensor of its own, so that whoever has kept the last one
        keeps its value."""
        value = value.value if isinstance(value, Number) else value
        old = group.get(name)
        if isinstance(self.common[name], int):
            group[name] = value
        elif self._captured or _capturing(old):
            self._captured = True
            old.copy_(value) if isinstance(value, Tensor) else old.fill_(value)  # type: ignore[union-attr]
        else:
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            if torch.is_inference_mode_enabled():
                with lasting():
                    group[name] = _own(value, device)
            else:
                group[name] = _own(value, device)
        known = None if isinstance(value, Tensor) else float(value)
        put = _Put(group[name], _version(group[name]), known)
        self._put.setdefault(id(group), {})[name] = put

    # ---- set by hand

    def take(self, groups: list[dict[str, Any]]) -> None:
        """Take what was set by hand since the last step.

        What begins as an entry that was set, and was not set itself, follows it: `d_max` is `d`. Where
        all groups have one estimate, they all take it.

        Errors: TypeError or ValueError naming the group and the entry. Nothing has been changed then.
        """
        given = {i: new for i, group in enumerate(groups) if (new := self._given(i, group))}
        if not given:
            return
        for index, new in given.items():
            self._refuse_made(index, new)
            new |= self.following(new, groups)
        if self._shared:
            given = self._for_all(given, len(groups))
        for index, new in given.items():
            for name, value in new.items():
                self._write(groups[index], name, value)
                self._begun.get(id(groups[index]), set()).discard(name)

    def _given(self, index: int, group: dict[str, Any]) -> dict[str, float]:
        """The entries of a group that are not as they were put there, as numbers."""
        put, given = self._put.get(id(group), {}), {}
        for name in self.common:
            if name not in group:
                raise ValueError(f"parameter group {index} is missing its entry {name!r}")
            value, known = group[name], put.get(name)
            if known is None or not known.stands(value):
                given[name] = self.checked(name, value, index)
        return given

    def checked(self, name: str, value: Any, index: int) -> float:
        """The value of an entry of a group, as a number.

        Errors: TypeError or ValueError naming the group and the entry.
        """
        assert self.node is not None
        first, said = self.common[name], f"parameter group {index}: {name!r} is {value!r}, expected"
        if isinstance(first, int):
            try:
                count = -1 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                count = -1
            if count < 0:
                raise ValueError(f"{said} a number of steps")
            return count
        number = _number(value)
        if number is None:
            raise TypeError(f"{said} a number, or a real tensor with one element")
        domain = self.node.transform.domain(first) if isinstance(first, str) else finite
        if not math.isfinite(number) or number not in domain:
            raise ValueError(f"{said} a finite number in {domain}")
        return number

    def check_saved(self, index: int, name: str, group: Mapping[str, Any]) -> None:
        """Check an entry of a saved group, if it is one of these numbers or what waits for a step's end.

        Errors: TypeError or ValueError naming the group and the entry.
        """
        if name in self.common:
            self.checked(name, group[name], index)
        elif name == WAITING:
            given = () if self.node is None else self.node.transform.gives
            shares = len(given) + 1 if given else 0  # and whether the parameter was stepped
            wrong = _wrong_waiting(group[name], len(group["params"]), shares)
            if wrong:
                raise ValueError(f"parameter group {index}: {name!r} {wrong}")

    def _refuse_made(self, index: int, new: Mapping[str, float]) -> None:
        assert self.node is not None
        t = self.node.transform
        for name, source in {**t.past, **t.made_from}.items():
            if name in new and source not in new:
                raise ValueError(
                    f"parameter group {index}: {name!r} was set, but is computed from {source!r} in "
                    "every step; set that instead"
                )

    def following(self, new: Mapping[str, float], groups: list[dict[str, Any]]) -> dict[str, float]:
        """Entries that follow from others that were set, because they start equal."""
        if self.node is None:
            return {}
        leaders: dict[str, str] = {}
        for name, first in self.common.items():
            if isinstance(first, str):
                leaders.setdefault(first, name)
        found = {}
        for name, first in self.common.items():
            leader = leaders[first] if isinstance(first, str) else name
            # of several groups, the step makes it
            t = self.node.transform
            several = name in t.made_from and t.is_mean and len(groups) > 1
            if leader in new and name not in new and not (several and self._has_stepped(groups)):
                found[name] = new[leader]
        return found

    def _has_stepped(self, groups: list[dict[str, Any]]) -> bool:
        return any(group[name] for group in groups for name in self._counters)

    def _for_all(
        self, given: Mapping[int, Mapping[str, float]], count: int
    ) -> dict[int, dict[str, float]]:
        """What was set in some groups, for all of them; counts of steps are each group's own."""
        one: dict[str, tuple[int, float]] = {}
        for index, new in given.items():
            for name, value in new.items():
                if isinstance(self.common[name], int):
                    continue
                other, before = one.setdefault(name, (index, value))
                if before != value:
                    raise ValueError(
                        f"parameter groups {other} and {index} share one estimate, but {name!r} was set "
                        f"to {before!r} and {value!r}: set it in one of them, or to the same value"
                    )
        return {
            i: {**{n: v for n, (_, v) in one.items()}, **given.get(i, {})} for i in range(count)
        }

    def _hyper(self, group: Mapping[str, Any], name: str) -> float:
        assert self.node is not None
        key, index = self.node.hyper[name]
        return float(group[key] if index is None else group[key][index])

    def finish(
        self, groups: list[dict[str, Any]], found: list[tuple[Job, tuple[Tensor, ...]]]
    ) -> None:
        """Renew the numbers of every group from what its jobs gave."""
        self.renew(
            groups, by_group((job.group for job, _ in found), stacked([s for _, s in found]))
        )

    def renew(self, groups: list[dict[str, Any]], sums: Sums) -> None:
        """The same, given the sums of each group by its identity."""
        assert self.node is not None
        t = self.node.transform
        home = _device_of(next(iter(sums.values()))[0])
        on_host = home.type == "cpu"
        given = _on_host(sums) if on_host else _at(home, sums)
        # the last share counts the parameters whose step no gate has left out
        if self._gated and on_host:
            given = {place: shares for place, shares in given.items() if shares[-1] > 0}
        if not given:
            return
        # on a device only it knows, and nothing waits for it
        unsure = self._gated and not on_host
        whole = [group for group in groups if self.common.keys() <= group.keys()]
        for group in whole:
            for name in self._counters if id(group) in given else ():
                more = given[id(group)][-1] > 0 if unsure else 1
                self._write(group, name, group[name] + more)
        members = [self._member(group, given.get(id(group)), home) for group in whole]
        everyone = torch.stack([shares[-1] for shares in given.values()]).sum() if unsure else None
        for group, member, values in zip(whole, members, t.finish(members, t.options), strict=True):
            kept = {name: member.values[before] for name, before in t.past.items()}
            for name, value in (kept | values).items():
                if unsure and isinstance(value, Tensor):
                    mine = everyone if self._shared else given.get(id(group), (everyone,))[-1]
                    value = torch.where(mine > 0, value.to(home), member.values[name])  # type: ignore[operator, arg-type]
                if not _same(value, member.values[name]):
                    self._write(group, name, value)

    def _member(
        self, group: dict[str, Any], shares: tuple[Any, ...] | None, home: torch.device
    ) -> Member:
        assert self.node is not None
        on_host = home.type == "cpu"
        values: dict[str, Any] = {}
        for name in self.common:
            if name in self._counters:
                values[name] = group[name]
            else:
                values[name] = self._read(group, name) if on_host else group[name].to(home)
        scalars = self._scalars.setdefault(id(group), Scalars())
        for name, (key, index) in self.node.hyper.items():
            value = _numbers(group[key]) if on_host else scalars.get(group, key, home)
            values[name] = value if index is None else value[index]
        values["lr"] = self._lr(group, home)
        if LOSS_KEY in group:
            on_device = None if on_host else scalars.get(group, LOSS_KEY, home)
            values[LOSS] = Number(float(group[LOSS_KEY])) if on_host else on_device
        return Member(None if shares is None else shares[:-1], values)

    def _lr(self, group: dict[str, Any], home: torch.device) -> Any:
        """The learning rate of a group in this step, with the warm-up that its first counter is at."""
        on_host = home.type == "cpu"
        lr = _numbers(group["lr"]) if on_host else self._scalars[id(group)].get(group, "lr", home)
        if not group["warmup_steps"] or not self._counters:
            return lr
        share = group[self._counters[0]] / float(group["warmup_steps"])
        return lr * (share.clamp(max=1) if isinstance(share, Tensor) else min(share, 1.0))

    def _read(self, group: dict[str, Any], name: str) -> Number:
        """An entry of a group, on the host."""
        put = self._put.get(id(group), {}).get(name)
        if put is not None and put.value is not None and put.stands(group[name]):
            return Number(put.value)
        return Number(group[name].reshape(1).tolist()[0])


def _device_of(share: Tensor | float) -> torch.device:
    return share.device if isinstance(share, Tensor) else torch.device("cpu")


def _as_tensor(share: Tensor | float) -> Tensor:
    return share if isinstance(share, Tensor) else _own(share, torch.device("cpu"))


def _at(home: torch.device, sums: Sums) -> dict[int, tuple[Any, ...]]:
    """Sums on one device."""
    return {place: tuple(s.to(home) for s in shares) for place, shares in sums.items()}  # type: ignore[union-attr]


def _on_host(sums: Sums) -> dict[int, tuple[Any, ...]]:
    """Sums as numbers, which take little time to compute with."""
    return {place: tuple(map(Number, _plain(shares))) for place, shares in sums.items()}


def _plain(shares: tuple[Tensor | float, ...]) -> Iterable[float]:
    if isinstance(shares[0], Tensor):
        return torch.stack([s.cpu() for s in shares]).tolist()  # type: ignore[union-attr]
    return shares  # type: ignore[return-value]


def _numbers(value: Any) -> Any:
    """A hyper-parameter on the host: one number, a tuple of them, or None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return Number(float(value))
    return tuple(map(Number, value)) if is_sequence(value) else Number(float(value))


def _same(new: Any, old: Any) -> bool:
    """Whether a number on the host has not changed."""
    return type(new) is type(old) is Number and new.value == old.value


# The entry of a group for what its parameters gave in a step that has not ended, by their positions.
# It is saved and copied with the group.
WAITING = "_waiting"


class Pending:
    """Takes the place of a `Together` while parameters are stepped one at a time.

    What they give waits in their groups until the step ends, and is then added in the order of the
    parameters.
    """

    def __init__(self, together: Together):
        self._together = together
        self._place: Place | None = None  # of the one that is stepped now; None if all others are
        self._rest: dict[int, Shares] = {}

    @property
    def node(self) -> Any:
        return self._together.node

    def finish(
        self, groups: list[dict[str, Any]], found: list[tuple[Job, tuple[Tensor, ...]]]
    ) -> None:
        """Keep what the parameter gave."""
        self.renew(
            groups, by_group((job.group for job, _ in found), stacked([s for _, s in found]))
        )

    def renew(self, groups: list[dict[str, Any]], sums: Sums) -> None:
        """The same, given it by its group."""
        given = {place: tuple(map(_as_tensor, shares)) for place, shares in sums.items()}
        if self._place is None:
            self._rest = given
        else:
            (shares,) = given.values()
            self._place.group.setdefault(WAITING, {})[self._place.position] = shares

    def waits(self, groups: list[dict[str, Any]]) -> bool:
        """Whether a step has begun and not ended."""
        return any(WAITING in group for group in groups)

    def before(self, place: Place, groups: list[dict[str, Any]]) -> bool:
        """A parameter is about to be stepped: if it was before, that step has ended; says whether."""
        self._place = place
        ended = place.position in place.group.get(WAITING, ())
        if ended:
            self.close(groups)
        return ended

    def before_others(self, groups: list[dict[str, Any]]) -> bool:
        """All parameters that have a gradient are about to be stepped: whether in the same step."""
        if any(
            position < len(group["params"]) and group["params"][position].grad is not None
            for group in groups
            for position in group.get(WAITING, ())
        ):
            self.close(groups)
        self._place = None
        return self.waits(groups)

    def after(self, groups: list[dict[str, Any]]) -> bool:
        """End the step if no parameter is left to wait for; says whether it has ended."""
        if not self.waits(groups) or not all(
            position in group.get(WAITING, ()) or not (p.requires_grad and p.numel())
            for group in groups
            for position, p in enumerate(group["params"])
        ):
            return False
        self.close(groups)
        return True

    def close(self, groups: list[dict[str, Any]]) -> None:
        """The step has ended: renew the numbers of the groups."""
        total = _total(groups, self._rest)
        self._rest = {}
        for group in groups:
            group.pop(WAITING, None)
        if total:
            self._together.renew(groups, total)

    def closed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups as they would be if the step ended now."""
        self._together.take(groups)
        if not self.waits(groups):
            return groups
        ended = [dict(group) for group in groups]
        Together(self._together.chain).renew(ended, _total(ended, {}))
        return ended


def _total(groups: list[dict[str, Any]], rest: Mapping[int, Shares]) -> Sums:
    """What waits in the groups, and the rest, added up in the order of the parameters."""
    total: dict[int, tuple[Tensor | float, ...]] = {}
    for group in groups:
        waiting = group.get(WAITING, {})
        given = [waiting[position] for position in sorted(waiting)]
        given += [rest[id(group)]] if id(group) in rest else []
        if given:
            total |= by_group([group] * len(given), stacked(given))
    return total


def _wrong_waiting(waiting: Any, params: int, shares: int) -> str | None:
    """What is wrong with an entry `WAITING` for so many parameters, which give so many numbers each."""
    if not isinstance(waiting, dict):
        return f"is {waiting!r}, expected a dict"
    for position, given in waiting.items():
        if isinstance(position, bool) or not isinstance(position, int):
            return f"has the key {position!r}, expected a position"
        if not 0 <= position < params:
            return f"has the key {position!r}, expected a position below {params}"
        if not isinstance(given, tuple | list) or len(given) != shares:
            return f"has {given!r} at {position}, expected {shares} numbers"
        found = [_number(share) if isinstance(share, Tensor) else None for share in given]
        if any(number is None or not math.isfinite(number) for number in found):
            return f"has {given!r} at {position}, expected tensors with one finite number"
    return None


def _number(value: Any) -> float | None:
    """A real number, or the one element of a real tensor; None where it is neither."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            return None
        return float(value.detach())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _version(value: Any) -> int | None:
    return version_of(value) if isinstance(value, Tensor) else None


def _own(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device == device and value.dtype is SCALAR and value.ndim == 0:
            return value.clone()
        return value.to(device, SCALAR, copy=True).reshape(())
    return torch.full((), value, dtype=SCALAR, device=device)


def _capturing(value: Any) -> bool:
    """Whether a CUDA graph is being captured, which will write into this tensor."""
    on_cuda = isinstance(value, Tensor) and value.is_cuda
    return on_cuda and torch.cuda.is_current_stream_capturing()
