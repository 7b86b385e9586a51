"""Presets that whiten the gradient: PSGD and Shampoo."""

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.core.transform import Transform
from heavyball.linalg.decisions import Decision
from heavyball.linalg.kron import MemorySaveMode
from heavyball.linalg.matrices import Blocks
from heavyball.presets.base import Preset, PresetOptions, flag

Probability = float | Callable[[int], float] | None

# True and False are HeavyBall's names for the first two.
Schedule = bool | Decision


def decision_of(stochastic_schedule: Schedule) -> Any:
    if isinstance(stochastic_schedule, bool):
        return "stochastic" if stochastic_schedule else "cumulative"
    return stochastic_schedule


class _PSGD(Preset):
    """Shared parts of the PSGD presets: momentum before the preconditioner, a clip at 1.1 after it."""

    exp_avg_input_default = True

    def build_psgd(
        self,
        params: Any,
        lr: float | Tensor,
        beta: float,
        psgd: Transform,
        exp_avg_input: bool | None,
        weight_decay: float,
        options: PresetOptions,
    ) -> None:
        if exp_avg_input is None:
            exp_avg_input = self.exp_avg_input_default
        chain: tuple[Any, ...] = (psgd,)
        if flag("exp_avg_input", exp_avg_input):
            averaged = shared("beta", beta)
            chain = C.exp_avg(beta=averaged), psgd
            self_beta: Any = averaged
        else:
            self._check_pure(beta, psgd)
            self_beta = 0.95
        options.setdefault("update_clipping", C.clip_by_rms(max_rms=1.1))
        self.build(params, lr, chain, options, beta1=self_beta, weight_decay=weight_decay)

    def _check_pure(self, beta: float, psgd: Transform) -> None:
        if beta != 0.9:
            raise ValueError(f"beta={beta!r} has no effect without exp_avg_input=True")
        if not psgd.options["momentum_into_precond_update"]:
            raise ValueError(
                "momentum_into_precond_update=False has no effect without exp_avg_input=True"
            )


class PSGDKron(_PSGD):
    """PSGD with Kronecker factors; the argument names and defaults of HeavyBall 1.0's PSGDKron.

    beta: of the momentum, which is preconditioned. exp_avg_input=False: no momentum.
    stochastic_schedule: how the probability determines the steps with a fit: True for "stochastic",
        False for "cumulative", or the name of a decision, see `heavyball.linalg.decisions.Occasions`.
    delayed, cached: None follows the preset's name.
    Other options, and their cost: see `psgd_kron`; `blocks` may be given by names.

    Units: the update has entries of about 1, at most 1.1 in root mean square (`update_clipping=None`
        removes that bound), so `lr` is about the size of a step in weight units.
    Source: Li 2015, https://arxiv.org/abs/1512.04202; the Kron optimizer of kron_torch 0.3.3.
        Departure: `weight_decay` reaches parameters of all dimensions, as everywhere here.
    """

    delayed_default = False
    cached_default = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        preconditioner_update_probability: Probability = None,
        max_size_triangular: int = 2048,
        min_ndim_triangular: int = 2,
        memory_save_mode: MemorySaveMode = None,
        momentum_into_precond_update: bool = True,
        *,
        merge_dims: bool = False,
        split: bool = False,
        store_triu_as_line: bool = True,
        q_dtype: Literal["float32", "bfloat16"] = "float32",
        stochastic_schedule: Schedule = True,
        delayed: bool | None = None,
        cached: bool | None = None,
        exp_avg_input: bool | None = None,
        precond_init_scale: float = 1.0,
        precond_lr: float = 0.1,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        psgd = C.psgd_kron(
            precond_lr=precond_lr,
            precond_init_scale=precond_init_scale,
            preconditioner_update_probability=preconditioner_update_probability,
            decision=decision_of(stochastic_schedule),
            max_size_triangular=max_size_triangular,
            min_ndim_triangular=min_ndim_triangular,
            memory_save_mode=memory_save_mode,
            momentum_into_precond_update=momentum_into_precond_update,
            delayed=self.delayed_default if delayed is None else delayed,
            cached=self.cached_default if cached is None else cached,
            store_triu_as_line=store_triu_as_line,
            q_dtype=q_dtype,
            merge_dims=merge_dims,
            split=split,
            blocks=blocks,
            axis=axis,
        )
        self.build_psgd(params, lr, beta, psgd, exp_avg_input, weight_decay, options)


class PurePSGD(PSGDKron):
    """PSGDKron without momentum.

    Source: Li 2015, https://arxiv.org/abs/1512.04202.
    """

    exp_avg_input_default = False


class DelayedPSGD(PSGDKron):
    """PSGDKron that computes the update with the factors of the previous step.

    Source: Li 2015, https://arxiv.org/abs/1512.04202; HeavyBall 1.0.
    """

    delayed_default = True


class CachedPSGDKron(PSGDKron):
    """PSGDKron that caches Q^T Q: more memory, half the products in steps without a fit.

    Source: Li 2015, https://arxiv.org/abs/1512.04202; HeavyBall 1.0.
    """

    cached_default = True


class CachedDelayedPSGDKron(PSGDKron):
    """DelayedPSGD and CachedPSGDKron combined.

    Source: Li 2015, https://arxiv.org/abs/1512.04202; HeavyBall 1.0.
    """

    delayed_default = True
    cached_default = True


DelayedPSGDKron = DelayedPSGD


