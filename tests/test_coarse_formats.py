"""Four bits, and rows and columns: what they hold, how far they are off, and that they are stable."""

import math

import pytest
import torch
from helpers import same_bits, snapshot
from torch import Tensor, nn

import heavyball
from heavyball.runtime.state import packed_shape
from heavyball.state import four_bit, rank_one
from heavyball.state.held import COLUMNS, SCALE, SIGNS, held

C = heavyball.chainable
SIGNED = (True, False)
# how far the levels are apart, and the largest distance
GAPS = torch.tensor(four_bit.LEVELS, dtype=torch.float64).diff()
WIDEST = 0.225


def golden(dtype: torch.dtype = torch.float64) -> Tensor:
    """sin(1 + i + 2 j + i j + 3), 3 x 4."""
    i, j = torch.arange(3.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)
    return torch.sin(4 + i + 2 * j + i * j).to(dtype)


def blocks(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(seed))


def coded(x: Tensor, signed: bool, bits: Tensor | None = None) -> Tensor:
    scale = four_bit.scales(x, signed)
    return four_bit.decode(four_bit.encode(x, scale, signed, bits), scale, signed)


# ---- four bits


def test_codes_of_a_known_block() -> None:
    """What torchao's `OptimState4bit` makes of these twelve values, with their largest as the scale."""
    x = golden(torch.float32).flatten()
    scale = x.abs().max()
    codes = four_bit.code_of(x, scale, True, None)
    assert codes.tolist() == [1, 3, 15, 2, 0, 15, 0, 15, 3, 2, 15, 1]
    # twelve roundings of float32 of numbers up to 1
    assert abs(four_bit.value_of(codes, scale, True).sum().item() + 0.399996089935) < 12 * 2**-24


def test_the_levels_are_those_of_the_dynamic_map_and_a_line_without_zero() -> None:
    codes, one = torch.arange(16, dtype=torch.uint8), torch.ones(())
    # bitsandbytes' map: middles of even divisions of (0.1, 1], (0.01, 0.1] and (0.001, 0.01]; 0 and 1
    means = []
    for power, parts in ((0.01, 1), (0.1, 2), (1.0, 4)):
        ends = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        means += ((ends[1:] + ends[:-1]) / 2 * power).tolist()
    levels = sorted([*means, *(-x for x in means), 0.0, 1.0])
    found = four_bit.value_of(codes, one, True)
    torch.testing.assert_close(found.double(), torch.tensor(levels, dtype=torch.float64))
    assert four_bit.value_of(codes, one, False).tolist() == [k / 16 for k in range(1, 17)]


@pytest.mark.parametrize("signed", SIGNED)
def test_the_first_of_two_codes_is_in_the_high_half(signed: bool) -> None:
    x = blocks(3) if signed else blocks(3).square()
    scale = four_bit.scales(x, signed)
    codes = four_bit.code_of(x, scale[:, None], signed, None)
    packed = four_bit.encode(x, scale, signed, None)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 64)
    assert torch.equal(packed >> 4, codes[:, ::2])
    assert torch.equal(packed & 15, codes[:, 1::2])


@pytest.mark.parametrize("signed", SIGNED)
def test_a_code_is_the_nearest_one_and_the_upper_of_two(signed: bool) -> None:
    levels = torch.tensor(four_bit.LEVELS if signed else [k / 16 for k in range(1, 17)])
    x = torch.linspace(-0.8875 if signed else 0, 1, 20_001)
    codes = four_bit.code_of(x, torch.ones(()), signed, None)
    distance = (x.double()[:, None] - levels.double()).abs()
    nearest = 15 - distance.flip(1).argmin(1)
    middles = (levels[1:] + levels[:-1]) / 2
    edge = (x[:, None] - middles).abs().amin(1) < 1e-6
    assert torch.equal(codes.long()[~edge], nearest[~edge])
    if not signed:  # these middles are exact
        assert four_bit.code_of(middles, torch.ones(()), False, None).tolist() == [*range(1, 16)]


