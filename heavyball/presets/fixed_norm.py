"""Optimizers that keep the norms of matrices fixed, with AdamW for everything else."""

from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.orthogonalize import Products
from heavyball.presets.muon import RoutedOptions, RoutedPreset
from heavyball.transforms.muon import Method


class AdamH(RoutedPreset):
    """Adam with the norm of each matrix fixed at its initial value; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options. Weights that are
    all zero raise. Weight decay has no effect at a fixed norm, so there is none.

    blocks, axis: blocks with separate norms, as in `hyperball`; `blocks` may be given by names.

    Units: `lr` is the angle of a step, 0.005 to 0.02.
    Source: https://arxiv.org/abs/2606.16899; record 4 of modded-nanogpt's third track.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.018,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.scale_by_adam(betas=betas, eps=eps)
        self.build_routed(params, lr, rule, options, writer=C.hyperball(blocks=blocks, axis=axis))


class MuonH(RoutedPreset):
    """Muon with the norm of each matrix fixed at its initial value; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options. Weights that are
    all zero raise. Weight decay has no effect at a fixed norm, so there is none.

    blocks, axis: blocks with separate norms and products, as in `orthogonalize`; `blocks` may be
        given by names.

    Units: `lr` is the angle of a step, 0.005 to 0.02.
    Source: https://arxiv.org/abs/2606.16899; record 5 of modded-nanogpt's third track.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.018,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        eps: float = 1e-7,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.muon(
            momentum=momentum,
            nesterov=nesterov,
            steps=ns_steps,
            method=method,
            eps=eps,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(params, lr, rule, options, writer=C.hyperball(blocks=blocks, axis=axis))


class MuonSphere(RoutedPreset):
    """Muon with the spectral norm fixed at sqrt(rows / columns); AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options. The first step rescales
    the matrices to scaler sqrt(rows / columns). A decay would be undone, so there is none.

    blocks, axis: blocks with separate spheres, as in `orthogonalize`; `blocks` may be given by
        names.

    Units: `lr` is the norm of a step relative to that of the weights, about 0.02.
    Source: https://arxiv.org/abs/2601.08393.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        scaler: float = 1.0,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.muon_momentum(momentum=momentum, nesterov=nesterov)
        writer = C.spectral_sphere(scaler=scaler, solve=False, blocks=blocks, axis=axis)
        self.build_routed(params, lr, rule, options, writer=writer)


class Muown(RoutedPreset):
    """Muon on the directions of rows and Adam on their norms; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options. `weight_decay`
    applies to the row norms, after the step.

    blocks, axis: as in `muown`; `blocks` may be given by names.

    Units: `lr` is that of the row norms, about 3e-4.
    Source: https://arxiv.org/abs/2605.10797.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-4,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        method: Method = "quintic-5",
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        writer = C.muown(
            momentum=momentum,
            betas=betas,
            eps=eps,
            steps=ns_steps,
            method=method,
            products=products,
            blocks=blocks,
            axis=axis,
            weight_decay=weight_decay,
        )
        self.build_routed(params, lr, (), options, writer=writer)
