"""Fused backward: step each parameter as soon as its gradient is complete, and free the gradient."""

import functools
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from heavyball.compiler.run.engine import Engine
from heavyball.compiler.run.row import Row
from heavyball.core.program import Program
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.place import Place
from heavyball.runtime.rates import Pending

if TYPE_CHECKING:
    from heavyball.optim.optimizer import ChainOpt


def fuse_backward(opt: "ChainOpt") -> "FusedBackward":
    """Step each parameter inside `backward()`, as soon as its gradient is complete, and free that.

    At no time do all gradients exist. The results are those of the ordinary step with
    `foreach=False` to the bit, and without it too unless matrix methods step small parameters of one
    shape together, whose batched products round otherwise.
    `opt.step()` then ends the step: it steps what has a gradient all the same (one assigned by hand)
    and must follow every `backward()`. Calling this again changes nothing; `remove()` undoes it. A
    copied or unpickled optimizer is fused as its original was, over its own parameters.

    Errors: ValueError if a chain in use needs a sum over all parameters, naming the element, or a
        parameter is in the optimizer twice. In `backward()`: RuntimeError for a second gradient of a
        parameter before `step()`, in evaluation mode, and where two optimizers would step a parameter;
        else what `step()` raises. In `step()`: RuntimeError when a GradScaler calls it.
    """
    from heavyball.optim.optimizer import ChainOpt

    if not isinstance(opt, ChainOpt):
        raise TypeError(
            f"fuse_backward: expected an optimizer of heavyball, got {type(opt).__name__}"
        )
    if opt._fused is None:
        opt._fused = FusedBackward(opt)
    return opt._fused


# Which fused optimizers each parameter belongs to, and how often that has changed.
_owners = WeakTensorKeyDictionary()
_changes = 0


class FusedBackward:
    """The hooks that step an optimizer's parameters inside `backward()`."""

    def __init__(self, opt: "ChainOpt"):
        self._opt = weakref.ref(opt)  # parameters outlive optimizers, and hold their hooks
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._stepped: set[Tensor] = set()
        self.attach()

    def remove(self) -> None:
        """Take the hooks away: from now on `backward()` leaves gradients, and `step()` uses them."""
        for param, handle in self._handles.items():
            handle.remove()
            _owners[param].discard(self)
        self._handles = {}
        opt = self._opt()
        if opt is not None and opt._fused is self:
            opt._fused = None

    def attach(self) -> None:
        """Hook on to every parameter that can have a gradient and has no hook yet."""
        global _changes
        opt = self._opt()
        assert opt is not None
        places = list(opt._places())
        for place in places:
            single = opt._singles.find(place.param)
            if single is not None and single.refusal is not None:
                raise ValueError(f"fuse_backward: {single.refusal}")
        refuse_processes(places)
        for place in places:
            param = place.param
            if param.requires_grad and param not in self._handles:
                owners = _owners.setdefault(param, weakref.WeakSet())
                owners.add(self)
                hook = functools.partial(_on_gradient, weakref.ref(self), owners)
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)
                _changes += 1

    def begin(self) -> None:
        """Begin a step: no parameter has been stepped in it."""
        self._stepped.clear()

    @property
    def has_begun(self) -> bool:
        """Whether a parameter has been stepped in this step."""
        return bool(self._stepped)

    def on_gradient(self, param: Tensor, owners: weakref.WeakSet) -> None:
        """A parameter's gradient is complete: step it."""
        opt = self._opt()
        single = None if opt is None else opt._singles.find(param)
        if opt is None or single is None:  # a parameter that has left the optimizer
            self._handles.pop(param).remove()
            owners.discard(self)
            return
        if len(owners) > 1:
            raise RuntimeError(
                f"{single.place.label} is in {len(owners)} optimizers that step inside backward(), "
                "and only one of them could: remove() the other's hooks"
            )
        again = param in self._stepped
        if again and not opt._fused_ends_itself:
            raise RuntimeError(
                f"{single.place.label} has a second gradient before step(), but was stepped with the "
                "first: with fuse_backward, call step() after every backward(); to accumulate "
                "gradients, put `accumulate` into the chain"
            )
        opt._singles.step(single, "backward()")
        if again:
            self.begin()
        self._stepped.add(param)

    def check_left(self) -> None:
        """Before the step ends: no parameter may be stepped a second time."""
        opt = self._opt()
        assert opt is not None
        if any(param.grad is not None for param in self._stepped):
            for place in opt._places():
                if place.param in self._stepped and place.param.grad is not None:
                    raise RuntimeError(
                        f"{place.label} was stepped in backward() and has a gradient again: with "
                        "fuse_backward, call step() after every backward(), or zero_grad() to drop it"
                    )

    def finish(self) -> None:
        """End the step: free the gradients that it found, and hook on to what came in the meantime."""
        opt = self._opt()
        assert opt is not None
        params = [p for group in opt.param_groups for p in group["params"]]
        for param in params:
            if param.grad is not None:
                param.grad = None
        if any(p.requires_grad and p not in self._handles for p in params):
            self.attach()
        self.begin()


