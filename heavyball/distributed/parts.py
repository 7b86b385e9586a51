"""A parameter in parts: what this process has of it, and how it is stepped."""

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.core.program import Program
from heavyball.distributed.evaluate import first_of_slice
from heavyball.distributed.layout import WEIGHTS, Beginning, Kept, kept_states, shown
from heavyball.distributed.recipe import Recipe, recipe, staged
from heavyball.distributed.recordings import recorded
from heavyball.distributed.shard import Group, Layout, local
from heavyball.numerics import Origin, compute_dtype
from heavyball.runtime.meta import Remembering
from heavyball.runtime.place import Place
from heavyball.runtime.recent import Recent
from heavyball.runtime.state import add_missing_state, lazy_wanted
from heavyball.state.held import main_of


class Held(dict[str, Tensor]):
    """What this process has of a parameter's state; `optimizer.state` shows it as DTensors."""

    def __init__(self, part: "Part", states: dict[Tensor, Any]):
        super().__init__()
        self._part, self._states = part, states

    def is_in(self, states: dict[Tensor, Any]) -> bool:
        """Whether it is shown in this dict, as `optimizer.state`."""
        return self._states is states

    @property
    def shown(self) -> dict[str, Any]:
        """The same as `optimizer.state` has it, with what others keep there."""
        return self._states.get(self._part.param, {})

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        shown = self._part.shown(key, tensor)
        self._states.setdefault(self._part.param, {})[key] = shown
        super().__setitem__(key, local(shown))

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.shown.pop(key, None)

    def clear(self) -> None:
        for key in list(self):
            del self[key]
        for key in self._part.kept:  # of the owner's
            self.shown.pop(key, None)

    def show_owned(self, keys: Iterable[str]) -> None:
        """Let `optimizer.state` have an entry without elements for what the owner has, and it alone.

        What reads the keys there, as `torch.distributed.checkpoint` does, finds the same everywhere.
        """
        device = self._part.here.device
        for key in keys:
            if key not in self.shown:
                kind = self._part.kept[key].dtype
                self._states[self._part.param][key] = torch.empty(0, dtype=kind, device=device)

    def follow(self) -> None:
        """Take what was put into `optimizer.state` by hand."""
        shown = self.shown
        for key in [key for key in self if key not in shown]:
            super().__delitem__(key)
        for key, value in shown.items():
            if key not in self._part.kept or self._part.is_elsewhere(key):
                continue  # others may keep what they like beside it
            here = local(value) if isinstance(value, Tensor) else value
            if here is not self.get(key):
                super().__setitem__(key, here)