@pytest.mark.parametrize("signed", SIGNED)
def test_errors_are_half_a_gap(signed: bool) -> None:
    x = blocks(500) if signed else blocks(500).square()
    largest = x.abs().amax(1, keepdim=True).double()
    scale = four_bit.scales(x, signed).double()[:, None]
    assert (scale >= largest).all()
    assert (scale <= largest / (0.8875 if signed else 1) * (1 + 2**-23)).all()
    error = (coded(x, signed) - x).double().abs()
    part = (x.double() / scale)[..., None]
    levels = torch.tensor(four_bit.LEVELS, dtype=torch.float64)
    if signed:
        place = (part >= levels[1:-1]).sum(-1)
        assert (error <= (GAPS[place] / 2 * (1 + 1e-5) + 1e-6) * scale).all()
    else:
        assert (error <= scale / 32 * (1 + 1e-5) + scale / 32 * (part[..., 0] < 1 / 32)).all()


@pytest.mark.parametrize("signed", SIGNED)
def test_what_reaches_furthest_is_kept_whatever_its_sign(signed: bool) -> None:
    x = blocks(200) if signed else blocks(200).square()
    place = torch.where(x < 0, -x / 0.8875, x).argmax(1, keepdim=True)
    found = coded(x, signed)
    torch.testing.assert_close(found.gather(1, place), x.gather(1, place), rtol=2**-22, atol=0)


@pytest.mark.parametrize("signed", SIGNED)
def test_encoding_again_changes_no_code(signed: bool) -> None:
    once = coded(blocks(300) if signed else blocks(300).square(), signed)
    scale = four_bit.scales(once, signed)
    codes = four_bit.encode(once, scale, signed, None)
    again = four_bit.decode(codes, scale, signed)
    torch.testing.assert_close(again, once, rtol=2**-22, atol=0)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("share", [0.97, 0.77, 0.5, 0.31, 0.12, 0.07, -0.02, -0.5, -0.88])
def test_the_mean_over_all_bits_is_exact(signed: bool, share: float) -> None:
    if not signed and share < 1 / 16:
        share = 1 / 16 - share / 2
    x = torch.full((2**9, 128), 3.0 * share)
    x[:, 0] = 3.0
    bits = torch.arange(2**16, dtype=torch.int32).reshape(2**9, 128)
    found = coded(x, signed, bits)[:, 1:].double()
    # the bits without the first of each 128, whose mean is off by less than 2^-9 of a gap
    assert abs(found.mean().item() - 3 * share) < 3 * WIDEST * 2**-9


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-13, 1.0, 1e30, 3.4e38])
def test_every_size_is_held(signed: bool, size: float) -> None:
    x = blocks(20).clamp(-1, 1) * size if signed else blocks(20).clamp(-1, 1).abs() * size
    x[:, 5] = -size if signed else size
    for bits in (None, torch.full(x.shape, 2**16 - 1, dtype=torch.int32)):
        found = coded(x, signed, bits)
        assert found.isfinite().all()
        room = 1.13 * WIDEST * size + 2.0**-149 * 2
        assert ((found.double() - x.double()).abs() <= room).all()
    if not signed:
        assert (coded(x, False)[x > 0] > 0).all() or size < 1e-37


@pytest.mark.parametrize("signed", SIGNED)
def test_blocks_of_zeros_and_blocks_that_are_not_finite(signed: bool) -> None:
    x = torch.ones(4, 128)
    x[0], x[1, 3], x[2, 3] = 0.0, torch.nan, torch.inf
    found = coded(x, signed)
    assert (found[0] == 0).all()
    assert found[1:3].isnan().all()
    assert (found[3] == 1).all()


def test_a_square_is_never_zero_beside_others() -> None:
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1] = 1.0, 1e-30
    assert (coded(x, False) >= 1 / 16).all()


# ---- rows and columns


def test_factors_of_a_known_matrix() -> None:
    x = golden()
    found = rank_one.values(*rank_one.factors(x), rank_one.sign_bits(x))
    picked = found[0, 0], found[1, 2], found[2, 3], found.sum(), found.square().sum()
    expected = -0.565019827186, -1.29362179981, -0.6461310471, -2.1425373532, 7.44921616755
    assert [v.item() for v in picked] == pytest.approx(expected, abs=1e-11)