def _on_gradient(
    fused: "weakref.ref[FusedBackward]", owners: weakref.WeakSet, param: Tensor
) -> None:
    found = fused()
    if found is None:
        return
    if torch.is_grad_enabled():  # backward(create_graph=True)
        with torch.no_grad():
            found.on_gradient(param, owners)
    else:
        found.on_gradient(param, owners)


@dataclass(eq=False)
class Single:
    """One parameter with an engine, and so with a table, of its own."""

    place: Place
    engine: Engine
    # what the engine sees as the groups of a step
    groups: list[dict[str, Any]]
    refusal: ValueError | None
    row: Row | None = None
    # in which run of backward() it was stepped last
    stepped_in: "Backward | None" = None

    def holds(self, opt: "ChainOpt") -> bool:
        """Whether the parameter still stands where it stood."""
        place, groups = self.place, opt.param_groups
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
    """Steps the parameters of an optimizer one at a time."""

    def __init__(self, opt: "ChainOpt"):
        self._opt = weakref.proxy(opt)
        self._known: dict[Tensor, Single] = {}
        self.pending = Pending(opt._together)
        self._backward: Backward | None = None
        self._steps = 0  # of all parameters

    def forget(self) -> None:
        """Look for every parameter anew: groups have changed."""
        self._known = {}

    def find(self, param: Tensor) -> Single | None:
        """A parameter with its engine; None if it is not one of the optimizer's."""
        single = self._known.get(param)
        if single is None or not single.holds(self._opt):
            if single is not None:  # what waits does so by the positions of before
                self.pending.close(self._opt.param_groups)
            self._known = self._found()
            single = self._known.get(param)
        return single

    def _found(self) -> dict[Tensor, Single]:
        known = {p: s for p, s in self._known.items() if s.holds(self._opt)}
        programs = self._opt._all_programs()
        mode, shared = self._opt._compile, self._opt._engine.known
        found: dict[Tensor, Single] = {}
        for place in self._opt._places():
            param = place.param
            if param in found:
                found[param].refusal = ValueError(f"{place.label} is in the optimizer twice")
                continue
            refusal = sums_in(programs[param])
            engine = known[param].engine if param in known else Engine(mode, shared)
            found[param] = Single(place, engine, [{"params": [param]}], refusal)
        return found

    @without_autocast
    def step(self, single: Single, what: str) -> None:
        """Step one parameter with its gradient, and free the gradient."""
        opt, place = self._opt, single.place
        self._refuse_part(single, what)
        training = place.group.get("train_mode", True)
        if not (training and single.row is not None and self._again(single, single.row)):
            if single.refusal is not None:
                raise type(single.refusal)(f"{what}: {single.refusal}")
            opt._check_mode(what)
            opt._check_groups(place.index)
            if self.pending.node is None:
                self._anew(single)
            else:
                self._anew_with_others(single)
        place.param.grad = None
        # what a scheduler looks at to see whether step() came first; such trainers need not call it
        opt._opt_called = True

    def _anew_with_others(self, single: Single) -> None:
        """Step a parameter that gives something to the others."""
        opt, pending, groups = self._opt, self.pending, self._opt.param_groups
        if pending.before(single.place, groups):
            opt._give_up_state()
        if opt._advice.active:
            opt._advice.before(groups, pending.waits(groups), [single.place.param])
        self._anew(single)
        if pending.after(groups):
            opt._give_up_state()

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

    def _again(self, single: Single, row: Row) -> bool:
        attributes = self._opt.__dict__
        return row.again(attributes["state"], lambda: self._opt._check_groups(single.place.index))

    def _anew(self, single: Single) -> None:
        opt, engine = self._opt, single.engine
        if not engine.step_again(single.groups, opt.__dict__, self.pending):
            jobs = opt._jobs([single.place])
            engine.step(jobs, [], opt._foreach, single.groups, opt.__dict__, self.pending)
        if self.pending.node is None:  # else each parameter gives something to all
            keys = ("lr", "warmup_steps", "seed", *opt._chain.hyper)
            single.row = Row.of(engine.plan, keys)

    def step_given(self, param: Tensor, group: Mapping[str, Any] | None, index: int | None) -> None:
        """`ChainOpt.step_parameter`."""
        single = self.find(param)
        if single is None:
            raise ValueError(
                f"step_parameter: a tensor of shape {tuple(param.shape)} that is not a parameter of "
                "this optimizer"
            )
        place = single.place
        if group is not None and group is not place.group:
            raise ValueError(f"step_parameter: {place.label} is not in the group that was given")
        if index is not None and index != place.position:
            raise ValueError(f"step_parameter: {place.label} does not stand at index {index!r}")
        if param.grad is not None:
            self.step(single, "step_parameter()")
        self._opt._opt_called = True


