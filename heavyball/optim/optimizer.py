"""ChainOpt: a torch optimizer whose step is a chain of transforms."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.schedule import SCHEDULES
from heavyball.diagnostics.advice import Advice
from heavyball.metrics.elements import MEASURES
from heavyball.optim.arguments import as_params, given_elements
from heavyball.optim.estimate import check_alike
from heavyball.optim.evaluation import Evaluation
from heavyball.optim.flight import Recorder
from heavyball.optim.fused import FusedBackward, refuse_scaler
from heavyball.optim.inputs import Inputs
from heavyball.optim.looking import Looking
from heavyball.optim.options import (
    Options,
    check_capturable,
    check_names,
    check_switches,
    group_defaults,
)
from heavyball.optim.preview import updates
from heavyball.optim.registry import Registry
from heavyball.optim.scheduling import warn_of_peak
from heavyball.optim.sharpness import Perturbation
from heavyball.optim.steps import Steps
from heavyball.runtime.autocast import without_autocast
from heavyball.runtime.state import SHOWN
from heavyball.runtime.tracing import hide_step, opaque
from heavyball.state.formats import Choice, Storage
from heavyball.state.held import CORRECTION, PARAM


class ChainOpt(Looking):
    """An optimizer made of a chain of transforms.

    params: tensors, parameter groups, or (name, tensor) pairs, as in torch; or a module, which gives its
        parameters and their names.
    lr: the step size; its unit is the parameter's over the update's. It, `weight_decay` and every live
        hyper-parameter may be a schedule, such as `C.cosine(1000, peak=3e-4)`: see docs/schedules.md.
    transforms: what happens to the gradient, in order; elements, or text such as "sign | exp_avg", also
        as one sequence `transforms=`. A chain in which nothing has a
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
    stochastic_rounding: how bfloat16 parameters and state and codes are written: without bias, or to
        nearest.
    seed: what the bits for the rounding are hashed from, together with the parameter's place, the
        state's name, the parameter's step and the element. They do not touch torch's generators.
    storage_dtype: how state is kept: "float32", "bfloat16", "float16", "8bit", "4bit" or "rank1", for
        all of it or as a dict by the state's name or key. The last three are for means of gradients and
        of squares of 4096 elements or more. None: as it is computed, in float32 (float64 for float64).
    ecc: a 16-bit value and a correction instead: "bf16+8", "bf16+16", "fp16+8" or "fp16+16", likewise.
    param_ecc: the same for the parameters, whose correction is state; they must have that 16-bit dtype.
    fuse_backward: step each parameter inside `backward()`, as soon as its gradient is complete, and
        free the gradient; see `heavyball.fuse_backward`.
    replicas: processes on which plain parameters are equal (DDP): the work of matrix methods and its
        state are shared out over them. A `ProcessGroup` or a `DeviceMesh` of one dimension; see
        docs/distributed.md, also for DTensors, which need no option.
    stages: processes that hold other parameters of the model (pipelines, `ZeroRedundancyOptimizer`):
        sums over all parameters are completed over them. Likewise.
    metrics: measure each step for `metrics()`, inside the kernels that run anyway.
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
        replicas: Any = None,
        stages: Any = None,
        metrics: bool = False,
        **unknown: Any,
    ):
        owner = type(self).__name__
        transforms = given_elements(transforms, unknown)
        check_names(owner, unknown, foreach)
        check_switches(fuse_backward=fuse_backward, metrics=metrics)
        self._options = Options(foreach, compile, stochastic_rounding, replicas, stages)
        storage = Storage(storage_dtype, ecc, param_ecc)
        self._chain = Chain(transforms, owner, storage, MEASURES if metrics else ())
        self._set_up()
        warn_of_peak(type(self), lr)
        defaults = group_defaults(self._chain, lr, weight_decay, warmup_steps, seed)
        check_capturable(self._chain, unknown.get("capturable"), defaults.get(SCHEDULES, ()))
        super().__init__(as_params(params), defaults)
        hide_step(type(self))
        if fuse_backward:
            self.fuse_backward()

    def _set_up(self) -> None:
        own = weakref.ref(self)
        self._advice = Advice(self._chain)
        self._fused = FusedBackward(
            lambda: None if (opt := own()) is None else opt._steps.singles, self.backward_ends_step
        )
        self._begin(Registry(self, self._chain, self._options.stochastic_rounding))

    def _begin(self, registry: Registry) -> None:
        """Know nothing of the steps so far."""
        self._registry = registry
        self._inputs = Inputs(self._chain, type(self).__name__)
        rounds = self._options.stochastic_rounding
        self._perturbation = Perturbation(self._chain, type(self).__name__, rounds)
        self._recorder = Recorder(self._chain, registry, ChainOpt, rounds)
        self._steps = Steps(registry, self._options, self._chain, self._advice)
        self._watch(Evaluation(registry))

    def _watch(self, evaluation: Evaluation) -> None:
        self._evaluation = self._steps.evaluation = self._steps.singles.evaluation = evaluation

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
    backward_ends_step = False

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, in mid-training too, with hyper-parameters of their own.

        Entries that the chain does not know are kept, saved and loaded, as in torch: they are
        somebody else's.

        Errors: ValueError naming a key that is nearly a known one, a value outside its interval, or a
            parameter that cannot be optimized; the optimizer is then as it was.
        """
        group = self._registry.values.checked_group(type(self), param_group, self.defaults)
        if "train_mode" in self.defaults and self.param_groups:
            group["train_mode"] = self.param_groups[0]["train_mode"]
        super().add_param_group(group)
        index = len(self.param_groups) - 1
        try:
            check_alike(self._chain, self.param_groups)
            programs = self._registry.resolved(index)
            self._steps.forget()
            if self._fused.active:
                self._fused.attach()
        except Exception:
            self.param_groups.pop()
            self._steps.forget()
            raise
        self._registry.add(index, programs)
        self._registry.find_parts(self._options)

    # ---- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient; return the loss of the closure, if one is given.

        loss: of the gradients, for chains that read it (`momo`, `polyak_rate`), a number or a tensor of
            one element; without it they take what the closure returns. Processes that share parameters
            (DTensors, `replicas=`) take the mean of theirs.

        Errors: RuntimeError in evaluation mode; ValueError naming a sparse or complex gradient, one
            of the wrong shape, device or dtype, or a hyper-parameter out of its interval. Nothing
            has been changed then.
        """
        if self._fused.active:
            refuse_scaler(vars(self))
        self._registry.check_training("step()")
        returned = None
        if closure is None:
            self._perturbation.refuse("step()")
        else:
            with torch.enable_grad():
                returned = closure()
            if self._perturbation.needed:
                with self._perturbation.second(self._registry, closure, self._evaluation):
                    self._step_all(loss, returned)
                return returned
        self._step_all(loss, returned)
        return returned

    def _step_all(self, loss: float | Tensor | None, returned: Any) -> None:
        """Step with the gradients that are there, and with what was given besides."""
        if self._inputs.needed or loss is not None:
            with self._steps.heard(), self._inputs.given(self._registry, loss, returned):
                self._step_recorded()
        else:
            self._step_recorded()

    def _step_recorded(self) -> None:
        if self._recorder.active:
            self._steps.step_all(self._fused, self._recorder.over_step())
        else:
            self._steps.step_all(self._fused)

    @opaque
    def feed(self, name: str, value: float | Tensor) -> None:
        """Give the next step what an element of the chain reads of the model, such as "max_logits".

        It is used once: every step needs its own. With `fuse_backward` it must be there before
        `backward()`.

        Errors: ValueError for a name that nothing in the chain asks for, and at the step for a number of
            numbers that it does not expect; TypeError for what holds no real numbers.
        """
        self._inputs.feed(name, value)
        if self._fused.active:
            self._inputs.put(self._registry)

    @opaque
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
        self._perturbation.refuse("step_parameter()")
        self._recorder.refuse("step_parameter()")
        self._steps.step_given(param, group, index)

    @opaque
    @torch.no_grad()
    @without_autocast
    def init_state(self) -> Self:
        """Create the state of every parameter that requires a gradient, before the first step.

        The steps are the same to the bit with and without it. `torch.distributed.checkpoint` writes
        into tensors that exist, so it needs this; see docs/checkpoints.md.
        """
        self._registry.init_state()
        self._steps.backend.forget()
        return self

    # ---- evaluation weights

    @opaque
    @torch.no_grad()
    @without_autocast
    def train(self, mode: bool = True) -> Self:
        """Put the weights to train with into the parameters (`mode=False`: those to evaluate with).

        A chain with `schedule_free` or `parameter_ema` evaluates at an average. In evaluation mode
        a copy of the training weights is kept, so that training goes on bit for bit. Calling it
        again changes nothing, and for other chains it does nothing at all. Ended by an exception, it
        leaves the weights to train with in the parameters.

        Other weights that were written into the parameters, in either mode, are taken for the point to
        train on and for the average, with a warning; those that come with the state of their
        optimizer are not.
        """
        if not isinstance(mode, bool):
            raise TypeError(f"train(mode={mode!r}): expected True or False")
        if "train_mode" not in self.defaults:
            return self
        self._evaluation.switch(mode)
        return self

    def eval(self) -> Self:
        """Put the average into the parameters: `train(False)`."""
        return self.train(False)

    @opaque
    @contextlib.contextmanager
    def averaged(self) -> Iterator[Self]:
        """Evaluate inside a `with` block, and go back to the mode of before."""
        before = self._registry.training
        try:
            self.eval()
            yield self
        finally:
            self.train(before)

    @torch.no_grad()
    def reset_corrections(self) -> None:
        """Forget what `param_ecc` holds beside the parameters, after other weights were put into them.

        Without it the old corrections move the new weights by up to half of the distance between two
        of their neighbours, once.
        """
        for state in self.state.values():
            if PARAM + CORRECTION in state:
                state[PARAM + CORRECTION].zero_()

    @opaque
    def fuse_backward(self) -> FusedBackward:
        """Step each parameter inside `backward()`, see `heavyball.fuse_backward`."""
        self._perturbation.refuse("fuse_backward")
        self._recorder.refuse("fuse_backward")
        self._fused.attach()
        return self._fused

    @opaque
    def updates(self, *, loss: float | Tensor | None = None) -> dict[str, Tensor]:
        """What a step would add to each parameter that has a gradient now, without doing it.

        By name, or by number where parameters have none; decay and warm-up are part of it. It is
        computed with a copy of the parameters and the state, so it takes that much memory.

        loss: as of `step`. What was fed is used, and still waits for the step.

        Errors: those of `step`. Nothing is changed in any case.
        """
        return updates(self, self._inputs.told(), loss)
