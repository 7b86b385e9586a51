"""Saves and loads the state of parameters in parts, with what processes must agree on for it."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from heavyball.distributed.agreement import Ballot, Entry, form_of
from heavyball.distributed.exchange import moved
from heavyball.distributed.layout import Kept, saved, saving, taken, travels
from heavyball.distributed.parts import Held, devices_of
from heavyball.distributed.plan import Plan
from heavyball.distributed.shard import Group

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry

LOADING = (
    "another process could not load its state dict, see its error",
    "the processes of a group of {size} load different numbers of parameters, here {here}",
    "would get other state on another process: the entries, shapes, dtypes or placements of its state "
    "dict differ there; load the same on all processes",
)
SAVING = (
    "state_dict: another process could not say what it has, see its error",
    "the processes of a group of {size} have different numbers of parameters there, here {here}",
    "has other state on another process: change opt.state alike on all of them",
)


class Saving:
    """Brings state into the layout of a checkpoint, and back to whoever holds it."""

    def __init__(self, registry: "Registry", plan: Plan):
        self._registry = weakref.proxy(registry)
        self._plan = plan
        self._ballot: Ballot | None = None

    def save(self, state: dict[Any, Any], numbers: Mapping[Any, Tensor]) -> None:
        """Put the state of parameters as a checkpoint holds it: DTensors, or whole tensors.

        Every process must take part where an owner has state that others have not.

        numbers: the parameters by what they are called in `state`.
        """
        with self._agreeing(SAVING, travels) as ballot:
            parts, moves, places = self._plan.current(), [], []
            asked: dict[Group, list[Entry]] = {}
            for number, param in numbers.items():
                part = parts[param]
                keys = part.saved_keys() if "step" in part.held else []
                entry = part.place.label, repr(sorted(keys))
                asked.setdefault(part.layout.group, []).append(entry)
                for key in keys:
                    where = part.kept[key]
                    if travels(where):
                        own = None if where.at_owner and not part.is_mine else part.held[key]
                        moves.append(saving(param, where, own, part.here.device))
                        places.append((number, key, param, where))
            ballot.vote(asked)
        found = {number: dict(state[number]) for number in numbers if number in state}
        for (number, key, param, where), tensor in zip(
            places, moved(moves) if moves else (), strict=True
        ):
            found[number][key] = saved(param, where, tensor)
        for number, entries in found.items():
            kept = parts[numbers[number]].kept
            known = {key: entries[key] for key in kept if key in entries}
            state[number] = {**known, **{k: v for k, v in entries.items() if k not in kept}}

    def taken(
        self, several: Sequence[tuple[Tensor, str, Mapping[str, Any]]]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """What is here of parameters, and of the state that was saved for them.

        several: each with what errors call it, and its state, of which all processes must have the same.
        """
        parts = self._plan.current()
        if self._ballot is not None:
            asked: dict[Group, list[Entry]] = {}
            for param, label, state in several:
                asked.setdefault(parts[param].layout.group, []).append((label, form_of(state)))
            self._ballot.vote(asked)
        return [(parts[param].here, taken(parts[param], state)) for param, _, state in several]

    def put(self, loaded: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take the state of parameters, as this process shall have it."""
        states = self._registry.attributes["state"]
        for param, entries in loaded.items():
            part = self._plan.current()[param]
            part.held = Held(part, states)
            for key, value in entries.items():
                if key in part.kept:
                    part.held[key] = value
                else:
                    states.setdefault(param, {})[key] = value
            part.show_owned()
        self._plan.follow_anew()
        self._plan.is_lost = False

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """What raises in this block on one process raises on all; each must come to its end."""
        with self._agreeing(LOADING, lambda where: True) as ballot:
            self._ballot = ballot
            try:
                yield
            finally:
                self._ballot = None
            ballot.vote()

    @contextlib.contextmanager
    def _agreeing(
        self, words: tuple[str, str, str], asks: Callable[[Kept], bool]
    ) -> Iterator[Ballot]:
        """Where the processes agree that hold parts of parameters whose state asks for it."""
        error = None
        try:
            self._plan.current()
        except Exception as raised:
            error = raised
        several = [p for p in self._plan.last if any(map(asks, p.kept.values()))]
        ballot = Ballot(devices_of(several), words)
        try:
            if error is not None:
                raise error
            yield ballot
        except Exception as raised:
            if not ballot.closed:
                ballot.vote(error=raised)
            raise
