"""factored_rms against golden values, torch.optim.Adafactor, and explicit outer products."""

import math

import pytest
import torch
from helpers import (
    EPS,
    chain,
    close,
    fixed_beta2,
    gradients,
    m_grads,
    m_start,
    matches_golden,
    of_one,
    prefixes,
    same_path,
    set_lr,
    starts,
    states,
    summary,
    updates,
    walk,
    weighted_mean,
)
from torch import Tensor

from heavyball import chainable as C
from heavyball.core.transform import transform


def column_scaled(rows: int, cols: int) -> Tensor:
    """cos(cols i + j + 0.5) (j + 1)."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(cols, dtype=torch.float64)
    return torch.cos(cols * i + j + 0.5) * (j + 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((36, 40), "(0.07031451474, 0.2075065342, 2.836487098, 2086.65084, 3983.288435)"),
        # the larger axis first: averaging the row over a wrong axis makes every row constant
        ((40, 36), "(0.07171645361, 0.2076342384, 2.589336584, 1883.760864, 3243.043641)"),
    ],
)
def test_the_golden_denominators_of_one_step_without_bias_correction(
    shape: tuple[int, int], expected: str
) -> None:
    grad = column_scaled(*shape)
    (ours,) = updates([fixed_beta2(beta2=0.99), C.factored_rms(eps=0.0)], [grad])
    # sums of 1440 numbers
    matches_golden([summary(grad / ours)], expected, roundings=0.0)
    assert (grad / ours)[0].std() > 0.1


@transform()
def times_param_rms(update: Tensor, *, param: Tensor, least: float = 1e-3) -> Tensor:
    """Adafactor's step size: u max(eps2, RMS(p))."""
    return update * param.square().mean().sqrt().clamp(min=least)


def adafactor(threshold: float = 1.0) -> tuple:
    """torch's Adafactor as a chain, for tensors whose last two axes are the largest."""
    return (
        C.palm_beta2,
        # eps1 is the machine epsilon under the root there, and no entry here is that small
        C.factored_rms(eps=0.0, min_dim=1),
        C.clip_update_rms(threshold=threshold),
    )


def test_the_golden_values_of_adafactor() -> None:
    # rho = min(lr, 1 / sqrt(t)) = 0.1 at these steps
    path = walk(chain(*adafactor(), times_param_rms), [m_start()], of_one(m_grads(3)))
    matches_golden(
        [summary(p) for (p,) in path],
        """(0.7581335814, 0.8464313201, -0.6562673453, 1.220179829, 21.99871023)
        | (0.6805798067, 0.9471401278, -0.7513953075, 1.16995673, 22.39678174)
        | (0.6105783822, 1.016839185, -0.6631034039, 1.174565004, 22.48613142)""",
        roundings=48 * 1e-15,
    )


MATRICES = ((5, 7), (7, 5), (6, 6), (1, 4), (9,), (), (2, 3, 4), (2, 2, 6, 5))


@pytest.mark.parametrize("threshold", [1.0, 1.2])
def test_it_is_torch_adafactor_with_a_fixed_step_size(threshold: float) -> None:
    begin, grads = starts(MATRICES), gradients(10, MATRICES, least=0.1)
    # eps2 is above any RMS(p), so that the step size is eps2 lr = 0.1 and not a share of the weights
    theirs = walk(
        lambda ps: torch.optim.Adafactor(
            ps, 1e-7, eps=(None, 1e6), d=threshold, weight_decay=0.0, foreach=False
        ),
        begin,
        grads,
    )
    ours = walk(chain(*adafactor(threshold)), begin, grads)
    # 100 roundings of updates below 10
    same_path(ours, theirs, atol=10 * EPS * (100 * 0.1 * 10 + 4 * 10))


def test_decay_and_the_share_of_the_weights_are_torch_adafactors() -> None:
    begin, grads = starts([(5, 7)]), gradients(8, [(5, 7)], least=0.1)
    theirs = walk(
        lambda ps: torch.optim.Adafactor(ps, 0.5, weight_decay=0.3, foreach=False), begin, grads
    )
    rates = [min(0.5, t**-0.5) for t in range(1, 9)]
    # the decay there is by lr, ours by rho
    parts = [(r, (0.5 / r - 1) * 0.3 + 0.3) for r in rates]

    def before(optimizer: torch.optim.Optimizer, t: int) -> None:
        optimizer.param_groups[0].update(lr=parts[t - 1][0], weight_decay=parts[t - 1][1])

    ours = walk(chain(*adafactor(), times_param_rms), begin, grads, before)
    # RMS(p) feeds the weights back: less than (1 + 0.5 * 1)^8 < 30-fold
    same_path(ours, theirs, atol=30 * 8 * EPS * (100 * 0.5 * 10 + 4 * 10))


