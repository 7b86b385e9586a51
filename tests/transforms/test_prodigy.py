"""Prodigy's d, against the authors' package, prodigy-plus-schedule-free, and golden values.

The suite's fixture runs chains as written; the kernels are compared with that in test_together.py.
"""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import prodigyopt
import pytest
import torch
from prodigyplus import ProdigyPlusScheduleFree as Original
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C

F64 = torch.float64
GOLDEN_STEPS = (1, 2, 3, 5, 10, 15, 20)


def grid(rows: int = 8, columns: int = 6) -> Tensor:
    i = torch.arange(rows, dtype=F64)[:, None]
    return torch.sin(1 + 6 * i + torch.arange(columns, dtype=F64))


def coarse(rows: int = 8, columns: int = 6) -> Tensor:
    """Weights that bfloat16 holds exactly, so that the original's copy of them is exact."""
    return torch.round(64 * grid(rows, columns)) / 64


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    """Multiples of 1/8: exact in bfloat16."""
    made = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter((8 * torch.randn(s, generator=made, dtype=F64)).round() / 8) for s in shapes
    ]


def pulls(params: Sequence[Tensor], step: int) -> None:
    """Gradients that float32 holds exactly, since the original casts them to it."""
    for place, p in enumerate(params):
        pull = p.detach() * (1 + 0.3 * place) + 0.05 * step
        p.grad = pull.float().to(p.dtype)


def walk(opt: Any, params: Sequence[Tensor], steps: int) -> list[list[float]]:
    """d of every group after each step."""
    found = []
    for step in range(1, steps + 1):
        pulls(params, step)
        opt.step()
        found.append([float(group["d"]) for group in opt.param_groups])
    return found


def quadratic(opt: Any, param: Tensor, steps: int = 20) -> list[float]:
    """d after the golden values' steps, the gradient being the parameter itself."""
    found = []
    for step in range(1, steps + 1):
        param.grad = param.detach().clone()
        opt.step()
        if step in GOLDEN_STEPS:
            found.append(float(opt.param_groups[0]["d"]))
    return found


def corners(p: Tensor) -> list[float]:
    return [p[0, 0], p[3, 2], p[7, 5], p.sum(), p.square().sum()]


def silent(make: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


# ---- the authors' form

AUTHORS = {
    1: (
        [1e-06, 1.581529613e-06, 4.822383187e-06, 3.450953469e-05,
         0.003873240934, 0.3170224205, 0.3170224205],
        [-0.3515941214, -0.3529435511, 0.4073808231, 0.3443766546, 5.831498826],
    ),
    11: (
        [1e-06, 1.581530151e-06, 4.822386192e-06, 3.450955503e-05,
         0.00387333557, 0.3941937314, 0.3941937314],
        [-0.06997354089, -0.07476456493, 0.2079693594, 0.7705502602, 4.759354983],
    ),
}  # fmt: skip


@pytest.mark.parametrize("slice_p", AUTHORS)
def test_the_golden_values_of_the_authors_form(slice_p: int) -> None:
    param = nn.Parameter(grid())
    found = quadratic(heavyball.Prodigy([param], slice_p=slice_p), param)
    expected, end = AUTHORS[slice_p]
    assert found == pytest.approx(expected, rel=1e-9)
    assert [float(x) for x in corners(param.detach())] == pytest.approx(end, rel=2e-9)


AUTHORS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"slice_p": 11},
    {"use_bias_correction": True},
    {"safeguard_warmup": True},
    {"growth_rate": 1.5},
    {"d_coef": 2.0, "d0": 1e-5, "beta3": 0.9},
    {"betas": (0.8, 0.95), "eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decouple": False},
    {"lr": 0.5},
    {"betas": (0.0, 0.99)},
]


