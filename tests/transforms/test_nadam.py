"""scale_by_nadam against torch, and against the formula with its products written out."""

import math

import pytest
import torch
from helpers import (
    EPS,
    ROOTS,
    bound,
    chain,
    close,
    decayed_sum,
    double_default,
    gradients,
    moves,
    prefixes,
    same_path,
    starts,
    updates,
    walk,
    weighted_mean,
)

from heavyball import chainable as C


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize("momentum_decay", [4e-3, 0.5, 0.0])
def test_it_is_torch_nadam_with_its_product_in_float64(
    betas: tuple[float, float], momentum_decay: float
) -> None:
    begin, grads = starts(), gradients(12)
    nadam = C.scale_by_nadam(betas=betas, momentum_decay=momentum_decay)
    ours = walk(chain(nadam, weight_decay=0.1), begin, grads)
    with double_default():
        theirs = walk(
            lambda ps: torch.optim.NAdam(
                ps, 0.1, betas, 1e-8, 0.1, momentum_decay, decoupled_weight_decay=True
            ),
            begin,
            grads,
        )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=max(betas)))


def test_torch_nadam_as_it_comes_is_as_near_as_its_float32_product_lets_it() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.scale_by_nadam), begin, grads)
    theirs = walk(lambda ps: torch.optim.NAdam(ps, 0.1), begin, grads)
    # t products rounded to float32 leave t 2^-24 in P, so less than 12 * 2^-24 / (1 - P) of an
    # update's first term, with 1 - P > 0.5 and updates below 10, in each of 12 steps of lr 0.1
    same_path(ours, theirs, atol=12 * 0.1 * 10 * 12 * 2**-24 / 0.5)


def test_coupled_decay_is_torchs_default() -> None:
    begin, grads = starts(), gradients(8)
    ours = walk(chain(C.coupled(weight_decay=0.3), C.scale_by_nadam), begin, grads)
    with double_default():
        theirs = walk(lambda ps: torch.optim.NAdam(ps, 0.1, weight_decay=0.3), begin, grads)
    # the gradient depends on the parameter here, with a slope of 0.3 that lr 0.1 cannot make grow
    # more than (1 + 0.1 * 0.3 * 10)^8 < 10-fold
    same_path(ours, theirs, atol=10 * bound(8, beta=0.999))


@pytest.mark.parametrize("placement", ["outside", "maximum", "inside", "biased"])
def test_the_update_is_the_formula_with_explicit_sums_and_products(placement: str) -> None:
    beta1, beta2, psi, eps = 0.8, 0.95, 0.1, 0.2
    grads = [g for (g,) in gradients(10, [(3, 4)])]
    nadam = C.scale_by_nadam(
        betas=(beta1, beta2), momentum_decay=psi, eps=eps, eps_placement=placement
    )
    mus = [beta1 * (1 - 0.5 * 0.96 ** (t * psi)) for t in range(1, 12)]
    for t, (update, past) in enumerate(
        zip(updates([nadam], grads), prefixes(grads), strict=True), start=1
    ):
        product = math.prod(mus[:t])
        v = weighted_mean([g**2 for g in past], beta2)
        denominator = ROOTS[placement](v, eps, 1 - beta2**t)
        mean = (1 - beta1) * decayed_sum(past, beta1)
        now = (1 - mus[t - 1]) / (1 - product) * past[-1]
        ahead = mus[t] / (1 - product * mus[t]) * mean
        # fewer than 60 roundings of updates below 20, twentyfold for 1 - 0.95^t
        close(update, (now + ahead) / denominator, atol=60 * EPS * 20 * 20)
