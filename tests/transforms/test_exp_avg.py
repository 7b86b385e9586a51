"""exp_avg against the weighted mean that it is."""

import torch
from helpers import (
    EPS,
    close,
    e_grads,
    examples,
    gradients,
    matches_golden,
    prefixes,
    updates,
    weighted_mean,
)
from hypothesis import given
from hypothesis import strategies as st

from heavyball import chainable as C


def test_the_golden_updates() -> None:
    matches_golden(
        updates([C.exp_avg(beta=0.9)], e_grads(3)),
        """[0.8775825619, 0.07073720167, -0.8011436155, -0.9364566873]
        | [0.8775825619, -0.388147439, -0.4904342386, 0.07040874061]
        | [0.8775825619, -0.5904755749, 0.05090224267, -0.3235325497]""",
    )


@examples(20)
@given(
    beta=st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.9999]),
    steps=st.integers(1, 12),
    shape=st.sampled_from([(), (7,), (3, 4), (2, 3, 2, 2)]),
    seed=st.integers(0, 99),
)
def test_the_update_is_the_weighted_mean_of_all_so_far(
    beta: float, steps: int, shape: tuple[int, ...], seed: int
) -> None:
    grads = [g for (g,) in gradients(steps, [shape], seed)]
    for update, past in zip(updates([C.exp_avg(beta=beta)], grads), prefixes(grads), strict=True):
        # the power in 1 - beta^t rounds once, which counts 1 / (1 - beta) times in each of the
        # steps' weights; gradients are below 15
        close(update, weighted_mean(past, beta), atol=steps * EPS * 15 * (4 + 1 / (1 - beta)))


def test_the_first_update_is_the_gradient_and_beta_zero_passes_all() -> None:
    grads = e_grads(4)
    assert torch.equal(updates([C.exp_avg(beta=0.999)], grads)[0], grads[0])
    for update, grad in zip(updates([C.exp_avg(beta=0.0)], grads), grads, strict=True):
        assert torch.equal(update, grad)


def test_twice_in_a_chain_it_is_the_mean_of_the_means() -> None:
    grads = e_grads(6)
    once = [weighted_mean(past, 0.9) for past in prefixes(grads)]
    twice = [weighted_mean(past, 0.5) for past in prefixes(once)]
    ours = updates([C.exp_avg(beta=0.9), C.exp_avg(beta=0.5)], grads)
    for update, expected in zip(ours, twice, strict=True):
        # two means of six numbers below 1, each bounded as above
        close(update, expected, atol=2 * 6 * EPS * (4 + 10))
