"""Steps parameters one at a time, each with a backend and so with a table of its own."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.program import HiddenNode, Program
from heavyball.core.transform import FED
from heavyball.diagnostics.advice import Advice
from heavyball.optim.backend import Backend
from heavyball.optim.evaluation import Evaluation
from heavyball.optim.registry import Registry
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.place import Place
from heavyball.runtime.rates import Pending

if TYPE_CHECKING:
    from heavyball.compiler.run.row import Row


@dataclass(eq=False)
class Single:
    """One parameter with a backend, and so with a table, of its own."""

    place: Place
    backend: Backend
    # what the backend sees as the groups of a step
    groups: list[dict[str, Any]]
    refusal: ValueError | None
    row: "Row | None" = None
    # in which run of backward() it was stepped last
    stepped_in: "Backward | None" = None

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the parameter is still at the same place."""
        place = self.place
        if place.index >= len(groups) or groups[place.index] is not place.group:
            return False
        params = place.group["params"]
        return place.position < len(params) and params[place.position] is place.param


# What a reentrant checkpoint's backward runs through, and a call of autograd's engine.
_NODE = torch.autograd.function.BackwardCFunction.apply.__code__
_ENGINE = torch.autograd.graph._engine_run_backward.__code__


class Backward:
    """A run of autograd's engine, in which hooks are called.

    A reentrant checkpoint runs the engine again inside of a run. Its node is known by the number that
    nodes are counted with as they are made.
    """

    def __init__(self, number: int, steps: int):
        self.number = number
        self.steps = steps  # how many steps of all parameters had ended
        self._node = _checkpoint_around()
        self._ended = False
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._ended = True

    def is_part_of_that_of(self, before: "Backward") -> bool:
        """Whether an earlier run was inside of the same call of `backward()`."""
        # runs are counted as they begin, so one with a smaller number is around that of before
        if self is before or self.number < before.number:
            return True
        if self._node is None:
            return False
        if before._node is None:
            return not before._ended
        # checkpoints run backward from the last to the first; those of a later forward pass are newer
        return self._node <= before._node


def _checkpoint_around() -> int | None:
    """The number of the outermost checkpoint's node that has led to this run; None without one."""
    frame, inside, node = sys._getframe(1).f_back, False, None
    while frame is not None:
        inside |= frame.f_code is _ENGINE
        if inside and frame.f_code is _NODE:
            node = frame
        frame = frame.f_back
    return None if node is None else node.f_locals["self"]._sequence_nr()