def test_signs_are_bits_of_rows_the_lowest_first() -> None:
    x = torch.tensor([[1.0, -1, 0, 2, -3, -1, -1, 5, 6, 7, -1], [-1.0] * 10 + [1]])
    assert rank_one.sign_bits(x).tolist() == [[1 + 8 + 128, 1 + 2], [0, 4]]


def test_what_has_rank_one_is_exact_and_sums_are_kept() -> None:
    made = torch.Generator().manual_seed(3)
    x = torch.outer(torch.rand(40, generator=made), torch.rand(30, generator=made)) + 0.0
    sign = torch.where(torch.rand(40, 30, generator=made) > 0.5, 1.0, -1.0)
    held = rank_one.factors(x * sign), rank_one.sign_bits(x * sign)
    torch.testing.assert_close(rank_one.values(*held[0], held[1]), x * sign, rtol=2**-20, atol=0)
    x = torch.rand(40, 30, generator=made)
    found = rank_one.values(*rank_one.factors(x), None)
    for axis in (0, 1):
        torch.testing.assert_close(found.sum(axis), x.sum(axis), rtol=2**-19, atol=0)


@pytest.mark.parametrize("numel", [1, 2, 12, 4096, 4098, 4099, 4352, 2**20])
def test_a_tensor_is_seen_as_the_most_square_matrix(numel: int) -> None:
    rows, columns = rank_one.sides(numel)
    assert rows * columns == numel
    assert rows >= columns
    between = range(columns + 1, math.isqrt(numel) + 1)
    assert all(numel % n for n in between)
    assert rank_one.fits(numel) == (columns > 1)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30, 3.4e38])
def test_sums_stay_in_range(size: float) -> None:
    made = torch.Generator().manual_seed(4)
    x = torch.rand(64, 50, generator=made) * size
    for signs in (None, rank_one.sign_bits(x)):
        found = rank_one.values(*rank_one.factors(x), signs)
        assert found.isfinite().all()
        # the sums are kept; each of the smallest values may be off by their smallest distance
        exact = x.double().sum(1)
        assert ((found.double().sum(1) - exact).abs() <= 1e-4 * exact + 50 * 2.0**-126).all()
    spread = torch.zeros(64, 50)
    spread[0], spread[:, 0] = size, size  # of which the factors make more than there is
    assert rank_one.values(*rank_one.factors(spread), None).isfinite().all()


def test_zeros_and_what_is_not_finite() -> None:
    zeros = torch.zeros(8, 8)
    for signs in (None, rank_one.sign_bits(zeros)):
        assert (rank_one.values(*rank_one.factors(zeros), signs) == 0).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(8, 8)
        x[2, 3] = bad
        assert rank_one.values(*rank_one.factors(x), rank_one.sign_bits(x)).isnan().all()
    x = torch.ones(8, 8)
    x[0] = 1e-30
    x[:, 0] = 1e-30
    assert (rank_one.values(*rank_one.factors(x), None) > 0).all()


# ---- through optimizers


