"""Inspection of an optimizer: its chain, its plan, its numbers."""

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
    """The part of `ChainOpt` for inspection, which changes no weights."""

    @opaque
    def metrics(self) -> dict[str, Tensor]:
        """Measurements of the last step, by group: 0-d tensors on the device, see `heavyball.metrics`.

        It does not synchronize with the device. Without `metrics=True`, the first call turns
        measuring on, and the measurements are NaN until the next step.
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
        """The estimated distance of each group, for chains that estimate their learning rate.

        In a step of one parameter at a time, it includes those stepped so far. Reading it
        synchronizes with the device.
        """
        estimate, groups = self._steps.estimates()
        return [float(group[estimate.name]) for group in groups]

    @property
    def effective_lr(self) -> list[float]:
        """The factor of each group's updates in the next step: lr d, without `warmup_steps`."""
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
        """The parameters: the position, program, state and job of each."""
        return self._registry

    def routing(self) -> str:
        """A table of which parameter got which chain, and why."""
        registry = self._registry
        return routing_table(self.param_groups, registry.programs(), registry.reasons)

    @opaque
    def plan(self) -> StepPlan:
        """How the next step runs: which kernels step which parameters, what runs eagerly, and why.

        It covers the parameters that have a gradient, and creates their state, as a step would. With
        `fuse_backward`, each parameter has its own kernel launch.

        Errors: as `step`; nothing is stepped.
        """
        with self._inputs.imagined(self.param_groups):
            return self._steps.described()

    @without_autocast
    def kernel_sources(self) -> list[str]:
        """The source of each kernel that steps the parameters which have a gradient.

        Errors: NotPrintableError if one of them has no kernel, with the reason.
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
