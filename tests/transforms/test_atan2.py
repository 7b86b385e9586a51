"""scale_by_adam_atan2 against adam-atan2-pytorch, the golden values, and its own definition."""

import math

import pytest
import torch
from adam_atan2_pytorch import AdamAtan2
from helpers import (
    EPS,
    bound,
    chain,
    close,
    examples,
    golden_path,
    gradients,
    matches_golden,
    moves,
    prefixes,
    same_path,
    starts,
    updates,
    walk,
    weighted_mean,
)
from hypothesis import given
from hypothesis import strategies as st

from heavyball import chainable as C

GOLDEN = """[0.9002544332, -2.099745567, 3.099745567, 4.099745567]
| [0.8005088665, -2.023831443, 3.188406563, 4.090417064]
| [0.7007632997, -1.936140357, 3.179685301, 4.131279204]"""


def test_the_golden_values_are_ours_and_those_of_the_package() -> None:
    matches_golden(golden_path(chain(C.scale_by_adam_atan2), 3), GOLDEN)
    matches_golden(golden_path(lambda ps: AdamAtan2(ps, 0.1), 3), GOLDEN)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("betas", "a", "b"),
    [((0.9, 0.99), 1.27, 1.0), ((0.0, 0.999), 4 / math.pi, 2.0), ((0.95, 0.0), 0.5, 50.0)],
)
def test_it_is_the_package_step_by_step(
    betas: tuple[float, float], a: float, b: float, weight_decay: float
) -> None:
    begin, grads = starts(), gradients(12)
    atan2 = C.scale_by_adam_atan2(betas=betas, a=a, b=b)
    ours = walk(chain(atan2, weight_decay=weight_decay), begin, grads)
    theirs = walk(
        lambda ps: AdamAtan2(ps, 0.1, betas, weight_decay=weight_decay, a=a, b=b), begin, grads
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=max(betas)))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
def test_it_is_the_angle_of_two_weighted_means(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(9, [shape])]
    ours = updates([C.scale_by_adam_atan2(betas=(0.8, 0.9), a=2.0, b=0.5)], grads)
    for update, past in zip(ours, prefixes(grads), strict=True):
        root = weighted_mean([g**2 for g in past], 0.9).sqrt()
        # the angle of (x, y) = (b root, m) as the argument of a complex number
        angle = torch.complex(0.5 * root, weighted_mean(past, 0.8)).angle()
        close(update, 2.0 * angle, atol=40 * EPS * 2 * math.pi * 10)


@examples(20)
@given(exponent=st.integers(-60, 60), seed=st.integers(0, 9))
def test_the_scale_of_the_gradient_does_not_matter_and_the_update_is_bounded(
    exponent: int, seed: int
) -> None:
    # powers of two scale without rounding
    grads = [g for (g,) in gradients(5, [(6,)], seed)]
    scaled = [g * 2.0**exponent for g in grads]
    ours = updates([C.scale_by_adam_atan2], grads)
    for one, other in zip(ours, updates([C.scale_by_adam_atan2], scaled), strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() <= 1.27 * math.pi / 2


def test_a_zero_gradient_gives_a_zero_update() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(updates([C.scale_by_adam_atan2], [zero])[0], zero)