def made(chain, shapes=((66, 64),), **options):
    """Parameters and an optimizer without kernels."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return params, C.ChainOpt(params, 0.05, *chain, **{"compile": False, **options})


def step(opt, *seeds) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        opt.step()


def values(opt, p, name):
    state, program = opt.state[p], opt.registry.programs()[p]
    shape = packed_shape(program, name, p, state)
    return held(state, name, program.holds_of(name), shape).load(torch.float32)


M, V = "scale_by_adam.exp_avg", "scale_by_adam.exp_avg_sq"


def test_what_is_held_in_four_bits() -> None:
    params, opt = made((C.scale_by_adam,), storage_dtype="4bit", stochastic_rounding=False)
    step(opt, 1)
    (p,) = params
    state, grad = opt.state[p], p.grad.reshape(-1, 128)
    assert {k: (t.dtype, t.numel()) for k, t in state.items() if k != "step"} == {
        M: (torch.uint8, 66 * 32),
        M + SCALE: (torch.float32, 33),
        V: (torch.uint8, 66 * 32),
        V + SCALE: (torch.float32, 33),
    }
    # after one step of unbiased means they are the gradient and its square
    for key, x, signed in ((M, grad, True), (V, grad.square(), False)):
        scale = four_bit.scales(x, signed)
        torch.testing.assert_close(state[key + SCALE], scale, rtol=2**-20, atol=0)
        codes = four_bit.encode(x, scale, signed, None).flatten()
        assert (codes != state[key]).sum() <= 2  # on the edge between two levels


def test_what_is_held_of_rank_one() -> None:
    params, opt = made((C.scale_by_adam,), storage_dtype="rank1")
    step(opt, 1)
    (p,) = params
    state = opt.state[p]
    assert {k: (t.dtype, tuple(t.shape)) for k, t in state.items() if k != "step"} == {
        M: (torch.float32, (66,)),
        M + COLUMNS: (torch.float32, (64,)),
        M + SIGNS: (torch.uint8, (66, 8)),
        V: (torch.float32, (66,)),
        V + COLUMNS: (torch.float32, (64,)),
    }
    assert torch.equal(values(opt, p, M) > 0, p.grad > 0)
    for key, x in ((M, p.grad.abs()), (V, p.grad.square())):
        found = values(opt, p, key).abs()
        for axis in (0, 1):
            torch.testing.assert_close(found.sum(axis), x.sum(axis), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("form", "kept"), [("4bit", (64, 64)), ("4bit", (33, 128)), ("rank1", (63, 67))]
)
def test_tensors_that_a_format_is_not_for_stay(form: str, kept: tuple) -> None:
    others = [(63, 65), (4099,)]  # less than 4096; a prime number
    others += [(70, 61)] if form == "4bit" else []  # not in whole blocks
    params, opt = made((C.scale_by_adam,), (kept, *others), storage_dtype={"exp_avg": form})
    step(opt, 1)
    assert opt.state[params[0]][M].shape != kept
    assert opt.state[params[0]][V].shape == kept
    for p in params[1:]:
        assert opt.state[p][M].shape == p.shape
        assert opt.state[p][M].dtype == torch.float32


@pytest.mark.parametrize("form", ["4bit", "rank1"])
def test_weights_are_refused_by_name_and_left_alone_otherwise(form: str) -> None:
    chain = (C.scale_by_adam, C.schedule_free)
    with pytest.raises(ValueError, match=f"'schedule_free.z' cannot be stored as '{form}'"):
        made(chain, storage_dtype={"z": form})
    params, opt = made(chain, storage_dtype=form)
    step(opt, 1)
    assert opt.state[params[0]]["schedule_free.z"].dtype == torch.float32
    assert opt.state[params[0]]["schedule_free.z"].shape == params[0].shape


def test_state_of_another_shape_than_the_parameters_is_packed_by_name() -> None:
    """GaLore keeps Adam's moments of what is left of the gradient, 8 x 640 here."""
    chain = (C.galore(C.scale_by_adam, rank=8),)
    p = nn.Parameter(torch.zeros(70, 640))
    plain = C.ChainOpt([p], 0.1, *chain, storage_dtype="4bit", compile=False)
    step(plain, 1)
    assert all(t.dtype != torch.uint8 for t in plain.state[p].values())
    named = C.ChainOpt([p], 0.1, *chain, storage_dtype={"exp_avg": "4bit"}, compile=False)
    step(named, 1, 2)
    (key,) = (k for k, t in named.state[p].items() if t.dtype == torch.uint8)
    assert named.state[p][key].numel() == 8 * 640 // 2
    other = C.ChainOpt([p], 0.1, *chain, compile=False)
    other.load_state_dict(named.state_dict())
    assert torch.equal(other.state[p][key], values(named, p, key))


def distance(form, steps: int = 200, **options) -> float:
    """How far AdamW is from the minimum of a quadratic with curvatures from 0.1 to 1."""
    target = torch.randn(64, 96, generator=torch.Generator().manual_seed(7))
    curvature = torch.logspace(-1, 0, 64)[:, None]
    p = nn.Parameter(torch.zeros(64, 96))
    opt = heavyball.AdamW([p], 0.03, weight_decay=0.0, storage_dtype=form, **options)
    for k in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - k / steps)
        p.grad = (curvature * (p - target)).detach()
        opt.step()
    return ((p - target).norm() / target.norm()).item()


