"""scale_by_lion against lion-pytorch, the golden values, and explicit sums."""

import pytest
import torch
from helpers import (
    bound,
    chain,
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
)
from lion_pytorch import Lion

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.scale_by_lion(betas=(0.9, 0.99)), weight_decay=0.1), 3),
        """[0.89, -2.08, 3.07, 4.06] | [0.7811, -1.9592, 3.1393, 3.9194]
        | [0.673289, -1.839608, 3.007907, 3.980206]""",
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5), (0.5, 0.0)])
def test_it_is_lion_pytorch_step_by_step(betas: tuple[float, float], weight_decay: float) -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.scale_by_lion(betas=betas), weight_decay=weight_decay), begin, grads)
    theirs = walk(lambda ps: Lion(ps, 0.1, betas, weight_decay), begin, grads)
    assert moves(ours, begin)
    # a sign differs only where a mix of random gradients is 1e-15, so this is the write's rounding
    same_path(ours, theirs, atol=bound(12, update=1.0))


def test_the_update_is_the_sign_of_an_explicit_sum_and_lags_by_no_step() -> None:
    grads = [g for (g,) in gradients(10, [(30,)])]
    ours = updates([C.scale_by_lion(betas=(0.6, 0.9))], grads)
    for t, past in enumerate(prefixes(grads), start=1):
        mean = 0.1 * decayed_sum(past[:-1], 0.9) if t > 1 else torch.zeros(30)
        assert torch.equal(ours[t - 1], (0.6 * mean + 0.4 * past[-1]).sign())


def test_where_momentum_and_gradient_are_zero_nothing_moves() -> None:
    grad = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    assert updates([C.scale_by_lion], [grad])[0].tolist() == [0.0, 1.0, -1.0]
