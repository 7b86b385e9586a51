"""scale_by_exp_avg_sq and scale_by_rms against torch, golden values, and explicit sums."""

import pytest
import torch
from helpers import (
    EPS,
    ROOTS,
    bound,
    chain,
    close,
    decayed_sum,
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

from heavyball import chainable as C


@pytest.mark.parametrize("beta2", [0.999, 0.9, 0.0])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_exp_avg_sq_is_torch_adamw_without_first_moment(beta2: float, eps: float) -> None:
    begin, grads = starts(), gradients(10)
    ours = walk(chain(C.scale_by_exp_avg_sq(beta2=beta2, eps=eps)), begin, grads)
    theirs = walk(
        lambda ps: torch.optim.AdamW(ps, 0.1, (0.0, beta2), eps, weight_decay=0.0), begin, grads
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(10, beta=beta2))


@pytest.mark.parametrize(
    ("alpha", "eps", "centered"),
    [
        (0.99, 1e-8, False),
        (0.9, 0.1, False),
        (0.0, 1.0, False),
        (0.99, 1e-8, True),
        (0.9, 0.1, True),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rms_is_torch_rmsprop(alpha: float, eps: float, centered: bool, momentum: float) -> None:
    begin, grads = starts(), gradients(10, least=0.5)
    rms = C.scale_by_rms(alpha=alpha, eps=eps, centered=centered)
    ours = walk(chain(rms, C.heavyball_momentum(momentum=momentum)), begin, grads)
    theirs = walk(
        lambda ps: torch.optim.RMSprop(ps, 0.1, alpha, eps, momentum=momentum, centered=centered),
        begin,
        grads,
    )
    assert moves(ours, begin)
    # an update is below 10, with momentum the sum of ten; v - m^2 may cancel a digit of v
    same_path(ours, theirs, atol=bound(10, update=100, param=100, beta=0.9))


def test_centred_differs_from_plain_and_never_takes_a_root_of_a_negative_number() -> None:
    constant = [torch.full((4,), 0.1, dtype=torch.float64)] * 200
    plain = updates([C.scale_by_rms(alpha=0.5)], constant)
    centred = updates([C.scale_by_rms(alpha=0.5, centered=True)], constant)
    assert (plain[3] - centred[3]).abs().max() > 1e-3
    # v - m^2 is 0 up to rounding here, below 0 in some step of some entry
    assert all(torch.isfinite(u).all() for u in centred)


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.scale_by_exp_avg_sq(beta2=0.99, eps=1e-8)), 3),
        """[0.9000000011, -2.099999986, 3.099999999, 4.099999999]
        | [0.8000000023, -1.959473883, 3.136064729, 3.997935458]
        | [0.7000000034, -1.828452535, 3.004107457, 4.100672924]""",
    )
    matches_golden(
        golden_path(chain(C.scale_by_rms(alpha=0.99, eps=1e-8)), 3),
        """[1.1394938e-07, -2.999998586, 3.999999875, 4.999999893]
        | [-0.7088810338, -2.003835563, 4.25565594, 4.276483592]
        | [-1.28913008, -1.243585441, 3.489975129, 4.872616769]""",
    )


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 2, 2)])
def test_both_are_the_gradient_over_the_root_of_a_sum(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(9, [shape], least=0.2)]
    debiased = updates([C.scale_by_exp_avg_sq(beta2=0.9, eps=0.0)], grads)
    biased = updates([C.scale_by_rms(alpha=0.9, eps=0.0)], grads)
    for one, other, past in zip(debiased, biased, prefixes(grads), strict=True):
        squares = [g**2 for g in past]
        # fewer than 40 roundings of updates below 10, tenfold for 1 - 0.9^t
        close(one, past[-1] / weighted_mean(squares, 0.9).sqrt(), atol=40 * EPS * 10 * 10)
        close(other, past[-1] / (0.1 * decayed_sum(squares, 0.9)).sqrt(), atol=40 * EPS * 10 * 10)


@pytest.mark.parametrize("placement", ROOTS)
def test_eps_of_exp_avg_sq_has_four_places(placement: str) -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    ours = updates([C.scale_by_exp_avg_sq(beta2=0.9, eps=0.3, eps_placement=placement)], grads)
    for t, (update, past) in enumerate(zip(ours, prefixes(grads), strict=True), start=1):
        square = weighted_mean([g**2 for g in past], 0.9)
        expected = past[-1] / ROOTS[placement](square, 0.3, 1 - 0.9**t)
        close(update, expected, atol=40 * EPS * 10 * 10)