@pytest.mark.parametrize("options", AUTHORS_OPTIONS, ids=str)
def test_it_is_prodigyopt_step_by_step(options: dict[str, Any]) -> None:
    ours, theirs = weights((8, 6), (7,), (3, 4, 5)), weights((8, 6), (7,), (3, 4, 5))
    mine = heavyball.Prodigy(ours, **options)
    other = silent(lambda: prodigyopt.Prodigy(theirs, **options))
    for step in range(1, 21):
        # the same gradients for both: a path of its own would blow up the first rounding
        for place, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.cos(step * torch.arange(p.numel(), dtype=F64) + place).reshape(p.shape)
            q.grad = p.grad.clone()
        mine.step()
        other.step()
        d = float(mine.param_groups[0]["d"])
        # p0 - p is exact to 1e-16 of p and itself of size d: 2e-16 * 3 / d at most, averaged
        assert d == pytest.approx(other.param_groups[0]["d"], rel=max(1e-12, 1e-15 / d))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_groups_of_different_lr_keep_their_ratio_and_share_one_d() -> None:
    params = weights((4, 3), (4, 3))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
    opt = heavyball.Prodigy(groups, d0=1e-3)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    moved = [(p.detach() - b).abs().max().item() for p, b in zip(params, before, strict=True)]
    assert moved[1] / moved[0] == pytest.approx(0.1, rel=1e-9)
    assert opt.param_groups[0]["d"] == opt.param_groups[1]["d"]


