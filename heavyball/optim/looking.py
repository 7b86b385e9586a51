"""What an optimizer shows of itself: its chain, its plan, its numbers."""

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.diagnostics.plan import StepPlan
from heavyball.diagnostics.report import optimizer_repr, routing_table, state_bytes
from heavyball.metrics.elements import MEASURES
from heavyball.metrics.totals import totals
from heavyball.optim.registry import Registry
from heavyball.optim.saving import Saving
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.tracing import opaque


class Looking(Saving):
    """The part of `ChainOpt` that is asked and changes no weights."""

    @opaque
    def metrics(self) -> dict[str, Tensor]:
        """What the last step did, by group: 0-d tensors on the device, see `heavyball.metrics`.

        Nothing waits for the device. Without `metrics=True` the first call asks for them, and the
        numbers of steps are NaN until the next one.
        """
        if not self._chain.around:
            self._chain = Chain(
                self._chain.given, type(self).__name__, self._chain.storage, MEASURES
            )
            self._rebuild()
        with torch.no_grad():
            return totals(self._registry, self._steps.measured)

    def state_bytes(self) -> int:
        """Bytes of all state tensors held at this moment."""
        return state_bytes(self.state)

    @property
    def d(self) -> list[float]:
        """The estimated distance of each group, of a chain that finds its learning rate.

        In a step of one parameter at a time it counts those that were stepped so far. It is read from
        the device, so a program that asks in every step waits in every step.
        """
        estimate, groups = self._steps.estimates()
        return [float(group[estimate.name]) for group in groups]

    @property
    def effective_lr(self) -> list[float]:
        """What multiplies each group's updates in the next step: lr d, without `warmup_steps`."""
        estimate, groups = self._steps.estimates()
        entry = estimate.steps_with or estimate.name
        ahead = [self._registry.schedules.ahead(i, group) for i, group in enumerate(groups)]
        return [float(group[entry]) * float(group["lr"]) for group in ahead]

    @property
    def chain(self) -> Chain:
        """The chain as it runs: checked, completed and named."""
        return self._chain

    @property
    def registry(self) -> Registry:
        """The parameters: where each stands, what runs for it, its state and its part of a step."""
        return self._registry

    def routing(self) -> str:
        """A table of which parameter got which chain, and why."""
        registry = self._registry
        return routing_table(self.param_groups, registry.programs(), registry.reasons)

    @opaque
    def plan(self) -> StepPlan:
        """How the next step runs: which kernels step which parameters, what runs eagerly, and why.

        It is of the parameters that have a gradient now, and makes their state, as a step would. With
        `fuse_backward` each parameter has a kernel launch of its own.

        Errors: as `step`; nothing is stepped.
        """
        with self._inputs.imagined(self.param_groups):
            return self._steps.described()

    @without_autocast
    def kernel_sources(self) -> list[str]:
        """The source of each kernel that steps the parameters which have a gradient now.

        Errors: NotPrintableError if one of them has no kernel, naming what stands in the way.
        """
        from heavyball.compiler.run.engine import sources

        with self._inputs.imagined(self.param_groups):
            return sources(self._registry.looked_at(), self._chain.total_keys)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # so that GradScaler calls step(), which refuses it, and does not fail for want of gradients
        return self._fused.active

    def __repr__(self) -> str:
        return optimizer_repr(type(self).__name__, self._chain, self.param_groups, self.state)
