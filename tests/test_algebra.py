"""What is computed in another way than a transform says, against what it says."""

import operations
import pytest
import torch

import heavyball
from heavyball.compiler.passes import algebra
from heavyball.core.hyper import Interval

C = heavyball.chainable


@C.transform(
    exp_avg=C.TRANSFORMS["scale_by_adam"].states["exp_avg"], domains={"low": Interval(-9, 9)}
)
def divided(update, exp_avg, *, low: C.Live = 0.0, high: C.Live = 1.0):
    """A direction over something that may be negative where `low` is."""
    exp_avg = exp_avg + update
    return exp_avg / (update.abs() + low) / (update.abs() + high), exp_avg


def divisions_before_the_sum(opt) -> int:
    (source,) = opt.kernel_sources()
    return source[source.index("void pass_0") : source.index("void scalars_1")].count(" / ")


def opt_of(chain, compiled: bool):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 99))
    return p, C.ChainOpt([p], 0.1, *chain, compile=compiled)


@pytest.mark.parametrize(
    ("chain", "left"),
    [
        ((C.scale_by_adam, C.cautious), 0),
        ((C.scale_by_adam(eps_placement="maximum"), C.cautious), 0),
        ((C.scale_by_adopt, C.cautious), None),
        ((divided(low=-0.5), C.cautious), 1),  # the division by what may be negative stays
    ],
)
def test_a_mask_of_signs_needs_no_division_by_what_is_not_negative(chain, left) -> None:
    ends = []
    for compiled in (False, True):
        p, opt = opt_of(chain, compiled)
        for step in range(4):
            p.grad = torch.randn(99, generator=torch.Generator().manual_seed(step))
            p.grad[::7] = 0
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    if left is not None:
        assert divisions_before_the_sum(opt) == left


@pytest.mark.parametrize("direction", [C.scale_by_exp_avg_sq, C.factored_rms(min_dim=8)], ids=repr)
def test_a_direction_that_is_clipped_is_divided_once(direction) -> None:
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 99).reshape(9, 11))
        opt = C.ChainOpt([p], 0.1, direction, C.clip_update_rms(threshold=0.5), compile=compiled)
        for step in range(4):
            p.grad = torch.randn(9, 11, generator=torch.Generator().manual_seed(step))
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    (source,) = opt.kernel_sources()
    write = source[source.rindex("PART void pass_") :]
    assert write[: write.index("scalars_end")].count(" / ") == 1


@C.transform(exp_avg=C.zeros)
def over_a_difference(update, exp_avg):
    """A direction whose divisor changes its sign between the elements, though neither part has one."""
    exp_avg = exp_avg + update
    return exp_avg / (update.square() - update.abs()), exp_avg


def test_a_difference_of_what_is_not_negative_may_be_negative() -> None:
    ends = []
    for compiled in (False, True):
        p, opt = opt_of((over_a_difference, C.cautious), compiled)
        for step in range(3):
            p.grad = 2 * torch.randn(99, generator=torch.Generator().manual_seed(step))
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# by name: of one argument, or of two
POSITIVE = [name for name in operations.CASES if name in algebra.NEVER_NEGATIVE]
KEEPING = [name for name in operations.CASES if name in algebra.KEEPING | algebra.ANY]


@pytest.mark.parametrize("name", POSITIVE + KEEPING)
def test_what_is_taken_for_never_negative_is_not(name: str) -> None:
    x, y = operations.pairs(torch.float64, shifts=33)
    if name in KEEPING:
        x = x.abs()
        y = y if name in algebra.ANY else y.abs()
    found = operations.CASES[name](x, y)
    # an infinite divisor is the exception that `simplified` names, as 1 / sqrt(-0.0) is
    assert not (found[found.isfinite()] < 0).any()