@pytest.mark.parametrize(
    "form", ["4bit", "rank1", {"exp_avg": "4bit", "exp_avg_sq": "8bit"}, {"exp_avg_sq": "rank1"}]
)
@pytest.mark.parametrize("compile", [False, "auto"])
def test_adam_comes_to_the_minimum(form, compile) -> None:
    # It may go 200 * 0.1 / 2 = 10 along each axis and has to go 1 in the mean, 4 at most. A format must
    # not keep it from there: nine tenths of the way at least.
    assert distance(form, compile=compile) < 0.1


def test_random_rounding_is_what_lets_four_bits_come_near() -> None:
    """To nearest, a mean whose increments are less than half a gap stays where it is."""
    assert distance("4bit", compile=False) * 10 < distance(
        "4bit", compile=False, stochastic_rounding=False
    )


@pytest.mark.parametrize("form", ["4bit", "rank1"])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_other_orders_of_memory_hold_the_same(form: str, memory) -> None:
    """Blocks and matrices are those of a contiguous tensor, whatever the order."""
    start = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = []
    for order in (torch.contiguous_format, memory):
        p = nn.Parameter(start.clone().to(memory_format=order))
        opt = C.ChainOpt([p], 0.05, C.scale_by_adam, storage_dtype=form, compile=False)
        step(opt, 1, 2, 3)
        ends.append(snapshot(opt))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_parameter_that_is_not_contiguous_runs_eagerly_and_says_so() -> None:
    p = nn.Parameter(torch.randn(64, 70).t())
    p.grad = torch.randn(64, 70).t()
    opt = C.ChainOpt([p], 0.05, C.scale_by_adam, storage_dtype="4bit", compile=True)
    with pytest.raises(RuntimeError, match="4-bit state of a parameter that is not contiguous"):
        opt.step()
    # without random bits, which are counted in the parameter's order, a copy in that order is stepped
    same = {"storage_dtype": "4bit", "stochastic_rounding": False}
    found = []
    for compile in (True, False):
        q = nn.Parameter(p.detach().clone())
        q.grad = p.grad
        opt = C.ChainOpt([q], 0.05, C.scale_by_adam, compile=compile, **same)
        opt.step()
        found.append(q.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# a square, a prime side, several axes, long, with rows that end within a byte
RANK_ONE = ((64, 64), (64, 66), (63, 67), (128, 64, 3, 3), (301, 1000), (4098,), (5,))
CHAINS = {
    "adam": (C.scale_by_adam,),
    "cautious": (C.skip_not_finite, C.exp_avg, C.cautious),
    "global": (C.scale_by_adam, C.clip_by_global_norm, C.schedule_free),
    "early": (C.prodigy_d(d0=0.1), C.scale_by_adam),
    "whole": (C.muon(products="full"),),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
def test_kernels_of_rank_one_hold_the_same(chain: str, dtype: torch.dtype) -> None:
    shapes = [s for s in RANK_ONE if chain != "whole" or len(s) > 1]
    ends = []
    for compile in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        opt = C.ChainOpt(params, 0.05, *CHAINS[chain], storage_dtype="rank1", compile=compile)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            opt.step()
        ends.append((params, opt))
    (one, eager), (two, kernels) = ends
    assert not kernels.plan().eager
    # a few roundings of float32 in each step, and a parameter's own where it has less
    unit = 2**-6 if dtype == torch.bfloat16 else 2**-16
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=unit, atol=unit)
        for key, a in eager.state[p].items():
            b = kernels.state[q][key]
            if key.endswith(SIGNS):
                assert (a == b).double().mean() > 0.99
            else:
                torch.testing.assert_close(a, b, rtol=2**-10, atol=2**-16)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (16, 64, 8, 8)])
