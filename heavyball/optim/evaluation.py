"""The weights to evaluate with, and what was written over them."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heavyball.core.program import Node
from heavyball.distributed import local
from heavyball.errors import warn
from heavyball.numerics import working
from heavyball.optim.checkpoint import SAVED_WEIGHTS
from heavyball.optim.registry import Registry
from heavyball.runtime.job import Scalars
from heavyball.runtime.place import Place
from heavyball.runtime.step import average

if TYPE_CHECKING:
    from heavyball.distributed.steps import Sharded

# A parameter, and whether it was written, still on its device.
Look = tuple[Place, Tensor]
# Where a parameter's memory is, and how often it was written; None where torch does not count that.
Stamp = tuple[int, int | None]
# Averages of other devices and kernels differ by roundings.
ROUNDINGS = 8


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A parameter that is evaluated at an average, the node that keeps it, and its state.

    param, state: as this process has them. parts: what knows of those that others have.
    """

    place: Place
    node: Node
    state: dict[str, Tensor]
    param: Tensor
    parts: "Sharded | None"

    def average(self, trained: Tensor) -> Tensor:
        """What to evaluate with, given the weights to train with."""
        if not self.state["step"]:  # before the first step there is nothing to average
            return trained.detach()
        if self.parts is not None:
            return self.parts.average(self.node, self.place.param, trained)
        return average(self.node, trained.detach(), self.state, self.place.group, Scalars())


def stamp(param: Tensor) -> Stamp:
    """What changes when a parameter is written or its `data` replaced."""
    param = local(param)
    return param.data_ptr(), None if param.is_inference() else param._version


def written(evaluated: Iterable[Evaluated], loaded: Mapping[Tensor, Stamp]) -> Iterator[Look]:
    """The parameters in evaluation mode, and whether something else than their average was put there.

    loaded: the stamps of those whose average came in a state dict. Until they are written again, what
        they hold may be older than that.
    """
    for each in evaluated:
        param = each.place.param
        if SAVED_WEIGHTS in each.state and loaded.get(param) != stamp(param):
            # a look is not worth failing for want of memory
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
                expected = each.average(each.state[SAVED_WEIGHTS]).to(param.dtype)
                yield each.place, _differ(each.param.detach(), expected)


def _differ(found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape or not found.numel():
        return torch.zeros((), dtype=torch.bool, device=found.device)
    room = ROUNDINGS * torch.finfo(found.dtype).eps
    found, expected = working(found), working(expected)
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    near = (found - expected).abs() <= room * (expected.abs() + scale)
    return ~(near | (found == expected) | (found.isnan() & expected.isnan())).all()


class Evaluation:
    """Switches an optimizer's parameters between the weights to train with and their averages.

    loaded: what the parameters were when evaluation mode came in a state dict.
    """

    def __init__(self, registry: Registry, loaded: Mapping[Tensor, Stamp] = MappingProxyType({})):
        self._registry = registry
        self._loaded = loaded
        self._switching = False

    def switch(self, training: bool) -> None:
        """Put the weights to train with into the parameters, or the averages.

        Warns if other weights were written into the parameters in evaluation mode.
        """
        looks: list[Look] = []
        try:
            if self._switching:  # an exception ended a switch
                self._restore_weights()
            if not training:
                self._show_averages()
            elif not self._registry.training:
                looks = list(written(self._evaluated(), self._loaded))
                self._restore_weights()
        except BaseException:
            if self._switching:  # what is not in the parameters yet is still in the state
                self._restore_weights()
            raise
        warn_of_written(looks)

    def _evaluated(self) -> Iterator[Evaluated]:
        """Every parameter that is averaged and has state."""
        programs, parts = self._registry.programs(), self._registry.parts
        for place, param, own in self._registry.views():
            for node in programs[place.param].evaluators if "step" in own else ():
                yield Evaluated(place, node, own, param, parts)

    def _show_averages(self) -> None:
        evaluated = list(self._evaluated())
        if not self._registry.training and all(SAVED_WEIGHTS in each.state for each in evaluated):
            return
        self._switching = True
        for group in self._registry.groups:
            group["train_mode"] = False  # first, so that no step takes an average for the weights
        for each in evaluated:
            if SAVED_WEIGHTS not in each.state:  # a parameter may stand twice
                value = each.average(each.param)
                each.state[SAVED_WEIGHTS] = each.param.detach().clone()
                each.param.copy_(value)
        self._loaded = {}
        self._switching = False

    def _restore_weights(self) -> None:
        """Put the weights to train with back. What an exception has ended can be begun again."""
        self._switching = True
        for _, param, state in self._registry.views():
            if SAVED_WEIGHTS in state:
                param.copy_(state[SAVED_WEIGHTS])
                del state[SAVED_WEIGHTS]
        for group in self._registry.groups:
            group["train_mode"] = True
        self._loaded = {}
        self._switching = False


def warn_of_written(looks: list[Look]) -> None:
    """Say which weights `train()` has thrown away."""
    by_device: dict[torch.device, list[Look]] = defaultdict(list)
    for look in looks:
        by_device[look[1].device].append(look)
    lost = [
        place.label
        for several in by_device.values()
        for (place, _), differs in zip(
            several, torch.stack([flag for _, flag in several]).tolist(), strict=True
        )
        if differs
    ]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        warn(
            f"{lost[0]}{more}: other weights were written in evaluation mode, where the parameters hold "
            "the average, and train() has replaced them by those that were trained; load weights in "
            "training mode, and the optimizer's state with them, see docs/checkpoints.md",
            UserWarning,
        )
