"""Common numbers of groups and advice, however the steps are driven."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import clones, copies, parameters
from torch import nn
from torch.utils.checkpoint import checkpoint

import heavyball
from heavyball import chainable as C
from heavyball.diagnostics import advice

Plus = heavyball.ProdigyPlusScheduleFree
RATES = {
    "authors": heavyball.Prodigy,
    "plus": Plus,
    "progress": lambda p, **o: Plus(p, use_speed="progress", **o),
}
WAYS = ("step", "step_parameter", "hooks", "fused", "fused and step")
rates = pytest.mark.parametrize("rate", RATES)
driven_rates = pytest.mark.parametrize("rate", ["plus", "progress"])
ways = pytest.mark.parametrize("way", WAYS)
MODES = ({}, {"compile": False, "foreach": False})
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def make(rate, params, way="step", **options):
    """An optimizer that is driven in one of the `WAYS`."""
    fused = {"fused_back_pass": True} if way.startswith("fused") else {}
    opt = RATES[rate](params, **fused, **options)
    for group in opt.param_groups if way == "hooks" else ():
        for p in group["params"]:
            p.register_post_accumulate_grad_hook(opt.step_parameter)
    return opt


def walk(opt, way, seeds, idle=()):
    """Steps towards zero, whose gradients all have some noise; `idle` parameters have none."""
    params = [p for g in opt.param_groups for p in g["params"] if not any(p is q for q in idle)]
    for seed in seeds:
        opt.zero_grad()
        made = torch.Generator().manual_seed(seed)
        noise = [0.1 * torch.randn(p.shape, generator=made).to(p.device) for p in params]
        pairs = zip(params, noise, strict=True)
        sum((p.square() / 2 + n * p).sum() for p, n in pairs).backward()
        if "step" in way.split():
            opt.step()
        elif way == "step_parameter":
            for p in reversed(params):
                opt.step_parameter(p)


def weights(opt):
    return clones(p for g in opt.param_groups for p in g["params"])


def common(opt):
    """The numbers of the groups, read now."""
    names = opt.chain.rate.transform.numbers
    return [{n: float(g[n]) for n in names} for g in opt.param_groups]


# ---- steps that have not ended


# each way in kernels with one rate, and as written with the other
DRIVEN = [
    (("plus", "progress")[(i + eager) % 2], way, MODES[eager])
    for i, way in enumerate(WAYS)
    for eager in (0, 1)
]
driven = pytest.mark.parametrize(("rate", "way", "mode"), DRIVEN, ids=str)


@driven
def test_a_step_that_has_not_ended_is_saved_and_copied(rate, way, mode):
    def fresh(values, idle):
        return make(rate, [{"params": values[:2]}, {"params": [values[2], idle]}], way, **mode)

    params, idle = parameters((8, 6), (5,), (7, 3)), nn.Parameter(torch.ones(3))
    opt = fresh(params, idle)
    walk(opt, way, range(4), [idle])
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    twins, other_idle = copies(params), nn.Parameter(torch.ones(3))
    loaded = fresh(twins, other_idle)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    others = [loaded]
    if way != "hooks":  # a copy has parameters without a trainer's hooks
        others += [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for other in others:
        assert other.d == opt.d
    walk(opt, way, range(4, 6), [idle])
    for other in others:
        walk(other, way, range(4, 6), [other.param_groups[1]["params"][1]])
        assert other.d == opt.d
        for a, b in zip(weights(other), weights(opt), strict=True):
            assert torch.equal(a, b)


@driven_rates
def test_d_counts_the_step_that_has_not_ended(rate):
    """So it is that of the ordinary step, and what the next step uses, also while one waits."""
    params, seen = parameters((8, 6), (5,)), {}
    for way in WAYS:
        idle = nn.Parameter(torch.ones(3))
        opt = make(rate, [*copies(params), idle], way, compile=False, d0=1e-3)
        seen[way] = []
        for seed in range(5):
            walk(opt, way, [seed], [idle])
            seen[way].append((opt.d, opt.effective_lr))
        assert seen[way][-1] != seen[way][0]
    assert all(found == seen["step"] for found in seen.values())


def test_a_gradient_assigned_by_hand_is_of_the_step_that_has_begun():
    params = parameters((8, 6), (5,))
    opt = make("plus", params, "fused", compile=False)
    for _ in range(4):
        params[0].square().sum().backward()
        params[1].grad = params[1].detach().clone()
        opt.step()
    assert opt.param_groups[0]["d_steps"] == 4


@pytest.mark.parametrize(
    "waiting",
    [
        [],
        {"0": (torch.ones(()),)},
        {5: (torch.ones(()),) * 5},
        {0: ()},
        {0: (torch.tensor(math.nan),) * 5},
        {0: (1.0,) * 5},
    ],
    ids=repr,
)
def test_what_waits_is_checked_before_it_is_loaded(waiting):
    params = parameters((8, 6), (5,))
    opt = make("plus", params, "fused", compile=False)
    params[0].square().sum().backward()
    saved = copy.deepcopy(opt.state_dict())
    [name] = [k for k in saved["param_groups"][0] if k.startswith("_")]
    saved["param_groups"][0][name] = waiting
    with pytest.raises(ValueError, match=name):
        opt.load_state_dict(saved)
    left = opt.load_state_dict(saved, strict=False)
    assert left.unexpected_keys == [f"param_groups.0.{name}"]


@driven
def test_given_up_state_is_freed_however_steps_are_driven(rate, way, mode):
    params = parameters((8, 6), (5,))
    opt = make(rate, params, way, prodigy_steps=3, **mode)
    walk(opt, way, range(1))
    held = opt.state_bytes()
    walk(opt, way, range(1, 3))
    assert opt.state_bytes() < held
    assert not any(k.endswith((".p0", "_d.s")) for s in opt.state.values() for k in s)
    walk(opt, way, range(3, 6))


# ---- two gradients in one backward()

REENTRANT = {
    "outside, inside": lambda f, x: f(checkpoint(f, x, use_reentrant=True).tanh()),
    "inside, outside": lambda f, x: checkpoint(f, f(x).tanh(), use_reentrant=True),
    "inside twice": lambda f, x: checkpoint(
        f, checkpoint(f, x, use_reentrant=True).tanh(), use_reentrant=True
    ),
    "branches": lambda f, x: (
        checkpoint(f, x, use_reentrant=True) + checkpoint(f, x.sin(), use_reentrant=True)
    ),
    "nested": lambda f, x: checkpoint(
        lambda y: f(checkpoint(f, y, use_reentrant=True).tanh()), x, use_reentrant=True
    ),
}


def module_of(x_requires_grad=True):
    torch.manual_seed(0)
    return nn.Linear(6, 6), torch.randn(8, 6, requires_grad=x_requires_grad)


@pytest.mark.parametrize("way", ["hooks", "fused", "fused and step"])
@pytest.mark.parametrize("case", REENTRANT)
def test_a_part_of_a_gradient_is_not_taken_for_a_step(case, way):
    model, x = module_of()
    opt = make("plus", model.parameters(), way, compile=False)
    for _ in range(2):  # once before and once after something was stepped
        with pytest.raises(RuntimeError, match=r"second gradient|modified by an inplace"):
            REENTRANT[case](model, x).square().mean().backward()
        opt.zero_grad()
        if way == "fused and step":
            opt.step()


@pytest.mark.parametrize("way", ["hooks", "fused"])
@pytest.mark.parametrize("forward", ["plain", "checkpoint", "outer", "not reentrant"])
def test_two_backward_without_step_are_two_steps(forward, way):
    model, x = module_of()
    opt = make("plus", model.parameters(), way, compile=False)
    run = {
        "plain": lambda: model(model(x)),
        "checkpoint": lambda: checkpoint(model, x, use_reentrant=True),
        "outer": lambda: checkpoint(lambda y: model(model(y)), x, use_reentrant=True),
        "not reentrant": lambda: model(checkpoint(model, x, use_reentrant=False)),
    }[forward]
    for count in range(1, 5):
        run().square().mean().backward()
        assert int(opt.state[model.weight]["step"]) == count


# ---- numbers that are logged and set


# that of the authors needs its sums before it steps
RATED = [("authors", "step"), *((rate, way) for rate in ("plus", "progress") for way in WAYS)]


@pytest.mark.parametrize(("rate", "way"), RATED)
def test_a_history_holds_what_the_numbers_were(rate, way):
    opt = make(rate, parameters((8, 6), (5,)), way, compile=False, d0=1e-3)
    kept, right = [], []
    for seed in range(5):
        walk(opt, way, [seed])
        kept.append([{n: g[n] for n in common(opt)[0]} for g in opt.param_groups])
        right.append(common(opt))
    assert [[{n: float(v) for n, v in g.items()} for g in gs] for gs in kept] == right
    assert right[0] != right[-1]


GIVEN = {
    "float": lambda v: v,
    "numpy": np.float32,
    "tensor": torch.tensor,
    "float64": lambda v: torch.tensor(v, dtype=torch.float64),
    "one element": lambda v: torch.tensor([v]),
    "parameter": lambda v: nn.Parameter(torch.tensor(v)),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    ("rate", "steps", "mode"),
    [("authors", 0, MODES[0]), ("plus", 3, MODES[0]), ("progress", 0, MODES[1])],
    ids=str,
)
def test_a_d_that_was_set_counts_from_the_next_step_on(rate, steps, given, mode):
    params = parameters((8, 6), (5,))
    opt = make(rate, params, **mode)
    walk(opt, "step", range(steps))
    opt.param_groups[0]["d"] = GIVEN[given](0.25)
    assert opt.effective_lr == opt.d == [0.25]
    before = weights(opt)
    walk(opt, "step", [steps])
    assert opt.d[0] >= 0.25
    assert opt.param_groups[0]["d"].dtype == torch.float64
    moved = max(float((p - q).abs().max()) for p, q in zip(weights(opt), before, strict=True))
    assert moved > 1e-3


@rates
def test_a_d_that_was_lowered_stays_low(rate):
    opt = make(rate, parameters((8, 6), (5,)), compile=False, d0=1e-2)
    walk(opt, "step", range(4))
    for group in opt.param_groups:
        group["d"], group["d_numerator"] = 1e-4, 0.0
    walk(opt, "step", [4])
    assert opt.d[0] < 1e-2


@rates
def test_one_estimate_is_set_for_all_groups_and_others_for_one(rate):
    params = parameters((8, 6), (5,), (4,))
    for split in (False, True):
        opt = make(
            rate, [{"params": [p]} for p in copies(params)], compile=False, split_groups=split
        )
        walk(opt, "step", range(2))
        before = opt.d
        opt.param_groups[1]["d"] = 0.25
        assert opt.d == ([before[0], 0.25, before[2]] if split else [0.25] * 3)
        opt.param_groups[2]["d"] = 0.5
        if split:
            walk(opt, "step", [2])
            assert opt.d[1] >= 0.25
            assert opt.d[2] >= 0.5
        opt.param_groups[0]["d"] = 0.125
        if not split:
            held = weights(opt)
            with pytest.raises(ValueError, match=r"'d' was set to 0\.125 and 0\.5"):
                walk(opt, "step", [2])
            assert all(torch.equal(p, q) for p, q in zip(weights(opt), held, strict=True))


WRONG = [math.nan, math.inf, -1.0, 0.0, "a", None, True, 1j, [1.0], 10**400]
WRONG += [torch.ones(2), torch.tensor(math.nan), torch.tensor(True), torch.tensor(1j)]
WRONG += [torch.ones((), device="meta"), torch.ones(0)]


@pytest.mark.parametrize(
    ("rate", "way", "steps"),
    [(*driven, 2) for driven in RATED] + [("authors", "step", 0), ("plus", "fused", 0)],
)
def test_what_cannot_be_is_refused_before_anything_changes(rate, steps, way):
    params = parameters((8, 6), (5,))
    opt = make(rate, [{"params": params[:1]}, {"params": params[1:]}], way, compile=False)
    walk(opt, way, range(steps))
    group = opt.param_groups[1]
    wrong = [(name, value) for name in ("d", "d_numerator") for value in WRONG]
    wrong = [c for c in wrong if c[0] == "d" or (c[1] is not WRONG[2] and c[1] is not WRONG[3])]
    wrong += [("d_steps", value) for value in (-1, 1.5, True, None, "3")]
    made = {**opt.chain.rate.transform.past, **opt.chain.rate.transform.made_from}
    wrong += [(name, 0.5) for name in made]
    for name, value in wrong:
        kept, before, numbers = group[name], weights(opt), common(opt)
        group[name] = value
        with pytest.raises((TypeError, ValueError), match=f"parameter group 1: '{name}'"):
            walk(opt, way, [steps])
        group[name] = kept
        opt.zero_grad()
        assert common(opt) == numbers
        assert all(torch.equal(p, q) for p, q in zip(weights(opt), before, strict=True))
    kept = group.pop("d")
    with pytest.raises(ValueError, match="group 1 is missing its entry 'd'"):
        walk(opt, way, [steps])
    group["d"] = kept
    opt.zero_grad()
    walk(opt, way, [steps])


def test_a_number_that_was_written_in_place_is_looked_at():
    opt = make("authors", parameters((8, 6)), compile=False)
    walk(opt, "step", range(2))
    opt.param_groups[0]["d"].fill_(math.nan)
    with pytest.raises(ValueError, match="'d' is tensor"):
        walk(opt, "step", [2])
    opt.param_groups[0]["d"].fill_(0.25)
    walk(opt, "step", [2])
    assert opt.d[0] >= 0.25


@rates
def test_what_a_partial_load_does_not_list_is_kept(rate):
    opt = make(rate, parameters((8, 8)), compile=False)
    names = opt.chain.rate.transform.numbers
    theirs = {"d": 0.5, "d_max": 0.5, "k": 60}
    state = {"state": {}, "param_groups": [{"lr": 1.0, **theirs, "params": [0]}]}
    left = opt.load_state_dict(state, strict=False)
    listed = {key.removeprefix("param_groups.0.") for key in left.unexpected_keys}
    assert "k" in listed
    assert ("d_max" in listed) == ("d_max" not in names)
    assert opt.effective_lr == opt.d == [0.5]
    missing = {key.removeprefix("param_groups.0.") for key in left.missing_keys}
    assert "d_steps" in missing
    walk(opt, "step", [0])
    assert opt.d[0] >= 0.5


# ---- empty groups


@rates
@modes
def test_an_empty_group_is_no_special_case(rate, mode):
    def run(before, after, late):
        params = parameters((8, 6), (5,))
        groups = [{"params": []}] * before + [{"params": params}] + [{"params": []}] * after
        opt = make(rate, groups, d0=1e-3, **mode)
        walk(opt, "step", range(2))
        for _ in range(late):
            opt.add_param_group({"params": []})
        walk(opt, "step", range(2, 5))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        walk(opt, "step", range(5, 6))
        assert len(opt.d) == len(opt.effective_lr) == before + 1 + after + late
        return opt.d[before], opt.effective_lr[before], params

    d, lr, want = run(0, 0, 0)
    for where in ((1, 0, 0), (0, 1, 1)):
        other_d, other_lr, params = run(*where)
        assert other_d == pytest.approx(d, rel=1e-12)
        assert other_lr == pytest.approx(lr, rel=1e-12)
        for p, q in zip(params, want, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# ---- advice


@pytest.fixture
def soon(monkeypatch):
    """d and the norms are looked at after fewer steps."""
    monkeypatch.setattr(advice, "LOOK", 24)


def said(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    found = [str(w.message) for w in seen]
    return [message for message in found if "compiled kernel" not in message]


@ways
def test_the_same_is_said_however_steps_are_driven(way, soon):
    def run(lr, steps, d0=1e-6, **options):
        opt = make("plus", parameters((8, 6), (5,)), way, lr=lr, compile=False, d0=d0, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
        for seed in range(steps):
            walk(opt, way, [seed])
            schedule.step()

    assert not said(lambda: run(1.0, 3))
    [about_lr] = said(lambda: run(1e-3, 3))
    assert "lr=0.001" in about_lr
    [about_d] = said(lambda: run(1.0, advice.LOOK + 1, d_coef=1e-9))
    assert "still d0" in about_d


def trained(rate, clip=None, fixed=True, **options):
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    opt = RATES[rate](model.parameters(), compile=False, **options)
    for _ in range(advice.LOOK + 1):
        if not fixed:
            x, y = torch.randn(64, 16), torch.randn(64, 4)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


@rates
def test_a_clip_is_told_from_gradients_that_did_not_change(rate, soon):
    assert not any("clips" in m for m in said(lambda: trained(rate)))
    assert any("clips" in m for m in said(lambda: trained(rate, clip=0.01, fixed=False)))
    # with one batch, the gradients turn as d grows
    assert any("clips" in m for m in said(lambda: trained(rate, clip=0.01, d0=1e-3)))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 2e-3, "d0": 1.0, "prodigy_steps": 1},
        {"lr": 2e-3, "d0": 1.0},
        {"lr": 100.0, "prodigy_steps": 1},
        {"lr": torch.tensor(1.0)},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_an_lr_that_is_meant_so_is_not_spoken_of(options):
    def run():
        walk(make("plus", parameters((8, 6)), compile=False, **options), "step", range(2))

    assert not said(run)


def test_schedules_and_ratios_are_no_mistakes():
    def scheduled(scheduler):
        opt = make("plus", parameters((8, 6)), compile=False)
        scheduler(opt)
        walk(opt, "step", range(2))

    schedules = torch.optim.lr_scheduler
    assert not said(lambda: scheduled(lambda o: schedules.LinearLR(o, 1e-3)))
    assert not said(lambda: scheduled(lambda o: schedules.OneCycleLR(o, 1.0, 100)))
    a, b = parameters((8, 6), (5,))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.01}]
    assert not said(lambda: walk(make("plus", groups, compile=False), "step", range(2)))
    assert said(lambda: walk(make("plus", [a], lr=torch.tensor(1e-3)), "step", range(2)))


@pytest.mark.parametrize("why", ["lr", "frozen", "empty", "freeze", "growth_rate", "late"])
def test_a_d_that_stands_still_by_request_is_not_spoken_of(why, soon):
    a, b = parameters((8, 6), (5,))
    options = {
        "lr": {"lr": 0.0},
        "frozen": {},
        "empty": {},
        "freeze": {"prodigy_steps": 5},
        "growth_rate": {"growth_rate": 1.0},
        "late": {},
    }[why]
    rate = "authors" if why == "growth_rate" else "plus"

    def run():
        second = {
            "params": [] if why == "empty" else [b],
            **({"lr": 0.0} if why == "lr" else {}),
        }
        fixed = {k: v for k, v in options.items() if k != "lr"}
        still = {"d_coef": 1e-9} if why in ("freeze", "growth_rate") else {}
        opt = make(rate, [{"params": [a]}], compile=False, d0=1e-3, **fixed, **still)
        b.requires_grad_(why != "frozen")
        if why != "late":
            opt.add_param_group(second)
        walk(opt, "step", range(advice.LOOK - 2), [b] if why == "frozen" else [])
        if why == "late":
            opt.add_param_group(second)
        walk(opt, "step", range(4), [b] if why == "frozen" else [])

    assert not said(run)


def test_common_numbers_are_fresh_in_a_chain_of_ones_own():
    params = parameters((8, 6))
    opt = C.ChainOpt(params, 1.0, C.scale_by_laprop, C.prodigy_d, C.cautious)
    walk(opt, "step", range(1))
    first = opt.param_groups[0]["d"]
    walk(opt, "step", range(1, 4))
    assert opt.param_groups[0]["d"] is not first
