"""scale_by_adam against torch, the golden values, and a ratio of weighted means."""

import pytest
import torch
from helpers import (
    EPS,
    ROOTS,
    SHAPES,
    bound,
    chain,
    close,
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("betas", "eps"),
    [((0.9, 0.999), 1e-8), ((0.9, 0.99), 1e-3), ((0.0, 0.9), 1e-8), ((0.95, 0.0), 0.5)],
)
def test_it_is_torch_adamw_step_by_step(
    betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(
        chain(C.scale_by_adam(betas=betas, eps=eps), weight_decay=weight_decay), begin, grads
    )
    theirs = walk(
        lambda ps: torch.optim.AdamW(ps, 0.1, betas, eps, weight_decay=weight_decay), begin, grads
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=max(betas)))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.3)])
def test_amsgrad_is_torchs_where_the_gradient_shrinks(betas: tuple[float, float]) -> None:
    # each gradient is a third of the one before, so the largest second moment is an old one
    grads = [[g / 3**t for g in step] for t, step in enumerate(gradients(12, least=0.5))]
    begin = starts()
    ours = walk(chain(C.scale_by_adam(betas=betas, amsgrad=True)), begin, grads)
    theirs = walk(lambda ps: torch.optim.AdamW(ps, 0.1, betas, 1e-8, 0.0, True), begin, grads)
    plain = walk(chain(C.scale_by_adam(betas=betas)), begin, grads)
    # 40 roundings do it here too: the bias is taken out, and put in again
    same_path(ours, theirs, atol=bound(12, beta=max(betas)))
    assert (ours[-1][1] - plain[-1][1]).abs().max() > 1e-4


def test_maximize_is_torchs() -> None:
    begin, grads = starts(), gradients(8)
    ours = walk(chain(C.maximize, C.scale_by_adam, weight_decay=0.1), begin, grads)
    theirs = walk(
        lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.1, maximize=True), begin, grads
    )
    same_path(ours, theirs, atol=bound(8, beta=0.999))


def test_a_scheduled_lr_and_betas_are_read_at_every_step() -> None:
    begin, grads = starts(), gradients(9)

    def change(optimizer: torch.optim.Optimizer, t: int) -> None:
        optimizer.param_groups[0].update(lr=0.1 / t, betas=(0.9 - 0.05 * t, 0.99))

    ours = walk(chain(C.scale_by_adam), begin, grads, change)
    # what a beta1 that changes means is our own: the mean before counts as one of t - 1 steps
    with pytest.raises(AssertionError):
        same_path(ours, walk(chain(C.scale_by_adam), begin, grads), atol=1e-6)
    m = grads[0][1]
    v = grads[0][1] ** 2
    p = begin[1] - 0.1 * m / (v.sqrt() + 1e-8)
    for t in range(2, 10):
        g, beta1 = grads[t - 1][1], 0.9 - 0.05 * t
        m = (m * (beta1 - beta1**t) + g * (1 - beta1)) / (1 - beta1**t)
        v = (v * (0.99 - 0.99**t) + g**2 * 0.01) / (1 - 0.99**t)
        p = p - 0.1 / t * m / (v.sqrt() + 1e-8)
        close(ours[t - 1][1], p, atol=bound(t, beta=0.99))


GOLDEN_ADAM = """[0.9000000011, -2.099999986, 3.099999999, 4.099999999]
| [0.8000000023, -2.031916254, 3.18390764, 4.092641483]
| [0.7000000034, -1.949301749, 3.17702969, 4.125974658]"""
GOLDEN_ADAMW = """[0.8900000011, -2.079999986, 3.069999999, 4.059999999]
| [0.7811000023, -1.991116254, 3.12320764, 4.012041483]
| [0.6732890034, -1.888590587, 3.085097613, 4.005254243]"""


@pytest.mark.parametrize(
    ("weight_decay", "expected"), [(0.0, GOLDEN_ADAM), (0.1, GOLDEN_ADAMW)], ids=["adam", "adamw"]
)
def test_the_golden_values(weight_decay: float, expected: str) -> None:
    adam = C.scale_by_adam(betas=(0.9, 0.99), eps=1e-8)
    matches_golden(golden_path(chain(adam, weight_decay=weight_decay), 3), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_a_ratio_of_weighted_means(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(10, [shape], least=0.2)]
    ours = updates([C.scale_by_adam(betas=(0.9, 0.99), eps=0.0)], grads)
    for update, past in zip(ours, prefixes(grads), strict=True):
        squares = weighted_mean([g**2 for g in past], 0.99)
        # as in test_exp_avg, with the root halving the error of the second moment; |u| < 10
        close(update, weighted_mean(past, 0.9) / squares.sqrt(), atol=10 * EPS * 10 * (4 + 100))


@pytest.mark.parametrize("placement", ROOTS)
def test_eps_has_four_places(placement: str) -> None:
    eps = 0.3  # of the size of the gradients, so that every form differs from every other
    grads = [g for (g,) in gradients(8, [(3, 4)])]
    adam = C.scale_by_adam(betas=(0.9, 0.99), eps=eps, eps_placement=placement)
    for t, (update, past) in enumerate(
        zip(updates([adam], grads), prefixes(grads), strict=True), start=1
    ):
        mean, square = weighted_mean(past, 0.9), weighted_mean([g**2 for g in past], 0.99)
        expected = {name: mean / form(square, eps, 1 - 0.99**t) for name, form in ROOTS.items()}
        for name, value in expected.items():
            if name == placement:
                close(update, value, atol=10 * EPS * 10 * (4 + 100))
            else:
                assert (update - value).abs().max() > 1e-3


def test_eps_is_the_one_given() -> None:
    # a denominator of 1 + eps: the second moment of gradients of size 1 is 1 at every step
    grads = [torch.ones(3, dtype=torch.float64)] * 4
    for update in updates([C.scale_by_adam(eps=3.0)], grads):
        close(update, torch.full((3,), 0.25, dtype=torch.float64), atol=4 * EPS * 1000)


def test_a_first_step_is_the_sign_of_the_gradient() -> None:
    (grad,) = gradients(1, [(5,)], least=0.1)[0]
    close(updates([C.scale_by_adam(eps=0.0)], [grad])[0], grad.sign(), atol=4 * EPS)
