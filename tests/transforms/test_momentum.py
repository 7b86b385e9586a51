"""heavyball_momentum and nesterov_momentum against torch.optim.SGD, golden values and sums."""

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
    prefixes,
    same_path,
    starts,
    states,
    updates,
    walk,
)

from heavyball import chainable as C


def sgd(**options: object) -> object:
    return lambda ps: torch.optim.SGD(ps, 0.1, **options)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("momentum", "dampening"), [(0.9, 0.0), (0.5, 0.3), (0.9, 1.0), (0.0, 0.0)]
)
def test_heavyball_is_torch_sgd(momentum: float, dampening: float, maximize: bool) -> None:
    begin, grads = starts(), gradients(12)
    ball = C.heavyball_momentum(momentum=momentum, dampening=dampening)
    ours = walk(chain(*([C.maximize] * maximize), ball), begin, grads)
    theirs = walk(sgd(momentum=momentum, dampening=dampening, maximize=maximize), begin, grads)
    assert moves(ours, begin)
    # the buffer is a sum, ten times a gradient of up to 10
    same_path(ours, theirs, atol=bound(12, update=100, param=100))


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_nesterov_is_torch_sgd(momentum: float) -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.nesterov_momentum(momentum=momentum)), begin, grads)
    theirs = walk(sgd(momentum=momentum, nesterov=True), begin, grads)
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, update=100, param=100))


def test_coupled_decay_goes_into_the_momentum_as_in_torch() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.coupled(weight_decay=0.2), C.nesterov_momentum), begin, grads)
    theirs = walk(sgd(momentum=0.9, nesterov=True, weight_decay=0.2), begin, grads)
    # the decay feeds the parameter back with a slope of 0.2, in the sum up to tenfold: an error
    # grows less than (1 + 0.1 * 0.2 * 10)^12 < 10-fold
    same_path(ours, theirs, atol=10 * bound(12, update=100, param=100))


def test_the_golden_values_after_three_steps() -> None:
    matches_golden(
        [
            golden_path(chain(C.heavyball_momentum(momentum=0.9)), 3)[-1],
            golden_path(chain(C.nesterov_momentum(momentum=0.9)), 3)[-1],
        ],
        """[0.5076761828, -1.773306826, 3.159502359, 4.167945329]
        | [0.2936337959, -1.629289833, 3.147087302, 4.246854918]""",
    )


def test_both_are_explicit_sums() -> None:
    grads = [g for (g,) in gradients(10, [(3, 4)])]
    ball = updates([C.heavyball_momentum(momentum=0.8)], grads)
    damped = updates([C.heavyball_momentum(momentum=0.8, dampening=0.25)], grads)
    nesterov = updates([C.nesterov_momentum(momentum=0.8)], grads)
    for t, past in enumerate(prefixes(grads), start=1):
        atol = 40 * EPS * 50
        close(ball[t - 1], decayed_sum(past, 0.8), atol=atol)
        # the first gradient is not dampened
        whole = decayed_sum([past[0], *(0.75 * g for g in past[1:])], 0.8)
        close(damped[t - 1], whole, atol=atol)
        close(nesterov[t - 1], past[-1] + 0.8 * decayed_sum(past, 0.8), atol=atol)


@pytest.mark.parametrize("name", ["heavyball_momentum", "nesterov_momentum"])
def test_without_momentum_the_gradient_passes_and_no_state_is_held(name: str) -> None:
    transform = C.TRANSFORMS[name](momentum=0.0)
    grads = [g for (g,) in gradients(3, [(4,)])]
    for update, grad in zip(updates([transform], grads), grads, strict=True):
        assert torch.equal(update, grad)
    assert set(states([transform], grads)) == {"step"}


@pytest.mark.parametrize(
    "speeds",
    [
        (0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9),
        (0.9, 0.9, 0.0, 0.0, 0.5, 0.5, 0.9, 0.9),
        (0.5, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7, 0.6),
    ],
)
@pytest.mark.parametrize(("dampening", "nesterov"), [(0.3, False), (0.0, True)])
def test_a_momentum_that_is_changed_in_training_is_torchs(
    speeds: tuple[float, ...], dampening: float, nesterov: bool
) -> None:
    begin, grads = starts(), gradients(8)

    def change(optimizer: torch.optim.Optimizer, t: int) -> None:
        # torch refuses nesterov without momentum only when it is built
        optimizer.param_groups[0]["momentum"] = speeds[t - 1]

    ball = C.nesterov_momentum if nesterov else C.heavyball_momentum(dampening=dampening)
    ours = walk(chain(ball), begin, grads, change)
    theirs = walk(sgd(momentum=0.9, dampening=dampening, nesterov=nesterov), begin, grads, change)
    same_path(ours, theirs, atol=bound(8, update=100, param=100))
