"""Steps the parameters of an optimizer of which other processes hold parts."""

import contextlib
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from heavyball.core.program import Node, Program
from heavyball.diagnostics.plan import StepPlan
from heavyball.distributed import is_sharded
from heavyball.distributed.agreement import Ballot, Entry, compare, form_of
from heavyball.distributed.described import described
from heavyball.distributed.evaluate import Values
from heavyball.distributed.exchange import Move, back, moved
from heavyball.distributed.layout import Kept, saved, saving, taken, travels
from heavyball.distributed.parts import (
    Held,
    Part,
    another,
    is_owned,
    keep_at_owner,
    owners,
    part_of,
    whole_state,
)
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
from heavyball.distributed.sums import Term, completed, over_stages
from heavyball.distributed.waves import CutWave, EntireWave, Run, Shares, Wave, advance, in_flight
from heavyball.numerics import SCALAR, Origin, lasting, version_of
from heavyball.optim.backend import Backend
from heavyball.optim.checks import check_gradient
from heavyball.optim.options import Options
from heavyball.runtime.addresses import as_usable, check_memory
from heavyball.runtime.job import LOSS_KEY, Counts, Job, Scalars
from heavyball.runtime.place import Place
from heavyball.runtime.state import SHOWN, lazy_wanted
from heavyball.runtime.step import average
from heavyball.state.held import stream_of

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry

# The most elements of a wave, counted whole; a wave has at least a parameter for each process.
WAVE = 2**24
# What a process adds to the first number of a roll call: an error, or that it has other parameters now.
ERROR, CHANGED = 2.0**20, 1.0
PLAN = (
    "step: another process has refused a parameter or its gradient, see its error; nothing has been "
    "changed",
    "the processes of a group of {size} have different numbers of parameters there, here {here}: build "
    "the optimizer alike on all of them",
    "would be stepped otherwise on another process: its shape, dtype, placements, transforms, or "
    "whether it has a gradient differ; nothing has been changed",
)
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


