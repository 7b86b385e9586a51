"""ChainOpt: a torch optimizer whose step is a chain of transforms."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from heavyball.compiler.run.engine import Engine, sources
from heavyball.compiler.run.watch import SHOWN
from heavyball.core.chain import Chain
from heavyball.core.hyper import check_live, finite, frozen, nonnegative
from heavyball.core.program import Program
from heavyball.diagnostics.advice import Advice
from heavyball.diagnostics.report import optimizer_repr, routing_table
from heavyball.errors import nearest
from heavyball.numerics import lasting, version_of
from heavyball.optim.checkpoint import (
    DESCRIPTION,
    SAVED_WEIGHTS,
    LoadResult,
    description,
    migrate,
    plain,
)
from heavyball.optim.checks import (
    TORCH_SWITCHES,
    check_entries,
    check_gradient,
    check_shape,
    check_state,
    check_torch_switches,
    checked_lr,
    checked_seed,
    labelled,
    overlaps,
)
from heavyball.optim.estimate import check_alike, check_fixed, warn_of_half
from heavyball.optim.evaluation import Evaluated, Look, Stamp, stamp, warn_of_written, written
from heavyball.optim.fused import FusedBackward, Singles, refuse_rivals, refuse_scaler
from heavyball.optim.loading import fit
from heavyball.optim.reconcile import Kind, kind, notice
from heavyball.optim.validation import check_form
from heavyball.runtime.addresses import as_numbers, check_memory, check_plain, check_state_memory
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.job import Counts, Job, Scalars
from heavyball.runtime.place import Place, describe
from heavyball.runtime.rates import WAITING, Pending, Together
from heavyball.runtime.state import Own, add_missing_state
from heavyball.state.formats import Choice, Storage
from heavyball.state.held import CORRECTION, PARAM, stream_of


class ChainOpt(Optimizer):
    """An optimizer made of a chain of transforms.

    params: tensors, parameter groups, or (name, tensor) pairs, as in torch.
    lr: the step size; its unit is the parameter's over the update's.
    transforms: what happens to the gradient, in order. A chain in which nothing has a
        `weight_decay` gets `decoupled`, one without a writer `descend`, so the step ends in
        `p <- p (1 - lr weight_decay) - lr u`.
    weight_decay: the decay's coefficient, a live hyper-parameter like every float of the chain.
    warmup_steps: lr grows linearly over this many steps of each parameter: lr min(1, t / warmup).
    foreach: False steps one parameter at a time, for the smallest peak memory; else intermediate
        tensors may be kept for all of them where that saves time. The bits are the same where
        no whole transform (SOAP, Muon, PSGD, Shampoo) takes several parameters of one shape at once;
        batched products round otherwise, see docs/fused_backward.md.
    compile: "auto" runs the chain as one compiled kernel where that is possible and warns once where it
        is not; True raises there; False runs it as plain torch operations. Kernels are C++ on the CPU
        and Triton on CUDA.
    stochastic_rounding: how bfloat16 parameters and state and 8-bit codes are written: without bias, or
        to nearest.
    seed: what the bits for the rounding are hashed from, together with the parameter's place, the
        state's name, the parameter's step and the element. They do not touch torch's generators.
    storage_dtype: how state is kept: "float32", "bfloat16", "float16" or "8bit", for all of it or as a
        dict by the state's name or key. None: as it is computed, in float32 (float64 for float64).
    ecc: a 16-bit value and a correction instead: "bf16+8", "bf16+16", "fp16+8" or "fp16+16", likewise.
    param_ecc: the same for the parameters, whose correction is state; they must have that 16-bit dtype.
    fuse_backward: step each parameter inside `backward()`, as soon as its gradient is complete, and
        free the gradient; see `heavyball.fuse_backward`.
    fused, capturable, differentiable: torch's, taken where they ask for nothing that is not so:
        every chain is fused where it can be, elementwise ones can be captured, and none is
        differentiable.

    Errors: TypeError or ValueError when the chain or a hyper-parameter cannot be right, naming it;
        at a step, ValueError before anything has been changed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *transforms: Any,
        weight_decay: float = 0.0,
        warmup_steps: float = 0,
        foreach: bool | None = None,
        compile: bool | str = "auto",
        stochastic_rounding: bool = True,
        seed: int = 0,
        fuse_backward: bool = False,
        storage_dtype: Choice = None,
        ecc: Choice = None,
        param_ecc: str | None = None,
        **unknown: Any,
    ):
        check_torch_switches(type(self).__name__, unknown, foreach)
        for name in unknown.keys() - TORCH_SWITCHES.keys():
            known = (
                "weight_decay",
                "warmup_steps",
                "foreach",
                "compile",
                "stochastic_rounding",
                "seed",
                "fuse_backward",
                "storage_dtype",
                "ecc",
                "param_ecc",
            )
            raise TypeError(
                f"{type(self).__name__} has no option {name!r}; {nearest(name, known)}; the "
                "hyper-parameters of a transform are given to the transform, or per group"
            )
        if not isinstance(stochastic_rounding, bool):
            raise TypeError(f"stochastic_rounding={stochastic_rounding!r}: expected True or False")
        if not isinstance(compile, bool) and compile != "auto":
            raise ValueError(f"compile={compile!r}: expected 'auto', True or False")
        if not isinstance(fuse_backward, bool):
            raise TypeError(f"fuse_backward={fuse_backward!r}: expected True or False")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach={foreach!r}: expected True, False or None")
        lr = checked_lr(lr)
        storage = Storage(storage_dtype, ecc, param_ecc)
        self._chain = Chain(transforms, type(self).__name__, storage)
        if unknown.get("capturable") and any(p.has_whole for p in self._chain.programs):
            raise ValueError(
                "capturable=True: a chain with transforms of whole tensors decides on the host, so it "
                f"cannot be captured in a CUDA graph: {self._chain!r}"
            )
        self._foreach = foreach
        self._compile = compile
        self._stochastic_rounding = stochastic_rounding
        self._engine = Engine(compile)
        self._together = Together(self._chain)
        self._advice = Advice(self._chain)
        self._checked_values: dict[int, list[Any]] = {}
        self._programs: dict[Tensor, Program] = {}
        self._kinds: dict[Tensor, Kind] = {}
        self._fresh: dict[Tensor, list[tuple[Tensor, int | None]]] = {}
        self._singles = Singles(self)
        self._fused: FusedBackward | None = None
        self._rivals_checked = 0
        self._switching = False  # between training and evaluation
        self._loaded_in: dict[Tensor, Stamp] = {}  # evaluation mode, what the parameters were then
        self._scalars: list[Scalars] = []
        self._counts = Counts()
        defaults: dict[str, Any] = {"lr": lr}
        for key, hyper in self._chain.hyper.items():
            defaults[key] = hyper.default
        weight_decay = check_live("weight_decay", weight_decay, 0.0, nonnegative)
        if weight_decay and "weight_decay" not in defaults:
            raise ValueError(f"weight_decay={weight_decay}: no element of the chain decays")
        for program in self._chain.programs if weight_decay else ():
            if not any(key == "weight_decay" for n in program.flat for key, _ in n.hyper.values()):
                raise ValueError(
                    f"weight_decay={weight_decay} would not reach the branch {program!r}: give it to "
                    "each decay in the chain"
                )
        if weight_decay and defaults["weight_decay"] not in (0.0, weight_decay):
            raise ValueError(
                f"weight_decay={weight_decay}, but the chain says "
                f"{defaults['weight_decay']} ({self._chain.hyper['weight_decay'].owner})"
            )
        if weight_decay:
            defaults["weight_decay"] = weight_decay
        defaults["warmup_steps"] = check_live("warmup_steps", warmup_steps, 0.0, nonnegative)
        defaults["seed"] = checked_seed(seed)
        if any(program.evaluators for program in self._chain.programs):
            defaults["train_mode"] = True
        super().__init__(params, defaults)
        if fuse_backward:
            self._fused = FusedBackward(self)

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state tensors of each parameter, by name."""
        # whoever asks may change it, so the next steps look at every tensor of it
        self.__dict__[SHOWN] = self.__dict__.get(SHOWN, 0) + 1
        return self.__dict__["state"]

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    # whether a second gradient of a parameter begins a new step, with `fuse_backward`
    _fused_ends_itself = False

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, in mid-training too, with hyper-parameters of their own.

        Entries that the chain does not know are kept, saved and loaded, as in torch: they are
        somebody else's.

        Errors: ValueError naming a key that is nearly a known one, a value outside its interval, or a
            parameter that cannot be optimized; the optimizer is then as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        known = [key for key in self.defaults if key not in ("train_mode", "differentiable")]
        check_fixed(self._chain, group)
        check_entries(type(self), group, known, self._chain)
        # a mode is the optimizer's own, whatever another one's group says
        group.pop("train_mode", None)
        if "train_mode" in self.defaults and self.param_groups:
            group["train_mode"] = self.param_groups[0]["train_mode"]
        for key in known:
            if key in group:
                group[key] = self._checked(key, group[key])
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            check_alike(self._chain, self.param_groups)
            found = dict(self._resolve(len(self.param_groups) - 1, group))
            self._singles.forget()
            if self._fused is not None:
                self._fused.attach()
        except Exception:
            self.param_groups.pop()
            self._singles.forget()
            raise
        self._programs.update(found)
        self._kinds.update((param, kind(param)) for param in found)
        index = len(self.param_groups) - 1
        named = enumerate(labelled(index, group))
        warn_of_half(self._chain, {p: describe(name, index, i, p) for i, (name, p) in named})
        self._together.begin(len(self.param_groups) - 1, self.param_groups)
        self._engine.forget()
        self._rivals_checked = -1

    def _resolve(self, index: int, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, Program]]:
        for position, (name, param) in enumerate(labelled(index, group)):
            yield param, self._program_of(describe(name, index, position, param), name, param)

    def _program_of(self, label: str, name: str | None, param: Tensor) -> Program:
        if param.is_complex() or not param.is_floating_point():
            raise ValueError(f"{label} is {param.dtype}, expected a real floating-point dtype")
        check_plain(label, param)
        if overlaps(param):
            raise ValueError(f"{label}: its elements overlap in memory; pass a contiguous tensor")
        self._chain.storage.check_param(label, param)
        program = self._chain.program_for(name, param)
        check_shape(label, param, program)
        return program

    def _all_programs(self) -> dict[Tensor, Program]:
        """Programs by parameter, after a look at what was done to groups and parameters by hand."""
        notice(self, self._programs, self._kinds)
        return self._programs

    def _checked(self, key: str, value: Any) -> Any:
        if key == "lr":
            return checked_lr(value)
        if key == "seed":
            return checked_seed(value)
        if key == "warmup_steps":
            return check_live(key, value, 0.0, nonnegative)
        return self._chain.hyper[key].check(key, value)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of the closure, if one is given.

        Errors: RuntimeError in evaluation mode; ValueError naming a sparse or complex gradient, one
            of the wrong shape, device or dtype, or a hyper-parameter out of its interval. Nothing
            has been changed then.
        """
        if self._fused is not None:
            refuse_scaler(self)
        self._check_mode("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @without_autocast
    def _step(self) -> None:
        self._check_groups()
        refuse_rivals(self)
        if self._fused is not None:
            self._fused.check_left()
        pending = self._singles.pending
        together: Together | Pending = self._together
        begun = pending.waits(self.param_groups)
        if begun:  # by parameters that were stepped one at a time
            begun = pending.before_others(self.param_groups)
            together = pending
        if self._advice.active:
            begun |= self._fused is not None and self._fused.has_begun
            self._advice.before(self.param_groups, begun)
        if not self._engine.step_again(self.param_groups, self.__dict__, together):
            self._engine.step(
                self._jobs(),
                self._chain.total_keys,
                self._foreach,
                self.param_groups,
                self.__dict__,
                together,
            )
        pending.close(self.param_groups)
        self._singles.end()
        self._give_up_state()
        if self._fused is not None:
            self._fused.finish()

    def _give_up_state(self) -> None:
        """Free the state that its group does not need any more."""
        rate = self._chain.rate
        if rate is None:
            return
        for name, declared in rate.transform.states.items():
            for group in self.param_groups if declared.until else ():
                if declared.given_up(rate.transform.options, group):
                    for param in group["params"]:
                        if self.state.get(param, {}).pop(rate.state_key(name), None) is not None:
                            self._engine.forget()
                            self._singles.forget()

    @torch.no_grad()
    def step_parameter(
        self, param: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Step one parameter with the gradient that it has now, and free the gradient.

        For trainers that register hooks of their own; `heavyball.fuse_backward` does it for all
        parameters. A parameter without a gradient is left alone.

        group, index: the parameter's group and its place there, as such trainers give them; they
            are checked, and may be left out.

        Errors: ValueError if it is not a parameter of this optimizer, or its chain needs a sum over
            all parameters; else as `step`. Nothing has been changed then.
        """
        self._singles.step_given(param, group, index)

    def _check_mode(self, what: str) -> None:
        if not self._training():
            raise RuntimeError(
                f"{type(self).__name__}.{what} in evaluation mode, where the parameters hold the "
                "average: call train() before the forward pass that the step is for"
            )

    def _check_groups(self, only: int | None = None) -> None:
        """Check the live hyper-parameters of every group, or of one, where any has changed."""
        keys, changed = ("lr", "warmup_steps", "seed", *self._chain.hyper), {}
        for index, group in enumerate(self.param_groups):
            if only is None or index == only:
                found = [frozen(group.get(key)) for key in keys]
                if found != self._checked_values.get(index):
                    self._check_group(index, group)
                    changed[index] = found
        if changed:
            check_alike(self._chain, self.param_groups)
        if self._chain.rate is not None:
            self._together.take(self.param_groups)
        for index, found in changed.items():
            self._together.begin_again(index, self.param_groups)
            self._checked_values[index] = found

    def _places(self) -> Iterator[Place]:
        """Where each parameter stands."""
        first = 0
        for index, group in enumerate(self.param_groups):
            for position, (name, param) in enumerate(labelled(index, group)):
                yield Place(param, group, index, position, first + position, name)
            first += len(group["params"])

    def _jobs(self, places: list[Place] | None = None) -> list[Job]:
        """Every parameter that has a gradient (or those of `places`), checked, with its state."""
        if places is not None and all(self._kinds.get(p.param) == kind(p.param) for p in places):
            programs = self._programs  # as it was noticed last
        else:
            programs = self._all_programs()
        while len(self._scalars) < len(self.param_groups):
            self._scalars.append(Scalars())
        found = []
        for place in self._places() if places is None else places:
            param = place.param
            if param.grad is not None:
                label, state = place.label, self.state.get(param, {})
                check_memory(label, param)
                check_gradient(label, param, param.grad)
                check_memory(f"{label}: its gradient", param.grad)
                check_state(label, programs[param], param, state)
                check_state_memory(label, programs[param], param, place.group, state)
                if param.numel() > 0:  # else there is nothing to step, and no mean of it to keep
                    found.append(place)
        return [self._job(programs[p.param], p) for p in found]

    def _job(self, program: Program, place: Place) -> Job:
        param, group, scalars = place.param, place.group, self._scalars[place.index]
        state = self._state_of(program, param, group)
        if not program.owns(state):
            state = Own(state, program)
        job = Job(program, param, param.grad, group, state, scalars)  # type: ignore[arg-type]
        kept = (param, *state.values())
        rounded = self._chain.storage.is_random or any(t.dtype == torch.bfloat16 for t in kept)
        if rounded and self._stochastic_rounding:
            job.stream = stream_of(group["seed"], place.number)
        if program.has_whole:
            job.place = place.number
            job.noise = stream_of(group["seed"], place.number) if program.has_noise else 0
            job.counts = self._counts
        return job

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        for key in ("lr", "warmup_steps", "seed", *self._chain.hyper):
            if key not in group:
                raise ValueError(f"parameter group {index} has lost its entry {key!r}")
            value = group[key]
            try:
                if key != "lr":
                    self._checked(key, value)
                # a schedule may end a rounding error below zero, so only the sign is not checked
                elif not isinstance(value, Tensor):
                    check_live(key, value, 0.0, finite)
            except (TypeError, ValueError) as error:
                raise type(error)(f"parameter group {index}: {error}") from None

    def _state_of(self, program: Program, param: Tensor, group: Mapping) -> dict[str, Tensor]:
        state = self.state[param]
        if param in self._fresh:
            self._begin_anew(param, Own(state, program))
        if "step" not in state or not program.lazy_keys <= state.keys():
            with lasting():
                add_missing_state(program, param, group, state)
        as_numbers(program, state, param.device)
        return state

    @torch.no_grad()
    @without_autocast
    def init_state(self) -> Self:
        """Create the state of every parameter that requires a gradient, before the first step.

        The steps are the same to the bit with and without it. `torch.distributed.checkpoint` writes
        into tensors that exist, so it needs this; see docs/checkpoints.md.
        """
        programs = self._all_programs()
        for group in self.param_groups:
            for param in group["params"]:
                if (
                    param.requires_grad
                    and param.numel()
                    and "step" not in self.state.get(param, ())
                ):
                    state = Own(self._state_of(programs[param], param, group), programs[param])
                    self._fresh[param] = [(tensor, version_of(tensor)) for tensor in state.values()]
        self._engine.forget()
        return self

    def _begin_anew(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Drop untouched state of `init_state`: weights may have been loaded since it was made."""
        made, found = self._fresh.pop(param), list(state.values())
        if len(made) == len(found) and all(
            tensor is own and version_of(tensor) == version
            for own, (tensor, version) in zip(found, made, strict=True)
        ):
            state.clear()

    # ---- evaluation weights

    def _training(self) -> bool:
        return all(group.get("train_mode", True) for group in self.param_groups)

    @torch.no_grad()
    @without_autocast
    def train(self, mode: bool = True) -> Self:
        """Put the weights to train with into the parameters (`mode=False`: those to evaluate with).

        A chain with `schedule_free` or `parameter_ema` evaluates at an average. In evaluation mode
        a copy of the training weights is kept, so that training goes on bit for bit. Calling it
        again changes nothing, and for other chains it does nothing at all. Ended by an exception, it
        leaves the weights to train with in the parameters.

        Warns if other weights were written into the parameters in evaluation mode: going back to
        training mode replaces them.
        """
        if not isinstance(mode, bool):
            raise TypeError(f"train(mode={mode!r}): expected True or False")
        if "train_mode" not in self.defaults:
            return self
        looks: list[Look] = []
        try:
            if self._switching:  # an exception ended a switch
                self._restore_weights()
            if not mode:
                self._show_averages()
            elif not self._training():
                looks = list(written(self._evaluated(), self._loaded_in))
                self._restore_weights()
        except BaseException:
            if self._switching:  # what is not in the parameters yet is still in the state
                self._restore_weights()
            raise
        warn_of_written(looks)
        return self

    def eval(self) -> Self:
        """Put the average into the parameters: `train(False)`."""
        return self.train(False)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Self]:
        """Evaluate inside a `with` block, and go back to the mode of before."""
        before = self._training()
        try:
            self.eval()
            yield self
        finally:
            self.train(before)

    def _evaluated(self) -> Iterator[Evaluated]:
        """Every parameter that is averaged and has state."""
        programs = self._all_programs()
        for place in self._places():
            state = self.state.get(place.param, {})
            for node in programs[place.param].evaluators if "step" in state else ():
                yield Evaluated(place, node, state)

    def _show_averages(self) -> None:
        evaluated = list(self._evaluated())
        if not self._training() and all(SAVED_WEIGHTS in each.state for each in evaluated):
            return
        self._switching = True
        for group in self.param_groups:
            group["train_mode"] = False  # first, so that no step takes an average for the weights
        for each in evaluated:
            if SAVED_WEIGHTS not in each.state:  # a parameter may stand twice
                value = each.average(each.place.param)
                each.state[SAVED_WEIGHTS] = each.place.param.detach().clone()
                each.place.param.copy_(value)
        self._loaded_in = {}
        self._switching = False

    def _restore_weights(self) -> None:
        """Put the weights to train with back. What an exception has ended can be begun again."""
        self._switching = True
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if SAVED_WEIGHTS in state:
                    param.copy_(state[SAVED_WEIGHTS])
                    del state[SAVED_WEIGHTS]
        for group in self.param_groups:
            group["train_mode"] = True
        self._loaded_in = {}
        self._switching = False

    @torch.no_grad()
    def reset_corrections(self) -> None:
        """Forget what `param_ecc` holds beside the parameters, after other weights were put into them.

        Without it the old corrections move the new weights by up to half of the distance between two
        of their neighbours, once.
        """
        for state in self.state.values():
            if PARAM + CORRECTION in state:
                state[PARAM + CORRECTION].zero_()

    # ---- saving and copying

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_chain", "_foreach", "_compile", "_stochastic_rounding", "_fused_ends_itself")
        state = {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}
        # hooks belong to the parameters of this optimizer; a copy registers its own
        return {**state, "_fuse_backward": self._fused is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scalars = []
        self._counts = Counts()
        self._checked_values = {}
        self._fresh = {}
        self._together = Together(self._chain)
        if "_advice" not in self.__dict__:
            self._advice = Advice(self._chain)
        self._engine = Engine(self._compile)
        self._singles = Singles(self)
        self._rivals_checked = -1
        self._switching, self._loaded_in = False, {}
        for group in self.param_groups:
            self._together.settle(group)
        loaded = self.__dict__.pop("_loading", None)
        if loaded is None:
            self._programs, self._kinds = {}, {}  # parameters are new tensors after unpickling
            self._all_programs()
            self._fused = None
            if self.__dict__.pop("_fuse_backward"):
                self._fused = FusedBackward(self)
        else:
            self.__dict__["state"].update(loaded)
            if not self._training():
                self._loaded_in = {p: stamp(p) for g in self.param_groups for p in g["params"]}
            if self._fused is not None:
                self._fused.begin()

    def _with_own(self, index: int, loaded: dict[str, Any]) -> dict[str, Any]:
        """A loaded group with what it does not decide: our names, and what it does not know."""
        own, group = self.param_groups[index], dict(loaded)
        if "param_names" in own:  # else it brings its own along, as in torch
            group.pop("param_names", None)
        common = self._chain.rate.transform.common if self._chain.rate else ()
        for key in ("param_names", *self.defaults, *common):
            if key in own:
                group.setdefault(key, own[key])
        group["params"] = own["params"]
        self._together.settle(group)
        return group

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters in the groups, the groups, and a description of the chain.

        Tensors and plain values only, so `torch.load(weights_only=True)` reads it. The tensors are the
        optimizer's own.
        """

        def describe_chain(_: Optimizer, saved: dict[str, Any]) -> None:
            saved["param_groups"] = [plain(group) for group in saved["param_groups"]]
            saved["state"] = {n: plain(state) for n, state in saved["state"].items()}
            saved[DESCRIPTION] = description(self._chain)
            for group in saved["param_groups"]:
                if WAITING in group:  # the step that has begun goes on
                    group[WAITING] = dict(group[WAITING])

        held = {param for group in self.param_groups for param in group["params"]}
        state = self.state
        # First of all hooks, so that the user's see it.
        handle = self.register_state_dict_post_hook(describe_chain, prepend=True)
        removed = {p for p in state if isinstance(p, Tensor) and p not in held}
        if removed:  # they have no number to be saved under
            self.state = defaultdict(dict, {p: s for p, s in state.items() if p not in removed})
        try:
            return super().state_dict()
        finally:
            self.state = state
            handle.remove()

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> LoadResult:
        """Load what `state_dict()` gave, now or in an older version.

        strict: False loads what matches, and the result says what it left: parameters match by name
            where both sides have names, else by place; state matches by key and shape.

        Errors: ValueError if the dict is of a newer version, is none, or holds numbers that cannot be;
            with `strict`, if it was saved by another chain, for other names, or by torch.optim.
            Whatever is raised, nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            check_form(state_dict)
        results = []

        def capture(_: Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            check_form(loading)
            fitted = fit(self, migrate(loading), strict)
            self._loading = fitted.states
            results.append(fitted.left)
            numbers = iter(range(sum(len(group["params"]) for group in fitted.groups)))
            groups = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in fitted.groups]
            return {"state": fitted.others, "param_groups": groups}

        before = dict(self.__dict__)
        # Registered last, so it sees what the user's own hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(dict(state_dict))
        except BaseException:
            shown = self.__dict__.get(SHOWN, 0)
            self.__dict__.clear()  # new state and groups took the place of the old ones, if any did
            self.__dict__.update(before)
            self.__dict__[SHOWN] = shown + 1
            raise
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)
        return results[0]

    # ---- looking at it

    def state_bytes(self) -> int:
        """Bytes of all state tensors held at this moment."""
        tensors = (t for state in self.state.values() for t in state.values())
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    @property
    def d(self) -> list[float]:
        """The estimated distance of each group, of a chain that finds its learning rate.

        In a step of one parameter at a time it counts those that were stepped so far. It is read from
        the device, so a program that asks in every step waits in every step.
        """
        return [float(group["d"]) for group in self._estimating()]

    @property
    def effective_lr(self) -> list[float]:
        """What multiplies each group's updates in the next step: lr d, without warm-up."""
        groups = self._estimating()
        return [float(g.get("d_step", g["d"])) * float(g["lr"]) for g in groups]

    def _estimating(self) -> list[dict[str, Any]]:
        if self._chain.rate is None or "d" not in self._chain.rate.transform.common:
            raise AttributeError(
                f"{type(self).__name__} has no d: nothing in its chain estimates it, as prodigy_d does"
            )
        return self._singles.pending.closed(self.param_groups)

    @property
    def chain(self) -> Chain:
        """The chain as it runs: checked, completed and named."""
        return self._chain

    def routing(self) -> str:
        """A table of which parameter got which chain."""
        return routing_table(self.param_groups, self._all_programs())

    @without_autocast
    def kernel_sources(self) -> list[str]:
        """The source of each kernel that steps the parameters which have a gradient now.

        Errors: NotPrintableError if one of them has no kernel, naming what stands in the way.
        """
        return sources(self._jobs(), self._chain.total_keys)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # so that GradScaler calls step(), which refuses it, and does not fail for want of gradients
        return self._fused is not None

    def __repr__(self) -> str:
        return optimizer_repr(self, self._chain)
