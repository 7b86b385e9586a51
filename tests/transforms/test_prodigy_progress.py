"""Prodigy's d from progress, against its equations in float64 and prodigy-plus-schedule-free 2.0.1."""

import math

import pytest
import torch
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C
from transforms.test_prodigy import coarse, corners, quadratic, weights

F64 = torch.float64

# prodigy-plus-schedule-free 2.0.1 (which cannot be installed beside 1.9.0), in float32, with
# use_speed=True, use_schedulefree=False, factored=False, use_stableadamw=False and these options: the
# weights of `coarse`, gradient = weights, d after the steps of GOLDEN_STEPS, and `corners` at the end.
GOLDEN = (
    (
        {"d0": 1e-3},
        [0.001, 0.001, 0.00118920712, 0.00168179283, 0.00392317116, 0.00778033066, 0.0124681416],
        [0.63932848, 0.63932848, -0.561142206, 0.767701987, 13.4797286],
    ),
    (
        {"d0": 1e-3, "d_coef": 2.0, "weight_decay": 0.1},
        [0.001, 0.001, 0.00129683955, 0.00218101547, 0.008, 0.0293441294, 0.0856864051],
        [0.0771960914, 0.0771960914, -0.00147613802, 0.289707472, 0.92894654],
    ),
    (
        {"d0": 1e-3, "betas": (0.95, 0.999), "beta3": 0.9},
        [0.001, 0.001, 0.00118920712, 0.00168179283, 0.00367463962, 0.00604134802, 0.00742854139],
        [0.534282804, 0.534282804, -0.455889195, 0.630219244, 9.43908796],
    ),
)


@pytest.mark.parametrize(("options", "expected", "ends"), GOLDEN, ids=str)
def test_it_is_the_original_without_schedule_free(options, expected, ends) -> None:
    param = nn.Parameter(coarse())
    plain = {"use_schedulefree": False, "factored": False, "use_stableadamw": False}
    opt = heavyball.ProdigyPlusScheduleFree([param], use_speed="progress", **plain, **options)
    found = quadratic(opt, param)
    # the original rounds weights near 1 to float32 and looks at how far they are from the first ones,
    # some 1e-3: 2^-24 / 1e-3 = 6e-5 in the displacement, and a few times that in d
    assert found == pytest.approx(expected, rel=3e-4)
    assert corners(param.detach()) == pytest.approx(ends, rel=3e-4, abs=3e-5)


def written_out(
    params: list[Tensor], grads: list[list[Tensor]], d0: float, beta3: float, coef: float, k: int
) -> list[float]:
    """d after each step of `p <- p - d sign(g)`, from the recurrence as it stands in the docstring."""
    params = [p.detach().clone() for p in params]
    first = [p.clone() for p in params]
    along, l1, l2 = ([v] * len(params) for v in (0.0, 1e-8, 1e-8))
    d, total, largest, found = d0, 0.0, 0.0, []
    for t, step in enumerate(grads, start=1):
        n = 0.0
        for i, (p, g) in enumerate(zip(params, step, strict=True)):
            moved = (first[i] - p).flatten()[::k]
            along[i] += t**-0.75 * (float(g.flatten()[::k] @ moved) - along[i])
            l1[i] = max(l1[i], float(moved.abs().sum()))
            l2[i] = max(l2[i], float(moved.norm()))
            n += d**2 / math.sqrt(d0) / (1 + l2[i]) ** 2 * along[i] / l1[i]
            p -= d * g.sign()
        before, total = total, beta3 * total + (n if d > d0 or n > 0 else 0.0)
        largest = max(largest, total)
        if total >= largest and total > 0 and before > 0:
            d = max(d, d * min(2**0.25, math.sqrt(total / before)) * coef**0.125)
        found.append(d)
    return found


@pytest.mark.parametrize("slice_p", [1, 3, 11])
@pytest.mark.parametrize("coef", [1.0, 0.5])
def test_it_is_its_recurrence(slice_p: int, coef: float) -> None:
    params = weights((8, 6), (13,), (2, 3, 4))
    made = torch.Generator().manual_seed(3)
    grads = [
        [p.detach() + 0.5 * torch.randn(p.shape, generator=made, dtype=F64) for p in params]
        for _ in range(40)
    ]
    expected = written_out(params, grads, 1e-3, 0.9, coef, slice_p)
    rate = C.prodigy_progress_d(d0=1e-3, beta3=0.9, d_coef=coef, slice_p=slice_p)
    opt = C.ChainOpt(params, 1.0, C.sign, rate)
    found = []
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        opt.step()
        found.append(opt.d[0])
    assert max(expected) > 1.3e-3
    # sums of fewer than 50 terms over 40 steps, each of which the square root halves
    assert found == pytest.approx(expected, rel=40 * 50 * 2.0**-52)


def test_no_sum_of_gradients_is_kept_and_the_first_weights_are_freed() -> None:
    params = weights((8, 6), (5,))
    opt = heavyball.ProdigyPlusScheduleFree(params, use_speed="progress", prodigy_steps=4)
    for step in range(6):
        for p in params:
            p.grad = p.detach().clone()
        opt.step()
        kept = {key for p in params for key in opt.state[p]}
        assert "prodigy_progress_d.s" not in kept
        assert ("prodigy_progress_d.p0" in kept) == (step < 2)
        if step == 4:
            frozen = opt.d
    assert opt.d == frozen


def test_the_size_of_the_gradients_does_not_matter() -> None:
    found = []
    for scale in (1.0, 2.0**20):
        (param,) = weights((8, 6))
        opt = C.ChainOpt([param], 1.0, C.sign, C.prodigy_progress_d(d0=1e-2))
        steps = []
        for _ in range(20):
            param.grad = scale * param.detach()
            opt.step()
            steps.append(opt.d[0])
        found.append(steps)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0][-1] > 2e-2


def test_adopt_leaves_the_first_gradient_out() -> None:
    """The second one is then the first of the running mean."""
    (param,) = weights((8, 6))
    opt = C.ChainOpt([param], 1.0, C.sign, C.prodigy_progress_d(d0=1e-2, after_first=True))
    for _ in range(2):
        before = param.detach().clone()
        param.grad = param.detach().clone()
        grad = param.grad
        opt.step()
    first = weights((8, 6))[0].detach()
    moved = (first - before).flatten()[::11]
    assert opt.state[param]["prodigy_progress_d.along"].item() == pytest.approx(
        float(grad.flatten()[::11] @ moved), rel=1e-12
    )


def test_what_cannot_be_is_refused() -> None:
    params = weights((3,))
    with pytest.raises(TypeError, match=r'use_speed \(or "progress"\)=\'fast\': expected True'):
        heavyball.ProdigyPlusScheduleFree(params, use_speed="fast")
    with pytest.raises(ValueError, match="the growth of d is bounded anyway; pass d_limiter=False"):
        heavyball.ProdigyPlusScheduleFree(params, use_speed="progress", d_limiter=True)
