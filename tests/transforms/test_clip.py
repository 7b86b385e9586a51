"""The clips against golden values, torch, pytorch_optimizer, and their definitions."""

import pytest
import torch
from helpers import (
    EPS,
    SHAPES,
    chain,
    close,
    gradients,
    matches_golden,
    reveal,
    same_path,
    starts,
    updates,
    walk,
)
from pytorch_optimizer.optimizer.agc import agc

from heavyball import chainable as C

# elements of a large tensor
N = 2**17
POINTS = torch.tensor([-3.0, -0.5, -0.01, 0.0, 0.2, 1.0, 5.0], dtype=torch.float64)
CLIPS = {
    "clip_by_norm": lambda x: x.square().sum().sqrt(),
    "clip_by_rms": lambda x: x.square().mean().sqrt(),
}
NORMALIZES = {
    "l2_normalize": lambda x: x.square().sum().sqrt(),
    "rms_normalize": lambda x: x.square().mean().sqrt(),
}


def test_the_golden_values() -> None:
    matches_golden(
        [updates([C.clip_by_norm], [POINTS])[0], updates([C.clip_by_rms], [POINTS])[0]],
        """-0.5050039909 -0.08416733181 -0.001683346636 0 0.03366693273 0.1683346636 0.8416733181
        | -1.336114971 -0.2226858285 -0.00445371657 0 0.0890743314 0.445371657 2.226858285""",
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_bounds_what_is_larger_and_leaves_what_is_smaller(
    name: str, shape: tuple[int, ...]
) -> None:
    transform = C.TRANSFORMS[name]
    ((grad,),) = gradients(1, [shape], least=0.5)
    size = CLIPS[name](grad).item()
    (smaller,) = updates([transform(size * 0.25)], [grad])
    close(smaller, grad * 0.25, rtol=30 * EPS, atol=0.0)
    (same,) = updates([transform(size * 1.5)], [grad])
    assert torch.equal(same, grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMALIZES)
def test_a_normalization_gives_the_size_one(name: str, shape: tuple[int, ...]) -> None:
    for factor in (1e-3, 1.0, 1e6):
        ((grad,),) = gradients(1, [shape], least=0.5)
        (ours,) = updates([C.TRANSFORMS[name]], [grad * factor])
        close(ours, grad / NORMALIZES[name](grad), rtol=30 * EPS, atol=0.0)


def test_a_normalization_has_a_floor() -> None:
    grad = torch.full((4,), 1e-9, dtype=torch.float64)
    close(updates([C.l2_normalize], [grad])[0], grad / 1e-8, rtol=4 * EPS, atol=0.0)
    close(updates([C.rms_normalize], [grad])[0], grad / 1e-6, rtol=4 * EPS, atol=0.0)


@pytest.mark.parametrize(
    "name",
    [*CLIPS, *NORMALIZES, "clip_by_global_norm", "adaptive_gradient_clip", "clip_update_rms"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_stays_zero(name: str, shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(updates([C.TRANSFORMS[name]], [zero])[0], zero)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("max_norm", [0.5, 10.0])
def test_the_global_clip_is_torchs(max_norm: float, foreach: bool) -> None:
    begin, grads = starts(), gradients(8)
    grads[2][1] = grads[5][3] = None

    def clip(optimizer: torch.optim.Optimizer, t: int) -> None:
        total = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        sizes.append(total.item())

    sizes: list[float] = []
    ours = walk(chain(C.clip_by_global_norm(max_norm=max_norm), foreach=foreach), begin, grads)
    theirs = walk(lambda ps: torch.optim.SGD(ps, 0.1), begin, grads, clip)
    # fewer than 60 roundings of gradients below 15, sums of 33 squares included
    same_path(ours, theirs, atol=8 * EPS * (60 * 0.1 * 15 + 4 * 10))
    assert max(sizes) > 10.0 > min(sizes)


def test_the_global_clip_has_one_factor_for_all_groups() -> None:
    begin, (grads,) = starts(), gradients(1)
    made = []

    def groups(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        two = [{"params": params[:2]}, {"params": params[2:], "lr": 3.0}]
        made.append(C.ChainOpt(two, 0.1, C.clip_by_global_norm(max_norm=0.5), reveal))
        return made[0]

    walk(groups, begin, [grads])
    size = torch.cat([g.flatten() for g in grads]).square().sum().sqrt() + 1e-6
    for state, grad in zip(made[0].state.values(), grads, strict=True):
        close(state["reveal"], grad * 0.5 / size, rtol=60 * EPS, atol=0.0)


@pytest.mark.parametrize("foreach", [True, False])
def test_routed_branches_may_sum_for_themselves_before_a_common_sum(foreach: bool) -> None:
    begin, (grads,) = starts([(2, 2), (3,)]), gradients(1, [(2, 2), (3,)])
    branches = C.route(
        C.when(C.clip_by_global_norm(max_norm=0.5), ndim=2),
        otherwise=C.clip_by_global_norm(max_norm=0.25),
    )
    elements = branches, C.clip_by_global_norm(max_norm=0.1)
    ((matrix, vector),) = walk(chain(*elements, lr=1.0, foreach=foreach), begin, [grads])

    def clipped(grad: torch.Tensor, bound: float, size: torch.Tensor) -> torch.Tensor:
        return grad * min(1.0, bound / (size.item() + 1e-6))

    one = clipped(grads[0], 0.5, grads[0].square().sum().sqrt())
    other = clipped(grads[1], 0.25, grads[1].square().sum().sqrt())
    both = (one.square().sum() + other.square().sum()).sqrt()
    close(matrix, begin[0] - clipped(one, 0.1, both), atol=60 * EPS)
    close(vector, begin[1] - clipped(other, 0.1, both), atol=60 * EPS)


def test_the_golden_values_of_agc() -> None:
    p = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    g = 10 * torch.cos(torch.tensor([[0.5, 1.5], [2.5, 3.5]], dtype=torch.float64))
    whole = C.adaptive_gradient_clip(unit_wise=False)
    matches_golden(
        [updates([C.adaptive_gradient_clip], [g], p)[0], updates([whole], [g], p)[0]],
        """[0.02228839201, 0.001796547184, -0.03250368708, -0.03799355638]
        | [0.03173641433, 0.002558101355, -0.02897211821, -0.03386550590]""",
    )


@pytest.mark.parametrize("clipping", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1), (2, 3, 2, 2, 2)])
def test_agc_is_pytorch_optimizers(shape: tuple[int, ...], clipping: float) -> None:
    # three dimensions are left out: that package reduces only the second axis there
    (p,) = starts([shape])
    for (grad,) in gradients(4, [shape]):
        (ours,) = updates([C.adaptive_gradient_clip(clipping=clipping)], [grad], p)
        close(ours, agc(p, grad, 1e-3, clipping, 1e-6), rtol=60 * EPS, atol=0.0)


def test_agc_of_three_dimensions_is_unit_wise_too() -> None:
    ((g,),), (p,) = gradients(1, [(4, 3, 2)]), starts([(4, 3, 2)])
    (ours,) = updates([C.adaptive_gradient_clip], [g], p)
    flat = agc(p.reshape(4, 6), g.reshape(4, 6), 1e-3, 1e-2, 1e-6)
    close(ours.reshape(4, 6), flat, rtol=60 * EPS, atol=0.0)


def test_agc_leaves_alone_what_is_within_the_bound_however_small_that_is() -> None:
    # the bound is 1e-4 * 1e-3, below the floor 1e-6 of the gradient's norm
    p = torch.zeros(4, dtype=torch.float64)
    grad = torch.full((4,), 1e-8, dtype=torch.float64)
    assert torch.equal(updates([C.adaptive_gradient_clip(clipping=1e-4)], [grad], p)[0], grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("element", "size"),
    [
        (C.clip_by_norm, 1.0),
        (C.clip_by_global_norm, 1.0),
        (C.l2_normalize, 1.0),
        (C.clip_by_rms, N**0.5),
        (C.rms_normalize, N**0.5),
    ],
    ids=repr,
)
def test_a_sum_of_squares_does_not_overflow(element: object, size: float, compiled: bool) -> None:
    """The largest that a gradient may be: so many squares of 2^56 are 2^129, infinite in float32."""
    param = torch.nn.Parameter(torch.zeros(N))
    optimizer = C.ChainOpt([param], 1.0, element, compile=compiled)
    param.grad = torch.full((N,), 1e30)
    optimizer.step()
    # 20 roundings, and 1e-6 beside the norm
    torch.testing.assert_close(param.detach(), torch.full((N,), -size / N**0.5), rtol=3e-6, atol=0)