# ---- refusals


def sums_in(program: Program) -> ValueError | None:
    """What to raise where a parameter's step needs the other parameters' gradients."""
    if not program.total_keys:
        return None
    return ValueError(
        f"{' and '.join(program.total_keys)} needs a sum over all parameters, so no parameter can be "
        f"stepped before the last gradient is there; the chain is {program!r}"
    )


def refuse_processes(places: list[Place]) -> None:
    """Refuse replicas: their gradients are averaged only after they are complete here."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if places and distributed.get_world_size() > 1:
        raise ValueError(
            f"fuse_backward: {places[0].label} in {distributed.get_world_size()} processes would be "
            "stepped before its gradient is averaged over them; step without fuse_backward"
        )


def refuse_scaler(opt: "ChainOpt") -> None:
    """Refuse a GradScaler, which leaves what it wants done with the scale as attributes."""
    if "found_inf" in vars(opt):
        for name in ("found_inf", "grad_scale"):
            vars(opt).pop(name, None)
        raise RuntimeError(
            "GradScaler with fuse_backward: the parameters were already stepped in backward(), with "
            "scaled gradients. Start again from a checkpoint, with bfloat16 or float32 and without a "
            "scaler, or without fuse_backward"
        )


def refuse_rivals(opt: "ChainOpt") -> None:
    """Refuse parameters whose gradients another optimizer frees before this one sees them."""
    if opt._rivals_checked == _changes:
        return
    for place in opt._places():
        others = [other for other in _owners.get(place.param, ()) if other is not opt._fused]
        if others:
            raise RuntimeError(
                f"{place.label} is stepped by another optimizer inside backward(), which frees its "
                "gradient: remove() the other's hooks, or leave the parameter to one of the two"
            )
    opt._rivals_checked = _changes
