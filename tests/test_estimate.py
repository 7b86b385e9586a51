"""Estimates of d over gates, groups and missing gradients: what did not happen changes nothing."""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import parameters
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C

F64 = torch.float64
RATES = {
    "authors": C.prodigy_d,
    "plus": C.prodigy_plus_d(slice_p=2),
    "speed": C.prodigy_plus_d(use_speed=True),
    "limited": C.prodigy_plus_d(d_limiter=True, after_first=True),
    "progress": C.prodigy_progress_d(slice_p=3),
}
RULES = {
    "adam": C.scale_by_adam,
    "momentum": C.exp_avg,
    "adopt": C.scale_by_adopt,
    "factored": C.factored_rms(min_dim=4),
}


def numbers(group: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in group.items() if k == "d" or k.startswith("d_")}


def snapshot(opt: Any) -> dict[Any, Tensor]:
    found = {}
    for index, group in enumerate(opt.param_groups):
        found |= {(index, k): torch.tensor(v) for k, v in numbers(group).items()}
        for place, param in enumerate(group["params"]):
            found[index, place] = param.detach().clone()
            counts = ("step", "skip_not_finite.skipped")
            kept = {k: v.clone() for k, v in opt.state[param].items() if k not in counts}
            found |= {(index, place, k): v for k, v in kept.items()}
    return found


def changed(before: dict[Any, Tensor], after: dict[Any, Tensor]) -> list[Any]:
    return [k for k in before if not torch.equal(before[k], after[k])]


def pull(params: list[nn.Parameter], step: int) -> None:
    for place, p in enumerate(params):
        made = torch.Generator().manual_seed(100 * step + place)
        noise = torch.randn(p.shape, generator=made, dtype=F64)
        p.grad = (p.detach().double() + 0.3 * noise.to(p.device)).to(p.dtype)


# ---- steps that are left out


