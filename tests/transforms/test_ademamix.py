"""scale_by_ademamix against the golden values, pytorch_optimizer, and explicit sums."""

import math

import pytest
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
from pytorch_optimizer import AdEMAMix
from pytorch_optimizer.optimizer.ademamix import SimplifiedAdEMAMix

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.scale_by_ademamix), 3),
        """[0.8999800011, -2.100019986, 3.100019999, 4.100019999]
        | [0.7999400043, -2.031759164, 3.183796707, 4.092659944]
        | [0.6998800114, -1.94888457, 3.176913741, 4.126019105]""",
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("betas", "alpha", "eps"),
    [
        ((0.9, 0.999, 0.9999), 2.0, 1e-8),
        ((0.5, 0.9, 0.95), 5.0, 0.1),
        ((0.0, 0.9, 0.99), 0.0, 1e-8),
    ],
)
def test_it_is_pytorch_optimizers_ademamix(
    betas: tuple[float, float, float], alpha: float, eps: float, weight_decay: float
) -> None:
    begin, grads = starts(), gradients(12)
    mix = C.scale_by_ademamix(betas=betas, alpha=alpha, eps=eps)
    ours = walk(chain(mix, weight_decay=weight_decay), begin, grads)
    theirs = walk(
        lambda ps: AdEMAMix(
            ps, 0.1, betas, weight_decay, True, alpha=alpha, eps=eps, foreach=False
        ),
        begin,
        grads,
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=max(betas[:2])))


def test_both_warm_ups_are_pytorch_optimizers() -> None:
    begin, grads, steps, betas = starts(), gradients(15), 10, (0.9, 0.999, 0.99)
    mix = C.scale_by_ademamix(betas=betas, alpha=5.0, alpha_warmup=steps, beta3_warmup=steps)
    ours = walk(chain(mix), begin, grads)
    theirs = walk(
        lambda ps: AdEMAMix(ps, 0.1, betas, t_alpha_beta3=steps, foreach=False), begin, grads
    )
    plain = walk(chain(C.scale_by_ademamix(betas=betas, alpha=5.0)), begin, grads)
    # The authors add 1e-8 to beta before its logarithm, that package does not. It changes 1 - beta3
    # by less than 1e-8 / (1 - 0.99) of itself at every step, and with it the slow mean's part of an
    # update, which is below alpha * 10, at lr 0.1.
    same_path(ours, theirs, atol=15 * 0.1 * 5 * 10 * 1e-6)
    assert (ours[-1][1] - plain[-1][1]).abs().max() > 1e-2


@pytest.mark.parametrize("placement", ROOTS)
def test_the_update_is_the_formula_with_explicit_sums(placement: str) -> None:
    beta1, beta2, beta3, alpha, eps = 0.8, 0.9, 0.95, 3.0, 0.2
    alpha_steps, beta_steps = 5, 7
    grads = [g for (g,) in gradients(9, [(3, 4)])]
    ours = updates(
        [
            C.scale_by_ademamix(
                betas=(beta1, beta2, beta3),
                alpha=alpha,
                eps=eps,
                alpha_warmup=alpha_steps,
                beta3_warmup=beta_steps,
                eps_placement=placement,
            )
        ],
        grads,
    )
    betas3 = [
        SimplifiedAdEMAMix.linear_hl_warmup_scheduler(t, beta3, beta1, beta_steps)
        for t in range(1, 10)
    ]
    assert betas3[0] < 0.87 < betas3[3]
    assert betas3[6:] == [beta3] * 3
    for t, (update, past) in enumerate(zip(ours, prefixes(grads), strict=True), start=1):
        weights = [(1 - betas3[i]) * math.prod(betas3[i + 1 : t]) for i in range(t)]
        slow = sum(w * g for w, g in zip(weights, past, strict=True))
        mixed = weighted_mean(past, beta1) + alpha * min(1, t / alpha_steps) * slow
        v = weighted_mean([g**2 for g in past], beta2)
        # fewer than 80 roundings of updates below 20, tenfold for 1 - 0.9^t
        expected = mixed / ROOTS[placement](v, eps, 1 - beta2**t)
        close(update, expected, atol=80 * EPS * 20 * 10)


def test_the_slow_mean_is_not_bias_corrected() -> None:
    grads = [g for (g,) in gradients(6, [(4,)])]
    fast = updates([C.scale_by_ademamix(betas=(0.9, 0.9, 0.99), alpha=0.0, eps=0.0)], grads)
    both = updates([C.scale_by_ademamix(betas=(0.9, 0.9, 0.99), alpha=1.0, eps=0.0)], grads)
    for one, other, past in zip(fast, both, prefixes(grads), strict=True):
        root = weighted_mean([g**2 for g in past], 0.9).sqrt()
        close(other - one, 0.01 * decayed_sum(past, 0.99) / root, atol=60 * EPS * 10 * 10)
