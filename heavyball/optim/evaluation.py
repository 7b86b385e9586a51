"""The weights to evaluate with, and what was written over them."""

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from heavyball.optim.writes import Writes, version
from heavyball.runtime.job import Scalars
from heavyball.runtime.place import Place
from heavyball.runtime.state import working_param
from heavyball.runtime.step import average
from heavyball.state.held import CORRECTION, PARAM, held

if TYPE_CHECKING:
    from heavyball.distributed.sharded import Sharded

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
            return self.parts.states.average(self.node, self.place.param, trained)
        return average(self.node, trained.detach(), self.state, self.place.group, Scalars())


def stamp(param: Tensor) -> Stamp:
    """What changes when a parameter is written or its `data` replaced."""
    return local(param).data_ptr(), version(param)


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
        # the parameters as the last step has left them; None where weights may still be loaded to a
        # state
        self.written: Writes | None = None
        self._loading = True

    def switch(self, training: bool) -> None:
        """Put the weights to train with into the parameters, or the averages.

        Other weights that were written into the parameters stay there, with a warning: they are the
        point to train on and the average from then on.
        """
        replaced: list[Place] = []
        try:
            if self._switching:  # an exception ended a switch
                self._restore_weights()
            elif self._registry.training:
                self.notice()
            if not training:
                self._show_averages()
                self.written = None
            elif not self._registry.training:
                replaced = _where(list(written(self._evaluated(), self._loaded)))
                self._restore_weights({place.param for place in replaced})
        except BaseException:
            if self._switching:  # what is not in the parameters yet is still in the state
                self._restore_weights()
            raise
        if replaced:
            self._begin_at(replaced)
        if training and not self._loading:
            self.note()

    # ---- weights written in training mode

    def note(self) -> None:
        """Remember each parameter as it is; whatever writes next is somebody else."""
        self._loading = False
        params = [p for group in self._registry.groups for p in group["params"]]
        if self.written is not None and self.written.are_of(params):
            self.written.note()
        else:
            self.written = Writes(params)

    def note_again(self) -> None:
        """Remember it anew, if it was remembered."""
        if self.written is not None:
            self.note()

    def note_one(self, param: Tensor) -> None:
        """Remember it of a parameter that was stepped alone."""
        if self.written is not None:
            self.written.note(param)

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Write parameters and put them back, after a look for what somebody else has written."""
        self.notice()
        try:
            yield
        finally:
            self.note_again()

    def notice(self, only: Tensor | None = None) -> None:
        """Look for weights that somebody has written since the last step, and begin at them.

        Until the next step after a state dict was loaded, weights may be loaded to it.
        """
        known = self.written
        if known is None or not self._registry.training:
            return
        if not (changed := known.changed(only)):
            return
        programs = self._registry.programs()
        places = [
            place
            for place, _, state in self._registry.views()
            if place.param in changed and programs[place.param].evaluators and "step" in state
        ]
        for param in changed:
            known.note(param)
        if places:
            self._begin_at(places)

    def _begin_at(self, places: list[Place]) -> None:
        """Make the parameters' current values the average, and the state it is computed from."""
        programs, params = self._registry.programs(), {place.param for place in places}
        for place, param, state in self._registry.views():
            if place.param not in params:
                continue
            if PARAM + CORRECTION in state:
                state[PARAM + CORRECTION].zero_()
            for node in programs[place.param].evaluators:
                for name, declared in node.transform.states.items():
                    key = node.state_key(name)
                    if declared.holds == "weights" and key in state:
                        value = working_param(param, state).reshape(state[key].shape)
                        held(state, key, "weights").store(value)
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        warn(
            f"{places[0].label}{more}: other weights were written into the parameters than the "
            "optimizer has left there. They are taken for the point to train on and for the average; to "
            "go on with a run, load the state of its optimizer too, see docs/checkpoints.md",
            UserWarning,
        )

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

    def _restore_weights(self, but: Collection[Tensor] = ()) -> None:
        """Restore the training weights. It can be called again after an exception.

        but: parameters that keep what they hold.
        """
        self._switching = True
        for place, param, state in self._registry.views():
            if SAVED_WEIGHTS in state:
                if place.param not in but:
                    param.copy_(state[SAVED_WEIGHTS])
                del state[SAVED_WEIGHTS]
        for group in self._registry.groups:
            group["train_mode"] = True
        self._loaded = {}
        self._switching = False


def _where(looks: list[Look]) -> list[Place]:
    """The parameters that hold something else, waiting once for each device."""
    by_device: dict[torch.device, list[Look]] = defaultdict(list)
    for look in looks:
        by_device[look[1].device].append(look)
    return [
        place
        for several in by_device.values()
        for (place, _), differs in zip(
            several, torch.stack([flag for _, flag in several]).tolist(), strict=True
        )
        if differs
    ]
