"""accumulate(k) against the inner chain run on the means of k gradients."""

import math

import pytest
import torch
from helpers import EPS, bound, chain, close, gradients, same_path, starts, walk

from heavyball import chainable as C

INNER = {
    "adam": lambda: (C.scale_by_adam(betas=(0.9, 0.99)),),
    "adam, decay": lambda: (C.scale_by_adam(betas=(0.9, 0.99)), C.decoupled(weight_decay=0.2)),
    "nadam": lambda: (C.scale_by_nadam(betas=(0.9, 0.99)),),
    "cautious": lambda: (C.exp_avg, C.cautious),
    "grams": lambda: (C.exp_avg, C.grams),
    "adopt": lambda: (C.scale_by_adopt(betas=(0.9, 0.99)),),
    "palm": lambda: (C.palm_beta2, C.scale_by_exp_avg_sq),
    "schedule-free": lambda: (C.scale_by_exp_avg_sq, C.schedule_free(r=1.0)),
    "global clip": lambda: (C.clip_by_global_norm(max_norm=0.5), C.heavyball_momentum),
    "mars": lambda: (C.mars, C.exp_avg),
    "mean": lambda: (C.exp_avg, C.decay_to_ema(weight_decay=0.1, beta=0.5)),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", INNER)
def test_it_is_the_inner_chain_on_mean_gradients(name: str, k: int) -> None:
    begin, grads = starts(), gradients(6 * k)
    # warm-up counts the steps of the inner chain, as every count behind does
    path = walk(chain(C.accumulate(k=k), *INNER[name](), warmup_steps=4), begin, grads)
    means = [
        [sum(gs) / k for gs in zip(*grads[i : i + k], strict=True)] for i in range(0, 6 * k, k)
    ]
    inner = walk(chain(*INNER[name](), warmup_steps=4), begin, means)
    # the running mean is off by k roundings of 10; an update changes by at most that over the least
    # gradient's size, 0.01, and there are six of them
    atol = 2 * bound(6, update=100, beta=0.99) + 6 * 0.1 * k * EPS * 10 / 0.01
    same_path(path[k - 1 :: k], inner, atol)
    for t, step in enumerate(path, start=1):
        if t % k:
            before = path[t - 2] if t > 1 else begin
            assert all(torch.equal(a, b) for a, b in zip(step, before, strict=True))


def test_between_two_steps_only_the_mean_and_the_count_change() -> None:
    grads = [g for (g,) in gradients(4, [(3, 4)])]
    param = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    elements = C.scale_by_adam, C.schedule_free
    optimizer = C.ChainOpt([param], 0.1, C.accumulate(k=3), *elements)
    for t, g in enumerate(grads, start=1):
        before = {k: v.clone() for k, v in optimizer.state[param].items()}
        param.grad = g.clone()
        optimizer.step()
        after = optimizer.state[param]
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        if t == 2:
            assert changed == {"step", "accumulate.accumulated"}
            close(after["accumulate.accumulated"], (grads[0] + g) / 2, atol=4 * EPS * 10)
        if t == 3:
            assert not after["accumulate.accumulated"].any()
            assert "scale_by_adam.exp_avg" in changed
        if t == 4:
            assert torch.equal(after["accumulate.accumulated"], g)


def test_cautious_compares_with_the_mean_and_not_with_the_last_gradient() -> None:
    first = torch.tensor([3.0, 3.0, -3.0], dtype=torch.float64)
    second = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    start = torch.zeros(3, dtype=torch.float64)
    path = walk(chain(C.accumulate(k=2), C.cautious, lr=1.0), [start], [[first], [second]])
    # the mean agrees with itself everywhere, though one entry of the last gradient does not
    assert path[1][0].tolist() == [-1.0, -2.0, 2.0]


def test_a_late_parameter_has_windows_of_its_own() -> None:
    begin, grads = starts([(3,), (2, 2)]), gradients(9, [(3,), (2, 2)])
    late = [[g[0], None if t < 2 else g[1]] for t, g in enumerate(grads)]
    make = chain(C.accumulate(k=3), C.scale_by_adam)
    path = walk(make, begin, late)
    alone = walk(make, begin[1:], [[g[1]] for g in grads[2:]])
    for (_, p), (other,) in zip(path[2:], alone, strict=True):
        assert torch.equal(p, other)


def test_a_bad_step_in_a_window_leaves_the_window_waiting() -> None:
    begin, good = starts(), gradients(9)
    bad = [g.clone() for g in good[0]]
    bad[1][0] = math.nan
    elements = C.skip_not_finite, C.accumulate(k=3), C.scale_by_adam, C.cautious
    clean = walk(chain(*elements), begin, good)
    # before a window, inside it, and right after its last
    mixed = [bad, *good[:2], bad, bad, good[2], bad, *good[3:]]
    path = walk(chain(*elements), begin, mixed)
    for step, expected in zip(
        [path[i] for i in (1, 2, 5, 7, 8, 9, 10, 11, 12)], clean, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))


def test_the_global_norm_behind_it_counts_only_parameters_at_their_step() -> None:
    shapes = [(3,), (2, 2)]
    begin, grads = starts(shapes), gradients(4, shapes)
    # the second parameter is one step behind, so its windows never end together with the first's
    late = [[g[0], None if t == 0 else g[1]] for t, g in enumerate(grads)]
    make = chain(C.accumulate(k=2), C.clip_by_global_norm(max_norm=0.1))
    path = walk(make, begin, late)
    for which, first in ((0, 0), (1, 1)):
        alone = walk(make, [begin[which]], [[g[which]] for g in grads[first : first + 2]])
        assert torch.equal(path[first + 1][which], alone[1][0])