def test_split_groups_are_optimizers_of_their_own() -> None:
    params, alone = weights((4, 3), (5,)), weights((4, 3), (5,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    opt = heavyball.Prodigy(groups, split_groups=True)
    single = [heavyball.Prodigy(alone[:1]), heavyball.Prodigy(alone[1:], lr=0.5)]
    for step in range(1, 11):
        pulls(params, step)
        for p, q in zip(params, alone, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        for each in single:
            each.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)
    assert opt.param_groups[0]["d"] != opt.param_groups[1]["d"]


# ---- the plus form

PLUS: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "no stableadamw": (
        {"use_stableadamw": False},
        [1e-06, 5.012527413e-06, 9.722705991e-06, 7.618137409e-05,
         0.01012869524, 0.1371441716, 0.1371441716],
        [0.006061496974, 0.006061496974, 0.009941839469, 0.0461878956, 0.07538787731],
    ),
    "stableadamw": (
        {},
        [1e-06, 5.012527413e-06, 9.722705991e-06, 1.992957571e-05,
         6.792020888e-05, 0.0002125601453, 0.0006464538892],
        [0.8418233583, 0.8418233583, -0.7636984028, 1.152398814, 23.94870651],
    ),
    "atan2": (
        {"eps": None, "use_stableadamw": False},
        [1e-06, 4.94725441e-06, 9.594964965e-06, 2.241182229e-05,
         0.0001110571893, 0.0004984386242, 0.002147225741],
        [0.8367852134, 0.8367852134, -0.7586602673, 1.14232302, 23.64258662],
    ),
    "bias correction": (
        {"use_bias_correction": True},
        [1e-06] * 7,
        [0.8437481336, 0.8437481336, -0.7656231336, 1.156246267, 24.06629205],
    ),
    "speed": (
        {"use_speed": True},
        [1e-06, 1.412537545e-06, 1.978108003e-06, 3.783316341e-06,
         1.669502019e-05, 6.17507071e-05, 0.0001955026899],
        [0.8432007072, 0.8432007072, -0.7650757107, 1.155151581, 24.03281156],
    ),
    "grams": (
        {"use_grams": True},
        [1e-06, 5.012527413e-06, 9.722705991e-06, 1.992957571e-05,
         6.792020888e-05, 0.0002125601453, 0.0006464538892],
        [0.8418233583, 0.8418233583, -0.7636984028, 1.152398814, 23.94870651],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLUS)
def test_the_golden_values_of_the_plus_form(name: str) -> None:
    options, expected, end = PLUS[name]
    param = nn.Parameter(coarse())
    opt = heavyball.ProdigyPlusScheduleFree([param], factored=False, **options)
    assert quadratic(opt, param) == pytest.approx(expected, rel=5e-9)
    # the specification's own run began with eps 1e-8 and rounded weights, as here
    assert [float(x) for x in corners(param.detach())] == pytest.approx(end, rel=1e-5)


def test_the_golden_values_with_the_papers_scale_of_cautious() -> None:
    param = nn.Parameter(coarse())
    chain = (
        C.scale_by_exp_avg_sq(beta2=0.99, correct_bias=False),
        C.prodigy_plus_d,
        C.clip_update_rms,
        C.schedule_free(weight_at="now", caution="cautious", caution_scale="sum_plus_one"),
    )
    expected = [
        1e-06, 4.910231631e-06, 9.554648686e-06, 1.962451556e-05,
        6.641376746e-05, 0.0002061521164, 0.0006221859214,
    ]  # fmt: skip
    assert quadratic(C.ChainOpt([param], 1.0, *chain), param) == pytest.approx(expected, rel=5e-9)


def test_the_estimate_of_the_plus_form_is_its_recurrence() -> None:
    """Also where gradients speak against the direction so far, before and after d has moved."""
    beta2, d0 = 0.9, 1e-2
    beta3 = math.sqrt(beta2)
    param = nn.Parameter(torch.zeros(3, dtype=F64))
    element = C.prodigy_plus_d(d0=d0, betas=(0.9, beta2), slice_p=1)
    opt = C.ChainOpt([param], 1.0, element)
    d, numerator, s = d0, 0.0, torch.zeros(3, dtype=F64)
    seen = set()
    # both signs, as the weights move along -g: against, along for long, against hardly, along, ...
    signs = [1, -1, 1, 1, 1, 1, 1, 1, -0.01, 1, 1, -1, -0.2, 1, 1, 1]
    for step, sign in enumerate(signs):
        grad = sign * (2 + torch.cos(step + torch.arange(3, dtype=F64)))
        added = math.sqrt(d) * float(grad @ -param.detach())
        s = beta3 * s + math.sqrt(d) * grad
        numerator *= beta3
        seen.add((added > 0, d > d0, added < numerator))
        if added >= 0:
            numerator += added
        elif d > d0:
            numerator = min(numerator, added)
        d = max(d, math.atan2(numerator, float(s.abs().sum())))
        param.grad = grad
        opt.step()
        assert float(opt.param_groups[0]["d"]) == pytest.approx(d, rel=1e-10)
    assert d > d0
    assert {(False, False), (False, True)} <= {(along, moved) for along, moved, _ in seen}


def test_d_of_two_groups_has_the_golden_values() -> None:
    for options, expected in (
        ({}, (1.0883994e-4, 1.0919260e-4)),
        ({"split_groups_mean": False}, (1.0844629e-4, 1.0927095e-4)),
        ({"split_groups": False}, (1.0919275e-4, 1.0919275e-4)),
    ):
        first, second = nn.Parameter(coarse().float()), nn.Parameter(4 * coarse().float())
        groups = [{"params": [first]}, {"params": [second]}]
        opt = heavyball.ProdigyPlusScheduleFree(groups, factored=False, **options)
        for _ in range(12):
            first.grad, second.grad = first.detach().clone(), second.detach().clone()
            opt.step()
        # the golden run rounded its sums to bfloat16, twice 2^-9 a step
        assert [float(g["d"]) for g in opt.param_groups] == pytest.approx(expected, rel=2e-2)
        if not options:
            mean = 2 / sum(1 / float(g["d"]) for g in opt.param_groups)
            assert [float(g["d_step"]) for g in opt.param_groups] == pytest.approx([mean] * 2)
            assert mean == pytest.approx(1.0901599e-4, rel=2e-2)


class Corrected(Original):
    """The original without the defects that the comparison would meet.

    Decay uses the weights of before the step for both y and z, in the published order; the scale of
    `cautious` is the authors' present one; the mean over a row goes over the right axis; d_prev is
    copied to all groups and follows the freeze.
    """

    def update_params(self, y, z, update, group, dlr):  # type: ignore[no-untyped-def]
        beta1, decay = group["betas"][0], group["weight_decay"]
        weight = dlr**2
        total = group["weight_sum"] + weight
        share = weight / total if total else 0
        forward = 1 - beta1 * (1 - share)
        decay = decay * dlr if group["weight_decay_by_lr"] else decay
        lost = y * decay
        change = (y - z) * share + update * (dlr * forward)
        if group["use_cautious"]:
            mask = (update * change > 0).to(change.dtype)
            change = change * mask / mask.mean().clamp(min=1e-3)
        elif group["use_grams"]:
            change = change.abs() * update.sign()
        z.sub_(update * dlr + lost)
        y.sub_(change + forward * lost)
        return total

    def get_denom(self, state, group):  # type: ignore[no-untyped-def]
        square = state["exp_avg_sq"]
        if isinstance(square, list):
            row, col, _, second, _ = square
            return (row / row.mean(second, keepdim=True).clamp(min=1e-30)).sqrt() * col.sqrt()
        return super().get_denom(state, group)

    def calculate_d(self, group):  # type: ignore[no-untyped-def]
        super().calculate_d(group)
        if group["prodigy_steps"] > 0 and group["k"] >= group["prodigy_steps"]:
            group["d_prev"] = group["d"]
        if not self.split_groups:
            for other in self.param_groups:
                other["d_prev"] = group["d_prev"]


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"factored": False},
    {"use_stableadamw": False},
    {"factored": False, "use_stableadamw": False},
    {"eps": None, "use_stableadamw": False},
    {"eps": None, "use_stableadamw": False, "factored": False},
    {"use_speed": True},
    {"use_speed": True, "factored": False, "eps": None, "use_stableadamw": False},
    {"use_bias_correction": True, "d0": 1e-3},
    {"use_bias_correction": True, "use_speed": True, "factored": False},
    {"use_cautious": True},
    {"use_cautious": True, "factored": False, "weight_decay": 0.1},
    {"use_grams": True},
    {"use_grams": True, "use_speed": True},
    {"use_adopt": True},
    {"use_adopt": True, "factored": False, "use_stableadamw": False},
    {"use_adopt": True, "eps": None, "use_stableadamw": False, "use_cautious": True},
    {"use_adopt": True, "use_bias_correction": True, "d0": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.01, "weight_decay_by_lr": False},
    {"weight_decay": 0.1, "use_grams": True, "use_speed": True},
    {"prodigy_steps": 6},
    {"prodigy_steps": 6, "use_speed": True, "factored": False},
    {"d_coef": 2.0, "d0": 1e-5},
    {"betas": (0.8, 0.95), "beta3": 0.9},
    {"lr": 0.3, "eps": 1e-3},
    {"split_groups": False},
    {"split_groups_mean": False},
    {"split_groups_mean": False, "use_speed": True},
    {"use_adopt": True, "split_groups": False, "factored": False},
]
SHAPES = ((40, 36), (36, 40), (13,), (10,), (1,), (4, 3, 3, 3), ())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_it_is_prodigy_plus_schedule_free_step_by_step(
    options: dict[str, Any], groups: int
) -> None:
    """The original in float64, where its copies are exact; its gradients are float32 all the same."""
    if groups == 2 and "prodigy_steps" in options:
        options = {**options, "split_groups": False}
    ours, theirs = weights(*SHAPES), weights(*SHAPES)

    def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}][:groups]

    mine = heavyball.ProdigyPlusScheduleFree(grouped(ours), **options)
    other = silent(lambda: Corrected(grouped(theirs), stochastic_rounding=False, **options))
    for step in range(1, 13):
        pulls(ours[: 3 if groups == 1 else None], step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        silent(other.step)
        for a, b in zip(mine.param_groups, other.param_groups, strict=True):
            assert float(a["d"]) == pytest.approx(b["d"], rel=3e-6)
        for p, q in zip(ours, theirs, strict=True):
            # each of its updates is rounded to float32: 6e-8 of d per element and step
            bound = 12 * 1e-6 * max(float(g["d"]) for g in mine.param_groups) + 1e-12
            torch.testing.assert_close(p, q, rtol=0, atol=bound)
    mine.eval()
    other.eval()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2 * bound)


