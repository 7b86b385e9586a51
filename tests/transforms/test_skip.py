"""skip_not_finite: a bad step leaves everything as it was, and training goes on as if it had not
been."""

import math

import pytest
import torch
from helpers import chain, gradients, starts, walk

from heavyball import chainable as C

CHAINS = {
    "adam": lambda: (C.scale_by_adam,),
    "adam, warm-up": lambda: (C.scale_by_adam, C.decoupled(weight_decay=0.1)),
    "adopt": lambda: (C.scale_by_adopt, C.cautious),
    "schedule-free": lambda: (C.palm_beta2, C.scale_by_exp_avg_sq, C.schedule_free),
    "global clip": lambda: (C.clip_by_global_norm, C.exp_avg, C.parameter_ema),
    "mars": lambda: (C.mars, C.scale_by_nadam, C.decay_to_ema(weight_decay=0.1)),
    "laprop": lambda: (C.scale_by_laprop(lr_in_momentum=True, centered=True), C.independent),
    "parallel": lambda: (C.parallel(C.scale_by_adam, C.scale_by_adopt, weights=(0.5, 0.5)),),
    "stable": lambda: (C.stable_adamw, C.adamc(weight_decay=0.1)),
    "accumulate": lambda: (C.accumulate(k=3), C.scale_by_adam, C.cautious),
    "factored": lambda: (C.factored_rms(min_dim=2), C.clip_update_rms),
    "focus": lambda: (C.focus, C.schedule_free),
    "momentum": lambda: (C.nesterov_momentum, C.heavyball_momentum(dampening=0.5)),
}


def bad_step(kind: float, grads: list[torch.Tensor], where: int) -> list[torch.Tensor]:
    """Gradients of which one entry of one parameter is not finite."""
    bad = [g.clone() for g in grads]
    bad[where].view(-1)[-1] = kind
    return bad


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", CHAINS)
def test_training_goes_on_as_if_the_bad_step_had_not_been(name: str, foreach: bool | None) -> None:
    begin, good = starts(), gradients(9)
    make = chain(C.skip_not_finite, *CHAINS[name](), warmup_steps=4, foreach=foreach)
    clean = walk(make, begin, good)
    bad = [bad_step(x, good[0], i) for i, x in enumerate((math.nan, math.inf, -math.inf, math.nan))]
    # at the very first step, after the first, in mid-run, and twice in a row
    mixed = [bad[0], good[0], bad[1], *good[1:5], bad[2], bad[3], *good[5:]]
    path = walk(make, begin, mixed)
    kept = [path[i] for i in (1, 3, 4, 5, 6, 9, 10, 11, 12)]
    for step, expected in zip(kept, clean, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))
    for skipped, before in ((0, begin), (2, path[1]), (7, path[6]), (8, path[7])):
        assert all(torch.equal(a, b) for a, b in zip(path[skipped], before, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_a_bad_step_changes_no_state_but_the_two_counters(name: str) -> None:
    begin, good = starts(), gradients(5)
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = C.ChainOpt(params, 0.1, C.skip_not_finite, *CHAINS[name]())

    def step(grads: list[torch.Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()

    for grads in good:
        step(grads)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    step(bad_step(math.nan, good[0], 2))
    for p, old in zip(params, before, strict=True):
        new = optimizer.state[p]
        assert new.keys() == old.keys()
        for key in old.keys() - {"step", "skip_not_finite.skipped"}:
            assert torch.equal(new[key], old[key]), key
        assert new["step"] == old["step"] + 1
        assert new["skip_not_finite.skipped"] == 1


def test_a_parameter_without_a_gradient_neither_decides_nor_counts() -> None:
    begin, good = starts([(3,), (2, 2)]), gradients(2, [(3,), (2, 2)])
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = C.ChainOpt(params, 0.1, C.skip_not_finite, C.scale_by_adam)
    params[0].grad = torch.full((3,), math.nan, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(params[0], begin[0])
    assert params[1] not in optimizer.state
    params[0].grad, params[1].grad = None, good[0][1].clone()
    optimizer.step()
    assert not torch.equal(params[1], begin[1])
    assert optimizer.state[params[1]]["skip_not_finite.skipped"] == 0
    assert optimizer.state[params[0]]["skip_not_finite.skipped"] == 1


def test_what_is_too_large_for_float32_after_a_square_is_still_finite() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = C.ChainOpt([param], 0.1, C.skip_not_finite, C.scale_by_adam)
    param.grad = torch.tensor([1e38, -1e38])
    optimizer.step()
    assert torch.allclose(param.detach(), torch.tensor([-0.1, 0.1]))
