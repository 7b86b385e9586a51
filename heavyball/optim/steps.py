"""Steps an optimizer's parameters: all that have a gradient, or one of them."""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.rate import Estimate
from heavyball.diagnostics.advice import Advice
from heavyball.diagnostics.plan import StepPlan
from heavyball.metrics.totals import with_gradient
from heavyball.optim.backend import Backend
from heavyball.optim.evaluation import Evaluation
from heavyball.optim.fused import FusedBackward, Rivals
from heavyball.optim.options import Options
from heavyball.optim.registry import Registry
from heavyball.optim.singles import Singles
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.rates import Pending, Together


class Steps:
    """What an optimizer keeps from step to step that is not saved in checkpoints."""

    def __init__(self, registry: Registry, options: Options, chain: Chain, advice: Advice):
        self.registry = registry
        self.backend = Backend(options)
        self.singles = Singles(registry, self.backend, advice)
        self._chain = chain
        self._advice = advice
        self._rivals = Rivals()
        self.evaluation: Evaluation | None = None
        self.measured: set[Tensor] | None = None  # what had a part in the last step

    def forget(self) -> None:
        """Recheck every parameter in the next step."""
        self.backend.forget()
        self.singles.forget()
        self._rivals.forget()

    @without_autocast
    def step_all(
        self, fused: FusedBackward, recording: AbstractContextManager | None = None
    ) -> None:
        """Step every parameter that has a gradient.

        recording: surrounds the step, when the groups hold its numbers.
        """
        with self.heard():
            self._step_scheduled(fused, recording)

    def heard(self) -> AbstractContextManager[None]:
        """Other processes that hold parts hear of an error in here before they wait for this one."""
        parts = self.registry.parts
        return contextlib.nullcontext() if parts is None else parts.steps.heard()

    def _step_scheduled(
        self, fused: FusedBackward, recording: AbstractContextManager | None
    ) -> None:
        schedules = self.registry.schedules
        if schedules.begins(self.registry.groups):
            with schedules.during(self.registry.groups):
                self._step_all(fused, recording)
        else:
            self._step_all(fused, recording)

    def _step_all(self, fused: FusedBackward, recording: AbstractContextManager | None) -> None:
        if recording is not None:
            with recording:
                self._step_all(fused, None)
            return
        registry = self.registry
        registry.values.check(registry.groups)
        evaluation = self.evaluation if "train_mode" in registry.defaults else None
        if evaluation is None:
            self._step_noticed(fused)
            return
        evaluation.notice()
        try:
            self._step_noticed(fused)
        except BaseException:  # it may have stepped some parameters
            evaluation.note_again()
            raise
        evaluation.note()

    def _step_noticed(self, fused: FusedBackward) -> None:
        registry, groups = self.registry, self.registry.groups
        stepped = with_gradient(groups) if self._chain.measures else set()
        self._rivals.refuse(registry, fused)
        if fused.active:
            fused.check_left(registry)
        pending = self.singles.pending
        together: Together | Pending = registry.rates
        begun = pending.waits(groups)
        if begun:  # by parameters that were stepped one at a time
            begun = pending.before_others(groups)
            together = pending
        if self._advice.active:
            begun |= fused.has_begun
            # norms of parts say nothing
            self._advice.before(groups, begun, None if registry.parts is None else ())
        attributes = registry.attributes
        if registry.parts is not None:
            registry.parts.steps.step(together)
        elif not self.backend.step_again(groups, attributes, together):
            keys = self._chain.total_keys
            self.backend.step(registry.jobs(), keys, groups, attributes, together)
        pending.close(groups)
        self.singles.end()
        self.singles.give_up_state()
        if self._chain.measures:
            self.measured = stepped | fused.stepped
        if fused.active:
            fused.finish(groups)

    def step_given(
        self, param: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Step one parameter, see `ChainOpt.step_parameter`."""
        self.singles.step_given(param, group, index)
        if self._chain.measures:
            self.measured = {param, *(self.measured or ())}

    def estimates(self) -> tuple[Estimate, list[dict[str, Any]]]:
        """What a chain estimates its learning rate by, and its groups as if the step ended now.

        Errors: AttributeError for other chains.
        """
        rate = self._chain.rate
        if rate is None or rate.transform.estimate is None:
            name = self.registry.type.__name__
            raise AttributeError(
                f"{name} has no d: nothing in its chain estimates it, see docs/prodigy.md"
            )
        return rate.transform.estimate, self.singles.pending.closed(self.registry.groups)

    @without_autocast
    def described(self) -> StepPlan:
        """How the next step of all parameters runs."""
        registry = self.registry
        jobs, views = registry.looked_at(), [*registry.views()]
        names = {here: place.name or str(place.number) for place, here, _ in views}
        keys = self._chain.total_keys
        plan = self.backend.described(jobs, keys, [names[job.param] for job in jobs])
        idle = [names[here] for place, here, _ in views if place.param.grad is None]
        if registry.parts is not None:
            more = registry.parts.steps.described(names)
            plan = dataclasses.replace(
                plan,
                kernels=(*plan.kernels, *more.kernels),
                eager=(*plan.eager, *more.eager),
                owned=more.owned,
            )
        return dataclasses.replace(plan, chain=repr(self._chain), without_gradient=tuple(idle))