@dataclass(eq=False)
class Part:
    """One parameter: the place where it stands, its layout, its program, and what is kept where.

    here: what this process has of it. mode: "local" where no process needs another for a step; "cut"
    where a recorded program is computed in parts; "entire" where the owner does the whole step. step,
    shares: the recipes of the step and of the shares of sums over all parameters.
    """

    place: Place
    program: Program
    layout: Layout
    here: Tensor
    mode: str
    step: Recipe | None
    shares: dict[str, Recipe]
    kept: dict[str, Kept]
    owner: int = 0
    held: Held = field(init=False)
    trains: bool = field(init=False)  # whether it required a gradient when the plan was made

    def __post_init__(self) -> None:
        self.trains = self.param.requires_grad

    @property
    def param(self) -> Tensor:
        return self.place.param

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.layout.shape)

    @property
    def is_mine(self) -> bool:
        """Whether this process owns it."""
        return self.layout.group.me == self.owner

    @property
    def needs_owner(self) -> bool:
        return self.mode == "entire" or (self.step is not None and bool(self.step.questions))

    def shown(self, key: str, tensor: Tensor) -> Tensor:
        """A state as `optimizer.state` shows it."""
        return shown(self.param, key, self.kept[key], tensor) if key in self.kept else tensor

    def refresh(self) -> None:
        """Look where the parameter is now; a trainer may have given it other memory."""
        here = local(self.param)
        if here.data_ptr() != self.here.data_ptr() or here.shape != self.here.shape:
            self.here = here.detach()

    def follow(self, states: dict[Tensor, Any]) -> None:
        """Take what was put into `optimizer.state` by hand, which may be another dict now."""
        if not self.held.is_in(states):
            self.held = Held(self, states)
        self.held.follow()

    @functools.cached_property
    def rounded(self) -> dict[int, torch.dtype]:
        """The values of the step that travel in fewer bits than they are computed in."""
        if self.step is None:
            return {}
        return self.step.rounded(compute_dtype(self.here.dtype), self.here.device)

    @property
    def cost(self) -> float:
        """About how many operations the owner's work takes."""
        rows, rest = (self.shape[0], self.shape[1:].numel()) if len(self.shape) else (1, 1)
        return float(rows * rest * min(rows, rest))

    def origin(self, key: str) -> Origin | None:
        """Where what is here of the parameter or of a state lies in the whole."""
        if key == "param" or key == WEIGHTS:
            return Origin(*self.layout.mine, self.layout.shape)
        where = self.kept.get(key)
        if where is None or where.is_number or where.at_owner:
            return None
        if where.values is not None:
            return Origin(*self.layout.mine, self.layout.shape)
        return Origin(*where.layout.mine, where.shape)

    def is_elsewhere(self, key: str) -> bool:
        """Whether another process holds all of a state, as the parameter's owner."""
        return self.kept[key].at_owner and not self.is_mine

    def saved_keys(self) -> list[str]:
        """What all processes have of the state together."""
        shown = self.held.shown
        return [
            key
            for key in self.kept
            if key in self.held or (key in shown and self.is_elsewhere(key))
        ]

    def show_owned(self) -> None:
        """Show what the owner has, where that is another process; see `Held.show_owned`."""
        if "step" in self.held and any(map(self.is_elsewhere, self.kept)):
            wanted = whole_state(self.program, self.shape, self.here.dtype, self.place.group, False)
            self.held.show_owned(key for key in wanted if self.is_elsewhere(key))

    def begin(self, whole: Tensor | None, state: dict[str, Tensor] | None = None) -> None:
        """Create what this process's part of the state lacks.

        whole: the whole parameter, where this process owns it. state: where to, if not in its own.
        """
        state = self.held if state is None else state
        if whole is None and self.layout.group.size == 1:
            whole = self.here
        here = {
            k for k, w in self.kept.items() if k != WEIGHTS and not (w.at_owner and whole is None)
        }
        if here <= state.keys():
            return
        wanted = whole_state(self.program, self.shape, self.here.dtype, self.place.group, False)
        kept = {key: where for key, where in self.kept.items() if key in wanted}
        first = functools.partial(first_of_slice, self.layout)
        Beginning(self.program, self.here, whole, first).add(state, kept)
        if state is self.held:
            self.held.show_owned(key for key in kept if self.is_elsewhere(key))


def whole_state(
    program: Program, shape: torch.Size, dtype: torch.dtype, group: Mapping[str, Any], lazy: bool
) -> dict[str, Tensor]:
    """The state of the whole tensor, without memory."""
    wanted = lazy or tuple(
        lazy_wanted(node, declared, group)
        for node, name, declared in program.states
        if node.state_key(name) in program.lazy_keys
    )
    key = shape, dtype, wanted, torch.get_default_dtype()
    kept = _states.setdefault(program, {})
    if key not in kept:
        kept[key] = _whole_state(program, key, group, lazy)
    return dict(kept[key])


# The state of whole tensors, by the programs, and for those of the library by what they compute.
_states: "weakref.WeakKeyDictionary[Program, dict[Any, dict[str, Tensor]]]" = (
    weakref.WeakKeyDictionary()
)
_of_library: dict[Any, dict[str, Tensor]] = Recent(4096)


def _whole_state(
    program: Program, key: Any, group: Mapping[str, Any], lazy: bool
) -> dict[str, Tensor]:
    begin = tuple(declared.init for _, _, declared in program.states)
    key = program.identity, begin, repr(program.storage), key
    if (known := _of_library.get(key)) is not None:
        return known
    found: dict[str, Tensor] = {}
    like = torch.empty(key[-1][0], dtype=key[-1][1], device="meta")
    with Remembering():
        add_missing_state(program, like, group, found, lazy)
    if program.is_library:
        _of_library[key] = found
    return found


