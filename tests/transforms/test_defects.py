"""The mistakes of HeavyBall 1.0 that these transforms must not repeat, each with its smallest sign."""

import math

import pytest
import torch
from helpers import (
    EPS,
    chain,
    close,
    gradients,
    of_one,
    set_lr,
    starts,
    updates,
    walk,
)
from torch import Tensor

from heavyball import chainable as C


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def test_the_average_of_schedule_free_moves_and_weighs_by_the_largest_rate() -> None:
    # the averaging coefficient was set to 0, and weights were those of the present rate
    param = torch.nn.Parameter(0 * ones(1))
    optimizer = C.ChainOpt([param], 0.1, C.schedule_free(beta=0.5))
    for t, rate in enumerate((0.4, 0.2, 0.1), start=1):
        set_lr([rate] * 3)(optimizer, t)
        param.grad = -ones(1)
        optimizer.step()
    with optimizer.averaged():
        # z = 0.4, 0.6, 0.7; by the present rate their weights were 16 : 4 : 1
        close(param.detach(), ones(1) * (0.4 + 0.6 + 0.7) / 3, atol=20 * EPS)


def test_decay_shrinks_the_weights() -> None:
    # lr was negative already where 1 - wd lr was formed
    ((p,),) = walk(chain(C.scale_by_adam, weight_decay=0.5), [3 * ones(2)], [[0 * ones(2)]])
    close(p, 3 * ones(2) * (1 - 0.1 * 0.5), atol=4 * EPS)


@pytest.mark.parametrize(
    "name", [n for n, t in C.TRANSFORMS.items() if "scheduled_beta2" in t.optional]
)
def test_beta2_is_the_one_given_where_nobody_asks_for_a_schedule(name: str) -> None:
    # every class replaced beta2 by 1 - t^-0.8. With beta2 = 0 the second moment is that of the last
    # gradient alone, and with the schedule it is not.
    grads = [ones(3), 2 * ones(3), 5 * ones(3)]
    transform = C.TRANSFORMS[name]
    if name == "scale_by_ademamix":
        transform = transform(betas=(0.9, 0.0, 0.9))
    elif "betas" in transform.hyper:
        transform = transform(betas=(0.9, 0.0))
    else:
        transform = transform(beta2=0.0)
    param = torch.nn.Parameter(ones(3))
    optimizer = C.ChainOpt([param], 0.1, transform)
    for g in grads:
        param.grad = g.clone()
        optimizer.step()
    close(optimizer.state[param][f"{name}.exp_avg_sq"], 25 * ones(3), atol=0.0)


def test_laprop_applies_its_momentum_and_caution_sees_the_raw_gradient_and_eps_is_heard() -> None:
    # fused paths applied n itself, compared with a transformed tensor, and had an eps of their own
    grads = [ones(1), ones(1), -ones(1)]
    laprop = C.scale_by_laprop(betas=(0.5, 0.9), eps=1.0)
    # n = 1/2, 1/2, -1/2 with weights 1 : 2 : 4
    close(updates([laprop], grads)[2], ones(1) * (1 + 2 - 4) / 2 / 7, atol=20 * EPS)
    centred = updates([C.centralize, C.cautious(scale="none")], [ones(1, 2) * torch.tensor([1, 3])])
    # centred to -1 and 1, of which the first disagrees with the raw gradient
    assert centred[0].tolist() == [[0.0, 1.0]]


def test_the_second_moment_divides_the_gradient_and_not_the_other_way_from_the_first_step() -> None:
    grads = [2 * ones(1), 4 * ones(1)]
    ours = updates([C.scale_by_exp_avg_sq(beta2=0.5, eps=0.0)], grads)
    close(ours[0], ones(1), atol=4 * EPS)
    # v = (4 + 2 * 16) / 3
    close(ours[1], 4 / (12 * ones(1)).sqrt(), atol=10 * EPS)


def test_adopt_has_one_step_without_an_update_a_clip_and_no_lag() -> None:
    path = walk(
        chain(C.scale_by_adopt(betas=(0.5, 0.5)), lr=1.0),
        [0 * ones(1)],
        [[ones(1)], [-9 * ones(1)]],
    )
    assert path[0][0].item() == 0.0
    # g / sqrt(v) = -9 is clipped to -1^0.25; m = 0.5 * -1
    assert path[1][0].item() == 0.5


@pytest.mark.parametrize("name", [n for n, t in C.TRANSFORMS.items() if t.kind == "transform"])
def test_every_transform_hands_an_update_on(name: str) -> None:
    # momentum transforms returned None, which ended the chain
    grads = [g for (g,) in gradients(3, [(3, 4)])]
    transform = C.TRANSFORMS[name]
    transform = transform(rank=1) if "rank" in transform.options else transform
    elements = [transform, C.scale_by_exp_avg_sq] if transform.rules.modifier else [transform]
    elements = [C.to_eigenbasis, transform] if name == "from_eigenbasis" else elements
    assert updates(elements, grads, starts([(3, 4)])[0])[-1].abs().max() > 0


def test_every_parameter_of_the_list_is_stepped_whatever_the_state_of_the_others() -> None:
    # one decorator returned after the first tensor; a first step of one parameter skipped them all
    shapes = [(2,), (3,), (2, 2), ()]
    begin, grads = starts(shapes), gradients(4, shapes)
    late = [[g if i <= t else None for i, g in enumerate(step)] for t, step in enumerate(grads)]
    for foreach in (None, False):
        path = walk(chain(C.scale_by_adopt, C.exp_avg, foreach=foreach), begin, late)
        for which in range(4):
            alone = walk(
                chain(C.scale_by_adopt, C.exp_avg),
                [begin[which]],
                of_one([g[which] for g in grads[which:]]),
            )
            for step, (expected,) in zip(path[which:], alone, strict=True):
                assert torch.equal(step[which], expected)


def test_the_companding_laws_keep_signs_and_both_of_their_branches() -> None:
    # abs was taken in place on the input, and the logarithm overwrote the small branch
    points = torch.tensor([-1.0, -0.005, 0.005, 1.0], dtype=torch.float64)
    assert updates([C.mu_law], [points])[0][[0, 3]].tolist() == [-1.0, 1.0]
    small = 87.6 * 0.005 / (1 + math.log(87.6))
    expected = torch.tensor([-1.0, -small, small, 1.0], dtype=torch.float64)
    close(updates([C.a_law], [points])[0], expected, atol=10 * EPS)


def test_clips_do_not_normalize_and_the_first_parameter_mean_is_the_parameter() -> None:
    small = 0.1 * ones(4)
    for transform in (C.clip_by_norm, C.clip_by_rms, C.clip_by_global_norm, C.clip_update_rms):
        assert torch.equal(updates([transform], [small])[0], small)
    param = torch.nn.Parameter(ones(2))
    optimizer = C.ChainOpt([param], 0.1, C.parameter_ema)
    param.grad = ones(2)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["parameter_ema"], param)