@pytest.mark.parametrize(
    "options",
    [{}, {"factored": False}, {"use_speed": True}, {"use_adopt": True, "factored": False}],
    ids=str,
)
def test_it_is_the_package_as_it_comes_in_float32(options: dict[str, Any]) -> None:
    """Where the original is right: rows <= columns, weights exact in bfloat16, one group."""
    ours, theirs = ([nn.Parameter(p.float()) for p in weights((36, 40), (13,))] for _ in range(2))
    mine = heavyball.ProdigyPlusScheduleFree(ours, **options)
    other = silent(lambda: Original(theirs, **options))
    for step in range(1, 13):
        pulls(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        mine.step()
        silent(other.step)
        # its s is rounded to bfloat16 twice a step, by up to 2^-9 each time
        d = float(mine.param_groups[0]["d"])
        assert d == pytest.approx(other.param_groups[0]["d"], rel=step * 2**-8)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=step**2 * 2**-8 * d)


def test_every_excluded_pair_raises_with_the_reason() -> None:
    for options, words in (
        (
            {"eps": None, "use_stableadamw": True},
            "eps=None and use_stableadamw=True exclude.*use_stableadamw=False",
        ),
        ({"use_cautious": True, "use_grams": True}, "use_cautious.*use_grams"),
        ({"use_focus": True, "factored": True}, "factored.*factored=False"),
        ({"use_focus": True, "factored": False, "use_adopt": True}, "focus.*use_adopt"),
        (
            {"use_focus": True, "factored": False, "eps": None, "use_stableadamw": False},
            "focus.*eps=None",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            heavyball.ProdigyPlusScheduleFree(weights((2, 2)), **options)


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        ({"eps": None}, {"use_stableadamw": False}),
        ({"use_focus": True}, {"factored": False}),
        ({"use_focus": True, "factored_fp32": False}, {"factored": False}),
        ({"eps": None, "use_muon_pp": True}, {"use_stableadamw": False}),
    ],
    ids=str,
)
def test_an_option_left_at_its_default_gives_way_to_one_that_was_given(given, implied) -> None:
    alone = heavyball.ProdigyPlusScheduleFree(weights((2, 2)), **given)
    both = heavyball.ProdigyPlusScheduleFree(weights((2, 2)), **given, **implied)
    assert repr(alone.chain) == repr(both.chain)
    other = copy.deepcopy(alone)
    other.load_state_dict(both.state_dict())
    walk(alone, alone.param_groups[0]["params"], 1)


