"""State stored in tensors with a different shape than its values; see `state/held.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heavyball.state import four_bit, rank_one

# Blocks of codes that are encoded at a time.
PART = 2**8


@dataclass(frozen=True)
class FourBit:
    """Two codes in each byte of `main`, and a scale for each block of them, in the order of a
    contiguous tensor."""

    main: Tensor
    scale: Tensor
    shape: torch.Size
    signed: bool

    def load(self, dtype: torch.dtype) -> Tensor:
        """The values, promoted to the dtype of the mathematics."""
        packed = self.main.view(-1, four_bit.BLOCK // 2)
        values = torch.empty(self.shape, dtype=torch.float32, device=self.main.device)
        blocks = values.view(-1, four_bit.BLOCK)
        for low in range(0, len(blocks), PART):
            here = slice(low, low + PART)
            blocks[here] = four_bit.decode(packed[here], self.scale[here], self.signed)
        return values.to(dtype)

    def store(self, value: Tensor, bits: Callable[[], Tensor] | None = None) -> None:
        """Write values; `bits` gives what to round with, in their shape."""
        blocks = value.to(torch.float32).reshape(-1, four_bit.BLOCK)
        drawn = None if bits is None else bits().reshape(-1, four_bit.BLOCK)
        packed, scales = self.main.view(-1, four_bit.BLOCK // 2).clone(), self.scale.clone()
        for low in range(0, len(blocks), PART):
            here = slice(low, low + PART)
            new, old = blocks[here], packed[here]
            # Values that did not change must keep their bits, as where a step was skipped.
            same = (four_bit.decode(old, scales[here], self.signed) == new).all(1)
            scale = four_bit.scales(new, self.signed)
            made = four_bit.encode(new, scale, self.signed, None if drawn is None else drawn[here])
            packed[here] = torch.where(same[:, None], old, made)
            scales[here] = torch.where(same, scales[here], scale)
        self.main.copy_(packed.view(-1))
        self.scale.copy_(scales)


@dataclass(frozen=True)
class RankOne:
    """`main` for the rows of a matrix, `columns`, and the signs of what may be negative."""

    main: Tensor
    columns: Tensor
    signs: Tensor | None
    shape: torch.Size

    def load(self, dtype: torch.dtype) -> Tensor:
        """The values, promoted to the dtype of the mathematics."""
        return self._matrix().reshape(self.shape).to(dtype)

    def _matrix(self) -> Tensor:
        return rank_one.values(self.main, self.columns, self.signs)

    def store(self, value: Tensor, bits: Callable[[], Tensor] | None = None) -> None:
        """Write values; nothing is rounded at random."""
        new = value.to(torch.float32).reshape(len(self.main), len(self.columns))
        above = None
        if self.signs is not None:
            above = rank_one.unpacked(self.signs, len(self.columns))
        rows, columns, *signs = rank_one.renewed(self.main[:, None], self.columns[None], above, new)
        self.main.copy_(rows[:, 0])
        self.columns.copy_(columns[0])
        for made in signs:
            self.signs.copy_(rank_one.packed(made))  # type: ignore[union-attr]