class PSGDLRA(_PSGD):
    """PSGD with a diagonal and a low-rank factor of each flattened parameter.

    beta: of the momentum, which is preconditioned. exp_avg_input=False: no momentum.
    rank: of the factor; memory and time are proportional to it and to the number of elements.
    stochastic_schedule: as in PSGDKron. Other options: see `psgd_lra`.

    Units: as in PSGDKron.
    Source: Li 2022, https://arxiv.org/abs/2211.04422; the LRA class of psgd_torch. Departure: every
        parameter has its own factor.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        preconditioner_update_probability: Probability = None,
        momentum_into_precond_update: bool = True,
        rank: int = 10,
        *,
        stochastic_schedule: Schedule = True,
        exp_avg_input: bool | None = None,
        precond_init_scale: float = 1.0,
        precond_lr: float = 0.1,
        beta_load: float = 0.9,
        damping: float = 1e-9,
        **options: Unpack[PresetOptions],
    ):
        psgd = C.psgd_lra(
            precond_lr=precond_lr,
            beta_load=beta_load,
            damping=damping,
            rank=rank,
            precond_init_scale=precond_init_scale,
            preconditioner_update_probability=preconditioner_update_probability,
            decision=decision_of(stochastic_schedule),
            momentum_into_precond_update=momentum_into_precond_update,
        )
        self.build_psgd(params, lr, beta, psgd, exp_avg_input, weight_decay, options)


class PSGDPRO(_PSGD):
    """PSGD with square Kronecker factors, fitted without solving for the inverse.

    beta: of the momentum, which is preconditioned. exp_avg_input=False: no momentum.
    method: "procrustes" (Q0.5EQ1.5) or "quad", see `psgd_pro`.
    stochastic_schedule, max_size_triangular, min_ndim_triangular, memory_save_mode: as in PSGDKron; axes
        with a triangular factor there have a square one here. blocks, axis: as in `psgd_pro`.

    Units: as in PSGDKron.
    Source: the methods Q0.5EQ1.5 and QUAD of psgd_torch; Li 2015, https://arxiv.org/abs/1512.04202.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        preconditioner_update_probability: Probability = None,
        max_size_triangular: int = 2048,
        min_ndim_triangular: int = 2,
        memory_save_mode: MemorySaveMode = None,
        momentum_into_precond_update: bool = True,
        *,
        method: Literal["procrustes", "quad"] = "procrustes",
        merge_dims: bool = False,
        split: bool = False,
        stochastic_schedule: Schedule = True,
        exp_avg_input: bool | None = None,
        precond_init_scale: float = 1.0,
        precond_lr: float = 0.1,
        beta_load: float = 0.9,
        damping: float = 1e-9,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        psgd = C.psgd_pro(
            precond_lr=precond_lr,
            beta_load=beta_load,
            damping=damping,
            precond_init_scale=precond_init_scale,
            preconditioner_update_probability=preconditioner_update_probability,
            decision=decision_of(stochastic_schedule),
            method=method,
            max_size_triangular=max_size_triangular,
            min_ndim_triangular=min_ndim_triangular,
            memory_save_mode=memory_save_mode,
            momentum_into_precond_update=momentum_into_precond_update,
            merge_dims=merge_dims,
            split=split,
            blocks=blocks,
            axis=axis,
        )
        self.build_psgd(params, lr, beta, psgd, exp_avg_input, weight_decay, options)


class Shampoo(Preset):
    """Shampoo with momentum, grafted to the update size of another optimizer.

    betas: of the momentum, and of the matrices (1: their sum, as in the paper).
    grafting: the optimizer that determines the size: "adam", "rmsprop", "sgd" (the momentum), or None.
    grafting_betas, grafting_eps: of Adam; RMSprop takes the second of the betas.
    precondition_frequency: steps between computations of the roots.
    start_preconditioning_step: the first step in Shampoo's direction; before it, the other optimizer's
        updates are used while the matrices accumulate.
    max_precond_dim, merge_dims, split, blocks, axis: see `shampoo`; `blocks` may be given by names.

    Units: those of the grafted optimizer; `lr` is meant for "adam" and "rmsprop".
    Source: Gupta, Koren and Singer 2018, https://arxiv.org/abs/1802.09568; grafting: Agarwal et al.
        2020, https://arxiv.org/abs/2002.11803; the defaults of facebookresearch/optimizers.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        max_precond_dim: int = 1024,
        precondition_frequency: int = 1,
        *,
        start_preconditioning_step: int = 0,
        grafting: Literal["adam", "rmsprop", "sgd"] | None = "adam",
        grafting_betas: tuple[float, float] = (0.9, 0.999),
        grafting_eps: float = 1e-8,
        merge_dims: bool = False,
        split: bool = False,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        direction = (
            C.exp_avg(beta=b[0]),
            C.shampoo(
                beta2=b[1],
                eps=eps,
                precondition_frequency=precondition_frequency,
                max_precond_dim=max_precond_dim,
                merge_dims=merge_dims,
                split=split,
                blocks=blocks,
                axis=axis,
            ),
        )
        graft_betas = shared("grafting_betas", grafting_betas)
        graft_eps = shared("grafting_eps", grafting_eps)
        if grafting not in ("adam", "rmsprop", "sgd", None):
            raise ValueError(f"grafting={grafting!r}: expected 'adam', 'rmsprop', 'sgd' or None")
        size: Any = None
        if grafting == "adam":
            size = C.scale_by_adam(betas=graft_betas, eps=graft_eps)
        elif grafting == "rmsprop":
            size = C.scale_by_exp_avg_sq(beta2=graft_betas[1], eps=graft_eps)
        elif grafting == "sgd":
            size = C.exp_avg(beta=b[0])
        start = start_preconditioning_step
        if size is None and start:
            raise ValueError(
                f"start_preconditioning_step={start!r} needs grafting, for the updates before it"
            )
        chain = direction if size is None else (C.graft(direction, size, start=start),)
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)
