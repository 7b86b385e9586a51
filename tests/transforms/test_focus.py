"""focus against the golden values, pytorch_optimizer, and explicit sums."""

import pytest
import torch
from helpers import (
    EPS,
    bound,
    chain,
    close,
    decayed_sum,
    golden_path,
    gradients,
    matches_golden,
    moves,
    of_one,
    same_path,
    starts,
    walk,
    weighted_mean,
)
from pytorch_optimizer import FOCUS

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.focus), 4),
        """[0.9, -2.1, 3.1, 4.1] | [0.81, -1.99, 3.19, 3.99]
        | [0.72, -1.9, 3.08, 4.1] | [0.63, -1.81, 3.19, 3.99]""",
    )
    matches_golden(
        golden_path(chain(C.focus, weight_decay=0.1), 4),
        """[0.89, -2.08, 3.07, 4.06] | [0.7905502751, -1.9495998, 3.129649825, 3.90969985]
        | [0.6916158061, -1.839501302, 2.988983893, 3.979801152]
        | [0.5931866722, -1.729829315, 3.068512276, 3.849927663]""",
    )


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.0])
@pytest.mark.parametrize("betas", [(0.9, 0.5), (0.5, 0.75), (0.0, 0.875)])
def test_it_is_pytorch_optimizers(betas: tuple[float, float], gamma: float) -> None:
    # 1 - beta2 is a power of two: elsewhere the division of that package leaves a rounding error in
    # p - q at the first step, whose sign moves the weights
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.focus(betas=betas, gamma=gamma)), begin, grads)
    theirs = walk(lambda ps: FOCUS(ps, 0.1, betas, gamma, foreach=False), begin, grads)
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, update=2))


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_the_step_is_two_signs_of_explicit_sums(weight_decay: float) -> None:
    begin, grads = starts([(4, 5)]), [g for (g,) in gradients(10, [(4, 5)])]
    focus = C.focus(betas=(0.7, 0.99), gamma=0.3)
    path = walk(chain(focus, weight_decay=weight_decay), begin, of_one(grads))
    before = [begin[0], *(p for (p,) in path)]
    for t, (new,) in enumerate(path):
        p, mean = before[t], weighted_mean(before[: t + 1], 0.99)
        # at the first step p - q is exactly 0
        away = (p - mean).sign() if t else torch.zeros_like(p)
        update = decayed_sum(grads[: t + 1], 0.7).sign() + 0.3 * away
        close(new, p - 0.1 * (update + weight_decay * mean), atol=40 * EPS * 5 * 100)


def test_the_first_step_is_the_sign_of_the_gradient_for_any_beta2() -> None:
    begin, grads = starts([(50, 40)]), gradients(1, [(50, 40)])
    for beta2 in (0.0, 0.9, 0.999, 0.99999):
        ((new,),) = walk(chain(C.focus(betas=(0.9, beta2))), begin, grads)
        assert torch.equal(new, begin[0] - 0.1 * grads[0][0].sign())
