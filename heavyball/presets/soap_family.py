"""Successors of SOAP and Shampoo."""

from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import shared
from heavyball.linalg.matrices import Blocks
from heavyball.presets.base import Preset, PresetOptions
from heavyball.presets.soap import BasisOptions, BasisPreset


class KLSOAP(BasisPreset):
    """SOAP with Kronecker factors fitted in the KL sense, each whitened by the other.

    The first gradient only initializes the basis: the parameters do not move in the first step.

    shampoo_beta: None is betas[1]. eigenvalue_init: as in `to_eigenbasis`.
    correct_bias: False omits Adam's bias corrections, as the authors do.

    Units: `lr` is about the size of a step in weight units.
    Source: https://arxiv.org/abs/2509.03378.
    """

    def __init__(  # type: ignore[misc]
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        correct_bias: bool = True,
        precondition_frequency: int = 10,
        eigenvalue_init: float = 0.1,
        **options: Unpack[BasisOptions],
    ):
        b = shared("betas", betas)
        adam = C.scale_by_adam(betas=b, eps=eps, correct_bias=correct_bias)
        chosen: dict[str, Any] = {"merge_dims": False, "max_precond_dim": 10000, **options}
        chosen["shampoo_beta"] = b[1] if shampoo_beta is None else shampoo_beta
        if options.get("precond_scheduler") is None:
            chosen["precondition_frequency"] = precondition_frequency
        self.build_in_basis(
            params,
            lr,
            adam,
            chosen,  # type: ignore[arg-type]
            beta1=b[0],
            weight_decay=weight_decay,
            basis={"gram": "kl", "eigenvalue_init": eigenvalue_init},
        )


class KLShampoo(Preset):
    """Momentum over the root of Kronecker factors fitted in the KL sense.

    The first gradient only initializes the bases: the parameters do not move in the first step.

    blocks, axis: as in `orthogonalize`; `blocks` may be given by names.

    Units: `lr` is about the size of a step in weight units; 1e-4 to 1e-3 in use.
    Source: https://arxiv.org/abs/2509.03378.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        precondition_frequency: int = 10,
        eigenvalue_init: float = 0.1,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        rule = C.kl_shampoo(
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            precondition_frequency=precondition_frequency,
            eigenvalue_init=eigenvalue_init,
            blocks=blocks,
            axis=axis,
        )
        self.build(params, lr, (rule,), options, beta1=betas[0], weight_decay=weight_decay)


class MOSO(Preset):
    """RMSprop of the momentum in the eigenbasis of its smaller side.

    blocks, axis: as in `orthogonalize`; `blocks` may be given by names.

    Units: the first step is 1 / sqrt(1 - rms_beta) times larger than later ones; `lr` about 3e-4.
    Source: NVIDIA's Emerging-Optimizers, whose second moment does not follow the sorting of the columns.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-4,
        *,
        momentum: float = 0.95,
        rms_beta: float = 0.95,
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        basis = C.soap_precond(
            C.scale_by_rms(alpha=shared("rms_beta", rms_beta), eps=eps),
            shampoo_beta=shampoo_beta,
            sides="smaller",
            precondition_frequency=1,
            refresh="before",
            blocks=blocks,
            axis=axis,
        )
        chain: tuple[Any, ...] = (C.muon_momentum(momentum=momentum, nesterov=False), basis)
        self.build(params, lr, chain, options, beta1=momentum, weight_decay=weight_decay)


class ASGO(Preset):
    """Momentum over the root of the gradients' covariance along the smaller side.

    The first update of a matrix is its polar factor.

    blocks, axis: as in `orthogonalize`; `blocks` may be given by names.

    Units: `lr` is the spectral norm of the first step; about 0.01.
    Source: An et al. 2025, https://arxiv.org/abs/2503.20762.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        b = shared("betas", betas)
        chain = (
            C.exp_avg(beta=b[0]),
            C.shampoo(
                beta2=b[1],
                eps=eps,
                sides="smaller",
                order=2,
                max_precond_dim=10000,
                blocks=blocks,
                axis=axis,
            ),
        )
        self.build(params, lr, chain, options, beta1=b[0], weight_decay=weight_decay)


class SPlus(Preset):
    """The sign of the momentum in Shampoo's eigenbasis, evaluated at a running mean of the weights.

    Call `eval()` before evaluating or saving the model, and `train()` before training continues.
    `weight_decay` uses the learning rate of its parameter, 2 lr / (R + C), and comes before the step.

    blocks, axis: as in `orthogonalize`; `blocks` may be given by names.

    Units: `lr` is about 0.1, for any width.
    Source: Frans, Levine and Abbeel 2025, https://arxiv.org/abs/2506.07254.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        ema_rate: float = 0.999,
        inverse_every: int = 100,
        weight_decay: float = 0.01,
        max_dim: int = 10000,
        nonstandard_constant: float = 0.001,
        *,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[PresetOptions],
    ):
        rule = C.splus(
            betas=betas,
            inverse_every=inverse_every,
            max_dim=max_dim,
            nonstandard_constant=nonstandard_constant,
            blocks=blocks,
            axis=axis,
        )
        mean = C.parameter_ema(beta=shared("ema_rate", ema_rate))
        self.build(
            params, lr, (rule,), options, last=(mean,), beta1=betas[0], weight_decay=weight_decay
        )
