"""scale_by_laprop against pytorch_optimizer, the golden values, and explicit weighted sums."""

import pytest
import torch
from helpers import (
    EPS,
    ROOTS,
    bound,
    chain,
    close,
    golden_path,
    gradients,
    matches_golden,
    moves,
    prefixes,
    same_path,
    set_lr,
    starts,
    updates,
    walk,
    weighted_mean,
)
from pytorch_optimizer import LaProp

from heavyball import chainable as C

RATES = [0.1, 0.02, 0.05, 0.2, 0.01, 0.3, 0.1, 0.15, 0.001, 0.2, 0.1, 0.05, 0.1, 0.2]


def laprop(**options: object) -> object:
    # foreach=True keeps step sizes in float32 and is off by 2e-9
    return lambda ps: LaProp(ps, 0.1, foreach=False, **options)


def oracle_bound(steps: int, beta2: float, size: float) -> float:
    """The oracle adds 1e-15 to the biased v, which is at least (1 - beta2) size^2, size the least
    gradient: half of that share of an update, below 10, at lr up to 0.3."""
    return bound(steps, lr=0.3, beta=beta2) + steps * 0.3 * 10 * 0.5e-15 / (1 - beta2) / size**2


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.95, 0.5)])
def test_it_is_pytorch_optimizers_laprop(betas: tuple[float, float]) -> None:
    begin, grads = starts(), gradients(14, least=1.0)
    ours = walk(chain(C.scale_by_laprop(betas=betas)), begin, grads)
    assert moves(ours, begin)
    same_path(ours, walk(laprop(betas=betas), begin, grads), atol=oracle_bound(14, max(betas), 0.3))


def test_with_the_lr_in_the_momentum_it_is_that_laprop_under_a_schedule() -> None:
    begin, grads = starts(), gradients(14, least=1.0)
    schedule = set_lr(RATES)
    theirs = walk(laprop(), begin, grads, schedule)
    ours = walk(chain(C.scale_by_laprop(lr_in_momentum=True)), begin, grads, schedule)
    same_path(ours, theirs, atol=oracle_bound(14, 0.999, 0.3))
    plain = walk(chain(C.scale_by_laprop), begin, grads, schedule)
    assert (plain[-1][1] - ours[-1][1]).abs().max() > 1e-2


def test_eps_stands_beside_the_biased_root_there() -> None:
    begin, grads = starts(), gradients(14, least=1.0)
    ours = walk(chain(C.scale_by_laprop(eps=0.1, eps_placement="biased")), begin, grads)
    same_path(ours, walk(laprop(eps=0.1), begin, grads), atol=oracle_bound(14, 0.999, 0.3))


def test_centered_is_that_laprop_from_the_eleventh_step() -> None:
    # gradients of one sign, so that their mean is not small against their size
    begin, grads = starts(), [[g.abs() for g in gs] for gs in gradients(24, least=1.0)]
    centred = chain(C.scale_by_laprop(betas=(0.9, 0.9), centered=True))
    plain = walk(chain(C.scale_by_laprop(betas=(0.9, 0.9))), begin, grads)
    theirs = walk(laprop(betas=(0.9, 0.9), centered=True), begin, grads)
    ours = walk(centred, begin, grads)
    same_path(ours[:10], plain[:10], atol=0.0)
    assert (theirs[-1][1] - plain[-1][1]).abs().max() > 1e-2
    # v - a^2 cancels one digit of v at most, with sizes that change tenfold from step to step
    same_path(ours, theirs, atol=10 * oracle_bound(24, 0.9, 0.3))


def test_the_golden_values() -> None:
    expected = """[0.9, -2.1, 3.1, 4.1] | [0.800000001, -2.073242834, 3.166312421, 4.093645145]
    | [0.6999999979, -2.007886954, 3.159420346, 4.127552884]"""
    # the values were made with step sizes in float32: 3 steps of lr 0.1 and updates up to 1, each
    # off by 2^-24 of itself, and the half unit of the tenth digit
    matches_golden(golden_path(chain(C.scale_by_laprop), 3), expected, 3 * 0.1 * 2**-24)


@pytest.mark.parametrize("placement", ROOTS)
def test_the_update_is_a_weighted_mean_of_normalized_gradients(placement: str) -> None:
    grads = [g for (g,) in gradients(9, [(3, 4)])]
    laprop = C.scale_by_laprop(betas=(0.8, 0.9), eps=0.3, eps_placement=placement)
    normalized = []
    for t, (update, past) in enumerate(
        zip(updates([laprop], grads), prefixes(grads), strict=True), start=1
    ):
        v = weighted_mean([g**2 for g in past], 0.9)
        normalized.append(past[-1] / ROOTS[placement](v, 0.3, 1 - 0.9**t))
        # fewer than 60 roundings of numbers below 5, tenfold for 1 - 0.9^t
        close(update, weighted_mean(normalized, 0.8), atol=60 * EPS * 5 * 10)


def test_the_lr_of_each_gradients_own_step_weighs_it() -> None:
    grads = [g for (g,) in gradients(14, [(3, 4)])]
    laprop = C.scale_by_laprop(betas=(0.8, 0.9), eps=0.3, lr_in_momentum=True)
    ours = updates([laprop], grads, rates=RATES)
    normalized = []
    for t, (update, past) in enumerate(zip(ours, prefixes(grads), strict=True), start=1):
        v = weighted_mean([g**2 for g in past], 0.9)
        normalized.append(past[-1] / (v.sqrt() + 0.3))
        weights = [0.8 ** (t - i) * RATES[i - 1] for i in range(1, t + 1)]
        mean = sum(w * n for w, n in zip(weights, normalized, strict=True)) / sum(weights)
        close(update, mean, atol=60 * EPS * 5 * 10)


def test_a_step_at_lr_zero_moves_nothing_and_weighs_nothing() -> None:
    begin, grads = starts(), gradients(6)
    make = chain(C.scale_by_laprop(lr_in_momentum=True))
    path = walk(make, begin, grads, set_lr([0.0, 0.0, 0.1, 0.0, 0.1, 0.1]))
    for t in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(path[t], begin, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(path[3], path[2], strict=True))
    assert moves([path[2], path[4], path[5]], begin)
