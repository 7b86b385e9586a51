"""Dion and Dion2, with AdamW for parameters that are not hidden matrices."""

from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.orthogonalize import Products
from heavyball.presets.muon import RoutedOptions, RoutedPreset
from heavyball.transforms.muon import Method


class Dion(RoutedPreset):
    """Orthonormal low-rank updates with error feedback; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options.

    rank, rank_fraction, rank_multiple, blocks, axis: as in `dion`; `blocks` may be given by names.

    Units: `lr` times sqrt(rows / columns) is the spectral norm of a step; about 0.01.
    Source: Ahn et al. 2025, https://arxiv.org/abs/2504.05295.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        rank: int | None = None,
        rank_fraction: float = 1.0,
        rank_multiple: int = 1,
        momentum: float = 0.95,
        eps: float = 1e-8,
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.01,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.dion(
            rank=rank,
            rank_fraction=rank_fraction,
            rank_multiple=rank_multiple,
            momentum=momentum,
            eps=eps,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)


class Dion2(RoutedPreset):
    """Muon on a subset of the momentum's slices per step; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options.

    fraction, select, blocks, axis: as in `partial_orthogonalize`; `blocks` may be given by names.

    Units: `lr` times sqrt(rows / columns) is the spectral norm of a step; about 0.01.
    Source: https://arxiv.org/abs/2512.16928.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        momentum: float = 0.95,
        fraction: float = 0.25,
        select: Literal["top", "random"] = "top",
        ns_steps: int = 5,
        method: Method = "polar_express",
        eps: float = 1e-7,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.01,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.partial_orthogonalize(
            momentum=momentum,
            fraction=fraction,
            select=select,
            steps=ns_steps,
            method=method,
            eps=eps,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)