def test_every_option_of_the_original_is_taken_by_its_place() -> None:
    # in the order of prodigy-plus-schedule-free 1.9.0
    places = (1.0, (0.9, 0.99), None, 0.0, True, False, 1e-6, 1.0, 0, False, None, True, True)
    opt = heavyball.ProdigyPlusScheduleFree(weights((2, 2)), *places)
    named = heavyball.ProdigyPlusScheduleFree(weights((2, 2)), eps=None)
    assert repr(opt.chain) == repr(named.chain)
    with pytest.raises(ValueError, match="eps=None and use_stableadamw=True"):
        heavyball.ProdigyPlusScheduleFree(weights((2, 2)), *places, True, True, False, True)


# ---- the original's defects


def test_d_moves_with_float32_weights_and_by_how_much_it_should() -> None:
    """The original's bfloat16 copy of these weights is off by 2^-9, far more than they move."""
    ends = []
    for dtype in (torch.float32, F64):
        param = nn.Parameter(grid().to(dtype))
        opt = heavyball.ProdigyPlusScheduleFree([param], factored=False, use_stableadamw=False)
        ends.append(quadratic(opt, param)[-1])
    assert ends[1] == pytest.approx(0.137, abs=2e-3)
    assert ends[0] == pytest.approx(ends[1], rel=2e-2)
    param = nn.Parameter(grid().float())
    original = silent(lambda: Original([param], factored=False, use_stableadamw=False))
    assert quadratic(original, param)[-1] == 1e-6


def test_after_the_freeze_no_state_is_left_and_d_and_the_units_stand_still() -> None:
    param = nn.Parameter(coarse().float())
    opt = heavyball.ProdigyPlusScheduleFree([param], factored=False, prodigy_steps=8)
    seen, held = [], []
    for _ in range(12):
        param.grad = param.detach().clone()
        opt.step()
        seen.append(float(opt.param_groups[0]["d"]))
        held.append(sum("prodigy" in key for key in opt.state[param]))
    assert seen[-1] == seen[6] == pytest.approx(3.3375393e-05, rel=5e-3)
    # p0, s and the unit; the 7th step is the last that looks at the first two
    assert held == [3] * 6 + [1] * 6
    assert opt.state[param]["prodigy_plus_d.unit"] == seen[-1]
    # the original's d_prev stays behind, and multiplies v by (d_prev / d)^2 in every further step
    square = opt.state[param]["scale_by_exp_avg_sq.exp_avg_sq"].clone()
    param.grad = torch.zeros_like(param)
    opt.step()
    torch.testing.assert_close(opt.state[param]["scale_by_exp_avg_sq.exp_avg_sq"], 0.99 * square)


