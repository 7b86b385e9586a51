"""The global clip by the last step's norm, against its recurrence in float64."""

import math

import pytest
import torch

import heavyball
from heavyball import chainable as C

SHAPES = ((3, 2), (5,), (2, 2, 2))
# norms go up, jump, come down, and one gradient is zero
SIZES = (0.2, 3.0, 50.0, 0.5, 0.0, 4.0)


def gradients(step, sizes=SIZES):
    made = torch.Generator().manual_seed(step)
    return [
        torch.randn(shape, generator=made, dtype=torch.float64) * sizes[step] for shape in SHAPES
    ]


def norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def clipped(grads, last, max_norm):
    """What becomes of the gradients of a step, and the norm that the next goes by."""
    return [g * min(1.0, max_norm / max(last, norm([g]), 1e-300)) for g in grads], norm(grads)


def updates_of(opt, params, grads, fused=False):
    """What a step of size 1 takes away."""
    before = [p.detach().clone() for p in params]
    if fused:
        sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
    else:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
    opt.step()
    return [b - p.detach() for b, p in zip(before, params, strict=True)]


def parameters():
    return [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_every_step_is_that_of_the_recurrence_over_all_groups(fused, compile):
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = C.ChainOpt(
        groups, 1.0, C.clip_by_last_norm(max_norm=2.0), fuse_backward=fused, compile=compile
    )
    last = 0.0
    for step in range(len(SIZES)):
        grads = gradients(step)
        expected, last = clipped(grads, last, 2.0)
        for ours, theirs in zip(updates_of(opt, params, grads, fused), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        assert [float(g["last_norm"]) for g in opt.param_groups] == pytest.approx([last] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_of_the_page_hold_and_are_reached(seed):
    made = torch.Generator().manual_seed(seed)
    sizes = torch.rand(len(SIZES), generator=made).mul(8).exp().div(50).tolist()
    params, last, max_norm = parameters(), 0.0, 1.5
    opt = C.ChainOpt(
        params, 1.0, C.clip_by_last_norm(max_norm=max_norm), fuse_backward=True, compile=False
    )
    for step in range(len(SIZES)):
        grads = gradients(step, sizes)
        updates = updates_of(opt, params, grads, True)
        slack = 1 + 1e-12
        assert max(norm([u]) for u in updates) <= max_norm * slack
        assert norm(updates) <= max_norm * math.sqrt(len(params)) * slack
        assert norm(updates) <= max_norm * norm(grads) / max(last, max_norm) * slack
        last = norm(grads)
    # once more the same gradients: together they are as long as the bound
    if last > max_norm:
        assert norm(updates_of(opt, params, grads, True)) == pytest.approx(max_norm)


def test_steps_that_are_accumulated_count_once():
    params = parameters()
    chain = (C.accumulate(2), C.clip_by_last_norm(max_norm=2.0))
    opt = C.ChainOpt(params, 1.0, *chain, fuse_backward=True, compile=False)
    last = 0.0
    for step in (0, 2, 4):
        first, second = gradients(step), gradients(step + 1)
        assert norm(updates_of(opt, params, first, True)) == 0
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        expected, last = clipped(mean, last, 2.0)
        for ours, theirs in zip(updates_of(opt, params, second, True), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_only_what_has_a_gradient_counts_and_an_infinite_norm_is_forgotten():
    params = parameters()
    opt = C.ChainOpt(params, 1.0, C.clip_by_last_norm, compile=False)
    params[0].grad = torch.full_like(params[0], 2.0)
    opt.step()
    assert float(opt.param_groups[0]["last_norm"]) == pytest.approx(2 * math.sqrt(6))
    params[0].grad = torch.full_like(params[0], math.nan)
    opt.step()
    assert float(opt.param_groups[0]["last_norm"]) == pytest.approx(2 * math.sqrt(6))
    opt.zero_grad()
    opt.step()
    assert float(opt.param_groups[0]["last_norm"]) == pytest.approx(2 * math.sqrt(6))


def test_presets_take_it_by_name_and_a_checkpoint_holds_the_norm():
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    options = {"gradient_clipping": "last_norm_clip", "fuse_backward": True, "compile": False}
    opt = heavyball.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        model(torch.full((4, 3), 3.0)).square().sum().backward()
        opt.step()
    other = heavyball.AdamW(twin.parameters(), lr=0.1, **options)
    other.load_state_dict(opt.state_dict())
    twin.load_state_dict(model.state_dict())
    for one, its in ((model, opt), (twin, other)):
        one(torch.full((4, 3), 2.0)).square().sum().backward()
        its.step()
    assert torch.equal(model.weight, twin.weight)
