"""Steps the parameters of an optimizer of which other processes hold parts."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.diagnostics.plan import StepPlan
from heavyball.distributed import is_sharded
from heavyball.distributed.described import described
from heavyball.distributed.jobs import Jobs, check_part
from heavyball.distributed.parts import Held, Part
from heavyball.distributed.plan import Plan
from heavyball.distributed.rollcall import (
    CHANGED,
    ERROR,
    First,
    RollCall,
    compare_plans,
    refuse_plans,
    refuse_told,
)
from heavyball.distributed.shard import replicated
from heavyball.distributed.staged import Staging
from heavyball.distributed.states import States
from heavyball.distributed.sums import Term
from heavyball.distributed.totals import Totals
from heavyball.distributed.waves import CutWave, EntireWave, Run, Wave, in_flight
from heavyball.numerics import SCALAR
from heavyball.optim.backend import Backend
from heavyball.optim.options import Options
from heavyball.runtime.job import LOSS_KEY, Job
from heavyball.runtime.state import SHOWN

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry

# The most elements of a wave, counted whole; a wave has at least a parameter for each process.
WAVE = 2**24


class Steps:
    """What the processes do together in a step, and what each of them does alone."""

    def __init__(
        self, registry: "Registry", options: Options, plan: Plan, states: States, staging: Staging
    ):
        self._registry = weakref.proxy(registry)
        self._plan, self._states, self._staging = plan, states, staging
        self._backend = Backend(options)
        self._stack = options.foreach is not False
        self._jobs = Jobs(registry, plan, options.stochastic_rounding)
        self.totals = Totals(registry, plan, self._jobs, staging)
        self._compared = -1  # the version of the plan that all have compared
        self._first: First | None = None  # how the steps of that plan begin
        self._silent = False  # whether a step has begun that no other process has heard of
        self._local_states: dict[Tensor, Held] = {}
        self._local_groups: list[dict[str, Any]] = []

    def step(self, together: Any) -> None:
        """Step every parameter that has a gradient."""
        parts = list(self._plan.current().values())
        self._compare_once(parts)
        self._step(parts, RollCall(parts, self._begins), together)

    def step_one(self, param: Tensor, together: Any) -> None:
        """Step one parameter, of which every process has the gradient now."""
        parts = self._plan.current()
        self._compare_once(list(parts.values()))
        self._step([parts[param]], RollCall((), self._begins), together)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """A step, of which others hear if it ends before the first exchange: they wait in that."""
        self._silent = True
        try:
            yield
        except Exception as error:
            if self._silent and self._first is not None:
                self._first.say(ERROR)
            elif self._silent and self._compared != self._plan.version:
                refuse_plans(self._plan.devices(), error)
            raise
        finally:
            self._silent = False

    def _compare_once(self, parts: Sequence[Part]) -> None:
        version = self._plan.version
        if self._compared == version:
            return
        self._silent = False
        if self._first is not None:  # others may go by the plan of before
            first, self._first = self._first, None
            for group, count in first.say(CHANGED):
                if count != CHANGED * group.size:
                    refuse_told(count)
        compare_plans(parts)
        self._backend.forget()
        self._compared = version

    def _begins(self, first: First) -> None:
        """Note how the first exchange of a step looks, which now comes."""
        self._silent = False
        if self._first is None:
            self._first = first

    # ---- one step

    def _step(self, parts: Sequence[Part], roll: RollCall, together: Any) -> None:
        self._jobs.refused = roll.check(parts, check_part)
        if self._registry.chain.reads_loss:
            self._share_loss(parts, roll)
        candidates = [p for p in parts if p.layout.shape.count(0) == 0 and roll.is_candidate(p)]
        cut = [part for part in candidates if self._jobs.is_cut(part)]
        for part in cut:
            self._states.drop_untouched(part)
        self._jobs.bare = {part for part in cut if "step" not in part.held}
        totals = self.totals.before(cut, roll, together)
        runs = [self._jobs.run(part, totals, roll) for part in cut]
        on_shards = [run for run in runs if run.part.mode == "cut" and not run.recipe.questions]
        given = [(run.part, run.recipe, run.job, run.values) for run in on_shards]
        for run, row in zip(on_shards, self._staging.rows(given, totals), strict=True):
            run.row = row
        waves = self._waves(runs, roll, totals)
        if not waves or not waves[0].sums_first:
            roll.finish()
        here = [part for part in candidates if not self._jobs.is_cut(part)]
        in_flight(waves, lambda: self._step_local(here))
        left = [(r.part, r.shares) for w in waves for r in w.runs if r.shares and not r.absent]
        if left or self._gives:
            self.totals.renew(left, together)
        stepped = [p.param for p in candidates if p not in roll.absent and is_sharded(p.param)]
        torch.autograd.graph.increment_version(stepped)

    @property
    def _gives(self) -> bool:
        rate = self._registry.chain.rate
        return rate is not None and bool(rate.transform.gives)

    def _share_loss(self, parts: Sequence[Part], roll: RollCall) -> None:
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

    # ---- waves

    def _waves(
        self, runs: Sequence[Run], roll: RollCall, totals: Mapping[str, Tensor]
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
        self, mode: str, runs: Sequence[Run], roll: RollCall, totals: Mapping[str, Tensor]
    ) -> Wave:
        if mode == "entire":
            return EntireWave(runs, roll.complete, totals)
        return CutWave(runs, roll.complete, self._stack)

    # ---- shards that are stepped as tensors of their own

    def _step_local(self, parts: Sequence[Part]) -> None:
        """Step shards which no other process is needed for."""
        registry = self._registry
        parts = [part for part in parts if part.param.grad is not None]
        for part in parts:
            self._states.drop_untouched(part)
            part.here.grad = self._jobs.gradient(part)
        self._look_local(parts)
        seen = self._local_groups, {"state": self._local_states, SHOWN: self._plan.shown}
        if parts and not self._backend.step_again(*seen, registry.rates):
            jobs = [self._jobs.begun(part) for part in parts]
            self._backend.step(jobs, [], *seen, registry.rates)
        for part in parts:
            part.here.grad = None

    def _look_local(self, parts: Sequence[Part]) -> None:
        """What the engine sees in place of the optimizer's groups and state."""
        held = self._local_states
        if len(held) != len(parts) or any(held.get(p.here) is not p.held for p in parts):
            self._local_states = {part.here: part.held for part in parts}
            self._local_groups = [{"params": [part.here for part in parts]}]

    # ---- looking at it

    def jobs(self, params: Sequence[Tensor] | None = None) -> list[Job]:
        """The jobs of shards that are stepped as tensors of their own."""
        parts = self._plan.current()
        several = parts.values() if params is None else (parts[param] for param in params)
        ready = [p for p in several if p.param.grad is not None and not self._jobs.is_cut(p)]
        for part in ready:
            part.begin(None)
        return [self._jobs.job(part, part.held) for part in ready]

    def described(self, names: Mapping[Tensor, str]) -> StepPlan:
        """How the parameters are stepped that `jobs` leaves out; names are those of what is here."""
        parts = self._plan.current().values()
        ready = [p for p in parts if p.param.grad is not None and self._jobs.is_cut(p)]
        return described(ready, self._staging, self._jobs.imagined, names)