def part_of(
    place: Place, program: Program, layout: Layout, totals: bool, compiled: bool = False
) -> Part:
    """How a parameter is stepped, decided from the whole of it.

    totals: whether the chain has sums over all parameters, for which each must say its share. compiled:
    whether kernels may compute what is computed on shards.
    """
    here, group = local(place.param).detach(), place.group
    expected = whole_state(program, torch.Size(layout.shape), here.dtype, group, False)
    full = whole_state(program, torch.Size(layout.shape), here.dtype, group, True)
    if layout.group.size == 1 and not totals:
        kept = kept_states(program, layout, full, lambda key: False, 0, here.dtype)
        assert kept is not None
        return Part(place, program, layout, here, "local", None, {}, kept)
    args = layout, here.dtype, expected, group
    shares: dict[str, Recipe] = {}
    try:
        step = recipe(program, *args)
        shares = {key: recipe(program, *args, key) for key in program.total_keys}
        kept = kept_states(program, layout, full, step.owns, 0, here.dtype)
        if any(
            r.graph.every and layout.flat(r.graph.every) is None for r in (step, *shares.values())
        ):
            kept = None
    except NotPrintableError:
        kept = None
    if kept is None:
        kept = kept_states(program, layout, full, _entirely, 0, here.dtype)
        assert kept is not None
        return Part(place, program, layout, here, "entire", None, {}, kept)
    mode = "local" if not totals and _is_local(step, program, here, expected, group) else "cut"
    # shards whose random bits are those of the whole are stepped so, too
    if (mode == "cut" or not layout.is_whole) and compiled and here.device.type == "cpu":
        step, *rest = (
            r if r.questions or r.graph.every is not None else staged(r, program)
            for r in (step, *shares.values())
        )
        shares = dict(zip(shares, rest, strict=True))
    return Part(place, program, layout, here, mode, step, shares, kept)


def another(like: Part, place: Place) -> Part:
    """The part of a parameter that is as another one in everything that decides how it is stepped."""
    here = local(place.param).detach()
    given = place, like.program, like.layout, here, like.mode, like.step, like.shares
    return Part(*given, dict(like.kept))


def _entirely(key: str) -> bool:
    """Whether a state of a parameter that its owner steps alone is at the owner."""
    return key not in ("step", WEIGHTS)


def _is_local(
    step: Recipe,
    program: Program,
    here: Tensor,
    expected: Mapping[str, Tensor],
    group: Mapping[str, Any],
) -> bool:
    """Whether a step of every shard, seen as a tensor of its own, is that of the whole.

    It is asked for every process's shard, so that all decide alike.
    """
    if not step.is_plain:
        return False
    whole = recorded(program, torch.Size(step.layout.shape), here.dtype, expected, group)
    for sizes in {box[1] for box in step.layout.boxes if 0 not in box[1]}:
        state = {k: _resized(t, step.layout.shape, sizes) for k, t in expected.items()}
        try:
            part = recorded(program, torch.Size(sizes), here.dtype, state, group)
        except NotPrintableError:
            return False
        if part.looked or part.key != whole.key:
            return False
    return True


def _resized(tensor: Tensor, whole: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    shape = sizes if tuple(tensor.shape) == whole else tuple(tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def owners(parts: list[Part], before: Mapping[Tensor, int]) -> None:
    """Give each part that needs one its owner: the most costly first, to whoever has the least to do.

    Loads are those of the places of a group, which all of its processes know alike. before: the owners
    of parts that were there already, which keep them.
    """
    loads: dict[Any, list[float]] = {}
    for part in parts:
        group = part.layout.group
        loads.setdefault(group, [0.0] * group.size)
        if part.param in before:
            part.owner = before[part.param]
            if part.needs_owner:
                loads[group][part.owner] += part.cost
    fresh = [p for p in parts if p.needs_owner and p.param not in before]
    for part in sorted(fresh, key=lambda p: (-p.cost, p.place.number)):
        of = loads[part.layout.group]
        part.owner = min(range(len(of)), key=lambda rank: (of[rank], rank))
        of[part.owner] += part.cost


def keep_at_owner(part: Part) -> None:
    """Say of the states that are at the owner who that is, now that it is known."""
    for key, where in part.kept.items():
        if where.at_owner:
            whole = where.layout.everywhere()
            part.kept[key] = replace(where, layout=whole.at(part.owner))


def devices_of(parts: Sequence[Part]) -> dict[Group, torch.device]:
    """The groups that hold these, each with a device of its first part."""
    return {part.layout.group: part.here.device for part in reversed(parts)}


def is_owned(part: Part, key: str) -> bool:
    """Whether a state, or what accompanies it, is at the owner only."""
    where = part.kept.get(key) or part.kept.get(main_of(key))
    return where is not None and where.at_owner
