"""Stochastic rounding of parameters, and where its bits come from."""

import copy

import pytest
import torch
from helpers import same_bits

import heavyball
from heavyball.numerics import random_bits, round_stochastically, stream

C = heavyball.chainable
EVERY = torch.arange(2**16, dtype=torch.int32)


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("bits", [0, 1, 2**15, 2**16 - 1])
def test_what_bfloat16_holds_is_unchanged(bits: int) -> None:
    held = all_bfloat16()
    rounded = round_stochastically(held.float(), torch.full(held.shape, bits, dtype=torch.int32))
    assert torch.equal(rounded.isnan(), held.isnan())
    assert same_bits(rounded[~held.isnan()], held[~held.isnan()])


@pytest.mark.parametrize("value", [1.0 + 2**-20, -3.14159, 1e-30, -1e-40, 5e-44, 2.0**-126 * 0.7])
def test_the_mean_over_all_bits_is_the_value(value: float) -> None:
    x = torch.full((2**16,), value)
    rounded = round_stochastically(x, EVERY).double()
    # 2^16 summands of one binary exponent, or of two beside a power of two, add exactly in float64
    assert rounded.mean().item() == x[0].double().item()
    assert len(rounded.unique()) == 2


def test_bits_are_even_and_differ_in_everything_they_come_from() -> None:
    like, step = torch.zeros(2**16), torch.tensor(3.0)
    first = random_bits(like, stream(0, 1), step)
    # Numbers of four standard deviations sqrt(n p (1 - p)) around n / 16 in each sixteenth.
    count = torch.bincount(first // 2**12, minlength=16)
    assert ((count - 2**12).abs() < 4 * (2**12 * 15 / 16) ** 0.5).all()
    others = (
        random_bits(like, stream(1, 1), step),
        random_bits(like, stream(0, 2), step),
        random_bits(like, stream(0, 1), step + 1),
        first.roll(1),
    )
    for other in others:
        # equal by chance with 1 in 2^16 for each of 2^16: Poisson with mean 1
        assert (first == other).sum() < 12
        correlation = torch.corrcoef(torch.stack([first, other]).double())[0, 1]
        assert correlation.abs() < 5 / 2**8


def test_bits_follow_the_order_of_memory() -> None:
    flat = torch.zeros(2 * 3 * 4 * 5)
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    step = torch.tensor(1.0)
    found = random_bits(last, 7, step).permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(found, random_bits(flat, 7, step))


def stepped(seed: int, stochastic_rounding: bool = True, steps: int = 3, place: int = 0):
    params = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(place + 1)]
    options = {"seed": seed, "stochastic_rounding": stochastic_rounding}
    opt = heavyball.AdamW(params, lr=1e-3, weight_decay=0.0, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    return params[place].detach()


def test_an_optimizer_leaves_torchs_generators_alone_and_replicas_agree() -> None:
    before = torch.get_rng_state()
    one, other = stepped(seed=4), stepped(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert same_bits(one, other)
    assert not same_bits(one, stepped(seed=5))
    assert not same_bits(one, stepped(seed=4, place=1))


def test_small_steps_are_lost_to_nearest_and_kept_on_average_by_chance() -> None:
    # Steps of 1e-3 from 1, where bfloat16 has neighbours at 2^-8 below: under half a neighbour.
    assert (stepped(0, stochastic_rounding=False, steps=8) == 1).all()
    ends = stepped(0, steps=8).double()
    # Each step is a choice between neighbours 2^-8 apart, so its deviation is at most 2^-9; eight
    # steps of 5000 elements, and five deviations.
    bound = 5 * (8 / 5000) ** 0.5 * 2**-9
    assert abs(ends.mean().item() - (1 - 8e-3)) < bound


def test_a_copied_optimizer_rounds_as_the_first_one() -> None:
    p = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    opt = heavyball.AdamW([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    opt.step()
    other = copy.deepcopy(opt)
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    opt.step()
    other.step()
    assert same_bits(p, q)


@pytest.mark.parametrize("compile", [False, True])
def test_float16_parameters_round_to_nearest_and_stay_finite(compile: bool) -> None:
    p = torch.nn.Parameter(torch.tensor([65504.0, -65504.0, 1.0, 0.5], dtype=torch.float16))
    p.grad = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float16)
    C.ChainOpt([p], 1.5 * 2**-11, C.sign, compile=compile).step()
    # 1 - 1.5 * 2^-11 lies between the neighbours 1 - 2^-11 and 1 - 2^-10, halfway: to the even one
    assert p.tolist() == [65504.0, -65504.0, 1 - 2**-10, 0.5 - 1.5 * 2**-11]
    C.ChainOpt([p], 1e6, C.sign, compile=compile).step()
    assert p.tolist()[:2] == [65504.0, -65504.0]
