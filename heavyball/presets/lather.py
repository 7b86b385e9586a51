"""LATHER: Adam in the eigenbasis of PSGD's factors."""

from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.linalg.kron import MemorySaveMode
from heavyball.linalg.matrices import Blocks
from heavyball.presets.base import Preset, PresetOptions
from heavyball.presets.psgd import Probability, Schedule, decision_of


class LATHER(Preset):
    """Adam in the eigenbasis of PSGD's Kronecker factors; HeavyBall's arguments and defaults.

    The first gradient only initializes factors and bases: the parameters do not move in the first step.

    beta: overrides betas[0]. stochastic_schedule: as in PSGDKron. The others: as in
        `to_psgd_basis`. `update_clipping` defaults to `trust_region`.

    Units: `lr` is about the size of a step in weight units.
    Source: LATHER of HeavyBall 3.2.1; the factors: Li 2015, https://arxiv.org/abs/1512.04202.
        Departures: those of `to_psgd_basis`; the factors start at the identity; Adam divides by
        sqrt(v) + eps and counts from the second gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
        precond_init_scale: float = 1.0,
        precond_lr: float = 0.1,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        if not momentum_into_precond_update:
            raise ValueError(
                "momentum_into_precond_update=False has no effect: there is no momentum before it"
            )
        b = shared("betas", betas if beta is None else (beta, betas[1]))
        adam = C.scale_by_adam(betas=b, eps=eps)
        basis: dict[str, Any] = {
            "precond_lr": precond_lr,
            "precond_init_scale": precond_init_scale,
            "preconditioner_update_probability": preconditioner_update_probability,
            "decision": decision_of(stochastic_schedule),
            "max_size_triangular": max_size_triangular,
            "min_ndim_triangular": min_ndim_triangular,
            "memory_save_mode": memory_save_mode,
            "store_triu_as_line": store_triu_as_line,
            "q_dtype": q_dtype,
            "merge_dims": merge_dims,
            "split": split,
            "blocks": blocks,
            "axis": axis,
        }
        options.setdefault("update_clipping", C.trust_region)
        self.build(
            params,
            lr,
            lambda palm: (C.lather_precond(*palm, adam, **basis),),
            options,
            beta1=b[0],
            weight_decay=weight_decay,
        )
