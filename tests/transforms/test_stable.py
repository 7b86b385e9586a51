"""stable_adamw and clip_update_rms against golden values, pytorch_optimizer, and explicit means."""

import pytest
import torch
from helpers import (
    EPS,
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
from pytorch_optimizer import StableAdamW

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.stable_adamw(betas=(0.9, 0.99), eps=1e-8)), 3),
        """[0.9000000011, -2.099999986, 3.099999999, 4.099999999]
        | [0.8017829372, -2.033130143, 3.182411621, 4.09277268]
        | [0.7166065833, -1.962762119, 3.176553234, 4.121164664]""",
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.99), 1e-8), ((0.5, 0.9), 0.5)])
def test_it_is_pytorch_optimizers_decay_included(
    betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(
        chain(C.stable_adamw(betas=betas, eps=eps), weight_decay=weight_decay), begin, grads
    )
    theirs = walk(
        lambda ps: StableAdamW(ps, 0.1, betas, weight_decay=weight_decay, eps=eps, foreach=False),
        begin,
        grads,
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=0.99))


def test_the_learning_rate_of_everything_behind_drops_by_the_surprise() -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    start = torch.ones(3, 4, dtype=torch.float64)
    path = walk(
        chain(C.stable_adamw(betas=(0.9, 0.9), eps=0.0), weight_decay=0.5),
        [start],
        [[g] for g in grads],
    )
    p, lowered = start, 0
    for (new,), past in zip(path, prefixes(grads), strict=True):
        v = weighted_mean([g**2 for g in past], 0.9)
        surprise = (past[-1] ** 2 / v).mean().sqrt().item()
        lr = 0.1 / max(1.0, surprise)
        lowered += surprise > 1
        p = p * (1 - lr * 0.5) - lr * weighted_mean(past, 0.9) / v.sqrt()
        close(new, p, atol=bound(6, beta=0.9))
    assert 0 < lowered < 6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_clip_update_rms_divides_by_what_is_above_the_threshold(
    shape: tuple[int, ...], threshold: float
) -> None:
    ((grad,),) = gradients(1, [shape], least=0.5)
    rms = (sum(x * x for x in grad.flatten().tolist()) / grad.numel()) ** 0.5
    for size, factor in ((0.5, 1.0), (4.0, 0.25), (100.0, 0.01)):
        update = grad * (size * threshold / rms)
        (ours,) = updates([C.clip_update_rms(threshold=threshold)], [update])
        close(ours, update * factor, rtol=40 * EPS, atol=0.0)


def test_clip_update_rms_of_a_number_is_a_clamp() -> None:
    for x, y in ((0.2, 0.2), (-0.7, -0.5), (9.0, 0.5)):
        (ours,) = updates(
            [C.clip_update_rms(threshold=0.5)], [torch.tensor(x, dtype=torch.float64)]
        )
        close(ours, torch.tensor(y, dtype=torch.float64), rtol=4 * EPS, atol=0.0)
