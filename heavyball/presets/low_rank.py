"""APOLLO: moments of a low-rank projection of the gradient, with AdamW for everything else."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.matrices import Blocks, matrices
from heavyball.presets.muon import Predicate, RoutedOptions, RoutedPreset


@dataclass(frozen=True)
class HasRank:
    """Whether a parameter selected by another rule has sides of at least this rank.

    blocks, axis: the blocks that are projected separately.
    """

    rule: Predicate
    rank: int
    blocks: Any = None
    axis: Literal[0, 1] = 0

    def __repr__(self) -> str:
        cut = "" if self.blocks is None else f", blocks={self.blocks!r}, axis={self.axis}"
        return f"HasRank(rule={self.rule!r}, rank={self.rank}{cut})"

    def __call__(self, name: str | None, param: Tensor) -> bool:
        if not self.rule(name, param):
            return False
        blocks = self.blocks
        if isinstance(blocks, Mapping):
            fitting = (v for k, v in blocks.items() if name and fnmatch.fnmatchcase(name, k))
            blocks = next(fitting, None)
        try:
            view = matrices(tuple(param.shape), False, blocks, self.axis)
        except ValueError:  # the rule says what is wrong with the blocks
            return True
        return min(map(min, view.sizes)) >= self.rank


class APOLLO(RoutedPreset):
    """Gradients scaled per channel like Adam's in a random projection; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and matrices with a side shorter than `rank`; it
    takes the same options. A matrix has state of 2 rank numbers per column or row of its longer
    side, instead of Adam's two per entry.

    rank, gap, scale, blocks, axis: as in `apollo`; `blocks` may be given by names.

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
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.apollo(
            rank=rank,
            gap=gap,
            scale=scale,
            scale_type=self.scale_type,
            betas=betas,
            eps=eps,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(
            params,
            lr,
            rule,
            options,
            weight_decay=weight_decay,
            narrowed=lambda rule: HasRank(rule, rank, blocks, axis),
        )


class APOLLOMini(APOLLO):
    """APOLLO with rank 1 and a single scale per tensor; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options. A matrix has state of
    two numbers per column or row of its longer side.

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
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            gap=gap,
            scale=scale,
            blocks=blocks,
            axis=axis,
            **options,
        )
