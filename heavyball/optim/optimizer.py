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
    """An optimizer built from a chain of transforms.

    params: tensors, parameter groups, or (name, tensor) pairs, as in torch; or a module, whose named
        parameters are used.
    lr: the step size, in units of the parameter over those of the update. `lr`, `weight_decay` and every
        live hyper-parameter may be a schedule, such as `C.cosine(1000, peak=3e-4)`: see
        docs/schedules.md.
    transforms: the elements of the chain, in order, or text such as "sign | exp_avg"; also as a
        sequence, `transforms=`. `decoupled` is added if nothing in the chain has a `weight_decay`,
        and `descend` if nothing writes the parameters, so the step ends in
        `p <- p (1 - lr weight_decay) - lr u`.
    weight_decay: the coefficient of the decay, a live hyper-parameter.
    warmup_steps: lr increases linearly over this many steps of each parameter: lr min(1, t / warmup).
    foreach: False steps one parameter at a time, which minimizes peak memory; otherwise intermediate
        tensors of all parameters may be kept to save time. The results are bit-identical unless a whole
        transform (SOAP, Muon, PSGD, Shampoo) batches parameters of the same shape, because batched
        products round differently; see docs/fused_backward.md.
    compile: "auto" runs the chain as one compiled kernel if possible, and warns once if not; True raises
        instead; False uses plain torch operations. Kernels are C++ on the CPU and Triton on CUDA.
    stochastic_rounding: write bfloat16 parameters, bfloat16 state and codes without bias; False
        rounds to nearest.
    seed: random bits are hashed from it, the parameter's position, the state's name, the parameter's
        step and the element. torch's generators are not used.
    storage_dtype: the format of state: "float32", "bfloat16", "float16", "8bit", "4bit" or "rank1",
        for all state or as a dict by the state's name or key. The last three apply to means of
        gradients and of squares with at least 4096 elements. None: float32 (float64 for float64
        parameters).
    ecc: store state as a 16-bit value and a correction: "bf16+8", "bf16+16", "fp16+8" or "fp16+16",
        for all state or as a dict.
    param_ecc: the same for parameters, which must have that 16-bit dtype; the correction is state.
    fuse_backward: step each parameter inside `backward()`, as soon as its gradient is complete, and
        free the gradient; see `heavyball.fuse_backward`.
    replicas: processes with equal plain parameters (DDP): the work of matrix methods and its state are
        distributed over them. A `ProcessGroup` or a `DeviceMesh` of one dimension; see
        docs/distributed.md, also for DTensors, which need no option.
    stages: processes with other parameters of the same model (pipelines, `ZeroRedundancyOptimizer`):
        sums over all parameters include theirs. Same types as `replicas`.
    metrics: measure each step for `metrics()`, inside the step's kernels.
    fused, capturable, differentiable: torch's arguments. `fused` has no effect, `capturable` works for
        elementwise chains, and `differentiable=True` raises.

    Errors: TypeError or ValueError for an invalid chain or hyper-parameter, naming it; in a step,
        ValueError before anything is changed.
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
        """Reset everything that depends on previous steps."""
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
        """Add parameters, also during training, with their own hyper-parameters.

        Entries that the chain does not use are kept, saved and loaded, as in torch.

        Errors: ValueError for a key that resembles a known one, a value outside its interval, or a
            parameter that cannot be optimized; the optimizer is not changed.
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
        """Update every parameter that has a gradient; return the closure's loss, if one is given.

        loss: for chains that read the loss (`momo`, `polyak_rate`), a number or a tensor with one
            element; by default, the value that the closure returns. Processes that share parameters
            (DTensors, `replicas=`) use the mean of theirs.

        Errors: RuntimeError in evaluation mode; ValueError for a sparse or complex gradient, one of the
            wrong shape, device or dtype, or a hyper-parameter outside its interval. Nothing is changed.
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
        """Step with the current gradients and the other inputs."""
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
        """Pass a signal of the model to the next step, for elements that read it, such as "max_logits".

        A signal is used once: every step needs a new one. With `fuse_backward`, feed it before
        `backward()`.

        Errors: ValueError for a name that no element reads, and in the step for a wrong number of
            values; TypeError for values that are not real numbers.
        """
        self._inputs.feed(name, value)
        if self._fused.active:
            self._inputs.put(self._registry)

    @opaque
    @torch.no_grad()
    def step_parameter(
        self, param: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Step one parameter with its current gradient, and free the gradient.

        For trainers that register their own hooks; `heavyball.fuse_backward` does this for all
        parameters. A parameter without a gradient is not changed.

        group, index: the parameter's group and its index there, as some trainers pass them;
            optional, but checked.

        Errors: ValueError if it is not a parameter of this optimizer, or its chain needs a sum over all
            parameters; otherwise as in `step`. Nothing is changed.
        """
        self._perturbation.refuse("step_parameter()")
        self._recorder.refuse("step_parameter()")
        self._steps.step_given(param, group, index)

    @opaque
    @torch.no_grad()
    @without_autocast
    def init_state(self) -> Self:
        """Create the state of every parameter that requires a gradient, before the first step.

        It does not change the steps, bit for bit. `torch.distributed.checkpoint` needs it, because
        it writes into existing tensors; see docs/checkpoints.md.
        """
        self._registry.init_state()
        self._steps.backend.forget()
        return self

    # ---- evaluation weights

    @opaque
    @torch.no_grad()
    @without_autocast
    def train(self, mode: bool = True) -> Self:
        """Write the training weights into the parameters; with `mode=False`, the evaluation weights.

        A chain with `schedule_free` or `parameter_ema` is evaluated at an average. In evaluation
        mode, a copy of the training weights is stored, so training continues bit for bit. Repeated
        calls change nothing, and for other chains this does nothing. If it is interrupted by an
        exception, the training weights remain in the parameters.

        Other weights that were written into the parameters, in either mode, become both the training
        weights and the average, with a warning, unless they were loaded with the optimizer's state.
        """
        if not isinstance(mode, bool):
            raise TypeError(f"train(mode={mode!r}): expected True or False")
        if "train_mode" not in self.defaults:
            return self
        self._evaluation.switch(mode)
        return self

    def eval(self) -> Self:
        """Write the average into the parameters: `train(False)`."""
        return self.train(False)

    @opaque
    @contextlib.contextmanager
    def averaged(self) -> Iterator[Self]:
        """Evaluation mode inside a `with` block; restores the previous mode afterwards."""
        before = self._registry.training
        try:
            self.eval()
            yield self
        finally:
            self.train(before)

    @torch.no_grad()
    def reset_corrections(self) -> None:
        """Clear the corrections of `param_ecc`, after other weights were written into the parameters.

        Otherwise the old corrections move the new weights once, by up to half the distance between
        neighbouring values.
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
        """The change that a step would make to each parameter with a gradient, without making it.

        Keys are names, or indices if parameters have no names; decay and warm-up are included. It is
        computed on a copy of the parameters and the state, which takes that much memory.

        loss: as in `step`. Fed signals are used, but remain for the step.

        Errors: those of `step`. Nothing is ever changed.
        """
        return updates(self, self._inputs.told(), loss)
