"""The parameters of an optimizer: the place, program, state and jobs of each."""

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from heavyball.core.chain import Chain
from heavyball.core.program import Program
from heavyball.distributed import check_parts, is_sharded
from heavyball.numerics import lasting, version_of
from heavyball.optim.arguments import routed_name
from heavyball.optim.checkpoint import convert, value_shapes
from heavyball.optim.checks import check_gradient, check_shape, check_state, labelled, overlaps
from heavyball.optim.estimate import warn_of_half
from heavyball.optim.options import Options
from heavyball.optim.reconcile import fitting_state, refuse_replaced
from heavyball.optim.scheduling import Scheduling
from heavyball.optim.values import Values
from heavyball.runtime.addresses import as_usable, check_memory, check_plain, check_state_memory
from heavyball.runtime.job import Counts, Job, Scalars
from heavyball.runtime.place import Place, describe
from heavyball.runtime.rates import Together
from heavyball.runtime.state import Own, add_missing_state
from heavyball.state.held import stream_of

if TYPE_CHECKING:
    from heavyball.distributed.sharded import Sharded


class Registry:
    """What an optimizer knows about its parameters.

    Groups and state are read from the optimizer each time, since users change and replace them. What
    was done to them by hand is noticed by `programs`.

    owner: the optimizer, which has this registry. rounds: whether 16-bit values are rounded
        stochastically.
    """

    def __init__(self, owner: Optimizer, chain: Chain, rounds: bool):
        self.type = type(owner)
        self.chain = chain
        self.rates = Together(chain)
        self.values = Values(chain, self.rates)
        self.schedules = Scheduling(chain)
        self._owner = weakref.proxy(owner)  # else it would be freed late
        self._rounds = rounds
        self._programs: dict[Tensor, Program] = {}
        # what programs and state were made for
        self._made_for: dict[Tensor, tuple[Any, ...]] = {}
        # state of `init_state`, with versions
        self._fresh: dict[Tensor, list[tuple[Tensor, int | None]]] = {}
        self._scalars: list[Scalars] = []
        self._counts = Counts()
        # what knows of the parts that other processes hold
        self.parts: Sharded | None = None

    def find_parts(self, options: Options) -> None:
        """Find out whether other processes hold parts of the parameters, or take part in a step."""
        several = options.replicas is not None or options.stages is not None
        params = (param for group in self.groups for param in group["params"])
        if self.parts is None and (several or any(map(is_sharded, params))):
            from heavyball.distributed.sharded import Sharded

            self.parts = Sharded(self, options)

    def owners(self) -> list[int]:
        """Who owns each parameter, if there are parts; state of owners is with them in a copy too."""
        if self.parts is None:
            return []
        known = self.parts.plan.current()
        return [known[place.param].owner for place in self.places()]

    def keep_owners(self, owners: Collection[int]) -> None:
        """Let them be those of the optimizer that this one is a copy of."""
        if self.parts is not None and owners:
            self.parts.plan.keep_owners([place.param for place in self.places()], owners)

    def renewed(self, owner: Optimizer) -> "Registry":
        """A registry of the same parameters, whose groups and state have been replaced."""
        renewed = Registry(owner, self.chain, self._rounds)
        renewed._programs, renewed._made_for = self._programs, self._made_for
        if self.parts is not None:
            renewed.parts = self.parts.renewed(renewed)
        return renewed

    # ---- groups and state

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self._owner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of each parameter, which the caller may change."""
        return self._owner.state

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The optimizer's own, see `heavyball.compiler.run.watch.Snapshot`."""
        return self._owner.__dict__

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The defaults of groups."""
        return self._owner.defaults

    @property
    def training(self) -> bool:
        """Whether the parameters hold the weights to train with."""
        return all(group.get("train_mode", True) for group in self.groups)

    def check_training(self, what: str) -> None:
        """Refuse a step in evaluation mode.

        Errors: RuntimeError naming what was called.
        """
        if not self.training:
            raise RuntimeError(
                f"{self.type.__name__}.{what} in evaluation mode, in which the parameters hold "
                "the average: call train() before the forward pass of the step"
            )

    def note_step(self) -> None:
        """Prevent the warning of schedulers that `step()` was not called first."""
        self._owner._opt_called = True  # type: ignore[attr-defined]

    def places(self) -> Iterator[Place]:
        """The place of each parameter."""
        first = 0
        for index, group in enumerate(self.groups):
            for position, (name, param) in enumerate(labelled(index, group)):
                yield Place(param, group, index, position, first + position, name)
            first += len(group["params"])

    # ---- programs

    def resolved(self, index: int) -> dict[Tensor, Program]:
        """The programs of a new group's parameters.

        Errors: ValueError naming a parameter that the chain cannot step.
        """
        return {
            param: self._resolved(describe(name, index, position, param), name, param)
            for position, (name, param) in enumerate(labelled(index, self.groups[index]))
        }

    def add(self, index: int, programs: Mapping[Tensor, Program]) -> None:
        """Take a new group in, with the programs of its parameters."""
        group = self.groups[index]
        self._programs.update(programs)
        self._made_for.update((param, _form(param)) for param in programs)
        named = enumerate(labelled(index, group))
        labels = {param: describe(name, index, i, param) for i, (name, param) in named}
        warn_of_half(self.chain, labels)
        self.rates.begin(index, self.groups)
        self.schedules.settle(index, self.groups)

    def settle(self) -> None:
        """Take the numbers that groups keep, and those of schedules, as this optimizer's own."""
        for index, group in enumerate(self.groups):
            self.rates.settle(group)
            self.schedules.settle(index, self.groups)

    def _resolved(self, label: str, name: str | None, param: Tensor) -> Program:
        if param.is_complex() or not param.is_floating_point():
            raise ValueError(f"{label} is {param.dtype}, expected a real floating-point dtype")
        check = check_parts if is_sharded(param) else check_plain
        check(label, param)
        if overlaps(param):
            raise ValueError(f"{label}: its elements overlap in memory; pass a contiguous tensor")
        self.chain.storage.check_param(label, param)
        program = self.chain.program_for(routed_name(name, self.groups), param)
        check_shape(label, param, program)
        return program

    def reasons(self, name: str | None, param: Tensor) -> list[str]:
        """Why a parameter has its program, in words."""
        program = self._programs[param]
        return self.chain.reasons_for(program, routed_name(name, self.groups), param)

    def programs(self) -> Mapping[Tensor, Program]:
        """Programs by parameter, brought up to what the groups hold now.

        A parameter of another dtype gets its state in the dtype that goes with it. Removed parameters
        keep their state, in case they come back.

        Errors: ValueError naming a parameter that took the place of one with state, or whose state does
            not fit it. Nothing has been changed then.
        """
        places: dict[Tensor, Place] = {}
        for place in self.places():
            places.setdefault(place.param, place)
        changed = [p for p in places if self._made_for.get(p) != _form(p)]
        gone = [p for p in self._programs if p not in places]
        if changed or gone:
            self._reconcile({p: places[p] for p in changed}, gone)
        return self._programs

    def _reconcile(self, changed: Mapping[Tensor, Place], gone: list[Tensor]) -> None:
        """Adopt parameters added to the groups or changed, and release removed ones."""
        state, labels = self.state, {param: place.label for param, place in changed.items()}
        new = [param for param in changed if param not in self._programs]
        refuse_replaced(new, gone, labels, state)
        programs, expected = dict[Tensor, Program](), dict[Tensor, dict[str, Tensor]]()
        for param, place in changed.items():
            label = labels[param]
            program = programs[param] = self._resolved(label, place.name, param)
            if is_sharded(param) and "step" in state.get(param, ()):
                if param not in self._made_for:
                    continue  # of a copy, or put there by hand: each step looks at its shapes
                raise ValueError(
                    f"{label} was redistributed or its dtype changed, but its state was not: save a "
                    "state dict before, create a new optimizer after, and load it"
                )
            if "step" in state.get(param, ()):
                expected[param] = fitting_state(label, program, param, place.group, state[param])
        for param, tensors in expected.items():
            shapes = value_shapes(programs[param], param, tensors)
            convert(state[param], tensors, programs[param], shapes)
        unlike = labels if self._programs else {}  # in a copy they are as they were
        for param in gone:
            del self._programs[param], self._made_for[param]
        self._programs.update(programs)
        self._made_for.update((param, _form(param)) for param in changed)
        if self.parts is not None:
            self.parts.plan.forget()
        warn_of_half(self.chain, unlike)

    # ---- jobs

    def jobs(self, places: list[Place] | None = None) -> list[Job]:
        """Every parameter that has a gradient (or those of `places`), checked, with its state."""
        if places is not None and all(
            self._made_for.get(place.param) == _form(place.param) for place in places
        ):
            programs: Mapping[Tensor, Program] = self._programs  # as it was noticed last
        else:
            programs = self.programs()
        if self.parts is not None:
            return self.parts.steps.jobs(None if places is None else [p.param for p in places])
        state, stepped = self.state, []
        for place in self.places() if places is None else places:
            if place.param.grad is not None:
                _check(place, programs[place.param], state.get(place.param, {}))
                if (
                    place.param.numel() > 0
                ):  # else there is nothing to step, and no mean of it to keep
                    stepped.append(place)
        return [self._job(place, programs[place.param]) for place in stepped]

    def _job(self, place: Place, program: Program) -> Job:
        """A parameter's part of a step. Later code sees the parameter only through its job."""
        param, group = place.param, place.group
        while len(self._scalars) <= place.index:
            self._scalars.append(Scalars())
        state = self._state_of(place, program)
        if not program.owns(state):
            state = Own(state, program)
        job = Job(program, param, param.grad, group, state, self._scalars[place.index])  # type: ignore[arg-type]
        kept = (param, *state.values())
        random = self.chain.storage.is_random or any(t.dtype == torch.bfloat16 for t in kept)
        if random and self._rounds:
            job.stream = stream_of(group["seed"], place.number)
        if program.has_whole:
            job.place = place.number
            job.noise = stream_of(group["seed"], place.number) if program.has_noise else 0
            job.counts = self._counts
        return job

    # ---- state

    def _state_of(self, place: Place, program: Program) -> dict[str, Tensor]:
        """A parameter's state, with what it lacks."""
        param, state = place.param, self.state[place.param]
        if param in self._fresh:
            self._drop_untouched(param, Own(state, program))
        if "step" not in state or not program.lazy_keys <= state.keys():
            with lasting():
                add_missing_state(program, param, place.group, state)
        as_usable(program, state, param.device)
        return state

    def init_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none."""
        if self.parts is not None:
            self.parts.states.init()
            return
        programs, state = self.programs(), self.state
        for place in self.places():
            param = place.param
            if param.requires_grad and param.numel() and "step" not in state.get(param, ()):
                self._state_of(place, programs[param])
                self._note_unstepped(place)

    def _note_unstepped(self, place: Place) -> None:
        """Remember the state of a parameter that no step has touched."""
        made = Own(self.state[place.param], self._programs[place.param])
        self._fresh[place.param] = [(tensor, version_of(tensor)) for tensor in made.values()]

    def take_unstepped(self, other: "Registry") -> None:
        """Copy another registry's knowledge of untouched state, for the same tensors."""
        self._fresh = other._fresh

    def unstepped(self) -> list[int]:
        """The numbers of the parameters whose state nobody has touched since `init_state`."""
        state, programs = self.attributes["state"], self._programs
        return [
            place.number
            for place in self.places()
            if place.param in self._fresh
            and self._is_untouched(place.param, Own(state[place.param], programs[place.param]))
        ]

    def note_unstepped(self, numbers: Collection[int]) -> None:
        """Know it of a copy of parameters and state."""
        self.programs()
        for place in self.places() if numbers else ():
            if place.number in numbers:
                self._note_unstepped(place)

    def looked_at(self) -> list[Job]:
        """The jobs of a step that does not come now; weights may be loaded before it does."""
        state, untouched = self.state, {*self.unstepped()}
        places = [
            place
            for place in self.places()
            if place.number in untouched or "step" not in state.get(place.param, ())
        ]
        jobs = self.jobs()
        for place in places if self.parts is None else ():
            if "step" in state.get(place.param, ()):
                self._note_unstepped(place)
        return jobs

    def _is_untouched(self, param: Tensor, state: Mapping[str, Tensor]) -> bool:
        made, present = self._fresh[param], list(state.values())
        return len(made) == len(present) and all(
            tensor is own and version_of(tensor) == version
            for own, (tensor, version) in zip(present, made, strict=True)
        )

    def _drop_untouched(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Drop untouched state of `init_state`: weights may have been loaded since it was made."""
        if self._is_untouched(param, state):
            state.clear()
        del self._fresh[param]

    def views(self) -> Iterator[tuple[Place, Tensor, dict[str, Tensor]]]:
        """Each parameter as this process has it, with its state."""
        if self.parts is not None:
            yield from (
                (part.place, part.here, part.held) for part in self.parts.plan.current().values()
            )
            return
        states = self.state
        for place in self.places():
            yield place, place.param, states.get(place.param, {})

    def whole(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A state dict in which state is as other processes can load it; they all take part."""
        if self.parts is not None:
            numbers = [n for group in saved["param_groups"] for n in group["params"]]
            params = [param for group in self.groups for param in group["params"]]
            self.parts.saving.save(saved["state"], dict(zip(numbers, params, strict=True)))
        return saved

    def agreeing(self) -> AbstractContextManager[None]:
        """A context in which errors raise on all processes that share the parameters."""
        return contextlib.nullcontext() if self.parts is None else self.parts.saving.agreeing()

    def put_state(self, loaded: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take state that was loaded."""
        if self.parts is not None:
            self.parts.saving.put(loaded)
        else:
            self.attributes["state"].update(loaded)

    def give_up_state(self) -> bool:
        """Free the state that its group does not need any more; says whether there was some."""
        rate, given_up = self.chain.rate, False
        if rate is None:
            return False
        for name, declared in rate.transform.states.items():
            for group in self.groups if declared.until else ():
                if declared.given_up(rate.transform.options, group):
                    for param in group["params"]:
                        state = self.state.get(param, {})
                        given_up |= state.pop(rate.state_key(name), None) is not None
        return given_up


def _form(param: Tensor) -> tuple[Any, ...]:
    placed = (param.device_mesh, param.placements) if is_sharded(param) else ()  # type: ignore[attr-defined]
    return param.shape, param.dtype, *placed


def _check(place: Place, program: Program, state: Mapping[str, Tensor]) -> None:
    """Refuse a parameter, gradient or state that a step could not use."""
    param, label = place.param, place.label
    assert param.grad is not None
    check_memory(label, param)
    check_gradient(label, param, param.grad)
    check_memory(f"{label}: its gradient", param.grad)
    check_state(label, program, param, state)
    check_state_memory(label, program, param, place.group, state)
