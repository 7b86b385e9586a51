"""Codes of four bits, two in a byte, with a float32 scale for every 128 values in the order of a
contiguous tensor; `state/packed.py` uses them, and `compiler/formats.py` prints `reach_of`, `scale_of`,
`code_of` and `value_of`.

    moment   16 levels from -0.8875 to 1, denser towards zero, times the scale
    square   k / 16 with k = 1 .. 16, times the scale: there is no zero, since it is divided by

The scale is the least one of which every value of the block is a part between the levels: the largest
magnitude, or 1 / 0.8875 of a negative one. So what is read and encoded again has the same codes.

Source: `OptimState4bit` of torchao; Li et al. 2023, https://arxiv.org/abs/2309.01507. Both hold squares
    as they are and not as roots, and so does this. Departures: their scale is the largest magnitude, so
    that -1 becomes -0.8875, and an average of it only half as large; and it has a floor of 1e-12, which
    loses smaller values and makes squares of zeros.

Nothing here makes a finite value infinite. One infinity or NaN turns its whole block into NaN.
"""

import functools
import itertools

import torch
from torch import Tensor

from heavyball.numerics import lasting

BLOCK = 128
_SIZES = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
LEVELS = (*(-x for x in reversed(_SIZES)), 0.0, *_SIZES, 1.0)
GAPS = tuple(above - level for level, above in itertools.pairwise(LEVELS))
ZERO, LAST = 7, 15  # the code of zero, and the largest one
STEPS = 16  # of squares
LARGEST = torch.finfo(torch.float32).max


def fits(numel: int) -> bool:
    """Whether a tensor of so many elements is whole blocks."""
    return numel % BLOCK == 0


def reach_of(x: Tensor, signed: bool) -> Tensor:
    """The least scale of which a value is a part between the levels."""
    size = x.abs()
    least = torch.where(x < 0, size / -LEVELS[0], size) if signed else size
    return torch.where(torch.isfinite(size) & (least > LARGEST), LARGEST, least)


def scale_of(largest: Tensor) -> Tensor:
    """The scale of blocks whose values reach so far; NaN where one is not finite."""
    return torch.where(torch.isfinite(largest), largest, torch.nan)


def code_of(x: Tensor, scale: Tensor, signed: bool, bits: Tensor | None) -> Tensor:
    """Codes of values, as uint8 from 0 to 15.

    bits: sixteen random ones for each element, with which codes round so that the mean of what they
        stand for is exact; without them they round to the nearest level, from the middle upwards.
    """
    part = x / scale
    if signed:
        # the code's place between levels: whole numbers at these, and linear between two
        code, low, gap = _below(part)
        within = (part - low) / gap
    else:
        code, within = part * STEPS, part * 0 - 1
    more = 0.5 if bits is None else bits.to(torch.float32) / 2**16
    code = torch.floor(code + (within + more))
    code = torch.where(code < 0, 0, torch.where(code > LAST, LAST, code))
    # a scale of zero or NaN: 0/0
    return torch.where(torch.isnan(part), ZERO if signed else 0, code).to(torch.uint8)


def value_of(code: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The values of codes, which `code_of` made."""
    wide = code.to(torch.float32)
    if not signed:
        return (wide + 1) * (1 / STEPS) * scale
    return _level(code, wide) * scale


def _below(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The level at or below each value but never the last: its number, itself, and the gap above it."""
    if isinstance(part, Tensor):
        levels, gaps = _table(part.device)
        number = torch.bucketize(part, levels[1:-1], right=True)
        return number.to(torch.float32), levels[number], gaps[number]
    # an expression
    number, low, gap = part * 0, part * 0 + LEVELS[0], part * 0 + GAPS[0]
    for k in range(1, LAST):
        at = part >= LEVELS[k]
        number = torch.where(at, k, number)
        low, gap = torch.where(at, LEVELS[k], low), torch.where(at, GAPS[k], gap)
    return number, low, gap


def _level(code: Tensor, wide: Tensor) -> Tensor:
    if isinstance(code, Tensor):
        return _table(code.device)[0][code.to(torch.int64)]
    value = wide * 0 + LEVELS[0]
    for number, level in enumerate(LEVELS[1:], start=1):
        value = torch.where(wide >= number, level, value)
    return value


@functools.cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels and the gaps above them."""
    with lasting():
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
        return levels, torch.tensor(GAPS, dtype=torch.float32, device=device)


# ---- blocks, a row for each


def scales(blocks: Tensor, signed: bool) -> Tensor:
    """The scale of each block."""
    return scale_of(reach_of(blocks, signed).amax(1))


def encode(blocks: Tensor, scale: Tensor, signed: bool, bits: Tensor | None) -> Tensor:
    """The bytes of blocks with known scales: of two codes the first is in the high half."""
    codes = code_of(blocks, scale[:, None], signed, bits)
    return codes[:, 0::2] * 16 + codes[:, 1::2]


def decode(packed: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The values of blocks, which `encode` made bytes of."""
    codes = torch.stack((packed >> 4, packed & 15), 2).flatten(1)
    return value_of(codes, scale[:, None], signed)
