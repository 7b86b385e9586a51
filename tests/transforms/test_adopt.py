"""scale_by_adopt against the golden values, pytorch_optimizer with its clip index corrected, and
explicit sums."""

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
    same_path,
    starts,
    updates,
    walk,
)
from pytorch_optimizer import ADOPT

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.scale_by_adopt(betas=(0.9, 0.9999), eps=1e-6)), 4),
        """[1, -2, 3, 4] | [0.99, -1.99, 3.002631186, 3.99]
        | [0.971, -1.969107929, 2.993107183, 3.991648307]
        | [0.9439, -1.937144325, 2.992050153, 3.982476861]""",
    )


@pytest.mark.parametrize("decouple", [False, True])
@pytest.mark.parametrize("exponent", [0.25, 0.5, None])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.9999), 1e-6), ((0.0, 0.5), 0.5)])
def test_it_is_pytorch_optimizers_adopt_with_the_authors_clip_and_first_step(
    betas: tuple[float, float], eps: float, exponent: float | None, decouple: bool
) -> None:
    begin, grads = starts(), gradients(12, least=0.5)
    adopt = C.scale_by_adopt(betas=betas, eps=eps, clip_exponent=exponent)
    elements = (adopt, C.decoupled) if decouple else (C.coupled, adopt)
    ours = walk(chain(*elements, weight_decay=0.1), begin, grads)
    # that package counts the step without an update in the clip, and decays there too; the authors
    # do neither
    clip = None if exponent is None else lambda step: (step - 1) ** exponent

    def no_decay_at_first(optimizer: torch.optim.Optimizer, t: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.0 if decouple and t == 1 else 0.1

    theirs = walk(
        lambda ps: ADOPT(ps, 0.1, betas, clip, 0.1, decouple, eps=eps, foreach=False),
        begin,
        grads,
        no_decay_at_first,
    )
    assert all(torch.equal(a, b) for a, b in zip(ours[0], begin, strict=True))
    assert moves(ours[1:], ours[0])
    # An update is the quotient of two gradients, below 50 here. Coupled decay feeds the parameter
    # back with a slope of 0.1 / 0.15, 0.15 the least gradient: (1 + 0.1 * 0.1 / 0.15)^12 < 3.
    same_path(ours, theirs, atol=3 * bound(12, update=50))


def test_the_update_is_an_explicit_sum_of_clipped_quotients() -> None:
    grads = [g for (g,) in gradients(10, [(3, 4)])]
    ours = updates([C.scale_by_adopt(betas=(0.8, 0.9), eps=0.2)], grads)
    quotients = []
    for t in range(2, 11):
        # v after t - 1 gradients: the first has the whole weight at first, later ones 1 - beta2
        square = 0.9 ** (t - 2) * grads[0] ** 2
        square = square + 0.1 * decayed_sum(
            [torch.zeros(3, 4), *(g**2 for g in grads[1 : t - 1])], 0.9
        )
        quotient = grads[t - 1] / square.sqrt().clamp(min=0.2)
        limit = (t - 1) ** 0.25
        quotients.append(quotient.clamp(-limit, limit))
        close(ours[t - 1], 0.2 * decayed_sum(quotients, 0.8), atol=60 * EPS * 10)
        assert ours[t - 1].abs().max() <= limit


def test_every_parameter_has_its_own_first_step() -> None:
    begin, grads = starts([(3,), (2, 2)]), gradients(6, [(3,), (2, 2)])
    late = [[g[0], None if t < 2 else g[1]] for t, g in enumerate(grads)]
    path = walk(chain(C.scale_by_adopt), begin, late)
    alone = walk(chain(C.scale_by_adopt), begin[1:], [[g[1]] for g in grads[2:]])
    assert all(torch.equal(step[1], begin[1]) for step in path[:3])
    for step, other in zip(path[2:], alone, strict=True):
        assert torch.equal(step[1], other[0])


def test_the_first_step_freezes_what_stands_behind() -> None:
    grads = [g for (g,) in gradients(5, [(3, 4)])]
    ours = updates([C.scale_by_adopt, C.exp_avg(beta=0.5)], grads)
    adopted = updates([C.scale_by_adopt], grads)
    for t in range(2, 6):
        weights = [0.5 ** (t - i) for i in range(2, t + 1)]
        mean = sum(w * u for w, u in zip(weights, adopted[1:t], strict=True)) / sum(weights)
        close(ours[t - 1], mean, atol=40 * EPS * 5)
