"""The weights to evaluate with, and what was written over them."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heavyball.core.program import Node
from heavyball.errors import warn
from heavyball.numerics import working
from heavyball.optim.checkpoint import SAVED_WEIGHTS
from heavyball.runtime.job import Scalars
from heavyball.runtime.place import Place
from heavyball.runtime.step import average

# A parameter, and whether it was written, still on its device.
Look = tuple[Place, Tensor]
# Where a parameter's memory is, and how often it was written; None where torch does not count that.
Stamp = tuple[int, int | None]
# Averages of other devices and kernels differ by roundings.
ROUNDINGS = 8


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A parameter that is evaluated at an average, the node that keeps it, and its state."""

    place: Place
    node: Node
    state: dict[str, Tensor]

    def average(self, trained: Tensor) -> Tensor:
        """What to evaluate with, given the weights to train with."""
        if not self.state["step"]:  # before the first step there is nothing to average
            return trained.detach()
        return average(self.node, trained.detach(), self.state, self.place.group, Scalars())


def stamp(param: Tensor) -> Stamp:
    """What changes when a parameter is written or its `data` replaced."""
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
                yield each.place, _differ(param.detach(), expected)


def _differ(found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape or not found.numel():
        return torch.zeros((), dtype=torch.bool, device=found.device)
    room = ROUNDINGS * torch.finfo(found.dtype).eps
    found, expected = working(found), working(expected)
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    near = (found - expected).abs() <= room * (expected.abs() + scale)
    return ~(near | (found == expected) | (found.isnan() & expected.isnan())).all()


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