def test_every_group_of_a_shared_d_knows_the_d_of_before() -> None:
    """The original's second group keeps d_prev = d0, and divides v by (d / d0)^2 in every step."""
    first, second = nn.Parameter(coarse()), nn.Parameter(coarse())
    groups = [{"params": [first]}, {"params": [second]}]
    opt = heavyball.ProdigyPlusScheduleFree(groups, factored=False, split_groups=False)
    for _ in range(8):
        first.grad, second.grad = first.detach().clone(), second.detach().clone()
        opt.step()
    assert opt.param_groups[0]["d"] > 2e-6
    assert torch.equal(first, second)
    a, b = opt.state[first], opt.state[second]
    assert torch.equal(a["scale_by_exp_avg_sq.exp_avg_sq"], b["scale_by_exp_avg_sq.exp_avg_sq"])


def test_a_group_whose_last_parameter_has_no_gradient_still_averages() -> None:
    """The original overwrites the group's weights with those of its last parameter."""
    params, alone = weights((4, 3), (5,)), weights((4, 3))
    opt, single = (
        heavyball.ProdigyPlusScheduleFree(params),
        heavyball.ProdigyPlusScheduleFree(alone),
    )
    for step in range(1, 9):
        pulls(alone, step)
        params[0].grad = alone[0].grad.clone()
        opt.step()
        single.step()
    assert torch.equal(params[0], alone[0])


def test_adopt_leaves_out_each_parameters_own_first_step() -> None:
    params = weights((4, 3), (5,))
    opt = heavyball.ProdigyPlusScheduleFree(params, use_adopt=True, d0=1e-2)
    first = params[1].detach().clone()
    for step in range(1, 5):
        pulls(params, step)
        if step < 3:
            params[1].grad = None
        opt.step()
        if step == 3:
            assert torch.equal(params[1], first)
    assert not torch.equal(params[1], first)


def test_cautious_does_not_shrink_a_tensor_of_one_element() -> None:
    """n / (kept + 1) is 1/2 there."""
    moved = []
    for options in ({}, {"use_cautious": True}):
        param = nn.Parameter(torch.tensor([0.5], dtype=F64))
        opt = heavyball.ProdigyPlusScheduleFree([param], d0=1e-2, **options)
        for _ in range(3):
            param.grad = torch.ones_like(param)
            opt.step()
        moved.append(param.item())
    assert moved[0] == moved[1]


def test_float64_weights_keep_their_precision() -> None:
    param = nn.Parameter(torch.tensor([1 + 2.0**-40], dtype=F64))
    opt = heavyball.ProdigyPlusScheduleFree([param])
    param.grad = torch.zeros_like(param)
    opt.step()
    assert param.item() == 1 + 2.0**-40


def test_orthograd_keeps_the_norm_of_the_gradient_and_the_estimate_its_gradient() -> None:
    w, g = coarse(), torch.cos(torch.arange(48, dtype=F64)).reshape(8, 6)
    param = nn.Parameter(w.clone())
    opt = heavyball.ProdigyPlusScheduleFree([param], use_orthograd=True, factored=False)
    param.grad = g.clone()
    opt.step()
    rest = g - (w * g).sum() / w.square().sum() * w
    projected = rest * (g.norm() / rest.norm())
    state = opt.state[param]
    torch.testing.assert_close(
        state["scale_by_exp_avg_sq.exp_avg_sq"], 0.01 * projected**2, rtol=1e-12, atol=0
    )
    s = math.sqrt(1e-6) * g.flatten()[::11]
    torch.testing.assert_close(state["prodigy_plus_d.s"], s, rtol=1e-12, atol=0)


def test_focus_averages_the_weights_without_bias_and_in_their_own_units() -> None:
    param = nn.Parameter(coarse())
    opt = heavyball.ProdigyPlusScheduleFree([param], use_focus=True, factored=False, d0=1e-3)
    past = []
    for step in range(1, 7):
        past.append(param.detach().clone())
        pulls([param], step)
        opt.step()
    weigh = [0.99 ** (len(past) - 1 - i) for i in range(len(past))]
    mean = sum(w * p for w, p in zip(weigh, past, strict=True)) / sum(weigh)
    torch.testing.assert_close(opt.state[param]["focus.param_avg"], mean, rtol=1e-12, atol=1e-14)
    assert "focus.exp_avg" not in opt.state[param]


