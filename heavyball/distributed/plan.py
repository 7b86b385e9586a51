"""Which parameters are in parts, how each is stepped, and who owns it, as the groups stand now."""

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from heavyball.core.program import Program
from heavyball.distributed import is_sharded
from heavyball.distributed.exchange import Move, moved
from heavyball.distributed.parts import Held, Part, another, keep_at_owner, owners, part_of
from heavyball.distributed.shard import (
    ALONE,
    Group,
    Layout,
    alone,
    group_of,
    group_of_mesh,
    layout_of,
    local,
    replicated,
)
from heavyball.distributed.staged import Staging
from heavyball.numerics import SCALAR, Origin
from heavyball.optim.options import Options
from heavyball.runtime.place import Place
from heavyball.runtime.state import SHOWN, lazy_wanted

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry


class Plan:
    """The parts of an optimizer's parameters.

    registry, options: the optimizer's. staging: says whether kernels are wanted.
    """

    def __init__(self, registry: "Registry", options: Options, staging: Staging):
        self._registry = weakref.proxy(registry)
        self._staging = staging
        self._replicas = as_group("replicas", options.replicas)
        self.stages = as_group("stages", options.stages)
        self.version = 0  # how often it was made
        self.is_lost = False  # whether this process could not end a step that others have made
        self.shown = -1  # how often `optimizer.state` had been asked for when the parts followed it
        self._parts: dict[Tensor, Part] = {}
        self._owners: dict[Tensor, int] = {}
        self._offsets: list[int] = []
        self._met = False  # whether stages have told each other how many parameters they have
        self._made_for: Any = None
        self._known: dict[Any, Part] = {}

    # ---- looking

    def current(self) -> dict[Tensor, Part]:
        """The parameters in parts, brought up to what the groups hold now."""
        programs = self._registry.programs()
        places = list(self._registry.places())
        key = self._key(places, programs)
        if key != self._made_for:
            self._make(places, programs)
            self._made_for = key
        self._follow()
        return self._parts

    @property
    def last(self) -> list[Part]:
        """The parts as they were looked at last."""
        return list(self._parts.values())

    def layout(self, param: Tensor) -> Layout:
        """Where the parts of a parameter are."""
        if is_sharded(param):
            return layout_of(param)  # type: ignore[arg-type]
        if self._replicas is not ALONE:
            return replicated(tuple(param.shape), self._replicas)
        return alone(param)

    def devices(self) -> dict[Group, torch.device]:
        """The groups of all parameters, each with a device, also where there are no parts yet."""
        params = [param for group in self._registry.groups for param in group["params"]]
        return {self.layout(param).group: local(param).device for param in params}

    @property
    def device(self) -> torch.device:
        """Where stages tell each other something: where the first parameter of any group is."""
        params = (param for group in self._registry.groups for param in group["params"])
        return next((param.device for param in params), torch.device("cpu"))

    def number(self, place: Place) -> int:
        """A parameter's number among those of all stages."""
        return place.number + self._offsets[place.index]

    def counted(self, place: Place) -> tuple[int, Origin | None]:
        """A parameter's number among those of all stages, and where what is here of it begins."""
        part = self.current()[place.param]
        return self.number(place), None if part.layout.is_whole else part.origin("param")

    def at_owners(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors like these parameters, whole at whoever owns each, and empty elsewhere."""
        parts, moves = self.current(), []
        for param, tensor in zip(params, tensors, strict=True):
            part, here = parts[param], local(tensor).clone()
            there = part.layout.at(part.owner)
            moves.append(Move(part.layout, there, here, here.dtype, here.device))
        return moved(moves) if moves else []

    # ---- changes

    def forget(self) -> None:
        """Look at every parameter anew: some were changed."""
        self._made_for = None

    def follow_anew(self) -> None:
        """Look at all state anew: some was put there."""
        self.shown = -1

    def keep_owners(self, params: Sequence[Tensor], owners: Collection[int]) -> None:
        """Let these own the parameters, which have not been looked at yet."""
        self._owners.update(zip(params, owners, strict=True))

    def take_owners(self, other: "Plan") -> None:
        """Let the same own the parameters as in another plan of theirs."""
        self._owners = dict(other._owners)

    def _follow(self) -> None:
        """Take what was done to state by hand, and find parameters that have moved."""
        for part in self._parts.values():
            part.refresh()
        shown = self._registry.attributes.get(SHOWN, 0)
        if shown != self.shown:
            states = self._registry.attributes["state"]
            for part in self._parts.values():
                part.follow(states)
            self.shown = shown

    # ---- making

    def _key(self, places: Sequence[Place], programs: Mapping[Tensor, Program]) -> Any:
        """What the parts were made for."""
        groups = {id(place.group): place.group for place in places}
        wanted = [_wanted(programs[place.param], place) for place in places]
        missing = [self._missing(group) for group in groups.values()]
        known = [
            (id(p.param), id(p.group), id(programs[p.param]), p.param.requires_grad) for p in places
        ]
        return known, wanted, missing

    def _missing(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Which hyper-parameters of a group are None."""
        return tuple(group.get(name) is None for name in self._registry.chain.hyper)

    def _make(self, places: Sequence[Place], programs: Mapping[Tensor, Program]) -> None:
        self._parts = {}
        states = self._registry.attributes["state"]
        self._count()
        for place in places:
            if place.param not in self._parts:
                part = self._part(place, programs[place.param])
                part.held = Held(part, states)
                self._parts[place.param] = part
        several = list(self._parts.values())
        owners(several, self._owners)
        for part in several:
            self._owners[part.param] = part.owner
            keep_at_owner(part)
            part.held.follow()
        self.version += 1

    def _part(self, place: Place, program: Program) -> Part:
        """A part as those of its shape are."""
        layout, device = self.layout(place.param), place.param.device.type
        wanted, missing = _wanted(program, place), self._missing(place.group)
        compiled = self._staging.is_on
        key = id(program), layout, place.param.dtype, device, compiled, wanted, missing
        if key not in self._known:
            chain = self._registry.chain
            # whether parameters meet: in sums over all of them, or in numbers of their group
            totals = bool(chain.total_keys) or chain.rate is not None
            self._known[key] = part_of(place, program, layout, totals, compiled)
        return another(self._known[key], place)

    def _count(self) -> None:
        """Count the parameters that other stages have before those of each group.

        Errors: ValueError on every stage if one of them cannot make a plan.
        """
        groups = self._registry.groups
        if self.stages is ALONE:
            self._offsets = [0] * len(groups)
            return
        counts = self._counts_of_stages([len(group["params"]) for group in groups])
        if bool((counts < 0).any()):
            raise ValueError("step: another stage cannot begin, see its error")
        self._offsets, own = [], 0
        for index, group in enumerate(groups):
            before = counts[:, :index].sum() + counts[: self.stages.me, index].sum()
            self._offsets.append(int(before) - own)
            own += len(group["params"])

    def _counts_of_stages(self, own: list[int]) -> Tensor:
        """How many parameters the groups of every stage have."""
        counts = torch.zeros(self.stages.size, len(own), dtype=SCALAR, device="cpu")
        counts[self.stages.me] = torch.tensor(own, device="cpu")
        counts = counts.to(self.device)
        self._met = True
        dist.all_reduce(counts, group=self.stages.handle)
        return counts.cpu()

    def refuse(self) -> None:
        """Say to stages that make their first plan that there is none here."""
        if self.stages is not ALONE and not self._met:
            self._counts_of_stages([-1] * len(self._registry.groups))


def _wanted(program: Program, place: Place) -> tuple[bool, ...]:
    """Which states are wanted that some values of hyper-parameters do without."""
    return tuple(
        lazy_wanted(node, declared, place.group)
        for node, _, declared in program.states
        if declared.needed_by in node.transform.hyper or declared.until is not None
    )


def as_group(name: str, given: Any) -> Group:
    """The processes of an option: a `ProcessGroup`, a mesh of one dimension, or None for this one alone.

    Errors: TypeError for anything else, naming the option.
    """
    if given is None:
        return ALONE
    if isinstance(given, dist.ProcessGroup):
        return group_of(given)
    if isinstance(given, DeviceMesh) and given.ndim == 1:
        return group_of_mesh(given)
    raise TypeError(
        f"{name}={given!r}: expected a ProcessGroup, a DeviceMesh of one dimension, or None"
    )
