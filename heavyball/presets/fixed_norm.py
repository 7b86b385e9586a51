"""Optimizers that keep the norms of matrices, with AdamW for everything else."""

from typing import Any, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.orthogonalize import Products
from heavyball.presets.muon import RoutedOptions, RoutedPreset
from heavyball.transforms.muon import Method


class AdamH(RoutedPreset):
    """Adam on the sphere of each matrix' first norm; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`. Weights that are all
    zero have no sphere and are refused. A decay has no effect on a sphere, so there is none.

    Units: `lr` is the angle of a step, 0.005 to 0.02.
    Source: https://arxiv.org/abs/2606.16899; record 4 of modded-nanogpt's third track.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.018,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.scale_by_adam(betas=betas, eps=eps)
        self.build_routed(params, lr, rule, options, writer=C.hyperball)


class MuonH(RoutedPreset):
    """Muon on the sphere of each matrix' first norm; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`. Weights that are all
    zero have no sphere and are refused. A decay has no effect on a sphere, so there is none.

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
        **options: Unpack[RoutedOptions],
    ):
        rule = C.muon(
            momentum=momentum,
            nesterov=nesterov,
            steps=ns_steps,
            method=method,
            eps=eps,
            products=products,
        )
        self.build_routed(params, lr, rule, options, writer=C.hyperball)


class MuonSphere(RoutedPreset):
    """Muon on the sphere of the spectral norm sqrt(rows / columns); AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`. The first step puts the
    matrices on their spheres: scaler sqrt(rows / columns). A decay would be undone, so there is none.

    Units: `lr` is the share of the norm that a step has, about 0.02.
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
        **options: Unpack[RoutedOptions],
    ):
        rule = C.muon_momentum(momentum=momentum, nesterov=nesterov)
        writer = C.spectral_sphere(scaler=scaler, solve=False)
        self.build_routed(params, lr, rule, options, writer=writer)


class Muown(RoutedPreset):
    """Muon on the directions of rows and Adam on their norms; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`. `weight_decay` is of the
    row norms, behind the step.

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
        **options: Unpack[RoutedOptions],
    ):
        writer = C.muown(
            momentum=momentum,
            betas=betas,
            eps=eps,
            steps=ns_steps,
            method=method,
            products=products,
            weight_decay=weight_decay,
        )
        self.build_routed(params, lr, (), options, writer=writer)
