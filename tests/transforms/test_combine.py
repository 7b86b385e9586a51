"""parallel, graft and route against their branches run as optimizers of their own."""

import pickle

import pytest
import torch
from helpers import (
    EPS,
    SHAPES,
    bound,
    chain,
    close,
    gradients,
    reveal,
    same_path,
    starts,
    updates,
    walk,
)
from torch import Tensor

from heavyball import chainable as C


@pytest.mark.parametrize("weights", [None, (0.5, -2.0, 0.25)])
@pytest.mark.parametrize("shape", SHAPES)
def test_parallel_is_the_weighted_sum_of_its_branches(
    shape: tuple[int, ...], weights: tuple[float, ...] | None
) -> None:
    grads = [g for (g,) in gradients(8, [shape])]
    branches = [C.scale_by_adam], [C.exp_avg, C.sign], [C.scale_by_lion]
    each = [updates(branch, grads) for branch in branches]
    together = updates([C.parallel(*map(tuple, branches), weights=weights)], grads)
    for parts, update in zip(zip(*each, strict=True), together, strict=True):
        expected = sum(w * u for w, u in zip(weights or (1, 1, 1), parts, strict=True))
        close(update, expected, atol=8 * EPS * 10)


@pytest.mark.parametrize("shape", SHAPES)
def test_graft_has_the_direction_of_one_and_the_size_of_the_other(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(8, [shape])]
    direction = updates([C.scale_by_adam], grads)
    magnitude = updates([C.heavyball_momentum, C.clip_by_norm], grads)
    both = C.graft(C.scale_by_adam, (C.heavyball_momentum, C.clip_by_norm))
    for d, m, update in zip(direction, magnitude, updates([both], grads), strict=True):
        size = (m.square().sum() / d.square().sum()).sqrt()
        close(update, d * size, rtol=60 * EPS, atol=0.0)


def test_graft_goes_in_the_other_direction_before_its_start() -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    grafted = updates([C.graft(C.scale_by_adam, C.exp_avg)], grads)
    magnitude = updates([C.exp_avg], grads)
    late = C.graft(C.scale_by_adam, C.exp_avg, start=4)
    for t, update in enumerate(updates([late], grads), start=1):
        assert torch.equal(update, magnitude[t - 1] if t < 4 else grafted[t - 1])
    assert repr(late) == "graft(scale_by_adam, exp_avg, start=4)"
    assert repr(pickle.loads(pickle.dumps(late))) == repr(late)
    with pytest.raises(ValueError, match="start=-1"):
        C.graft(C.sign, C.exp_avg, start=-1)


def test_graft_of_a_zero_direction_is_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(updates([C.graft(C.exp_avg, C.sign)], [zero])[0], zero)


def test_branches_may_hold_branches_and_go_on_behind() -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    inner = C.parallel(C.exp_avg(beta=0.5), C.sign, weights=(0.5, 0.5))
    nested = C.graft((inner, C.clip_by_rms), C.scale_by_adam)
    d = updates([inner, C.clip_by_rms], grads)
    m = updates([C.scale_by_adam], grads)
    ours = updates([nested, C.exp_avg], grads)
    grafted = [a * (b.square().sum() / a.square().sum()).sqrt() for a, b in zip(d, m, strict=True)]
    expected = 0.0
    for t, (update, new) in enumerate(zip(ours, grafted, strict=True), start=1):
        expected = 0.9 * expected + 0.1 * new
        close(update, expected / (1 - 0.9**t), atol=6 * 60 * EPS * 10 * 10)


def test_two_chains_with_the_same_transform_keep_two_states() -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    both = C.parallel(C.exp_avg(beta=0.9), C.exp_avg(beta=0.5), weights=(1.0, -1.0))
    slow, fast = updates([C.exp_avg(beta=0.9)], grads), updates([C.exp_avg(beta=0.5)], grads)
    for update, a, b in zip(updates([both], grads), slow, fast, strict=True):
        close(update, a - b, atol=4 * EPS * 10)


