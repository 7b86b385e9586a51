"""Corrections and 8-bit codes: what they hold, how far they are off, and that they are stable."""

import pytest
import torch
from helpers import same_bits
from torch import Tensor

from heavyball.state import packing

HALVES = (torch.bfloat16, torch.float16)
WHOLES = (torch.int8, torch.int16)
PAIRS = [(half, whole) for half in HALVES for whole in WHOLES]


def all_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def wide_values(dtype: torch.dtype, count: int = 200_000) -> Tensor:
    """Values of every size that the dtype has, its subnormal ones too, but for the last binade."""
    made = torch.Generator().manual_seed(0)
    low, high = (-133, 126) if dtype == torch.bfloat16 else (-24, 15)
    exponent = torch.empty(count).uniform_(low, high, generator=made)
    sign = torch.randint(2, (count,), generator=made) * 2 - 1
    return (sign * 2.0 ** exponent.double()).float()


def half_gap(kept: Tensor) -> Tensor:
    """Half the distance to the neighbour away from zero, found by counting up the bits."""
    above = (kept.abs().view(torch.int16) + 1).view(kept.dtype).double()
    return (above - kept.abs().double()) / 2


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_what_sixteen_bits_hold_has_no_correction(half: torch.dtype, whole: torch.dtype) -> None:
    held = all_of(half)
    kept, correction = packing.split(held.float(), half, whole)
    assert (correction == 0).all()
    assert torch.equal(kept.isnan(), held.isnan())
    assert same_bits(kept[~held.isnan()], held[~held.isnan()])
    joined = packing.join(kept, correction)
    assert same_bits(joined[~held.isnan()], held.float()[~held.isnan()])


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_the_error_is_half_a_step_of_the_correction(half: torch.dtype, whole: torch.dtype) -> None:
    x = wide_values(half)
    kept, correction = packing.split(x, half, whole)
    assert torch.equal(kept, x.to(half))
    levels = {torch.int8: 127, torch.int16: 32767}[whole]
    gap = half_gap(kept)
    # half a step; a whole one where halves round towards zero or the middle belongs to a neighbour;
    # and the rounding of the result to float32
    rounding = x.abs().double() * 2**-24 + 2.0**-150
    error = (packing.join(kept, correction).double() - x.double()).abs()
    assert (error <= gap / levels * 0.5000001 + rounding).double().mean() > 0.99
    assert (error <= gap / levels * 1.0000001 + rounding).all()


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_the_formula_of_the_paper(half: torch.dtype, whole: torch.dtype) -> None:
    """round(clip((x - p') / h, -1, 1) L) in float64, apart from ties and from the exact middle."""
    x = wide_values(half)
    levels = {torch.int8: 127, torch.int16: 32767}[whole]
    kept, correction = packing.split(x, half, whole)
    ratio = (x.double() - kept.double()) / half_gap(kept)
    expected = (ratio.clamp(-1, 1) * levels).round()
    plain = (expected.abs() < levels) & ((ratio * levels).frac().abs() - 0.5).abs().gt(1e-6)
    assert plain.double().mean() > 0.9
    assert torch.equal(correction[plain].double(), expected[plain])


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_splitting_again_changes_no_bit(half: torch.dtype, whole: torch.dtype) -> None:
    middles = (
        all_of(half).double() + half_gap(all_of(half)) * all_of(half).double().sign()
    ).float()
    for x in (wide_values(half), middles[middles.isfinite()]):
        kept, correction = packing.split(x, half, whole)
        again = packing.split(packing.join(kept, correction), half, whole)
        assert same_bits(again[0], kept)
        assert torch.equal(again[1], correction)


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_no_correction_moves_a_value_further_than_half_way(
    half: torch.dtype, whole: torch.dtype
) -> None:
    kept = all_of(half)
    kept = kept[kept.isfinite() & (kept.abs() < torch.finfo(half).max)]
    for value in (-1, 1, torch.iinfo(whole).min + 1, torch.iinfo(whole).max):
        joined = packing.join(kept, torch.full(kept.shape, value, dtype=whole))
        moved = (joined.double() - kept.double()).abs()
        assert (moved <= half_gap(kept) * (1 + 2**-20) + 2.0**-150).all()