@pytest.mark.parametrize("shape", [(36, 40), (40, 36), (33, 33), (2, 40, 36), (40, 2, 36)])
def test_the_denominator_is_an_outer_product_of_weighted_means(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(5, [shape], least=0.01)]
    ours = updates([C.factored_rms(beta2=0.9, eps=0.3)], grads)
    batch = [axis for axis, n in enumerate(shape) if n == 2]
    for update, past in zip(ours, prefixes(grads), strict=True):
        square = weighted_mean([g**2 for g in past], 0.9).movedim(batch, list(range(len(batch))))
        total = square.mean((-1, -2), keepdim=True)
        product = torch.einsum("...i,...j->...ij", square.mean(-1), square.mean(-2)) / total
        product = product.movedim(list(range(len(batch))), batch)
        # 100 roundings of updates below 50, tenfold for 1 - 0.9^t
        close(update, past[-1] / (product.sqrt() + 0.3), atol=100 * EPS * 50 * 10)


def test_a_second_moment_of_rank_one_is_kept_exactly() -> None:
    left = torch.linspace(1, 3, 40, dtype=torch.float64)
    right = torch.linspace(0.1, 2, 36, dtype=torch.float64)
    grads = [torch.outer(left, right) * (-1) ** t * (1 + t) for t in range(4)]
    for shaped in (grads, [g.T for g in grads]):
        ours = updates([C.factored_rms(beta2=0.9, eps=0.0)], shaped)
        full = updates([C.scale_by_exp_avg_sq(beta2=0.9, eps=0.0)], shaped)
        for one, other in zip(ours, full, strict=True):
            close(one, other, rtol=200 * EPS, atol=0.0)


def test_each_matrix_of_a_batch_is_as_if_alone() -> None:
    grads = [g for (g,) in gradients(4, [(3, 36, 40, 2)])]
    ours = updates([C.factored_rms], grads)
    for i in range(3):
        for j in range(2):
            alone = updates([C.factored_rms], [g[i, :, :, j].contiguous() for g in grads])
            for one, other in zip(ours, alone, strict=True):
                close(one[i, :, :, j], other, rtol=200 * EPS, atol=0.0)


@pytest.mark.parametrize(
    ("shape", "mode", "factored"),
    [
        ((64, 16), "second", False),
        ((64, 16), "any", True),
        ((64, 32), "second", True),
        ((31, 31), "any", False),
        ((32, 32), "second", True),
        ((100,), "any", False),
        ((), "any", False),
        ((1, 1, 64), "any", False),
        ((1, 2, 64), "any", True),
        ((1, 1, 64), "second", False),
        ((64, 48, 3, 3), "second", True),
    ],
)
def test_what_is_factored_and_how_much_state_it_holds(
    shape: tuple[int, ...], mode: str, factored: bool
) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    rms = C.factored_rms(beta2=0.9, min_dim_mode=mode)
    held = {key.split(".")[-1]: t for key, t in states([rms], grads).items()}
    assert set(held) == ({"step", "row", "col"} if factored else {"step", "exp_avg_sq"})
    if factored:
        largest, second = sorted(shape)[-1], sorted(shape)[-2]
        assert held["row"].numel() == math.prod(shape) // largest
        assert held["col"].numel() == math.prod(shape) // second
    else:
        full = updates([C.scale_by_exp_avg_sq(beta2=0.9)], grads)
        for one, other in zip(updates([rms], grads), full, strict=True):
            assert torch.equal(one, other)


def test_of_two_equal_axes_the_later_is_the_largest() -> None:
    held = states([C.factored_rms(min_dim=2)], [gradients(1, [(3, 3)])[0][0]])
    assert held["factored_rms.row"].shape == (3, 1)
    assert held["factored_rms.col"].shape == (1, 3)


def test_a_schedule_of_lr_does_not_touch_the_moment() -> None:
    begin, grads = starts([(36, 40)]), gradients(4, [(36, 40)])
    path = walk(chain(C.factored_rms), begin, grads, set_lr([0.1, 0.0, 0.0, 0.1]))
    ours = updates([C.factored_rms], [g for (g,) in grads])
    close(path[-1][0], begin[0] - 0.1 * ours[0] - 0.1 * ours[3], atol=10 * EPS * 10)