PAIRED = [*zip(RATES, itertools.cycle(RULES), strict=False)]


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize(("rate", "rule"), PAIRED)
def test_a_skipped_step_keeps_every_bit(rate: str, rule: str, compile: Any) -> None:
    params = parameters((6, 5), (7,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    opt = C.ChainOpt(groups, 1.0, C.skip_not_finite, RATES[rate], RULES[rule], compile=compile)
    for step in range(5):
        pull(params, step)
        opt.step()
    before = snapshot(opt)
    for _ in range(2):
        pull(params, 5)
        params[1].grad[0] = torch.nan
        opt.step()
        assert not changed(before, snapshot(opt))


FORMATS: tuple[dict[str, Any], ...] = (
    {"storage_dtype": "8bit"},
    {"storage_dtype": "4bit"},
    {"storage_dtype": "rank1"},
    {"storage_dtype": "float16"},
    {"storage_dtype": "bfloat16"},
    {"ecc": "bf16+8"},
    {"ecc": "fp16+16"},
)


@pytest.mark.parametrize(
    ("options", "compile"),
    [*((options, False) for options in FORMATS), (FORMATS[0], "auto"), (FORMATS[3], "auto")],
    ids=str,
)
def test_a_skipped_step_rounds_nothing_again(options: dict[str, Any], compile: Any) -> None:
    params = parameters((16, 16), dtype=torch.bfloat16)
    chain = (C.skip_not_finite, C.scale_by_adam, C.prodigy_plus_d)
    opt = C.ChainOpt(params, 1.0, *chain, compile=compile, **options)
    for step in range(5):
        pull(params, step)
        opt.step()
    before = snapshot(opt)
    params[0].grad[3, 3] = torch.inf
    opt.step()
    assert not changed(before, snapshot(opt))


def walked(rate: str, gate: tuple, repeat: int, **options: Any) -> tuple[list[Tensor], dict]:
    """Steps with gradients that are each given so many times."""
    params = parameters((6, 5), (7,), dtype=F64)
    opt = C.ChainOpt(params, 1.0, *gate, C.scale_by_adam, RATES[rate], **options)
    for step in range(6 * repeat):
        pull(params, step // repeat)
        opt.step()
    return [p.detach() for p in params], numbers(opt.param_groups[0])


@pytest.mark.parametrize(
    ("rate", "options"),
    [
        *((rate, {"compile": False}) for rate in RATES),
        ("authors", {"compile": False, "foreach": False}),
        ("plus", {}),
        ("progress", {}),
    ],
    ids=str,
)
def test_equal_gradients_in_pairs_are_the_plain_run(rate: str, options: dict[str, Any]) -> None:
    (plain, expected), (pairs, found) = (
        walked(rate, (), 1, **options),
        walked(rate, (C.accumulate(k=2),), 2, **options),
    )
    assert found == pytest.approx(expected, rel=1e-9)
    for p, q in zip(plain, pairs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_what_leaves_out_steps_stands_before_the_estimate_wherever_it_is_written() -> None:
    for chain in (
        (C.prodigy_d, C.accumulate(k=2), C.scale_by_adam),
        (C.accumulate(k=2), C.scale_by_adam, C.prodigy_d),
    ):
        shown = repr(C.ChainOpt(parameters(), 1.0, *chain).chain)
        assert shown.startswith("accumulate(k=2) | prodigy_d | scale_by_adam")


@pytest.mark.parametrize("rate", ["plus", "progress"])
def test_some_parameters_are_left_out_and_others_are_not(rate: str) -> None:
    params = parameters((6, 5), (7,), dtype=F64)
    gated = C.route(C.when((C.accumulate(k=3), C.scale_by_adam), ndim=1), otherwise=C.scale_by_adam)
    opt = C.ChainOpt(params, 1.0, gated, RATES[rate], compile=False)
    before = params[1].detach().clone()
    for step in range(8):
        pull(params, step)
        opt.step()
        if step % 3 < 2:
            assert torch.equal(params[1], before)
        before = params[1].detach().clone()
    assert all(torch.isfinite(p).all() for p in params)


def test_a_skipped_step_inside_backward_changes_nothing() -> None:
    params = parameters((6, 5), (7,))
    chain = (C.accumulate(k=2), C.scale_by_adam, C.prodigy_plus_d)
    opt = C.ChainOpt(params, 1.0, *chain, fuse_backward=True)
    counts = []
    for _ in range(6):
        sum(p.square().sum() for p in params).backward()
        opt.step()
        counts.append(int(opt.param_groups[0]["d_steps"]))
    assert counts == [0, 1, 1, 2, 2, 3]


# ---- groups that do not train


def plus(groups: Any, **options: Any) -> Any:
    return heavyball.ProdigyPlusScheduleFree(groups, compile=False, **options)


def two(second: dict[str, Any] | None, speed: Any, steps: int = 12, at: Any = None) -> Any:
    """Two groups of one weight each; `at(step, opt, b)` disturbs."""
    a, b = parameters((8, 8), (6, 6))
    groups = [{"params": [a]}] + ([] if second is None else [{"params": [b], **second}])
    opt, rates = plus(groups, use_speed=speed), []
    for step in range(steps):
        pull([a, b], step)
        if at is not None:
            at(step, opt, b)
        opt.step()
        rates.append(opt.effective_lr[0])
    return rates, opt, a


def _no_gradient(step: int, opt: Any, b: nn.Parameter) -> None:
    b.grad = None


def _scheduled(step: int, opt: Any, b: nn.Parameter) -> None:
    opt.param_groups[1]["lr"] = 0.0


def _zero_gradient(step: int, opt: Any, b: nn.Parameter) -> None:
    b.grad.zero_()


IDLE: dict[str, tuple[dict[str, Any], Callable | None]] = {
    "lr 0": ({"lr": 0.0}, None),
    "tensor lr 0": ({"lr": torch.tensor(0.0)}, None),
    "scheduled": ({}, _scheduled),
    "no gradient": ({}, _no_gradient),
    "zero gradient": ({}, _zero_gradient),
}


@pytest.mark.parametrize(
    ("kind", "speed"),
    [*((kind, False) for kind in IDLE), *zip(IDLE, [True, "progress"] * 2, strict=False)],
)
def test_an_idle_group_changes_nothing(kind: str, speed: Any) -> None:
    options, at = IDLE[kind]
    rates, opt, weights = two(options, speed, at=at)
    expected, alone, plain = two(None, speed)
    assert rates == expected
    assert opt.d[0] == alone.d[0]
    assert torch.equal(weights, plain)


@pytest.mark.parametrize("speed", [False, "progress"])
def test_a_group_that_stops_leaves_the_mean(speed: Any) -> None:
    at = lambda step, opt, b: _no_gradient(step, opt, b) if step > 7 else None  # noqa: E731
    rates, opt, _ = two({}, speed, at=at)
    assert rates[-1] == opt.d[0]


@pytest.mark.parametrize("how", ["added", "unfrozen"])
def test_a_group_that_joins_at_most_halves_what_the_others_step_with(how: str) -> None:
    a, b = parameters((8, 8), (6, 6))
    opt = plus([{"params": [a]}] + ([{"params": [b]}] if how == "unfrozen" else []))
    rates = []
    for step in range(26):
        pull([a, b], step)
        if how == "added" and step == 20:
            opt.add_param_group({"params": [b]})
        elif how == "unfrozen" and step < 20:
            b.grad = None
        opt.step()
        rates.append(opt.effective_lr[0])
    assert min(rates[20:]) >= rates[19] / 2 > 1e-5
    assert opt.effective_lr[1] > 1e-6


@pytest.mark.parametrize(
    ("speed", "split"), [(False, True), (False, False), (True, True), ("progress", True)]
)
def test_the_order_of_groups_does_not_matter(speed: Any, split: bool) -> None:
    ends = []
    for order in ((0, 1, 2), (2, 0, 1)):
        params = parameters((8, 8), (6, 6), (9,), dtype=F64)
        groups = [{"params": [params[i]], "lr": 1 / (1 + i)} for i in order]
        opt = plus(groups, use_speed=speed, split_groups=split)
        for step in range(8):
            pull(params, step)
            opt.step()
        ends.append([opt.d[order.index(i)] for i in range(3)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


@pytest.mark.parametrize("make", [heavyball.Prodigy, plus])
def test_a_shared_d_does_not_depend_on_how_parameters_are_grouped(make: Any) -> None:
    ends = []
    for cuts in ((0, 3), (0, 1, 3)):
        params = parameters((8, 8), (6, 6), (9,), dtype=F64)
        groups = [{"params": params[i:j]} for i, j in itertools.pairwise(cuts)]
        opt = make(groups, split_groups=False)
        for step in range(8):
            pull(params, step)
            opt.step()
        ends.append(opt.d[0])
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


@pytest.mark.parametrize(("number", "ratio"), [(2, 0.2), (3, 1.0)])
def test_d_of_the_progress_form_stays_a_distance_in_several_groups(
    number: int, ratio: float
) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 4) * 0.2) for _ in range(number)]
    first = [p.detach().clone() for p in params]
    groups = [{"params": [p], "lr": ratio**i} for i, p in enumerate(params)]
    opt, moved = plus(groups, use_speed="progress"), 0.0
    for _ in range(60):
        opt.zero_grad()
        loss = sum((i + 1) * p.square().sum() for i, p in enumerate(params))
        (loss + sum((0.1 * torch.randn_like(p) * p).sum() for p in params)).backward()
        opt.step()
        moved = max(moved, *((p - q).norm().item() for p, q in zip(params, first, strict=True)))
    assert max(opt.d) <= 10 * moved


# ---- parameters without a gradient in some steps

FORMS: dict[str, Callable] = {
    "authors": lambda params: heavyball.Prodigy(params, compile=False),
    "plus": lambda params: plus(params),
    "plus, shared": lambda params: plus([{"params": [p]} for p in params], split_groups=False),
    "progress": lambda params: plus(params, use_speed="progress"),
}
# who has no gradient in a step, of a weight (0) and a bias (1), given the step and a random number each
MISSING: dict[str, Callable[[int, list[float]], list[int]]] = {
    "every fourth": lambda step, _: [0] * (step % 4 == 3),
    "half": lambda step, _: [0] * (step % 2),
    "for good": lambda step, _: [0] * (step > 20),
    "in turn": lambda step, _: [step % 2],
    "in turn, later": lambda step, _: [step % 2] * (step > 10),
    "random": lambda _, drawn: [i for i in (0, 1) if drawn[i] < 0.5],
    "rarely there": lambda _, drawn: [0] * (drawn[0] < 0.9),
}


@functools.cache
def d_of(form: str, pattern: str | None) -> float:
    torch.manual_seed(0)
    x, y, model = torch.randn(64, 32), torch.randn(64, 8), nn.Linear(32, 8)
    params = [model.weight, model.bias]
    opt = FORMS[form](params)
    made = torch.Generator().manual_seed(5)
    for step in range(40):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        drawn = torch.rand(2, generator=made).tolist()
        for index in [] if pattern is None else MISSING[pattern](step, drawn):
            params[index].grad = None
        opt.step()
    return opt.d[0]


# the authors' form and one other with every pattern, the others with every second
PATTERNS = [(form, pattern) for form in ("authors", "plus") for pattern in MISSING]
PATTERNS += [("plus, shared", pattern) for pattern in [*MISSING][::2]]
PATTERNS += [("progress", pattern) for pattern in [*MISSING][1::2]]


@pytest.mark.parametrize(("form", "pattern"), PATTERNS)
def test_d_is_about_that_of_the_run_in_which_nothing_is_missing(form: str, pattern: str) -> None:
    ratio = d_of(form, pattern) / d_of(form, None)
    # the others are still growing, with fewer steps
    assert (0.4 if form == "authors" else 0.0) < ratio <= 1.5


@pytest.mark.parametrize("form", FORMS)
def test_two_equal_parameters_in_turn_are_a_run_at_half_the_rate(form: str) -> None:
    def run(stepped: Callable[[int], tuple[int, ...]], steps: int) -> float:
        torch.manual_seed(0)
        first = torch.randn(8, 32)
        params = [nn.Parameter(first.clone()) for _ in range(2)]
        opt = FORMS[form](params)
        for step in range(steps):
            opt.zero_grad()
            for i in stepped(step):
                params[i].grad = params[i].detach().clone()
            opt.step()
        return opt.d[0]

    expected = run(lambda _: (0, 1), 20)
    for turns in (1, 3):
        found = run(lambda step, turns=turns: (step // turns % 2,), 40)  # type: ignore[misc]
        assert 0.5 <= found / expected <= 1.5


# ---- values


SIZES = ((1e30, 1e-30), (1e-30, 1e30), (1e30, -1e30, 1e-30, 0.0), (1.0, -1.0, 1e-20))


@pytest.mark.parametrize(
    ("rate", "dtype"),
    [
        *((rate, torch.float32) for rate in RATES),
        *zip(RATES, itertools.cycle([torch.bfloat16, F64]), strict=False),
    ],
)
def test_finite_gradients_in_any_order_keep_d_and_weights_finite(rate: str, dtype: Any) -> None:
    for sizes in SIZES:
        params = parameters((6, 5), (7,), dtype=dtype)
        opt = C.ChainOpt(params, 1.0, RATES[rate], C.scale_by_adam, compile=False)
        for step in range(8):
            for p in params:
                p.grad = torch.full_like(p, sizes[step % len(sizes)])
            opt.step()
        tensors = [*params, *(t for p in params for t in opt.state[p].values())]
        assert all(torch.isfinite(t).all() for t in tensors)
        assert all(abs(v) < float("inf") for v in numbers(opt.param_groups[0]).values())


def test_float16_weights_are_warned_of_by_name() -> None:
    halves = parameters((6, 5), (7,), dtype=torch.float16)
    chain = (C.scale_by_adam, C.prodigy_d)
    for make in (heavyball.Prodigy, plus, lambda p, **o: C.ChainOpt(p, 1.0, *chain, **o)):
        with pytest.warns(RuntimeWarning, match=r"\(6, 5\) and 1 more in float16: .*param_ecc"):
            make(halves)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(halves, param_ecc="fp16+8")
            make(parameters((6, 5), dtype=torch.bfloat16))


@pytest.mark.parametrize("steps", [0, 3])
def test_weights_that_become_float16_are_warned_of(steps: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    opt = plus(model.parameters())
    for step in range(steps):
        pull([*model.parameters()], step)
        opt.step()
    model.half()
    for step in range(steps, steps + 2):
        pull([*model.parameters()], step)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opt.step()
        said = [str(w.message) for w in seen if "in float16" in str(w.message)]
        assert len(said) == (step == steps)
        assert all("(3, 4) and 3 more in float16" in message for message in said)


# ---- hyper-parameters that groups with one d disagree on

UNLIKE = {"d_coef": 0.1, "d0": 1e-3, "growth_rate": 1.02, "beta3": 0.5}


@pytest.mark.parametrize("key", UNLIKE)
def test_unlike_groups_of_one_d_are_refused(key: str) -> None:
    same = {"beta3": 0.9} if key == "beta3" else {}
    make = lambda *groups: heavyball.Prodigy(groups, compile=False, **same)  # noqa: E731
    a, b = parameters((4,), (5,))
    with pytest.raises(ValueError, match=f"{key}={UNLIKE[key]} of parameter group 1"):
        make({"params": [a]}, {"params": [b], key: UNLIKE[key]})
    opt = make({"params": [a]}, {"params": [b]})
    before = opt.param_groups[1][key]
    opt.param_groups[1][key] = UNLIKE[key]
    pull([a, b], 0)
    with pytest.raises(ValueError, match=key):
        opt.step()
    opt.param_groups[1][key] = before
    opt.step()
    heavyball.Prodigy(
        [{"params": [a]}, {"params": [b], key: UNLIKE[key]}], split_groups=True, **same
    )


def test_unlike_decays_of_one_d_are_warned_of() -> None:
    a, b = parameters((4,), (5,))
    groups = [{"params": [a]}, {"params": [b], "betas": (0.9, 0.5)}]
    with pytest.warns(RuntimeWarning, match=r"betas=\(0.9, 0.5\) of parameter group 1"):
        heavyball.Prodigy(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heavyball.Prodigy([dict(group) for group in groups], beta3=0.9)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (heavyball.Prodigy, "slice_p", 3),
        (heavyball.Prodigy, "safeguard_warmup", True),
        (heavyball.Prodigy, "beta3", 0.5),
        (plus, "prodigy_steps", 5),
        (plus, "split_groups_mean", False),
    ],
)
def test_what_all_groups_have_is_refused_in_one(make: Any, key: str, value: Any) -> None:
    a, b = parameters((4,), (5,))
    with pytest.raises(ValueError, match=f"{key}={value}"):
        make([{"params": [a]}, {"params": [b], key: value}])