# ---- after any direction


@pytest.mark.parametrize(
    "direction",
    [
        (C.scale_by_adam,),
        (C.factored_rms(min_dim=2),),
        (C.sign,),
        (C.exp_avg, C.sign),
        (C.scale_by_nadam,),
        (C.scale_by_lion,),
        (C.scale_by_ademamix,),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rate", [C.prodigy_d, C.prodigy_plus_d])
def test_moments_weigh_gradients_by_the_d_of_their_step(
    direction: tuple, rate: C.Transform
) -> None:
    """A chain whose gradients are multiplied by d, and whose eps is, gives the same update."""
    ours, scaled = nn.Parameter(grid()), nn.Parameter(grid())
    free = {"eps": 0.0} if "eps" in direction[0].hyper else {}
    elements = (direction[0](**free), *direction[1:])
    opt = C.ChainOpt([ours], 1.0, *elements, rate(d0=1e-3))
    other = C.ChainOpt([scaled], 1.0, *elements)
    moved = False
    for step in range(1, 11):
        gradient = torch.cos(step * torch.arange(48, dtype=F64)).reshape(8, 6) + 2 * grid()
        d = float(opt.param_groups[0]["d"])
        before = ours.detach().clone()
        ours.grad, scaled.grad = gradient.clone(), d * gradient
        scaled.data.copy_(ours)
        opt.step()
        # the direction of a linear one is scaled by d, that of the others is not
        other.param_groups[0]["lr"] = d
        other.step()
        torch.testing.assert_close(ours - before, scaled - before, rtol=1e-9, atol=1e-15)
        moved |= d > 1e-3
    assert moved


def test_laprop_weighs_normalized_gradients_by_the_d_of_their_step() -> None:
    param = nn.Parameter(grid())
    opt = C.ChainOpt(
        [param], 1.0, C.scale_by_laprop(betas=(0.5, 0.9), eps=0.0), C.prodigy_d(d0=1e-3)
    )
    mean = square = torch.zeros(8, 6, dtype=F64)
    rates = []
    for step in range(1, 9):
        gradient = torch.cos(step * torch.arange(48, dtype=F64)).reshape(8, 6) + 2 * grid()
        rates.append(float(opt.param_groups[0]["d"]))
        before = param.detach().clone()
        param.grad = gradient.clone()
        opt.step()
        scaled = rates[-1] * gradient
        square = 0.9 * square + 0.1 * scaled**2
        mean = 0.5 * mean + 0.5 * rates[-1] * scaled / (square / (1 - 0.9**step)).sqrt()
        torch.testing.assert_close(before - param, mean / (1 - 0.5**step), rtol=1e-9, atol=1e-14)
    assert rates[-1] > 1e-3


def test_d_stands_still_where_no_gradient_was_and_comes_to_late_parameters() -> None:
    params = weights((8, 6), (5,))
    opt = heavyball.ProdigyPlusScheduleFree(params[:1], factored=False, split_groups=False)
    for step in range(1, 9):
        pulls(params[:1], step)
        opt.step()
    d = float(opt.param_groups[0]["d"])
    assert d > 2e-6
    params[0].grad = None
    opt.step()
    assert float(opt.param_groups[0]["d"]) == d
    opt.add_param_group({"params": params[1:]})
    assert float(opt.param_groups[1]["d"]) == d
    before = params[1].detach().clone()
    params[1].grad = torch.ones_like(params[1])
    opt.step()
    # sqrt(0.01) in the first step without bias correction, and 1 at most by the clip
    assert (before - params[1]).max().item() == pytest.approx(d, rel=1e-6)


# ---- options with a chain of their own


def test_muon_pp_is_its_equations_in_float64() -> None:
    param = nn.Parameter(coarse())
    opt = heavyball.ProdigyPlusScheduleFree([param], use_muon_pp=True, use_stableadamw=False)
    z, square, total, unit = coarse(), 0.0, 0.0, None
    y = coarse()
    for _ in range(8):
        d = float(opt.param_groups[0]["d"])
        gradient = y.clone()
        param.grad = param.detach().clone()
        opt.step()
        x = gradient.T / (gradient.norm() + 1e-7)
        for _ in range(6):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T * (gradient * x.T).sum().clamp(-1, 1)
        change = 1.0 if unit is None else unit / d
        square = 0.99 * change**2 * square + 0.01 * x.square().mean()
        update, unit = x / (square.sqrt() + 1e-8), d
        total += d**2
        share = d**2 / total
        y = y + share * (z - y) - d * (1 - 0.9 * (1 - share)) * update
        z = z - d * update
        torch.testing.assert_close(param.detach(), y, rtol=1e-10, atol=1e-12)
    assert unit > 1e-6


@pytest.mark.parametrize("speed", [False, True])
def test_muon_pp_is_the_originals_within_its_bfloat16_products(speed: bool) -> None:
    ours, theirs = ([nn.Parameter(p.float()) for p in weights((36, 40), (13,))] for _ in range(2))
    mine = heavyball.ProdigyPlusScheduleFree(ours, use_muon_pp=True, use_speed=speed)
    other = silent(lambda: Original(theirs, use_muon_pp=True, use_speed=speed))
    before = [p.detach().clone() for p in ours]
    for step in range(1, 9):
        pulls(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        mine.step()
        silent(other.step)
    for p, q, b in zip(ours, theirs, before, strict=True):
        # bfloat16 products are off by up to 3.5e-2 an entry, a twentieth of the direction's norm
        assert (p - q).norm() < 0.1 * (p - b).norm()


def test_without_schedule_free_it_is_adam_in_units_of_d() -> None:
    param, twin = nn.Parameter(coarse()), nn.Parameter(coarse())
    opt = heavyball.ProdigyPlusScheduleFree(
        [param], use_schedulefree=False, factored=False, use_stableadamw=False, weight_decay=0.1
    )
    chain = (C.scale_by_adam(betas=(0.9, 0.99), correct_bias=False), C.prodigy_plus_d)
    other = C.ChainOpt([twin], 1.0, *chain, weight_decay=0.1)
    for step in range(1, 11):
        for p in (param, twin):
            p.grad = torch.cos(step * torch.arange(48, dtype=F64)).reshape(8, 6) + 2 * coarse()
        opt.step()
        other.step()
        torch.testing.assert_close(param, twin, rtol=0, atol=1e-14)
    assert float(opt.param_groups[0]["d"]) > 2e-6
    assert "train_mode" not in opt.defaults
    with pytest.raises(ValueError, match=r"schedulefree_c=5\.0 has no effect"):
        heavyball.ProdigyPlusScheduleFree([param], use_schedulefree=False, schedulefree_c=5.0)


def test_the_limiter_bounds_the_growth_of_d() -> None:
    param = nn.Parameter(coarse())
    opt = heavyball.ProdigyPlusScheduleFree([param], factored=False, d_limiter=True)
    seen = [1e-6, *quadratic(opt, param, 3)]
    assert seen[2] == pytest.approx(2**0.25 * 1e-6)
    assert seen[3] == pytest.approx(2**0.5 * 1e-6)


# ---- fused backward


def losses(model: nn.Module, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return model(torch.randn(4, 6, generator=made)).square().mean()


def test_the_fused_backward_is_the_ordinary_step_bit_for_bit() -> None:
    models = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    plain = heavyball.ProdigyPlusScheduleFree(models[0].parameters())
    fused = heavyball.ProdigyPlusScheduleFree(models[1].parameters(), fused_back_pass=True)
    # as trainers do it: their own hooks, and no step()
    driven = heavyball.ProdigyPlusScheduleFree(models[2].parameters())
    for group in driven.param_groups:
        for index, p in enumerate(group["params"]):
            p.register_post_accumulate_grad_hook(
                lambda p, group=group, index=index: driven.step_parameter(p, group, index)
            )
    for step in range(12):
        for model, opt in zip(models, (plain, fused, driven), strict=True):
            losses(model, step).backward()
            if opt is plain:
                opt.step()
                opt.zero_grad()
            if opt is fused and step % 2:
                opt.step()  # may be called or left out
    assert float(plain.param_groups[0]["d"]) > 1e-6
    for opt in (fused, driven):
        assert torch.equal(opt.param_groups[0]["d"], plain.param_groups[0]["d"])
    for p, q, r in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
