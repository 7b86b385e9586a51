"""Steps the parameters of an optimizer of which other processes hold parts."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.diagnostics.plan import StepPlan
from heavyball.distributed import is_sharded
from heavyball.distributed.cut import CutWave
from heavyball.distributed.described import described
from heavyball.distributed.entire import EntireWave
from heavyball.distributed.jobs import Jobs, check_part
from heavyball.distributed.parts import Held, Part
from heavyball.distributed.plan import Plan
from heavyball.distributed.rollcall import (
    CHANGED,
    LOST,
    LOST_HERE,
    ChangedError,
    RollCall,
    compare_plans,
    refuse_plans,
)
from heavyball.distributed.runs import Run, give_rows
from heavyball.distributed.shard import Layout, replicated
from heavyball.distributed.staged import Staging
from heavyball.distributed.states import States
from heavyball.distributed.sums import ERROR, Term, nothing
from heavyball.distributed.totals import Totals
from heavyball.distributed.waves import Wave, in_flight
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
        self._agreed: list[Part] | None = None  # the parts of the plan that all have compared
        self._compared = -1  # the version of that plan
        self._silent = False  # whether a step has begun that no other process has heard of
        self._local_states: dict[Tensor, Held] = {}
        self._local_groups: list[dict[str, Any]] = []

    def step(self, together: Any) -> None:
        """Step every parameter that has a gradient."""
        parts = list(self._plan.current().values())
        self._compare_once(parts)
        if self._plan.is_lost:
            self._take_part(self._roll(parts, RuntimeError(LOST_HERE), LOST), together)
        else:
            self._take_part(self._roll(parts), together)

    def step_one(self, param: Tensor, together: Any) -> None:
        """Step one parameter, of which every process has the gradient now."""
        parts = self._plan.current()
        self._compare_once(list(parts.values()))
        self._step([parts[param]], RollCall(()), together)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """A step, of which others hear if it ends before the first exchange: they wait in that."""
        self._silent = True
        try:
            yield
        except Exception as error:
            if self._silent:
                self._tell(error)
            raise
        finally:
            self._silent = False

    def _tell(self, error: Exception) -> None:
        """Take part in a step that cannot be made here, as far as others need it to hear of that."""
        self._silent = False
        roll = None if self._agreed is None else self._roll(self._agreed, error)
        with contextlib.suppress(type(error)):
            if roll is not None and not roll.is_alone:
                self._take_part(roll, self._registry.rates)
            elif self._compared != self._plan.version:
                self._plan.refuse()
                refuse_plans(self._plan.devices(), error)

    def _compare_once(self, parts: Sequence[Part]) -> None:
        version = self._plan.version
        if self._compared == version:
            return
        self._silent = False
        if self._agreed is not None:  # others may go by the plan of before
            roll = self._roll(self._agreed, ChangedError(), CHANGED)
            self._agreed = None
            if not roll.is_alone:
                with contextlib.suppress(ChangedError):
                    self._step(roll.parts, roll, self._registry.rates)
        compare_plans(parts)
        self._backend.forget()
        self._agreed, self._compared = list(parts), version

    def _roll(
        self, parts: Sequence[Part], error: Exception | None = None, says: float = ERROR
    ) -> RollCall:
        shares_loss = self._registry.chain.reads_loss and _most_shared(parts) is not None
        return RollCall(parts, self._plan.stages, shares_loss, error, says)

    def _take_part(self, roll: RollCall, together: Any) -> None:
        """Make a step, and know it where others have made one that this process could not end."""
        try:
            self._step(roll.parts, roll, together)
        finally:
            self._plan.is_lost |= roll.went_on

    # ---- one step

    def _step(self, parts: Sequence[Part], roll: RollCall, together: Any) -> None:
        """What is computed is attempted; what is exchanged follows from the parts alone."""
        self._silent = False
        for part in parts:
            if part.param.grad is not None:
                roll.attempts(check_part, part)
        self._jobs.begin(parts)
        if self._registry.chain.reads_loss:
            self._share_loss(parts, roll)
        candidates = [p for p in parts if p.layout.shape.count(0) == 0 and roll.is_candidate(p)]
        cut = [part for part in candidates if self._jobs.is_cut(part)]
        for part in cut:
            self._states.drop_untouched(part)
        self._jobs.look(cut)
        totals = self.totals.before(cut, roll, together)
        runs = [self._jobs.run(part, totals, roll) for part in cut]
        on_shards = [r for r in runs if r.part.mode != "entire" and not r.recipe.questions]
        roll.attempts(give_rows, self._staging, on_shards, totals)
        waves = self._waves(runs, roll, totals)
        if not waves or not waves[0].sums_first:
            roll.finish()
        roll.writes = True
        here = [part for part in candidates if not self._jobs.is_cut(part)]
        in_flight(waves, lambda: roll.attempts(self._step_local, here))
        left = [(r.part, r.shares) for w in waves for r in w.runs if r.shares and not r.absent]
        if left or self._gives:
            self.totals.renew(left, roll, together)
        self._jobs.end()
        roll.end()
        stepped = [p.param for p in candidates if p not in roll.absent and is_sharded(p.param)]
        torch.autograd.graph.increment_version(stepped)

    @property
    def _gives(self) -> bool:
        rate = self._registry.chain.rate
        return rate is not None and bool(rate.transform.gives)

    def _share_loss(self, parts: Sequence[Part], roll: RollCall) -> None:
        """Give all processes the mean of their losses: each has that of its own part of the batch."""
        part = _most_shared(parts)
        if part is None:
            return
        group, device, groups = part.layout.group, part.here.device, self._registry.groups
        layout = replicated((), group)
        term = roll.attempts(_loss_of, groups, layout, device) or nothing("sum", layout, device)
        (total,) = roll.told([term], group, device)
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
            return EntireWave(runs, roll.complete, roll.attempts, totals)
        return CutWave(runs, roll.complete, roll.attempts, self._stack)

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


def _most_shared(parts: Sequence[Part]) -> Part | None:
    """A part of what most processes share; None where each has its own."""
    part = max(parts, key=lambda part: part.layout.group.size, default=None)
    return None if part is None or part.layout.group.size == 1 else part


def _loss_of(groups: Sequence[Mapping[str, Any]], layout: Layout, device: torch.device) -> Term:
    loss = torch.as_tensor(groups[0][LOSS_KEY], dtype=SCALAR, device=device).reshape(())
    return Term("sum", layout, loss, True)