def test_rank_one_beside_sums_over_rows_and_columns(shape: tuple) -> None:
    """The matrix is the tensor's own, or has several rows in one of its, or several of its in one."""
    ends = []
    for compile in (False, True):
        chain = (C.exp_avg, C.factored_rms(min_dim=4))
        params, opt = made(chain, (shape,), storage_dtype={"exp_avg": "rank1"}, compile=compile)
        step(opt, 1, 2, 3)
        ends.append((params[0], opt))
    (p, eager), (q, kernels) = ends
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    for key, a in eager.state[p].items():
        torch.testing.assert_close(kernels.state[q][key], a, rtol=1e-5, atol=1e-7)


def test_rank_one_that_crosses_other_rows_runs_eagerly_and_the_plan_says_why() -> None:
    chain = (C.exp_avg, C.factored_rms(min_dim=4))
    options = {"storage_dtype": {"exp_avg": "rank1"}, "compile": "auto"}
    params, opt = made(chain, ((64, 66), (5,)), **options)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="rows and columns cross those of the parameter"):
        opt.step()
    reasons = opt.plan().reasons
    assert reasons.keys() == {"0"}
    assert "rank-one state (exp_avg)" in reasons["0"]


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30, 3.4e38])
def test_kernels_of_rank_one_at_the_ends_of_the_range(size: float) -> None:
    found = []
    for compile in (False, True):
        params, opt = made((C.exp_avg,), ((64, 66),), storage_dtype="rank1", compile=compile)
        for seed in (1, 2):
            params[0].grad = size * torch.linspace(-1, 1, 64 * 66).roll(seed).view(64, 66)
            opt.step()
        found.append(opt.state[params[0]])
    for key, a in found[0].items():
        assert a.double().isfinite().all(), key
        torch.testing.assert_close(found[1][key], a, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["4bit", "rank1"])
@pytest.mark.parametrize("case", ["8bit", "float32", "bfloat16", "4bit", "rank1"])
def test_saved_state_is_brought_into_the_other_format_and_back(form: str, case: str) -> None:
    params, opt = made((C.scale_by_adam,), storage_dtype=form)
    step(opt, 1, 2)
    (p,) = params
    other = C.ChainOpt([p], 0.05, C.scale_by_adam, storage_dtype=case, compile=False)
    other.load_state_dict(opt.state_dict())
    back = C.ChainOpt([p], 0.05, C.scale_by_adam, storage_dtype=form, compile=False)
    back.load_state_dict(other.state_dict())
    for key in (M, V):
        a, b, c = (values(o, p, key) for o in (opt, other, back))
        if case in ("float32", form):
            assert torch.equal(a, b)
            # to nearest, and the scale or the means are computed again
            torch.testing.assert_close(c, a, rtol=1e-5, atol=0)
        else:
            room = {"8bit": 1 / 60, "bfloat16": 2**-8, "4bit": 1.13 / 8, "rank1": math.inf}[case]
            assert (a - b).abs().max() <= room * a.abs().max()
    step(other, 3)


def edited(state, change) -> dict:
    entries = dict(state["state"][0])
    change(entries)
    return {**state, "state": {0: entries}}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("4bit", lambda s: s.update({M: s[M][:-1]}), f"'{M}' has the shape"),
        ("4bit", lambda s: s.pop(M + SCALE), f"'{M}' has the shape"),
        ("4bit", lambda s: s.update({M + SCALE: s[M + SCALE][:-1]}), f"'{M}:scale' has the shape"),
        ("4bit", lambda s: s.update({M: s[M].to(torch.int16)}), f"'{M}' is torch.int16"),
        ("4bit", lambda s: s.update({M + SCALE: s[M]}), f"'{M}:scale' is torch.uint8"),
        ("4bit", lambda s: s.update({V + SCALE: -s[V + SCALE]}), f"'{V}' has a square"),
        ("4bit", lambda s: s[V + SCALE].fill_(math.nan), f"'{V}' has a square that is nan"),
        ("rank1", lambda s: s.pop(M + COLUMNS), f"'{M}' is torch.float32, with"),
        ("rank1", lambda s: s.pop(M + SIGNS), f"'{M}' is torch.float32, with"),
        ("rank1", lambda s: s.update({M + SIGNS: s[M + SIGNS][:, 1:]}), f"'{M}:signs' has the"),
        ("rank1", lambda s: s.update({M: s[M][:-1]}), f"'{M}' has the shape"),
        ("rank1", lambda s: s[V].neg_(), f"'{V}' has a square"),
        ("rank1", lambda s: s.update({V + COLUMNS: None}), f"'{V}:columns' is a NoneType"),
        ("rank1", lambda s: s.update({M + SIGNS: s[M]}), f"'{M}:signs' is torch.float32"),
    ],
)
def test_a_saved_entry_that_cannot_be_is_named(form: str, change, message: str) -> None:
    _, opt = made((C.scale_by_adam,), storage_dtype=form)
    step(opt, 1)
    saved = dict(opt.state_dict())
    saved["state"] = {0: {k: t.clone() for k, t in saved["state"][0].items()}}
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(edited(saved, change))
    assert all(same_bits(before[k], v) for k, v in snapshot(opt).items())


