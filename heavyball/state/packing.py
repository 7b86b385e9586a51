"""Ways to store float32 values in fewer bits, as pure functions of tensors; used by `state/held.py`.

Kernels do the same: they print what `split`, `join`, `root`, `nearest_root`, `scale_of`, `code_of` and
`value_of` make of expressions (`compiler/formats.py`), so these use only what a printer can spell.

Nothing here makes a finite value infinite, and infinity and NaN come back as they were, except that
one of them turns its whole block of 8-bit codes into NaN.
"""

import torch
from torch import Tensor

# The steps of a correction on either side of the 16-bit value.
LEVELS = {torch.int8: 127, torch.int16: 32767}
# Half the distance between neighbours over the power of two below them, and the word of the power
# of two under which that distance no longer shrinks.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST = {torch.bfloat16: 0x00800000, torch.float16: 0x38800000}
# The last binade takes the steps of the one before it, so that a kernel can multiply by the inverse.
EXPONENT, LARGEST_UNIT = 0x7F800000, 0x7E800000
ONE = 0x3F800000  # the word of 1, and twice that less the word of a power of two is its inverse's
BLOCK = 32
SIGNED, UNSIGNED = 127, 255


def nearest_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest; a finite value beyond the largest one becomes the largest one."""
    if not isinstance(x, Tensor):  # an expression: every language has its own conversion
        return x.nearest_finite(dtype)
    rounded = x.to(dtype)
    largest = torch.finfo(dtype).max
    clamped = x.clamp(-largest, largest).to(dtype)
    return torch.where(rounded.isfinite() | ~x.isfinite(), rounded, clamped)


def _unit(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two at or below each value, as the word of a float32."""
    return (kept.view(torch.int32) & EXPONENT).clamp(LEAST[dtype], LARGEST_UNIT)


def split(x: Tensor, dtype: torch.dtype, correction: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 value as its nearest 16-bit value p' and a small integer for the rest.

    h = ulp(p') / 2, correction = round(clip((x - p') / h, -1, 1) L) with L = 127 or 32767.

    What `join` gives splits into the same two tensors again, so values that do not change keep their
    bits; for that the exact middle between two values belongs to the even one.

    Source: FlashOptim, https://arxiv.org/abs/2602.23349. Departures: halves round towards zero, and
        a value beyond the largest finite one stays finite.
    """
    kept = nearest_finite(x, dtype)
    back, levels = kept.to(torch.float32), LEVELS[correction]
    # sixteen bits of correction have ties that float32 cannot tell from their neighbours
    wide = torch.float64 if correction == torch.int16 else torch.float32
    inverse = (2 * ONE - _unit(back, dtype)).view(torch.float32)
    ratio = (x.to(wide) - back.to(wide)) * inverse.to(wide) * (1 / HALF[dtype])
    count = (ratio.abs().clamp(max=1) * levels - 0.5).ceil()
    most = levels - (kept.view(torch.uint16).to(torch.int32) & 1).to(wide)
    count = torch.where(count > most, most, count)
    count = torch.where(ratio < 0, -count, count)
    return kept, torch.where(torch.isnan(ratio), 0, count).to(correction)


def join(kept: Tensor, correction: Tensor) -> Tensor:
    """The float32 value of which `split` made these two: `p' + correction / L * ulp(p') / 2`.

    Whatever the correction is, the result is at most half an ulp away from p'.
    """
    back = kept.to(torch.float32)
    wide = torch.float64 if correction.dtype == torch.int16 else torch.float32
    inverse = torch.tensor(1 / LEVELS[correction.dtype], dtype=wide, device="cpu")
    part = correction.to(wide) * inverse * HALF[kept.dtype]
    unit = _unit(back, kept.dtype).view(torch.float32)
    moved = (back.to(wide) + part * unit.to(wide)).to(torch.float32)
    return torch.where(
        torch.eq(correction, 0), back, moved
    )  # adding zero would lose the sign of -0


def root(x: Tensor) -> Tensor:
    """The root of a mean of squares, as which float16 and 8-bit codes hold it; NaN passes."""
    return torch.sqrt(torch.where(x < 0, 0, x))


def nearest_root(x: Tensor) -> Tensor:
    """The root in float16; a positive one never becomes zero, since it is divided by."""
    value = root(x)
    smallest = 2.0**-24
    return nearest_finite(
        torch.where((value > 0) & (value < smallest), smallest, value), torch.float16
    )


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """The elements of `x` in one row, as those of `like`, of the same shape, lie in memory."""
    order = sorted(range(like.ndim), key=lambda axis: -like.stride()[axis])
    return x.permute(order).reshape(-1)


def from_memory_order(row: Tensor, like: Tensor) -> Tensor:
    """What `in_memory_order` took apart."""
    order = sorted(range(like.ndim), key=lambda axis: -like.stride()[axis])
    back = sorted(range(like.ndim), key=lambda axis: order[axis])
    return row.reshape([like.shape[axis] for axis in order]).permute(back)


def blocks(row: Tensor) -> Tensor:
    """Blocks of 32 consecutive elements, the last filled up with zeros."""
    return torch.nn.functional.pad(row, (0, -row.numel() % BLOCK)).view(-1, BLOCK)


def block_count(numel: int) -> int:
    return -(-numel // BLOCK)


def scales(x: Tensor) -> Tensor:
    """The largest magnitude of each block, rounded up to bfloat16; NaN where a value is not finite."""
    return scale_of(x.abs().amax(1))


def scale_of(largest: Tensor) -> Tensor:
    """The scale of blocks with these largest magnitudes."""
    word = (largest.view(torch.int32) + 0xFFFF) & -0x10000
    above = word.view(torch.float32).clamp(max=torch.finfo(torch.bfloat16).max)
    return torch.where(torch.isfinite(largest), above, torch.nan).to(torch.bfloat16)


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Codes of blocks with known scales, see `code_of`."""
    return code_of(x, scale.to(torch.float32)[:, None], dtype, bits)


def code_of(x: Tensor, scale: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Codes of values: int8 for signed ones, uint8 for those never negative.

    int8    127 * 2 z / (1 + |z|) with z = x / scale, which has small steps around zero
    uint8   255 * x / scale; a positive value never gets the code 0, since it is divided by

    bits: sixteen random ones for each element, with which codes round so that their mean is exact;
        without them they round to nearest.
    """
    size, signed = x.abs(), dtype == torch.int8
    position = 2 * SIGNED * size / (scale + size) if signed else size / (scale / UNSIGNED)
    if bits is None:
        code = torch.round(position)
    else:
        code = torch.floor(position + bits.to(torch.float32) / 2**16)
    if not signed:
        code = torch.where((x > 0) & (code < 1), 1, code)
    code = torch.where(
        code > (SIGNED if signed else UNSIGNED), SIGNED if signed else UNSIGNED, code
    )
    # a scale of zero or NaN: 0/0
    code = torch.where(torch.isnan(code), 0, code)
    return (torch.where(x < 0, -code, code) if signed else code).to(dtype)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of blocks of codes, which `encode` made."""
    return value_of(codes, scale.to(torch.float32)[:, None])


def value_of(code: Tensor, scale: Tensor) -> Tensor:
    """The values of codes, which `code_of` made."""
    wide = code.to(torch.float32)
    if code.dtype == torch.int8:
        part = wide * torch.tensor(1 / SIGNED, dtype=torch.float32, device="cpu")
        return part / (2 - part.abs()) * scale
    return wide * (scale / UNSIGNED)
