"""Schedules of live numbers: their values, what a step does with them, and how they are saved."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import heavyball
from heavyball import chainable as C
from heavyball.race.contenders import from_optimizer

# ---- values

# 12 digits of n = 1 .. 10
GOLDEN = {
    "cosine": (
        C.cosine(10, floor=0.1),
        "1 .977975432333 .914057647469 .814503363532 .689057647469 .55 .410942352531 .285496636468 "
        ".185942352531 .122024567667",
    ),
    "wsd linear": (C.wsd(10, 2, 4, "linear"), ".5 1 1 1 1 1 1 .75 .5 .25"),
    "wsd sqrt": (C.wsd(10, 2, 4), ".5 1 1 1 1 1 1 .5 .292893218813 .133974596216"),
    "wsd cosine": (C.wsd(10, 2, 4, "cosine"), ".5 1 1 1 1 1 1 .853553390593 .5 .146446609407"),
    "rex": (
        C.rex(10),
        "1 .947368421053 .888888888889 .823529411765 .75 .666666666667 .571428571429 .461538461538 "
        ".333333333333 .181818181818",
    ),
    "power": (
        C.power(10, 4),
        "1 1 1 1 1 .803493753336 .614738607654 .435275281648 .267580520587 .116471186462",
    ),
    "ramp": (
        C.ramp(0.85, 0.95, 4, 10, 3),
        ".85 .875 .9 .925 .95 .95 .95 .95 .916666666667 .883333333333",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_values_are_those_of_the_formulas(name):
    fn, expected = GOLDEN[name]
    values = [float(word) for word in expected.split()]
    assert [fn(n) for n in range(1, 11)] == pytest.approx(values, abs=1e-12)


AT_THE_CORNERS = [
    # schedule, step, value
    (C.constant(), 10**6, 1.0),
    (C.constant(peak=3.0), 1, 3.0),
    (C.linear(4), 1, 1.0),
    (C.linear(4), 4, 0.25),
    (C.linear(4), 5, 0.0),
    (C.linear(4), 500, 0.0),
    (C.linear(4, floor=0.2, peak=10.0), 3, 10 * (0.2 + 0.8 * 0.5)),
    (C.linear(4, floor=0.2, peak=10.0), 99, 2.0),
    (C.cosine(2.0), 2, 0.5),
    (C.cosine(10, floor=0.1), 11, 0.1),
    (C.cosine(10, floor=1), 6, 1.0),
    (C.rex(10, 0.1), 12, 0.1),
    (C.rex(10, beta=0.9), 6, 0.5 / 0.55),
    (C.rex(10, beta=0), 4, 0.7),
    (C.polynomial(4, 3), 3, 0.125),
    (C.wsd(10, 2, 4), 7, 1.0),
    (C.wsd(10, 0, 10, "linear"), 1, 1.0),
    (C.wsd(10, 2, 4), 11, 0.0),
    (C.wsd(10, 2, 4, floor=0.3), 11, 0.3),
    (C.inverse_sqrt(100), 1, 0.01),
    (C.inverse_sqrt(100), 100, 1.0),
    (C.inverse_sqrt(100), 400, 0.5),
    (C.power(10, 0), 1, 1.0),
    (C.power(10, 4, 2, 0.5), 9, 0.5 + 0.5 * (2 / 6) ** 2),
    (C.power(10, 4), 11, 0.0),
    (C.exponential(2.0), 5, 16.0),
    (C.exponential(2.0), 10**6, math.inf),
    (C.exponential(0.5), 10**6, 0.0),
    (C.step(3), 3, 1.0),
    (C.step(3), 4, 0.1),
    (C.step((3, 3, 5), 0.5), 6, 0.125),
    (C.cosine_restarts(4), 5, 1.0),
    (C.cosine_restarts(4), 10**9 + 3, 0.5),
    (C.cosine_restarts(2, 3, 0.5), 6, 0.75),
    (C.ramp(1, 2, 0, 9, 0), 1, 2.0),
    (C.ramp(1, 2, 0, 9, 0), 10, 1.0),
    (C.ramp(0.9, 0.5, 2, 9, 2), 2, 0.7),
]


@pytest.mark.parametrize(("fn", "n", "expected"), AT_THE_CORNERS, ids=str)
def test_the_first_and_the_last_steps(fn, n, expected):
    assert fn(n) == pytest.approx(expected, abs=1e-12)


TORCH = {
    "linear": (C.linear(7), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 7), 10),
    "cosine": (C.cosine(7, 0.25), lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.25), 8),
    "polynomial": (C.polynomial(7, 1.7), lambda o: lr_scheduler.PolynomialLR(o, 7, 1.7), 10),
    "exponential": (C.exponential(0.8), lambda o: lr_scheduler.ExponentialLR(o, 0.8), 12),
    "step": (C.step((2, 5), 0.3), lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3), 9),
    "one_cycle": (
        C.one_cycle(11, 0.4, 10.0, 100.0),
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, 11, None, None, 0.4, "cos", False, 0.8, 0.9, 10, 100
        ),
        11,
    ),
    "one_cycle from the peak": (
        C.one_cycle(6, 0.0),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, 6, pct_start=0.0, cycle_momentum=False),
        6,
    ),
    "cosine_restarts": (
        C.cosine_restarts(3, 2, 0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, 0.1),
        25,
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", TORCH)
def test_schedules_of_torch_give_the_same_numbers(name):
    fn, make, steps = TORCH[name]
    other = C.ChainOpt([leaf()], 1.0, C.descend)
    scheduler = make(other)
    for n in range(1, steps + 1):
        assert fn(n) == pytest.approx(other.param_groups[0]["lr"], rel=1e-9, abs=1e-12), n
        if n < steps:
            scheduler.step()


def test_betas_in_other_units():
    assert C.beta_of_half_life(100) == pytest.approx(1 - 0.6931471805599453 / 100)
    assert C.beta_of_batch(0.95, 4) == pytest.approx(0.95**4)
    opt = heavyball.create([leaf()], "AdamW:betas=(beta_of_batch(0.9, 2), beta_of_half_life(1000))")
    assert opt.param_groups[0]["betas"] == (0.9**2, C.beta_of_half_life(1000))
    for wrong in (0.5, math.inf, "1"):
        with pytest.raises((ValueError, TypeError), match="beta_of_half_life: steps"):
            C.beta_of_half_life(wrong)
    with pytest.raises(ValueError, match="beta_of_batch: beta=1"):
        C.beta_of_batch(1.0, 2)


# ---- steps

LENGTH = 9
LR = C.cosine(6, floor=0.1, peak=0.5)
DECAY = C.linear(5, peak=0.2)
MOMENTUM = C.ramp(0.5, 0.9, 2, 8, 3)


def leaf(size=5, dtype=torch.float64):
    return nn.Parameter(torch.arange(1.0, size + 1, dtype=dtype) / size)


def gradient(t, param):
    return torch.cos(torch.arange(1.0, param.numel() + 1, dtype=param.dtype) + t).reshape(
        param.shape
    )


def moved(start, lr, decay=lambda n: 0.0, momentum=lambda n: 0.0, steps=LENGTH, first=0):
    """Heavy ball with decoupled decay, in plain numbers."""
    p, m = start.detach().double().clone(), torch.zeros_like(start, dtype=torch.float64)
    for n in range(1, steps + 1):
        m = momentum(n) * m + gradient(first + n, p)
        p = p - lr(n) * (m + decay(n) * p)
    return p


def scheduled(params, lr=LR, **options):
    ball = C.heavyball_momentum(momentum=MOMENTUM)
    return C.ChainOpt(params, lr, ball, **{"weight_decay": DECAY, "compile": False, **options})


def train(opt, params, steps):
    for t in steps:
        for p in params:
            p.grad = gradient(t, p)
        opt.step()


def plainly(opt, params, t):
    train(opt, params, [t])


def by_hand(opt, params, t):
    for p in params:
        p.grad = gradient(t, p)
        opt.step_parameter(p)


def by_hand_and_step(opt, params, t):
    by_hand(opt, params[:1], t)
    plainly(opt, params[1:], t)


def inside_backward(opt, params, t):
    sum((p * gradient(t, p)).sum() for p in params).backward()
    opt.step()


def in_a_closure(opt, params, t):
    def closure():
        loss = sum((p * gradient(t, p)).sum() for p in params)
        opt.zero_grad()
        loss.backward()
        return loss

    opt.step(closure)


ENGINES = {
    "eager": ({}, plainly),
    "compiled": ({"compile": True}, plainly),
    "one at a time": ({"foreach": False, "compile": True}, plainly),
    "closure": ({}, in_a_closure),
    "step_parameter": ({"compile": True}, by_hand),
    "step_parameter and step": ({}, by_hand_and_step),
    "fused backward": ({"fuse_backward": True, "compile": True}, inside_backward),
    "fused backward, closure": ({"fuse_backward": True}, in_a_closure),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_steps_with_the_numbers_of_the_step(engine):
    options, step = ENGINES[engine]
    params = [leaf(), leaf(3)]
    expected = [moved(p, LR, DECAY, MOMENTUM) for p in params]
    opt = scheduled(params, **options)
    (group,) = opt.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.2, 0.5)
    assert group["schedule_step"] == 0
    for n in range(1, LENGTH + 1):
        step(opt, params, n)
        assert group["momentum"] == MOMENTUM(n)
        assert group["weight_decay"] == DECAY(n)
        assert group["scheduled_lr"] == pytest.approx(LR(n), rel=1e-15)
        assert (group["lr"], group["schedule_step"]) == (0.5, n)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-13, atol=1e-13)


def test_a_schedule_changes_no_kernel():
    p = leaf()
    opt = scheduled([p], compile=True)
    sources = []
    for t in range(3):
        p.grad = gradient(t, p)
        sources.append(opt.kernel_sources())
        opt.step()
    assert sources[0] == sources[1] == sources[2]


def test_an_element_multiplies_the_rate_and_replaces_other_numbers():
    p = leaf()
    fn = lambda n: 1 / n  # noqa: E731
    expected = moved(p, lambda n: 0.25 / n, momentum=MOMENTUM)
    chain = C.heavyball_momentum, C.schedule("momentum", MOMENTUM), C.schedule("lr", fn)
    opt = C.ChainOpt([p], 0.25, *chain, compile=False)
    train(opt, [p], range(1, LENGTH + 1))
    torch.testing.assert_close(p.detach(), expected)
    assert opt.param_groups[0]["lr"] == 0.25


def test_each_number_of_several_may_follow_its_own():
    betas = C.ramp(0.5, 0.9, 4, 9, 2), 0.99
    plain, other = leaf(), leaf()
    reference = heavyball.AdamW([plain], 0.1, compile=False)
    opts = [
        heavyball.AdamW([other], 0.1, betas=betas, compile=False),
        C.ChainOpt(
            [leaf()],
            0.1,
            C.scale_by_adam,
            C.schedule("betas", betas),
            weight_decay=0.01,
            compile=False,
        ),
    ]
    params = [plain, other, opts[1].param_groups[0]["params"][0]]
    for t in range(1, 6):
        reference.param_groups[0]["betas"] = (betas[0](t), 0.99)
        for p in params:
            p.grad = gradient(t, p)
        for opt in (reference, *opts):
            opt.step()
        assert torch.equal(plain, other)
        assert torch.equal(plain, params[2])
        assert opts[0].param_groups[0]["betas"] == (betas[0](t), 0.99)
    first, second = opts[0].chain.programs[0].flat[0].transform.hyper["betas"].value
    assert (first, second) == betas


def test_the_weights_of_branches_may_change():
    p = leaf(3)
    expected = p.detach() - (1.0 + 1.0) - (0.5 + 1.0) - (0.0 + 1.0)
    opt = C.ChainOpt(
        [p], 1.0, C.parallel(C.sign, C.sign, weights=(C.linear(2), 1.0)), compile=False
    )
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    torch.testing.assert_close(p.detach(), expected)
    assert C.parse(repr(opt.chain))[0].merge.hyper["weights"] == (C.linear(2), 1.0)


@pytest.mark.parametrize("name", ["ASGD", "Adafactor", "MuonClip", "Prodigy", "SPlus", "SFAdamW"])
def test_presets_that_make_rates_of_their_own_see_the_scheduled_one(name):
    make = getattr(heavyball, name)
    rising = C.wsd(6, 3, 2)
    pairs = [[("w", nn.Parameter(leaf(12).detach().reshape(4, 3))), ("b", leaf(3))] for _ in "ab"]
    peak = make(pairs[1]).param_groups[0]["lr"]
    opt = make(pairs[0], rising if peak == 1 else rising.with_peak(peak), compile=False)
    plain = make(pairs[1], compile=False)
    for n in range(1, 4):
        plain.param_groups[0]["lr"] = peak * rising(n)
        for each, named in zip((opt, plain), pairs, strict=True):
            train(each, [p for _, p in named], [n])
    for (_, p), (_, q) in zip(*pairs, strict=True):
        assert torch.equal(p, q)


def test_the_rate_may_be_a_tensor():
    plain, p = leaf(), leaf()
    lr = torch.tensor(0.5, dtype=torch.float64)
    opt = C.ChainOpt([p], lr, C.schedule("lr", C.linear(4)), C.descend, compile=False)
    train(opt, [p], range(1, 4))
    torch.testing.assert_close(p.detach(), moved(plain, C.linear(4, peak=0.5), steps=3))
    assert opt.param_groups[0]["lr"] is lr


def test_warm_up_and_schedule_are_multiplied():
    p = leaf()
    expected = moved(p, lambda n: LR(n) * min(1, n / 4))
    opt = C.ChainOpt([p], LR, C.descend, warmup_steps=4, compile=False)
    train(opt, [p], range(1, LENGTH + 1))
    torch.testing.assert_close(p.detach(), expected)


def test_what_a_gate_leaves_out_is_counted():
    """The count is of calls of `step`, as a scheduler of torch counts them."""
    p = leaf()
    opt = C.ChainOpt([p], C.exponential(0.5), C.accumulate(k=2), compile=False)
    before = p.detach().clone()
    train(opt, [p], range(1, 5))
    means = [(gradient(t, p) + gradient(t + 1, p)) / 2 for t in (1, 3)]
    torch.testing.assert_close(p.detach(), before - 0.5 * means[0] - 0.125 * means[1])
    bad = C.ChainOpt([p], C.exponential(0.5), C.skip_not_finite, C.descend, compile=False)
    p.grad = torch.full_like(p, math.nan)
    bad.step()
    before = p.detach().clone()
    train(bad, [p], [2])
    torch.testing.assert_close(p.detach(), before - 0.5 * gradient(2, p))


def test_a_parameter_without_a_gradient_follows_its_group():
    first, late = leaf(), leaf()
    opt = C.ChainOpt([first, late], C.linear(4), C.descend, compile=False)
    train(opt, [first], [1, 2])
    late.grad = gradient(3, late)
    before = late.detach().clone()
    opt.step()
    torch.testing.assert_close(late.detach(), before - 0.5 * gradient(3, late))


def test_the_decay_relative_to_the_peak_knows_a_schedule_that_rises():
    rising = C.wsd(8, 4, 2, peak=0.5)
    for decay, share in (
        (C.independent, lambda n: 0.1 * rising(n) / 0.5),
        (C.adamc, lambda n: 0.1 * rising(n) ** 2 / 0.5),
    ):
        p = leaf()
        opt = C.ChainOpt([p], rising, decay(weight_decay=0.1), compile=False)
        expected = p.detach().clone()
        for n in range(1, 5):
            expected = expected * (1 - share(n)) - rising(n) * gradient(n, p)
            train(opt, [p], [n])
        torch.testing.assert_close(p.detach(), expected)
        assert opt.param_groups[0]["peak_lr"] == 0


def test_a_perturbation_is_that_of_the_step():
    """rho of SAM on a quadratic, whose gradient at p + e is p + e."""
    p = leaf()
    rho = C.linear(2, peak=0.5)
    opt = C.ChainOpt([p], 0.25, C.sam(rho=rho), C.descend, compile=False)

    def closure():
        opt.zero_grad()
        loss = p.square().sum() / 2
        loss.backward()
        return loss

    for n in range(1, 4):
        expected = p.detach() - 0.25 * p.detach() * (1 + rho(n) / p.detach().norm())
        opt.step(closure)
        torch.testing.assert_close(p.detach(), expected)


# ---- beside schedulers of torch


def test_a_scheduler_of_torch_scales_what_the_schedule_multiplies():
    """One that computes from the first rate, and one that computes from the last."""
    for make, factor in (
        (lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)), lambda n: 1 / n),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.5), lambda n: 0.5 ** (n - 1)),
    ):
        p = leaf()
        expected = moved(p, lambda n, factor=factor: LR(n) * factor(n), DECAY, MOMENTUM)
        opt = scheduled([p])
        scheduler = make(opt)
        for n in range(1, LENGTH + 1):
            train(opt, [p], [n])
            assert opt.param_groups[0]["lr"] == pytest.approx(0.5 * factor(n))
            scheduler.step()
        torch.testing.assert_close(p.detach(), expected)


def test_a_number_that_follows_a_schedule_cannot_be_set():
    p = leaf()
    opt = scheduled([p])
    train(opt, [p], [1])
    saved, before = opt.state_dict(), p.detach().clone()
    scheduler = lr_scheduler.OneCycleLR(opt, 0.1, 20)
    with pytest.raises(ValueError, match=r"group 0: momentum=0.95 was set, but it.*cycle"):
        train(opt, [p], [2])
    assert torch.equal(p, before)
    assert opt.param_groups[0]["schedule_step"] == 1
    del scheduler
    opt.load_state_dict(saved)
    opt.param_groups[0]["weight_decay"] = 0.3
    with pytest.raises(ValueError, match=r"weight_decay=0\.3 was set, but it follows linear"):
        train(opt, [p], [2])
    # what follows no schedule any more can
    opt.param_groups[0]["schedules"] = {"momentum": MOMENTUM}
    train(opt, [p], [2])
    assert opt.param_groups[0]["weight_decay"] == 0.3
    assert opt.param_groups[0]["momentum"] == MOMENTUM(2)
    for wrong, error in (
        (3, "a dict of schedules"),
        ({"momentum": 3}, "a function"),
        ({"m": LR}, "'m'"),
    ):
        opt.param_groups[0]["schedules"] = wrong
        with pytest.raises((TypeError, ValueError), match=f"group 0: .*{error}"):
            train(opt, [p], [3])


def entries(group):
    return {key: value for key, value in group.items() if key != "params"}


@pytest.mark.parametrize("how", ["step", "step_parameter", "fused backward"])
def test_a_schedule_that_is_put_into_a_group_takes_effect_with_the_next_step(how):
    step = {"step": plainly, "step_parameter": by_hand_and_step, "fused backward": inside_backward}
    a, b = leaf(), leaf()
    expected = [moved(a, lambda n: 0.5, steps=6), b.detach().clone()]
    for n in range(1, 7):
        rate = 0.5 * C.linear(4)(n - 2) if 2 < n < 6 else 0.5
        expected[1] = expected[1] - rate * gradient(n, b)
    groups = [{"params": a}, {"params": b}]
    opt = C.ChainOpt(groups, 0.5, C.descend, compile=False, fuse_backward=how == "fused backward")
    group = opt.param_groups[1]
    plain = entries(group)
    for n in range(1, 7):
        if n == 3:
            group["schedules"] = {"lr": C.linear(4)}
            assert float(opt.metrics()["group_1/lr"]) == 0.5
        if n == 6:
            assert (group["schedule_step"], group["scheduled_lr"]) == (3, 0.25)
            del group["schedules"]
            assert float(opt.metrics()["group_1/lr"]) == 0.5
        step[how](opt, [a, b], n)
    assert entries(group) == plain
    for p, e in zip((a, b), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_what_is_put_into_a_group_is_checked_before_anything_is_changed():
    p = leaf()
    opt = C.ChainOpt([p], 0.5, C.exp_avg, compile=False, metrics=True)
    train(opt, [p], [1])
    group, before = opt.param_groups[0], p.detach().clone()
    plain = entries(group)
    for wrong, message in (
        ({"nonsense": 3}, r"group 0: schedule\('nonsense', 3\): expected a function"),
        ({"nonsense": LR}, "group 0: .*nonsense.*no live number"),
        (None, "group 0: schedules=None: expected a dict"),
        ({"lr": lambda n: -n}, "group 0: .*the factor of lr=-1"),
        ({"beta": lambda n: None}, "group 0: .*beta=None"),
    ):
        group["schedules"] = wrong
        assert float(opt.metrics()["group_0/lr"]) == 0.5
        for step in (plainly, by_hand):
            with pytest.raises((TypeError, ValueError), match=message):
                step(opt, [p], 2)
        assert torch.equal(p, before)
        assert entries(group) == {**plain, "schedules": wrong}
    # a step that fails for another reason does not follow it either
    group["schedules"] = {"beta": (lambda n: 0.25), "lr": C.linear(4)}
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert entries(group) == {**plain, "schedules": group["schedules"]}
    p.grad = None
    train(opt, [p], [2])
    assert (group["beta"], group["scheduled_lr"], group["schedule_step"]) == (0.25, 0.5, 1)


# ---- groups


def test_groups_have_schedules_and_counts_of_their_own():
    a, b, c, late = leaf(), leaf(), leaf(), leaf()
    expected = [
        moved(a, LR, momentum=MOMENTUM, steps=6),
        moved(b, lambda n: 0.1 * LR(n) / 0.5, lambda n: 0.3, MOMENTUM, steps=6),
        moved(c, C.linear(3, peak=2.0), DECAY, lambda n: 0.25, steps=6),
        moved(late, C.linear(9), DECAY, MOMENTUM, steps=3, first=3),
    ]
    opt = scheduled(
        [
            {"params": a, "weight_decay": 0},
            {"params": b, "lr": 0.1, "weight_decay": 0.3},
            {"params": c, "lr": C.linear(3, peak=2.0), "momentum": 0.25},
        ]
    )
    train(opt, [a, b, c], range(1, 4))
    opt.add_param_group({"params": late, "lr": C.linear(9)})
    train(opt, [a, b, c, late], range(4, 7))
    for p, e in zip((a, b, c, late), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)
    assert [g["schedule_step"] for g in opt.param_groups] == [6, 6, 6, 3]
    assert [sorted(g["schedules"]) for g in opt.param_groups] == [
        ["lr", "momentum"],
        ["lr", "momentum"],
        ["lr", "weight_decay"],
        ["lr", "momentum", "weight_decay"],
    ]


def test_only_one_group_may_have_a_schedule():
    a, b = leaf(), leaf()
    expected = moved(a, lambda n: 0.5, steps=4), moved(b, C.linear(4), steps=4)
    groups = [{"params": a}, {"params": b, "lr": C.linear(4)}]
    opt = C.ChainOpt(groups, 0.5, C.descend, compile=False)
    assert "schedules" not in opt.param_groups[0]
    train(opt, [a, b], range(1, 5))
    torch.testing.assert_close(a.detach(), expected[0])
    torch.testing.assert_close(b.detach(), expected[1])


def test_a_group_of_another_optimizer_begins_anew():
    a, b = leaf(), leaf()
    opt = scheduled([a])
    train(opt, [a], range(1, 4))
    other = scheduled([{**opt.param_groups[0], "params": [b]}], lr=1.0, weight_decay=0.0)
    (group,) = other.param_groups
    assert (group["schedule_step"], group["momentum"], group["weight_decay"]) == (0, 0.5, 0.2)
    expected = moved(b, LR, DECAY, MOMENTUM, steps=2)
    train(other, [b], [1, 2])
    torch.testing.assert_close(b.detach(), expected)


def test_create_keeps_decay_from_what_has_none_and_scales_the_base():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
    opt = heavyball.create(
        model,
        "AdamW:lr=cosine(10, peak=0.1), weight_decay=linear(10, peak=0.5)",
        no_decay="auto",
        layer_decay=0.5,
        compile=False,
    )
    for group in opt.param_groups:
        bare = group["params"][0].ndim == 1
        assert group["weight_decay"] == (0 if bare else 0.5)
        assert ("weight_decay" in group["schedules"]) is not bare
        assert group["scheduled_lr"] == group["lr"]
    assert {g["lr"] for g in opt.param_groups} == {0.05, 0.1 * 0.5**2}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    assert {g["weight_decay"] for g in opt.param_groups} == {0, 0.45}


def test_matrices_and_the_rest_follow_one_schedule():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = heavyball.Muon(model, C.linear(4, peak=0.5), adamw_lr=0.25, compile=False, weight_decay=0)
    assert opt.param_groups[0]["adamw_lr_scale"] == 0.5
    twin = copy.deepcopy(model)
    other = heavyball.Muon(twin, 0.5, adamw_lr=0.25, compile=False, weight_decay=0)
    for n in range(1, 4):
        other.param_groups[0]["lr"] = 0.5 * C.linear(4)(n)
        for m, o in ((model, opt), (twin, other)):
            for p in m.parameters():
                p.grad = gradient(n, p)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- saving


def through_a_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def loaded(opt, params):
    other = scheduled(params)
    other.load_state_dict(through_a_file(opt.state_dict()))
    return other


def pickled(opt, params):
    return pickle.loads(pickle.dumps(opt))


def copied(opt, params):
    return copy.deepcopy(opt)


@pytest.mark.parametrize("again", [loaded, pickled, copied])
def test_training_goes_on_in_the_middle_of_a_schedule(again):
    p = leaf()
    opt = scheduled([p])
    train(opt, [p], range(1, 4))
    other = again(opt, [nn.Parameter(p.detach().clone())])
    (q,) = other.param_groups[0]["params"]
    train(opt, [p], range(4, LENGTH))
    train(other, [q], range(4, LENGTH))
    assert torch.equal(p, q)
    groups = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (opt, other)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("again", [loaded, pickled])
def test_a_step_that_has_begun_goes_on(again):
    """Parameters were stepped inside `backward()`, and the step has not ended."""
    p = leaf()
    opt = scheduled([p])
    by_hand(opt, [p], 1)
    opt.step()
    by_hand(opt, [p], 2)
    other = again(opt, [nn.Parameter(p.detach().clone())])
    opt.step()
    other.step()
    assert opt.param_groups[0]["schedule_step"] == other.param_groups[0]["schedule_step"] == 2


def test_what_is_saved_says_which_schedules_it_had():
    p = leaf()
    opt = scheduled([p])
    train(opt, [p], [1, 2])
    saved = through_a_file(opt.state_dict())
    (group,) = saved["param_groups"]
    assert group["schedules"] == {
        "momentum": "ramp(lo=0.5, hi=0.9, up=2, T=8, down=3)",
        "lr": "cosine(T=6, floor=0.1)",
        "weight_decay": "linear(T=5, peak=0.2)",
    }
    assert group["schedule_step"] == 2
    longer = scheduled([leaf()], lr=C.cosine(12, floor=0.1, peak=0.5))
    before = longer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=r"lr follows cosine\(T=6.* and follows cosine\(T=12"):
        longer.load_state_dict(saved)
    assert longer.state_dict()["param_groups"] == before
    left = longer.load_state_dict(saved, strict=False)
    assert left.unexpected_keys == ["param_groups.0.schedules"]
    (group,) = longer.param_groups
    assert group["schedule_step"] == 2
    assert group["scheduled_lr"] == pytest.approx(C.cosine(12, floor=0.1, peak=0.5)(2))
    assert group["momentum"] == MOMENTUM(2)


def test_the_rate_that_is_loaded_wins_unless_its_schedule_is_kept():
    p = leaf()
    opt = heavyball.AdamW([p], C.linear(10, peak=0.5), compile=False)
    train(opt, [p], [1, 2])
    opt.param_groups[0]["initial_lr"] = 0.5
    saved = through_a_file(opt.state_dict())
    other = heavyball.AdamW([leaf()], C.linear(10, peak=1e-3), compile=False)
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert (group["lr"], group["initial_lr"], group["scheduled_lr"]) == (0.5, 0.5, 0.45)
    other = heavyball.AdamW([leaf()], C.linear(10, peak=1e-3), compile=False)
    left = other.load_state_dict(saved, strict=False)
    (group,) = other.param_groups
    assert (group["lr"], group["scheduled_lr"]) == (1e-3, 1e-3 * 0.9)
    assert "initial_lr" not in group
    assert sorted(left.unexpected_keys) == ["param_groups.0.initial_lr", "param_groups.0.lr"]
    # without a schedule here the rate is one number as any other
    other = heavyball.AdamW([leaf()], 1e-3, compile=False)
    other.load_state_dict(saved, strict=False)
    assert other.param_groups[0]["lr"] == 0.5


def test_with_and_without_schedules():
    p = leaf()
    plain = C.ChainOpt(
        [p], 0.25, C.heavyball_momentum(momentum=0.5), weight_decay=0.2, compile=False
    )
    train(plain, [p], [1, 2])
    opt = scheduled([p])
    with pytest.raises(ValueError, match="momentum follows no schedule in the st"):
        opt.load_state_dict(plain.state_dict())
    opt.load_state_dict(plain.state_dict(), strict=False)
    (group,) = opt.param_groups
    assert (group["schedule_step"], group["lr"], group["momentum"]) == (0, 0.5, 0.5)
    train(opt, [p], [1])
    with pytest.raises(ValueError, match=r"momentum follows ramp.* and follows no schedule here"):
        plain.load_state_dict(opt.state_dict())
    left = plain.load_state_dict(opt.state_dict(), strict=False)
    assert "param_groups.0.schedules" in left.unexpected_keys
    train(plain, [p], [1])
    assert plain.param_groups[0]["momentum"] == MOMENTUM(1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("schedules", 3), ("schedule_step", -1), ("schedule_step", 1.5), ("_scheduled", {"a": 1})],
)
def test_a_state_dict_that_cannot_be_is_refused(key, value):
    opt = scheduled([leaf()])
    saved = opt.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"parameter group 0: {key}"):
        opt.load_state_dict(saved)


def test_a_step_that_fails_counts_nothing():
    p = leaf()
    opt = scheduled([p])
    train(opt, [p], [1])
    before = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    with pytest.raises(ValueError, match="sparse"):
        opt.step_parameter(p)
    p.grad = None
    for wrong in ("much", math.nan):
        opt.param_groups[0]["lr"] = wrong
        with pytest.raises((TypeError, ValueError), match=f"parameter group 0: lr={wrong!r}"):
            opt.step()
    opt.param_groups[0]["lr"] = 0.5
    assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == before
    train(opt, [p], [2])
    assert opt.param_groups[0]["schedule_step"] == 2


# ---- what looks at the numbers


def test_averages_follow_a_beta_that_changes():
    p = leaf()
    opt = heavyball.SFAdamW([p], C.linear(20, peak=0.1), betas=(C.ramp(0.5, 0.9, 4, 20, 4), 0.99))
    train(opt, [p], range(1, 4))
    weights = p.detach().clone()
    with opt.averaged():
        assert not torch.equal(p, weights)
        with pytest.raises(RuntimeError, match="evaluation mode"):
            opt.step()
    assert torch.equal(p, weights)
    assert opt.param_groups[0]["schedule_step"] == 3


def test_metrics_and_previews_have_the_rate_of_the_step():
    p = leaf()
    opt = scheduled([p], metrics=True)
    train(opt, [p], [1, 2])
    assert float(opt.metrics()["group_0/lr"]) == pytest.approx(LR(2))
    p.grad = gradient(3, p)
    (change,) = opt.updates().values()
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p.detach() - before, change)
    shown = repr(opt)
    assert "cosine(T=6, floor=0.1)" in shown
    assert "schedule_step=3" in shown


def test_an_estimated_rate_is_multiplied_without_a_warning(recwarn):
    p = leaf()
    opt = heavyball.Prodigy([p], C.wsd(20, 10, 5), compile=False)
    assert opt.effective_lr == pytest.approx([opt.d[0] * 0.1])
    train(opt, [p], [1])
    assert opt.effective_lr == pytest.approx([opt.d[0] * 0.2])
    assert not [w for w in recwarn if "lr" in str(w.message)]


def test_planned_memory_is_the_same():
    plan = heavyball.memory_plan([torch.empty(3, 2)], "AdamW:lr=cosine(10, peak=0.1)")
    assert plan.state_bytes == heavyball.memory_plan([torch.empty(3, 2)], "AdamW").state_bytes


# ---- text

TEXTS = [fn for fn, _, _ in AT_THE_CORNERS] + [fn for fn, _ in GOLDEN.values()]


@pytest.mark.parametrize("fn", TEXTS, ids=str)
def test_a_schedule_has_a_text_that_reads_back(fn):
    (element, _) = C.parse(f"schedule('lr', {fn!r}) | sign")
    assert element.fn == fn
    assert repr(element) == f"schedule('lr', {fn!r})"
    assert pickle.loads(pickle.dumps(fn)) == copy.deepcopy(fn) == fn
    assert hash(element.fn) == hash(fn)


def test_numbers_of_numpy_become_those_of_python():
    for fn, plain in (
        (C.linear(np.int64(10), peak=np.float64(0.1)), C.linear(10, peak=0.1)),
        (C.cosine(np.float64(10), np.float32(0.1)), C.cosine(10.0, float(np.float32(0.1)))),
        (C.step((np.int32(3), 5), np.float64(0.5)), C.step((3, 5), 0.5)),
        (C.step([np.int32(3), 5]), C.step((3, 5))),
        (C.linear(10).with_peak(np.float32(0.5)), C.linear(10, peak=0.5)),
        (C.ramp(np.float64(0.5), 1, 2, np.uint8(8), 2), C.ramp(0.5, 1, 2, 8, 2)),
    ):
        assert repr(fn) == repr(plain)
        assert C.parse(f"schedule('lr', {fn!r}) | sign")[0].fn == plain
        for n in range(1, 12):
            assert type(fn(n)) is float
            assert fn(n) == plain(n)
    element = C.schedule("betas", (C.ramp(0.5, 0.9, 2, 8, 2), np.float64(0.99)))
    assert C.parse(f"{element!r} | scale_by_adam")[0] == element
    opt = C.ChainOpt([leaf()], 0.1, C.scale_by_adam(betas=(C.linear(9, peak=0.9), np.float64(0.5))))
    (group,) = opt.state_dict()["param_groups"]
    assert group["schedules"] == {"betas": "(linear(T=9, peak=0.9), 0.5)"}


def test_a_schedule_that_nobody_knows_has_a_nearest_one():
    for text in (
        "AdamW:lr=cosin(10)",
        "AdamW:betas=(cosin(10), 0.9)",
        "exp_avg(beta=cosin(10)) | sign",
        "schedule('lr', cosin(10)) | sign",
    ):
        with pytest.raises(ValueError, match=r"no (schedule|transform) 'cosin'; nearest: cosine"):
            heavyball.create([leaf()], text)


def test_a_peak_that_nobody_gave_is_warned_of_where_it_is_hardly_meant(recwarn):
    p = leaf()
    for make in (
        lambda: heavyball.AdamW([p], lr=C.cosine(10)),
        lambda: heavyball.AdamW([{"params": p, "lr": C.cosine(10)}]),
        lambda: heavyball.create([p], "Muon:lr=cosine(10)"),
        lambda: heavyball.AdamW([p], lr=pickle.loads(pickle.dumps(C.cosine(10)))),
    ):
        make()
        (warned,) = recwarn
        assert "the peak of lr=cosine(T=10) is 1" in str(warned.message)
        assert warned.filename == __file__
        recwarn.clear()
    heavyball.AdamW([p], lr=C.cosine(10, peak=1.0))
    heavyball.AdamW([p], lr=C.cosine(10).with_peak(0.5))
    heavyball.AdamW([p], lr=C.ramp(0, 1e-3, 5, 20, 5))
    heavyball.Prodigy([p], lr=C.cosine(10))
    C.ChainOpt([p], C.cosine(10), C.sign)
    assert not recwarn.list


def test_a_chain_and_a_class_keep_schedules_as_text():
    text = "schedule('lr', linear(4)) | heavyball_momentum(momentum=ramp(0.5, 0.9, 2, 8, 3)) | decoupled"
    cls = C.optimizer_class(text)
    p, q = leaf(), leaf()
    opt, other = (
        cls([p], 0.1, compile=False),
        pickle.loads(pickle.dumps(cls))([q], 0.1, compile=False),
    )
    again = heavyball.create([leaf()], repr(opt.chain), lr=0.1, compile=False)
    train(opt, [p], range(1, 4))
    train(other, [q], range(1, 4))
    train(again, again.param_groups[0]["params"], range(1, 4))
    assert torch.equal(p, q)
    assert torch.equal(p, again.param_groups[0]["params"][0])
    torch.testing.assert_close(
        p.detach(), moved(leaf(), C.linear(4, peak=0.1), momentum=MOMENTUM, steps=3)
    )


def test_a_race_takes_a_schedule_at_each_peak():
    contender = from_optimizer("AdamW:lr=cosine(100),weight_decay=linear(10)", grid=(0.1, 0.01))
    assert contender.lrs == (0.1, 0.01)
    opt = contender.build(nn.Linear(2, 2), 0.01)
    assert opt.param_groups[0]["lr"] == 0.01
    assert contender.label == "AdamW, lr=cosine(T=100), weight_decay=linear(T=10)"
    assert from_optimizer("AdamW:lr=cosine(100, peak=0.5)").lrs == (0.5,)


# ---- refusals

BAD_SHAPES = [
    (lambda: C.linear(0), "linear: T=0"),
    (lambda: C.cosine(-5), "cosine: T=-5"),
    (lambda: C.cosine("10"), "cosine: T='10'"),
    (lambda: C.cosine(math.inf), "cosine: T=inf"),
    (lambda: C.cosine(10, floor=1.5), "cosine: floor=1.5"),
    (lambda: C.rex(10, -0.1), "rex: floor=-0.1"),
    (lambda: C.rex(10, beta=1.0), "rex: beta=1.0"),
    (lambda: C.polynomial(10, 0), "polynomial: q=0"),
    (lambda: C.wsd(10, -1, 2), "wsd: warmup=-1"),
    (lambda: C.wsd(10, 1, 0), "wsd: decay=0"),
    (lambda: C.wsd(10, 1, 12), "wsd: decay=12 is more than all of T=10"),
    (lambda: C.wsd(10, 11, 2), "wsd: warmup=11 is more than all of T=10"),
    (lambda: C.wsd(10, 1, 2, "square"), "wsd: shape='square'.*'sqrt', 'linear', 'cosine'"),
    (lambda: C.inverse_sqrt(0), "inverse_sqrt: warmup=0"),
    (lambda: C.power(10, 10), "power: flat=10"),
    (lambda: C.exponential(0), "exponential: k=0"),
    (lambda: C.step(()), r"step: at=\(\)"),
    (lambda: C.step((3, -1)), "step: at=-1"),
    (lambda: C.one_cycle(0), "one_cycle: total_steps=0"),
    (lambda: C.one_cycle(10, 1.5), "one_cycle: pct_start=1.5"),
    (lambda: C.one_cycle(10, div_factor=0), "one_cycle: div_factor=0"),
    (lambda: C.cosine_restarts(0), "cosine_restarts: T_0=0"),
    (lambda: C.cosine_restarts(4, 0.5), "cosine_restarts: T_mult=0.5"),
    (lambda: C.ramp(0.8, 0.9, 6, 10, 5), "ramp: up=6 and down=5 are more than all of T=10"),
    (lambda: C.ramp(0.8, math.nan, 6, 10, 2), "ramp: hi=nan"),
    (lambda: C.constant(peak=math.inf), "constant: peak=inf"),
    (lambda: C.schedule(3, LR), "schedule: name=3"),
    (lambda: C.schedule("lr", 0.5), r"schedule\('lr', 0.5\)"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SHAPES, ids=[m for _, m in BAD_SHAPES])
def test_a_schedule_that_cannot_be_is_refused_by_name(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def built(*elements, lr=0.1, **options):
    return lambda: C.ChainOpt([leaf()], lr, *elements, compile=False, **options)


BAD_USES = {
    "an unknown number": (built(C.sign, C.schedule("momentun", LR)), "momentun.*no live number"),
    "a fixed option": (built(C.accumulate, C.schedule("k", LR)), "'k' of accumulate is fixed"),
    "in place of a fixed option": (
        lambda: C.accumulate(k=C.ramp(1, 4, 2, 9, 2)),
        "accumulate: k=ramp",
    ),
    "warmup_steps": (
        built(C.sign, C.schedule("warmup_steps", LR)),
        "warmup_steps is a number of st",
    ),
    "as warmup_steps": (built(C.sign, warmup_steps=LR), "warmup_steps=cosine"),
    "seed": (built(C.sign, C.schedule("seed", LR)), "'seed'.*no live number"),
    "twice": (built(C.schedule("lr", LR), C.schedule("lr", LR), C.sign), "lr follows cosine"),
    "rate twice": (built(C.schedule("lr", LR), C.sign, lr=LR), "the chain has a schedule of it"),
    "decay twice": (
        built(C.decoupled(weight_decay=LR), C.sign, weight_decay=DECAY),
        "weight_decay=linear.*but the chain says cosine",
    ),
    "no decay": (built(C.hyperball, weight_decay=DECAY), "weight_decay=linear"),
    "inside a branch": (
        built(C.parallel(C.sign, C.sign))
        if False
        else lambda: C.parallel(C.schedule("lr", LR), C.sign),
        "belongs at the head of the chain",
    ),
    "alone": (built(C.schedule("lr", LR)), "an empty chain"),
    "beyond the interval, late": (
        lambda: C.exp_avg(beta=C.ramp(0.9, 1.1, 5, 20, 5)),
        "exp_avg: beta=1.1.*in step 6",
    ),
    "negative rate": (built(C.sign, lr=C.linear(10, peak=-1.0)), "lr=-1.0"),
    "negative factor": (built(C.sign, C.schedule("lr", lambda n: -n)), "the factor of lr=-1"),
    "what a preset computes with": (
        lambda: heavyball.Adafactor([leaf()], beta2_decay=C.constant(peak=-0.8)),
        "beta2_decay=constant.*expected a number",
    ),
    "not a number": (built(C.sign, C.schedule("lr", str)), "the factor of lr='1'"),
    "one of two": (built(C.scale_by_adam, C.schedule("betas", LR)), "betas"),
    "what is found": (
        lambda: heavyball.Prodigy([leaf()], d0=C.constant(peak=1e-6)),
        "estimates d during training",
    ),
    "capturable": (built(C.sign, lr=LR, capturable=True), "capturable=True: the schedules of lr"),
    "a group's unknown number": (
        lambda: C.ChainOpt([{"params": leaf(), "momentun": LR}], 0.1, C.sign),
        "momentun",
    ),
    "a group's dict": (
        lambda: C.ChainOpt([{"params": leaf(), "schedules": 3}], 0.1, C.sign),
        "schedules=3",
    ),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_a_schedule_in_a_wrong_place_is_refused_by_name(name):
    make, message = BAD_USES[name]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_function_of_ones_own_is_checked_when_it_is_asked():
    p = leaf()
    chain = C.exp_avg, C.schedule("beta", lambda n: 0.5 if n < 3 else 1.5)
    opt = C.ChainOpt([p], 0.1, *chain, compile=False)
    train(opt, [p], [1, 2])
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"parameter group 0: beta=1.5: expected in \[0, 1\)"):
        train(opt, [p], [3])
    assert torch.equal(p, before)
    assert opt.param_groups[0]["beta"] == 0.5


WRONG_VALUES = {
    "a negative rate": (
        "lr",
        lambda n: (4 - n) / 10,
        4,
        "the factor of lr=-0.1: .*step 5 of .*lambda",
    ),
    "no rate": ("lr", lambda n: 1 if n < 3 else None, 2, "the factor of lr=None: .*step 3 of"),
    "a rate that is NaN": ("lr", lambda n: 1 if n < 3 else math.nan, 2, "lr=nan: .*step 3 of"),
    "an endless rate": ("lr", lambda n: math.inf if n > 1 else 1, 1, "lr=inf: .*step 2 of"),
    "nothing": ("beta", lambda n: 0.5 if n < 3 else None, 2, "beta=None: .*step 3 of"),
    "NaN": ("beta", lambda n: 0.5 if n < 3 else math.nan, 2, "beta=nan: .*step 3 of"),
}


@pytest.mark.parametrize("step", [plainly, by_hand])
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_value_that_a_number_cannot_have_is_refused_in_its_step(name, step):
    number, fn, last, message = WRONG_VALUES[name]
    p = leaf()
    opt = C.ChainOpt([p], 1.0, C.schedule(number, fn), C.exp_avg, compile=False)
    for n in range(1, last + 1):
        step(opt, [p], n)
    before, group = p.detach().clone(), entries(opt.param_groups[0])
    with pytest.raises((TypeError, ValueError), match=f"parameter group 0: .*{message}"):
        step(opt, [p], last + 1)
    assert torch.equal(p, before)
    after = entries(opt.param_groups[0])
    assert {k: v for k, v in after.items() if k != "_scheduled"} == {
        k: v for k, v in group.items() if k != "_scheduled"
    }


def test_a_factor_that_is_below_zero_by_rounding_is_zero():
    p = leaf()
    before = p.detach().clone()
    opt = C.ChainOpt([p], 1.0, C.schedule("lr", lambda n: -1e-17), C.sign, compile=False)
    train(opt, [p], [1])
    assert torch.equal(p, before)
    assert opt.param_groups[0]["scheduled_lr"] == 0