class Singles:
    """Steps the parameters of an optimizer one at a time.

    backend: the optimizer's, whose kernels they share.
    """

    def __init__(self, registry: Registry, backend: Backend, advice: Advice):
        self.pending = Pending(registry.rates)
        self.registry = registry
        self._backend = backend
        self._advice = advice
        self._known: dict[Tensor, Single] = {}
        self._backward: Backward | None = None
        self._steps = 0  # of all parameters
        self.evaluation: Evaluation | None = None

    def forget(self) -> None:
        """Recheck every parameter: groups have changed."""
        self._known = {}

    def find(self, param: Tensor) -> Single | None:
        """A parameter with its backend; None if it is not one of the optimizer's."""
        single, groups = self._known.get(param), self.registry.groups
        if single is None or not single.holds(groups):
            if single is not None:  # what waits does so by the positions of before
                self.pending.close(groups)
            self._known = self._all(groups)
            single = self._known.get(param)
        return single

    def _all(self, groups: list[dict[str, Any]]) -> dict[Tensor, Single]:
        known = {p: s for p, s in self._known.items() if s.holds(groups)}
        programs = self.registry.programs()
        singles: dict[Tensor, Single] = {}
        for place in self.registry.places():
            param = place.param
            if param in singles:
                singles[param].refusal = ValueError(f"{place.label} is in the optimizer twice")
                continue
            refusal = sums_in(programs[param])
            backend = known[param].backend if param in known else self._backend.another()
            singles[param] = Single(place, backend, [{"params": [param]}], refusal)
        return singles

    @without_autocast
    def step(self, single: Single, what: str) -> None:
        """Step one parameter with its gradient, and free the gradient."""
        schedules = self.registry.schedules
        if schedules.begins((single.place.group,)):
            with schedules.during(self.registry.groups, single.place):
                self._step(single, what)
        else:
            self._step(single, what)

    def _step(self, single: Single, what: str) -> None:
        registry, place = self.registry, single.place
        self._refuse_part(single, what)
        training = place.group.get("train_mode", True)
        evaluation = self.evaluation if "train_mode" in place.group else None
        if evaluation is not None:
            evaluation.notice(place.param)
        try:
            if not (training and single.row is not None and self._again(single, single.row)):
                if single.refusal is not None:
                    raise type(single.refusal)(f"{what}: {single.refusal}")
                registry.check_training(what)
                registry.values.check(registry.groups, place.index)
                if self.pending.node is None:
                    self._anew(single)
                else:
                    self._anew_with_others(single)
        finally:
            if evaluation is not None:
                evaluation.note_one(place.param)
        place.param.grad = None
        registry.note_step()

    def _anew_with_others(self, single: Single) -> None:
        """Step a parameter that gives something to the others."""
        pending, groups = self.pending, self.registry.groups
        if pending.before(single.place, groups):
            self.give_up_state()
        if self._advice.active:
            self._advice.before(groups, pending.waits(groups), [single.place.param])
        self._anew(single)
        if pending.after(groups):
            self.give_up_state()

    def give_up_state(self) -> None:
        """Free the state that its group does not need any more, and the tables that hold it."""
        if self.registry.give_up_state():
            self._backend.forget()
            self.forget()

    def _refuse_part(self, single: Single, what: str) -> None:
        """Refuse a second gradient of a parameter in one `backward()`: each is a part of the whole."""
        number = torch._C._current_graph_task_id()
        if number < 0:  # not in backward()
            return
        if self._backward is None or self._backward.number != number:
            self._backward = Backward(number, self._steps)
        before, single.stepped_in = single.stepped_in, self._backward
        if before is None or before.steps != self._steps:
            return
        if self._backward.is_part_of_that_of(before):
            raise RuntimeError(
                f"{what}: {single.place.label} has a second gradient in one backward(), but was stepped "
                "with the first: it is used in several reentrant checkpoints, or inside and outside of "
                "one. Pass use_reentrant=False to torch.utils.checkpoint, or step without fused backward"
            )

    def end(self) -> None:
        """The step of all parameters has ended."""
        self._steps += 1
        self._backward = None

    def _again(self, single: Single, row: "Row") -> bool:
        registry, index = self.registry, single.place.index
        state = registry.attributes["state"]  # which nobody was shown
        return row.again(state, lambda: registry.values.check(registry.groups, index))

    def _anew(self, single: Single) -> None:
        registry, backend = self.registry, single.backend
        if registry.parts is not None:
            registry.parts.steps.step_one(single.place.param, self.pending)
            return
        attributes = registry.attributes
        if not backend.step_again(single.groups, attributes, self.pending):
            jobs = registry.jobs([single.place])
            backend.step(jobs, [], single.groups, attributes, self.pending)
        if self.pending.node is None:  # else each parameter gives something to all
            single.row = backend.row(registry.values.keys)

    def step_given(self, param: Tensor, group: Mapping[str, Any] | None, index: int | None) -> None:
        """`ChainOpt.step_parameter`."""
        single = self.find(param)
        if single is None:
            raise ValueError(
                f"step_parameter: the tensor of shape {tuple(param.shape)} is not a parameter of this "
                "optimizer"
            )
        place = single.place
        if group is not None and group is not place.group:
            raise ValueError(f"step_parameter: {place.label} is not in the group that was given")
        if index is not None and index != place.position:
            raise ValueError(f"step_parameter: {place.label} is not at index {index!r}")
        if param.grad is not None:
            self.step(single, "step_parameter()")
        self.registry.note_step()


def sums_in(program: Program) -> ValueError | None:
    """The error for a step of one parameter that needs the gradients of others."""
    given = [n for n in program.flat if n.transform.reads_loss or FED in n.transform.context]
    if given and not program.total_keys:
        # where only others' chains read the loss, the gate is what waits for it
        shown = [n.key for n in given if not isinstance(n, HiddenNode)] or ["the gate of the loss"]
        return ValueError(
            f"{' and '.join(shown)} reads what step() is given, so no parameter can be stepped before "
            f"that is called; the chain is {program!r}"
        )
    if not program.total_keys:
        return None
    return ValueError(
        f"{' and '.join(program.total_keys)} needs a sum over all parameters, so no parameter can be "
        f"stepped before the last gradient is there; the chain is {program!r}"
    )