@pytest.mark.parametrize(("half", "whole"), PAIRS)
def test_finite_values_stay_finite_and_others_stay_what_they_are(
    half: torch.dtype, whole: torch.dtype
) -> None:
    largest = torch.finfo(half).max
    x = torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])
    kept, correction = packing.split(x, half, whole)
    assert kept.tolist()[:4] == [largest, -largest, torch.inf, -torch.inf]
    joined = packing.join(kept, correction)
    assert joined[:2].isfinite().all()
    assert joined[2:4].tolist() == [torch.inf, -torch.inf]
    assert joined[4].isnan()


# ---- 8-bit codes


def test_codes_are_off_by_half_a_step() -> None:
    made = torch.Generator().manual_seed(1)
    x = packing.blocks(torch.randn(32 * 500 + 7, generator=made))
    scale = packing.scales(x)
    largest = x.abs().amax(1)
    assert (scale.double() >= largest.double()).all()
    assert (scale.double() <= largest.double() * (1 + 2**-7)).all()
    wide = scale.double()[:, None]
    error = (packing.decode(packing.encode(x, scale, torch.int8, None), scale) - x).double().abs()
    # z(c) = c / (2 - c) for a code c in [0, 1] has the slope 2 / (2 - c)^2, and 2 - c = 2 / (1 + z)
    slope = (1 + (x.double() / wide).abs() + 1 / 127) ** 2 / 2
    assert (error <= slope / 127 / 2 * wide * 1.000001).all()
    root = x.abs()
    error = (packing.decode(packing.encode(root, scale, torch.uint8, None), scale) - root).abs()
    least = root.double() < wide / 510  # raised to the first code
    assert (error.double()[~least] <= (wide / 510 * 1.00001).expand_as(root)[~least]).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("share", [1.0, 0.77, 0.5, 0.31, 0.1234, 0.02])
def test_the_mean_code_over_all_bits_is_exact(dtype: torch.dtype, share: float) -> None:
    x = torch.full((2**11, 32), 3.0) * share
    x[:, 0] = 3.0
    bits = torch.arange(2**16, dtype=torch.int32).reshape(2**11, 32)
    found = packing.encode(x, packing.scales(x), dtype, bits)[:, 1:].double()
    ratio = share * 3 / packing.scales(x)[0].item()
    exact = 254 * ratio / (1 + ratio) if dtype == torch.int8 else 255 * ratio
    # bits without the first of each 32: their mean is off by less than 2^-11 of a code
    assert abs(found.mean().item() - exact) < 2**-11 + 1e-4


def test_a_positive_value_never_becomes_zero() -> None:
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 1], x[1, 0] = 1.0, 1e-20, 1e-30
    scale = packing.scales(x)
    for bits in (None, torch.zeros(2, 32, dtype=torch.int32)):
        found = packing.decode(packing.encode(x, scale, torch.uint8, bits), scale)
        assert torch.equal(found > 0, x > 0)
    tiny = packing.nearest_root(torch.tensor([0.0, 1e-30, 1e-12]))
    assert tiny.tolist() == [0.0, 2.0**-24, pytest.approx(1e-6, rel=0.03)]


def test_blocks_of_zeros_and_blocks_that_are_not_finite() -> None:
    x = torch.ones(4, 32)
    x[0], x[1, 3], x[2, 3] = 0.0, torch.nan, torch.inf
    for dtype in (torch.int8, torch.uint8):
        scale = packing.scales(x)
        found = packing.decode(packing.encode(x, scale, dtype, None), scale)
        assert (found[0] == 0).all()
        assert found[1:3].isnan().all()
        assert (found[3] == 1).all()


def test_memory_order_and_back() -> None:
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    for like in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 2)):
        row = packing.in_memory_order(like, like)
        assert torch.equal(packing.from_memory_order(row, like), like)
        if like.is_contiguous(memory_format=torch.channels_last) or like is x:
            assert row.data_ptr() == like.data_ptr()