class Sharded:
    """What an optimizer knows of its parameters' parts; it has one where other processes hold some.

    registry, options: the optimizer's.
    """

    def __init__(self, registry: "Registry", options: Options):
        self._registry = weakref.proxy(registry)
        self._options = options
        self._backend = Backend(options)
        self._staging = Staging(options.compile)
        self._foreach, self._rounds = options.foreach, options.stochastic_rounding
        self._replicas = as_group("replicas", options.replicas)
        self._stages = as_group("stages", options.stages)
        self._owners: dict[Tensor, int] = {}
        self._parts: dict[Tensor, Part] = {}
        self._made_for: Any = None
        self._shown = -1
        self._scalars: list[Scalars] = []
        self._counts = Counts()
        self._known: dict[Any, Any] = {}
        self._fresh: dict[Tensor, list[tuple[Tensor, int | None]]] = {}
        self._offsets: list[int] = []
        self._compared = self._refused = False
        self._first: First | None = None  # how the steps of the plan begin
        self._silent = False  # whether a step has begun that no other process has heard of
        self._ballot: Ballot | None = None
        self._bare: set[Part] = set()  # without state, before this step
        self._local_states: dict[Tensor, Held] = {}
        self._local_groups: list[dict[str, Any]] = []

    # ---- the plan

    def layout(self, param: Tensor) -> Layout:
        """Where the parts of a parameter are."""
        if is_sharded(param):
            return layout_of(param)  # type: ignore[arg-type]
        if self._replicas is not ALONE:
            return replicated(tuple(param.shape), self._replicas)
        return alone(param)

    def parts(self) -> dict[Tensor, Part]:
        """The parameters in parts, brought up to what the groups hold now."""
        programs = self._registry.programs()
        places = list(self._registry.places())
        key = self._key(places, programs)
        if key != self._made_for:
            self._make(places, programs)
            self._made_for = key
        self._follow()
        return self._parts

    def forget(self) -> None:
        """Look at every parameter anew: some were changed."""
        self._made_for = None

    def _key(self, places: Sequence[Place], programs: Mapping[Tensor, Program]) -> Any:
        groups = {id(place.group): place.group for place in places}
        hyper = self._registry.chain.hyper
        wanted = [
            lazy_wanted(node, declared, place.group)
            for place in places
            for node, _, declared in programs[place.param].states
            if declared.needed_by in node.transform.hyper or declared.until is not None
        ]
        missing = [group.get(name) is None for group in groups.values() for name in hyper]
        known = [
            (id(p.param), id(p.group), id(programs[p.param]), p.param.requires_grad) for p in places
        ]
        return known, wanted, missing

    def _make(self, places: Sequence[Place], programs: Mapping[Tensor, Program]) -> None:
        self._parts = {}
        states = self._registry.attributes["state"]
        totals = self._has_totals
        self._number(places)
        for place in places:
            if place.param in self._parts:
                continue
            param, program = place.param, programs[place.param]
            layout = self.layout(param)
            part = self._part(place, program, layout, totals)
            part.held = Held(part, states)
            self._parts[param] = part
        several = list(self._parts.values())
        owners(several, self._owners)
        for part in several:
            self._owners[part.param] = part.owner
            keep_at_owner(part)
            part.held.follow()
        self._backend.forget()
        self._compared = False

    @property
    def _has_totals(self) -> bool:
        """Whether parameters meet: in sums over all of them, or in numbers of their group."""
        return bool(self._registry.chain.total_keys) or self._registry.chain.rate is not None

    def _part(self, place: Place, program: Program, layout: Layout, totals: bool) -> Part:
        """A part as those of its shape are."""
        group = place.group
        wanted = tuple(
            lazy_wanted(node, declared, group)
            for node, _, declared in program.states
            if declared.needed_by in node.transform.hyper or declared.until is not None
        )
        none = tuple(group.get(name) is None for name in self._registry.chain.hyper)
        on = self._staging.is_on, place.param.device.type
        key = id(program), layout, place.param.dtype, wanted, none, on
        if key not in self._known:
            self._known[key] = part_of(place, program, layout, totals, self._staging.is_on)
        return another(self._known[key], place)

    def _number(self, places: Sequence[Place]) -> None:
        """Count the parameters that other stages have before those of each group."""
        groups = self._registry.groups
        if self._stages is ALONE:
            self._offsets = [0] * len(groups)
            return
        counts = torch.zeros(self._stages.size, len(groups), dtype=SCALAR, device="cpu")
        counts[self._stages.me] = torch.tensor([len(g["params"]) for g in groups], device="cpu")
        device = places[0].param.device if places else torch.device("cpu")
        counts = counts.to(device)
        dist.all_reduce(counts, group=self._stages.handle)
        counts = counts.cpu()
        self._offsets, own = [], 0
        for index, group in enumerate(groups):
            before = counts[:, :index].sum() + counts[: self._stages.me, index].sum()
            self._offsets.append(int(before) - own)
            own += len(group["params"])

    def _compare(self, parts: Sequence[Part], error: Exception | None = None) -> None:
        """Refuse to go on if other processes would do something else.

        Errors: ValueError on every process, naming the first parameter that differs.
        """
        asked: dict[Group, list[Entry]] = {}
        for part in parts:
            asked.setdefault(part.layout.group, []).append((part.place.label, _plan_of(part)))
        compare(asked, self._devices(parts), PLAN, error)

    def _refuse_first(self, error: Exception) -> None:
        """Say to those that begin their first step, and compare their plans, that it cannot be."""
        params = [param for group in self._registry.groups for param in group["params"]]
        devices = {self.layout(param).group: local(param).device for param in params}
        compare(dict.fromkeys(devices, ()), devices, PLAN, error)

    @staticmethod
    def _devices(parts: Sequence[Part]) -> dict[Group, torch.device]:
        return {part.layout.group: part.here.device for part in reversed(parts)}

    def _follow(self) -> None:
        """Take what was done to state by hand, and find parameters that have moved."""
        shown = self._registry.attributes.get(SHOWN, 0)
        for part in self._parts.values():
            part.refresh()
        if shown != self._shown:
            states = self._registry.attributes["state"]
            for part in self._parts.values():
                if part.held._states is not states:
                    part.held = Held(part, states)
                part.held.follow()
            self._shown = shown

    # ---- a step

    def step(self, together: Any) -> None:
        """Step every parameter that has a gradient."""
        parts = list(self.parts().values())
        self._compare_once(parts)
        self._step(parts, RollCall(parts, self._begins), together)

    def step_one(self, param: Tensor, together: Any) -> None:
        """Step one parameter, of which every process has the gradient now."""
        parts = self.parts()
        self._compare_once(list(parts.values()))
        self._step([parts[param]], RollCall((), self._begins), together)

    def _compare_once(self, parts: Sequence[Part]) -> None:
        if self._compared:
            return
        self._silent = False
        if self._first is not None:  # others may go by the plan of before
            first, self._first = self._first, None
            for group, count in first.say(CHANGED):
                if count != CHANGED * group.size:
                    refuse_told(count)
        self._compare(parts)
        self._compared = True

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """A step, of which others hear if it ends before the first exchange: they wait in that."""
        self._silent = True
        try:
            yield
        except Exception as error:
            if self._silent and self._first is not None:
                self._first.say(ERROR)
            elif self._silent and not self._compared:
                self._refuse_first(error)
            raise
        finally:
            self._silent = False

    def _begins(self, first: "First") -> None:
        """Note how the first exchange of a step looks, which now comes."""
        self._silent = False
        if self._first is None:
            self._first = first

    def _step(self, parts: Sequence[Part], roll: "RollCall", together: Any) -> None:
        self._refused = roll.check(parts, self._check)
        if self._registry.chain.reads_loss:
            self._share_loss(parts, roll)
        candidates = [p for p in parts if p.layout.shape.count(0) == 0 and roll.is_candidate(p)]
        cut = [part for part in candidates if self._is_cut(part)]
        for part in cut:
            self._drop_untouched(part)
        self._bare = {part for part in cut if "step" not in part.held}
        totals = self._totals(cut, roll, together)
        runs = [self._run(part, totals, roll) for part in cut]
        on_shards = [run for run in runs if run.part.mode == "cut" and not run.recipe.questions]
        given = [(run.part, run.recipe, run.job, run.values) for run in on_shards]
        for run, row in zip(on_shards, self._staging.rows(given, totals), strict=True):
            run.row = row
        waves = self._waves(runs, roll, totals)
        if not waves or not waves[0].sums_first:
            roll.finish()
        here = [part for part in candidates if not self._is_cut(part)]
        in_flight(waves, lambda: self._step_local(here))
        left = [(r.part, r.shares) for w in waves for r in w.runs if r.shares and not r.absent]
        if left or self._gives:
            self._renew(left, together)
        stepped = [p.param for p in candidates if p not in roll.absent and is_sharded(p.param)]
        torch.autograd.graph.increment_version(stepped)

    def _share_loss(self, parts: Sequence[Part], roll: "RollCall") -> None:
        """Give all processes the mean of their losses: each has that of its own part of the batch."""
        groups = self._registry.groups
        part = max(parts, key=lambda part: part.layout.group.size, default=None)
        if part is None or part.layout.group.size == 1:
            return
        group, device = part.layout.group, part.here.device
        loss = torch.as_tensor(groups[0][LOSS_KEY], dtype=SCALAR, device=device).reshape(())
        (total,) = roll.told([Term("sum", replicated((), group), loss, True)], group, device)
        for values in groups:
            values[LOSS_KEY] = total / group.size

    @property
    def _gives(self) -> bool:
        rate = self._registry.chain.rate
        return rate is not None and bool(rate.transform.gives)

    def _is_cut(self, part: Part) -> bool:
        """Whether a parameter is stepped node by node, also where that asks no other process."""
        if part.mode != "local" or part.step is None:
            return part.mode != "local"
        # a shard without elements still counts its steps; random bits are those of the whole
        rounded = self._rounds and not part.layout.is_whole and self._is_random(part)
        return part.here.numel() == 0 or rounded

    def _is_random(self, part: Part) -> bool:
        if self._registry.chain.storage.is_random or part.here.dtype == torch.bfloat16:
            return True
        return any(where.dtype == torch.bfloat16 for where in part.kept.values())

    def _check(self, part: Part) -> None:
        """Refuse what a step could not use, before any other process is waited for."""
        label, grad = part.place.label, part.param.grad
        assert grad is not None
        check_gradient(label, part.param, grad)
        check_memory(label, part.here)
        check_memory(f"{label}: its gradient", local(grad))
        for key, tensor in part.held.items():
            where = part.kept.get(key)
            if where is not None and not where.is_number:
                found, wanted = tuple(tensor.shape), where.layout.mine[1]
                if found != wanted:
                    raise ValueError(
                        f"{label}: its state {key!r} has the shape {found} here, expected {wanted}"
                    )
                check_memory(f"{label}: its state {key!r}", tensor)

    def _gradient(self, part: Part) -> Tensor:
        """What is here of the gradient, placed as the parameter is; zeros where there is none."""
        grad = part.param.grad
        if grad is None or self._refused:
            return torch.zeros_like(part.here)
        if is_sharded(grad) and grad.placements != part.param.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=part.param.placements)  # type: ignore[attr-defined]
        return local(grad)

    def _job(self, part: Part, state: dict[str, Tensor]) -> Job:
        place, program = part.place, part.program
        while len(self._scalars) <= place.index:
            self._scalars.append(Scalars())
        as_usable(program, state, part.here.device)
        job = Job(
            program, part.here, self._gradient(part), place.group, state, self._scalars[place.index]
        )
        number = place.number + self._offsets[place.index]
        if self._rounds and self._is_random(part):
            job.stream = stream_of(place.group["seed"], number)
        if not part.layout.is_whole:
            job.origin = part.origin
        if program.has_whole:
            job.place, job.counts = number, self._counts
            job.noise = stream_of(place.group["seed"], number) if program.has_noise else 0
        return job

    def _run(self, part: Part, totals: Mapping[str, Tensor], roll: "RollCall") -> Run:
        absent, fresh = part.param.grad is None, part in self._bare
        state: dict[str, Tensor] = {} if absent and fresh else part.held
        with lasting():
            part.begin(None, state)
        job = self._job(part, state)
        run = Run(part, job, Values(part.step, job, part.layout, totals), fresh=fresh)
        run.absent = part in roll.absent
        if absent:
            roll.waiting.append(run)
        return run

    def _waves(
        self, runs: Sequence[Run], roll: "RollCall", totals: Mapping[str, Tensor]
    ) -> list[Wave]:
        """Parameters in waves: those without owners together, the others by size."""
        free = [run for run in runs if run.part.mode == "cut" and not run.part.needs_owner]
        found = [self._wave("cut", free, roll, totals)] if free else []
        for mode in ("cut", "entire"):
            several: list[Run] = []
            owned = [run for run in runs if run.part.needs_owner and run.part.mode == mode]
            for run in owned:
                several.append(run)
                size = sum(run.part.shape.numel() for run in several)
                if size > WAVE and len(several) >= run.part.layout.group.size:
                    found.append(self._wave(mode, several, roll, totals))
                    several = []
            if several:
                found.append(self._wave(mode, several, roll, totals))
        # last, since not every process has some
        here = [run for run in runs if run.part.mode == "local"]
        return [*found, self._wave("cut", here, roll, totals)] if here else found

    def _wave(
        self, mode: str, runs: Sequence[Run], roll: "RollCall", totals: Mapping[str, Tensor]
    ) -> Wave:
        if mode == "entire":
            return EntireWave(runs, roll.complete, totals)
        return CutWave(runs, roll.complete, self._foreach is not False)

    def _step_local(self, parts: Sequence[Part]) -> None:
        """Step shards as tensors of their own, which no other process is needed for."""
        registry, jobs = self._registry, []
        parts = [part for part in parts if part.param.grad is not None]
        for part in parts:
            self._drop_untouched(part)
            part.here.grad = self._gradient(part)
        self._look_local(parts)
        seen = self._local_groups, {"state": self._local_states, SHOWN: self._shown}
        if parts and not self._backend.step_again(*seen, registry.rates):
            for part in parts:
                with lasting():
                    part.begin(None)
                jobs.append(self._job(part, part.held))
            self._backend.step(jobs, [], *seen, registry.rates)
        for part in parts:
            part.here.grad = None

    def _look_local(self, parts: Sequence[Part]) -> None:
        """What the engine sees in place of the optimizer's groups and state."""
        held = self._local_states
        if len(held) != len(parts) or any(held.get(p.here) is not p.held for p in parts):
            self._local_states = {part.here: part.held for part in parts}
            self._local_groups = [{"params": [part.here for part in parts]}]

    # ---- sums over all parameters

    def _totals(self, parts: Sequence[Part], roll: "RollCall", together: Any) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for key in self._registry.chain.total_keys:
            found = self._shares(key, parts, totals, roll)
            totals[key] = torch.zeros((), dtype=SCALAR, device="cpu")
            if together.node is not None and key == together.node.key:
                self._renew(found, together)
            else:
                total = sum((s[0] for _, s in found), torch.zeros((), dtype=SCALAR, device="cpu"))
                sums: dict[int, Shares] = {0: (total,)}
                if self._stages is not ALONE:
                    device = parts[0].here.device if parts else torch.device("cpu")
                    sums = over_stages(sums, 1, self._stages, device)
                totals[key] = sums[0][0]
        return totals

    def _shares(
        self, key: str, parts: Sequence[Part], totals: Mapping[str, Tensor], roll: "RollCall"
    ) -> list[tuple[Part, Shares]]:
        """The complete share of every parameter, in the order of the parameters."""
        having = [part for part in parts if key in part.program.total_keys]
        runs = [self._run(part, totals, roll) for part in having]
        found: dict[int, Shares] = {}
        cut = [run for run in runs if run.part.mode != "entire"]
        for run in cut:
            recipe = run.part.shares[key]
            run.values = Values(recipe, run.job, run.part.layout, totals)
        given = [(run.part, run.part.shares[key], run.job, run.values) for run in cut]
        for run, row in zip(cut, self._staging.rows(given, totals), strict=True):
            run.row = row
        advance([(run.worker, run.part.shares[key].before) for run in cut], roll.complete)
        for run in cut:
            if run.row is not None:
                found[id(run)] = run.row.finish()
                continue
            run.values.compute(run.part.shares[key].before.rest)
            outputs = run.part.shares[key].outputs
            names = sorted(outputs, key=lambda name: int(name.rsplit(":", 1)[1]))
            found[id(run)] = tuple(run.values.known[outputs[name]] for name in names)
        entire = [run for run in runs if run.part.mode == "entire"]
        if entire:
            roll.finish()
            wave = EntireWave(entire, roll.complete, totals)
            for run, shares in zip(entire, wave.found_shares(key), strict=True):
                if shares is not None:
                    found[id(run)] = shares
        roll.finish()
        return [(run.part, found[id(run)]) for run in runs if id(run) in found and not run.absent]

    def _renew(self, found: Sequence[tuple[Part, Shares]], together: Any) -> None:
        """Make the new numbers of the groups from the shares of their parameters."""
        sums: dict[int, Shares] = {}
        for part, shares in found:
            shares = tuple(share.to(SCALAR).reshape(()) for share in shares)
            index = part.place.index
            if index in sums:
                shares = tuple(a + b for a, b in zip(sums[index], shares, strict=True))
            sums[index] = shares
        groups = self._registry.groups
        if self._stages is not ALONE:
            device = groups[0]["params"][0].device if groups[0]["params"] else torch.device("cpu")
            sums = over_stages(sums, len(groups), self._stages, device)
        if sums:
            together.renew(groups, {id(groups[index]): shares for index, shares in sums.items()})

    def norm(self, params: Sequence[Tensor], known: Mapping[Tensor, Tensor]) -> float:
        """The Euclidean norm of tensors like these parameters, all together, on all processes.

        params: those that every process asks about. known: the tensors of those that have a gradient.

        Errors: ValueError on every process where only some have one, naming the parameter.
        """
        parts, terms = self.parts(), []
        for param in params:
            part = parts[param]
            square = torch.zeros((), dtype=SCALAR, device=part.here.device)
            if param in known and part.layout.is_first:
                square = local(known[param]).to(SCALAR).square().sum()
            has = square.new_full((), float(param in known))
            both = torch.stack((square, has))
            terms.append(Term("sum", replicated((2,), part.layout.group), both, True))
        total = torch.zeros((), dtype=SCALAR, device="cpu")
        for param, found in zip(params, completed(terms), strict=True):
            refuse_some(parts[param], float(found[1]))
            total = total + found[0].cpu()
        if self._stages is not ALONE:
            device = params[0].device if params else torch.device("cpu")
            total = over_stages({0: (total,)}, 1, self._stages, device)[0][0].cpu()
        return float(total.sqrt())

    def at_owners(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors like these parameters, whole at whoever owns each, and empty elsewhere."""
        parts, moves = self.parts(), []
        for param, tensor in zip(params, tensors, strict=True):
            part, here = parts[param], local(tensor).clone()
            there = part.layout.at(part.owner)
            moves.append(Move(part.layout, there, here, here.dtype, here.device))
        return moved(moves) if moves else []

    def counted(self, place: Place) -> tuple[int, Origin | None]:
        """A parameter's number among those of all stages, and where what is here of it begins."""
        part = self.parts()[place.param]
        number = place.number + self._offsets[place.index]
        return number, None if part.layout.is_whole else part.origin("param")

    # ---- state

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none."""
        for part in self.parts().values():
            if part.param.requires_grad and part.shape.numel() and "step" not in part.held:
                part.begin(self._zeros(part))
                self._fresh[part.param] = [(t, version_of(t)) for t in part.held.values()]

    def _drop_untouched(self, part: Part) -> None:
        """Drop untouched state of `init_state`: weights may have been loaded since it was made."""
        made = self._fresh.pop(part.param, None)
        if made is None:
            return
        found = list(part.held.values())
        if len(made) == len(found) and all(
            tensor is own and version_of(tensor) == version
            for own, (tensor, version) in zip(found, made, strict=True)
        ):
            part.held.clear()

    def begin(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what a state lacks, of the values that the parameter has now."""
        part = self.parts()[param]
        part.begin(self._zeros(part), state)

    @staticmethod
    def _zeros(part: Part) -> Tensor | None:
        """Stands in for the whole parameter where this process owns it and its values are not here."""
        if part.is_mine and any(where.at_owner for where in part.kept.values()):
            return torch.zeros(part.shape, dtype=part.here.dtype, device=part.here.device)
        return None

    def held(self, param: Tensor) -> dict[str, Tensor]:
        """What this process has of a parameter's state."""
        return self.parts()[param].held

    def expected_state(
        self, param: Tensor, group: Mapping[str, Any], all_lazy: bool
    ) -> dict[str, Tensor]:
        """What this process should have of a parameter's state, without memory."""
        part = self.parts()[param]
        whole = whole_state(part.program, part.shape, part.here.dtype, group, all_lazy)
        return {
            key: torch.empty(where.sizes, dtype=tensor.dtype, device="meta")
            for key, tensor in whole.items()
            if not (where := part.kept[key]).at_owner or part.is_mine
        }

    def value_shapes(self, param: Tensor) -> Callable[[str], torch.Size]:
        """Gives the shape of the values that this process should have of each state, by key."""
        part = self.parts()[param]

        def shape(key: str) -> torch.Size:
            where = part.kept[key]
            if where.values is None:
                return torch.Size(where.sizes)
            return torch.Size(where.values if where.at_owner else part.here.shape)

        return shape

    def average(self, node: Node, param: Tensor, trained: Tensor) -> Tensor:
        """The weights to evaluate with, of what is here; all processes ask for the same parameter."""
        part = self.parts()[param]
        group = part.place.group
        if not any(is_owned(part, node.state_key(name)) for name in node.transform.states):
            return average(node, trained.detach(), part.held, group, Scalars())
        there = part.layout.at(part.owner)
        kind = trained.dtype, trained.device
        (whole,) = moved([Move(part.layout, there, trained.detach(), *kind)])
        if part.is_mine:
            whole = average(node, whole, part.held, group, Scalars()).to(trained.dtype)
        (here,) = moved([back(part.layout, part.owner, whole if part.is_mine else None, *kind)])
        return here.reshape(trained.shape)

    # ---- saving and loading

    def save(self, state: dict[Any, Any], numbers: Mapping[Any, Tensor]) -> None:
        """Put the state of parameters as a checkpoint holds it: DTensors, or whole tensors.

        Every process must take part where an owner has state that others have not.

        numbers: the parameters by what they are called in `state`.
        """
        with self._agreeing(SAVING, travels) as ballot:
            parts, moves, places = self.parts(), [], []
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
        parts = self.parts()
        if self._ballot is not None:
            asked: dict[Group, list[Entry]] = {}
            for param, label, state in several:
                asked.setdefault(parts[param].layout.group, []).append((label, form_of(state)))
            self._ballot.vote(asked)
        return [(parts[param].here, taken(parts[param], state)) for param, _, state in several]

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
            self.parts()
        except Exception as raised:
            error = raised
        several = [p for p in self._parts.values() if any(map(asks, p.kept.values()))]
        ballot = Ballot(self._devices(several), words)
        try:
            if error is not None:
                raise error
            yield ballot
        except Exception as raised:
            if not ballot.closed:
                ballot.vote(error=raised)
            raise

    def put_state(self, loaded: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take the state of parameters, as this process shall have it."""
        states = self._registry.attributes["state"]
        for param, entries in loaded.items():
            part = self.parts()[param]
            part.held = Held(part, states)
            for key, value in entries.items():
                if key in part.kept:
                    part.held[key] = value
                else:
                    states.setdefault(param, {})[key] = value
            part.show_owned()
        self._shown = -1

    def jobs(self, params: Sequence[Tensor] | None = None) -> list[Job]:
        """The jobs of shards that are stepped as tensors of their own."""
        parts = self.parts()
        several = parts.values() if params is None else (parts[param] for param in params)
        ready = [p for p in several if p.param.grad is not None and not self._is_cut(p)]
        for part in ready:
            part.begin(None)
        return [self._job(part, part.held) for part in ready]

    def described(self, names: Mapping[Tensor, str]) -> StepPlan:
        """How the parameters are stepped that `jobs` leaves out; names are those of what is here."""
        ready = [p for p in self.parts().values() if p.param.grad is not None and self._is_cut(p)]
        return described(ready, self._staging, self._imagined, names)

    def _imagined(self, part: Part) -> Job:
        """The job of a step that does not come now; nothing is begun by it."""
        state = part.held if "step" in part.held else {}
        part.begin(None, state)
        return self._job(part, state)

    def keep_owners(self, params: Sequence[Tensor], owners: Collection[int]) -> None:
        """Let these own the parameters, which have not been looked at yet."""
        self._owners.update(zip(params, owners, strict=True))

    def renewed(self, registry: "Registry") -> "Sharded":
        """The same for a registry of the same parameters; owners stay who they are."""
        made = Sharded(registry, self._options)
        made._owners = dict(self._owners)
        return made


class RollCall:
    """Finds out which parameters have a gradient on every process; it costs a number a parameter.

    The numbers ride with the first sums of a step: nothing has been changed before they are known.
    """

    def __init__(self, parts: Sequence[Part], begins: "Callable[[First], None]"):
        self._begins = begins
        groups = {p.layout.group: None for p in parts if p.mode != "local"}
        self._members = {
            group: [p for p in parts if p.layout.group is group]
            for group in groups
            if group.size > 1
        }
        self._asked = {p for members in self._members.values() for p in members}
        self._error: Exception | None = None
        self._open = bool(self._members)
        self.absent: set[Part] = set()
        self.waiting: list[Run] = []  # for whether another process has a gradient

    def is_candidate(self, part: Part) -> bool:
        """Whether a parameter takes part in this step, as far as is known here."""
        if part.param.grad is not None:
            return True
        return part in self._asked and part.param.requires_grad

    def check(self, parts: Sequence[Part], check: Callable[[Part], None]) -> bool:
        """Look at all gradients; whether something is wrong, which waits until others hear of it."""
        try:
            for part in parts:
                if part.param.grad is not None:
                    check(part)
        except (TypeError, ValueError) as error:
            if not self._open:
                raise
            self._error = error
        return self._error is not None

    def complete(self, terms: Sequence[Term]) -> list[Tensor]:
        """Sums over processes, `completed`; the first ones carry who has gradients.

        Errors: ValueError on every process if one has refused its gradients, or only some have one.
        """
        if not self._open:
            return completed(terms)
        self._open = False
        calls = [*map(self._call, self._members)]
        self._begins(First.of([*terms, *calls], calls))
        found = completed([*terms, *calls])
        for parts, counts in zip(self._members.values(), found[len(terms) :], strict=True):
            self._read(parts, counts.tolist())
        for run in self.waiting:
            run.absent = run.part in self.absent
        return found[: len(terms)]

    def told(self, terms: Sequence[Term], group: Group, device: torch.device) -> list[Tensor]:
        """Sums that come first in a step; the same where gradients are nobody else's affair.

        Errors: ValueError on every process of the group if one could not begin the step.
        """
        if self._open:
            return self.complete(terms)
        call = Term(
            "sum", replicated((1,), group), torch.zeros(1, dtype=SCALAR, device=device), True
        )
        self._begins(First.of([*terms, call], [call]))
        *found, count = completed([*terms, call])
        refuse_told(float(count))
        return found

    def finish(self) -> None:
        """Find out, if no sum has carried it yet."""
        if self._open:
            self.complete(())

    def _call(self, group: Group) -> Term:
        parts = self._members[group]
        here = [
            ERROR * (self._error is not None),
            *(float(p.param.grad is not None) for p in parts),
        ]
        device = parts[0].here.device
        part = torch.tensor(here, dtype=SCALAR, device=device)
        return Term("sum", replicated((len(here),), group), part, True)

    def _read(self, parts: Sequence[Part], counts: list[float]) -> None:
        if self._error is not None:
            raise self._error
        refuse_told(counts[0])
        for part, count in zip(parts, counts[1:], strict=True):
            refuse_some(part, count)
            if not count:
                self.absent.add(part)


def _plan_of(part: Part) -> str:
    recipes = [r.graph.key() for r in (part.step, *part.shares.values()) if r is not None]
    layout = part.layout
    has = part.param.grad is not None
    return repr(
        (part.place.number, layout.shape, part.here.dtype, layout.boxes, part.mode, part.owner)
        + (sorted((i, str(dtype)) for i, dtype in part.rounded.items()),)
        + (repr(part.program), recipes, part.param.requires_grad, has)
    )


def refuse_some(part: Part, count: float) -> None:
    """Refuse a gradient that this many processes have, unless those are all or none.

    Errors: ValueError naming the parameter.
    """
    size = part.layout.group.size
    if count not in (0, size):
        raise ValueError(
            f"{part.place.label} has a gradient on {int(count)} of the {size} processes that "
            "hold it, expected all or none; nothing has been changed"
        )


def refuse_told(count: float) -> None:
    """Refuse a step of which another process has said that it cannot be.

    Errors: ValueError for the sum of what the processes of a group have said, if that is not 0.
    """
    if count >= ERROR:
        raise ValueError(PLAN[0])
    if count:
        raise ValueError(
            "step: the parameters in the groups, or which of them require a gradient, have changed on "
            f"{round(count)} of the processes that share a group: change them alike on all of them"
        )


@dataclass(frozen=True)
class First:
    """The first sums of a step: who takes part, how, of how many numbers, and where the calls begin."""

    sums: tuple[tuple[Group, str, torch.device, int, int | None], ...]

    @staticmethod
    def of(terms: Sequence[Term], calls: Sequence[Term]) -> "First":
        """How `completed` adds up these terms, of which the calls are the last."""
        kinds: dict[Any, list[Term]] = {}
        for term in terms:
            place = term.layout.group, term.op, term.part.device.type
            kinds.setdefault(place, []).append(term)
        sums = []
        for (group, op, _), several in kinds.items():
            size = sum(math.prod(term.layout.shape) for term in several)
            called = size - several[-1].part.numel() if several[-1] in calls else None
            sums.append((group, op, several[0].part.device, size, called))
        return First(tuple(sums))

    def say(self, what: float) -> list[tuple[Group, float]]:
        """Take part in it, adding nothing but this; returns what all have said, group by group."""
        told = []
        for group, op, device, size, called in self.sums:
            # up to the call, its first number, and the rest of it
            sizes = (size, 0, 0) if called is None else (called, 1, size - called - 1)
            terms = [
                Term(
                    op,
                    replicated((n,), group),
                    torch.full((n,), what, dtype=SCALAR, device=device),
                    place == 1,
                )
                for place, n in enumerate(sizes)
            ]
            found = completed(terms)
            if called is not None:
                told.append((group, float(found[1])))
        return told


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