@pytest.mark.parametrize("form", ["4bit", "rank1"])
def test_nan_comes_and_goes(form: str) -> None:
    """One NaN makes its block, or the tensor, NaN; a mean that begins again is finite."""
    params, opt = made((C.exp_avg,), storage_dtype=form)
    (p,) = params
    p.grad = torch.ones_like(p)
    p.grad[0, 0] = torch.nan
    opt.step()
    wrong = values(opt, p, "exp_avg").isnan()
    assert wrong.sum() == (128 if form == "4bit" else p.numel())
    assert wrong[0, 0]
    for t in opt.state[p].values():
        t.zero_()
    with torch.no_grad():
        p.zero_()
    step(opt, 5)
    assert values(opt, p, "exp_avg").isfinite().all()


WAYS = {
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
    "in backward": {"fuse_backward": True},
}


@pytest.mark.parametrize("form", ["4bit", "rank1"])
@pytest.mark.parametrize("preset", ["AdamW", "SFAdamW", "Prodigy"])
def test_all_ways_to_step_have_the_same_bits(form: str, preset: str) -> None:
    ways = dict(WAYS)
    if preset == "Prodigy":  # its sums need all gradients
        del ways["in backward"]
    ends = []
    for options in ways.values():
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((66, 64), (5,))]
        opt = getattr(heavyball, preset)(params, storage_dtype=form, compile=False, **options)
        for k in range(3):
            pull = [
                torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for p in params
            ]
            sum((p * g).sum() for p, g in zip(params, pull, strict=True)).backward()
            opt.step()
            opt.zero_grad()
        ends.append(snapshot(opt))
    assert all(same_bits(ends[0][k], end[k]) for end in ends for k in ends[0])


@pytest.mark.parametrize("form", ["4bit", "rank1"])
def test_a_parameter_without_a_gradient_is_left_alone_and_a_late_group_begins(form: str) -> None:
    params, opt = made((C.scale_by_adam,), ((66, 64), (64, 64)), storage_dtype=form)
    step(opt, 1)
    before = {k: t.clone() for k, t in opt.state[params[0]].items()}
    late = nn.Parameter(torch.ones(33, 128))
    opt.add_param_group({"params": [late]})
    params[0].grad = None
    for p in (params[1], late):
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(same_bits(before[k], t) for k, t in opt.state[params[0]].items())
    assert opt.state[late][M].dtype == opt.state[params[0]][M].dtype
    assert opt.state[late][M].shape != late.shape
    assert (
        opt.state_bytes()
        == heavyball.memory_plan(
            [*params, late], (C.scale_by_adam,), storage_dtype=form
        ).state_bytes
    )
    assert f"{opt.state_bytes():,} bytes" in repr(opt)


@pytest.mark.parametrize("form", ["8bit", "4bit", "rank1"])
def test_torch_goes_on_with_what_is_held(form: str) -> None:
    params, opt = made((C.scale_by_adam,), storage_dtype=form)
    step(opt, 1, 2)
    (p,) = params
    mean = values(opt, p, M).double() * (1 - 0.9**2)
    found = heavyball.checkpoint.to_torch(opt)["state"][0]["exp_avg"]
    torch.testing.assert_close(found.double(), mean, rtol=1e-6, atol=0)
