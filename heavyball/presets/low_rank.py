"""APOLLO: moments of a low-rank image of the gradient, with AdamW for everything that has none."""

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.low_rank import matrix_shape
from heavyball.presets.muon import Predicate, RoutedOptions, RoutedPreset


@dataclass(frozen=True)
class HasRank:
    """Which of the parameters that another rule picks have an image of so many dimensions."""

    rule: Predicate
    rank: int

    def __call__(self, name: str | None, param: Tensor) -> bool:
        return self.rule(name, param) and min(matrix_shape(param.shape)) >= self.rank


class APOLLO(RoutedPreset):
    """Steps as large per channel as Adam's in a random image of the gradient; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`; matrices with a side
    shorter than `rank` are for AdamW too. A matrix keeps 2 rank numbers per column or row of its longer
    side in place of Adam's two per entry.

    rank, gap, scale: as in `apollo`.

    Units: `lr` is about 0.01.
    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270.
    """

    scale_type: ClassVar[Any] = "channel"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 256,
        gap: int = 200,
        scale: float = 1.0,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.apollo(
            rank=rank, gap=gap, scale=scale, scale_type=self.scale_type, betas=betas, eps=eps
        )
        self.build_routed(
            params,
            lr,
            rule,
            options,
            weight_decay=weight_decay,
            narrowed=lambda rule: HasRank(rule, rank),
        )


class APOLLOMini(APOLLO):
    """APOLLO with an image of one dimension and one size per tensor; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`. A matrix keeps two
    numbers per column or row of its longer side.

    Units: `lr` is about 0.01.
    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270.
    """

    scale_type = "tensor"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 1,
        gap: int = 200,
        scale: float = 128.0,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, gap=gap, scale=scale, **options
        )