def test_what_a_branch_says_of_the_learning_rate_is_not_lost() -> None:
    begin, grads = starts([(3, 4)]), gradients(6, [(3, 4)])
    alone = walk(chain(C.stable_adamw), begin, grads)
    halves = chain(C.parallel(C.stable_adamw, C.stable_adamw, weights=(0.5, 0.5)))
    try:
        both = walk(halves, begin, grads)
    except ValueError:
        return  # to refuse it is right as well: two branches could say different things
    same_path(both, alone, bound(6, beta=0.99))


RULES = {
    "ndim": lambda: (C.when(C.scale_by_adam, ndim=2), C.when(C.sign, max_ndim=1)),
    "name": lambda: (C.when(C.scale_by_adam, name="*weight"), C.when(C.sign, name="b*")),
    "predicate": lambda: (
        C.when(C.scale_by_adam, predicate=lambda name, p: p.numel() > 5),
        C.when(C.sign, predicate=lambda name, p: name == "bias" or p.ndim == 0),
    ),
}
NAMES = ("a.weight", "bias", "conv.weight", "b.scale")
ROUTED = ((3, 4), (5,), (2, 6), ())


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_route_is_separate_optimizers(rule: str, foreach: bool | None) -> None:
    begin, grads = starts(ROUTED), gradients(8, ROUTED)

    def routed(params: list[Tensor]) -> torch.optim.Optimizer:
        named = list(zip(NAMES, params, strict=True))
        return C.ChainOpt(named, 0.1, C.route(*RULES[rule]()), weight_decay=0.1, foreach=foreach)

    path = walk(routed, begin, grads)
    for which, transform in enumerate((C.scale_by_adam, C.sign, C.scale_by_adam, C.sign)):
        alone = walk(
            chain(transform, weight_decay=0.1), [begin[which]], [[g[which]] for g in grads]
        )
        for step, (expected,) in zip(path, alone, strict=True):
            assert torch.equal(step[which], expected)


def test_the_first_rule_wins_and_the_rest_goes_otherwise() -> None:
    begin, grads = starts(ROUTED), gradients(4, ROUTED)
    route = C.route(
        C.when(C.sign, min_ndim=2), C.when(C.scale_by_adam, max_ndim=5, min_ndim=1), otherwise=()
    )
    path = walk(chain(route), begin, grads)
    for which, elements in enumerate(((C.sign,), (C.scale_by_adam,), (C.sign,), (C.descend,))):
        alone = walk(chain(*elements), [begin[which]], [[g[which]] for g in grads])
        assert torch.equal(path[-1][which], alone[-1][0])


def test_a_route_between_common_elements_is_the_whole_chain_for_each() -> None:
    begin, grads = starts(ROUTED), gradients(6, ROUTED)
    route = C.route(C.when((C.scale_by_adam, C.cautious), ndim=2), otherwise=C.scale_by_lion)
    path = walk(chain(C.clip_by_rms, route, C.schedule_free), begin, grads)
    for which, middle in enumerate((0, 1, 0, 1)):
        inner = ((C.scale_by_adam, C.cautious), (C.scale_by_lion,))[middle]
        make = chain(C.clip_by_rms, *inner, C.schedule_free)
        alone = walk(make, [begin[which]], [[g[which]] for g in grads])
        for step, (expected,) in zip(path, alone, strict=True):
            assert torch.equal(step[which], expected)


def test_a_norm_over_all_parameters_inside_a_route_counts_those_routed_there() -> None:
    begin, grads = starts(ROUTED), gradients(3, ROUTED)
    route = C.route(C.when(C.clip_by_global_norm(max_norm=0.1), ndim=2), otherwise=C.sign)
    made: list = []

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        made.append(C.ChainOpt(params, 0.1, route, reveal))
        return made[0]

    walk(make, begin, grads)
    matrices = [grads[-1][0], grads[-1][2]]
    size = sum(g.square().sum() for g in matrices).sqrt() + 1e-6
    states = list(made[0].state.values())
    for state, grad in zip((states[0], states[2]), matrices, strict=True):
        close(state["reveal"], grad * 0.1 / size, rtol=60 * EPS, atol=0.0)
