"""A clip outside of a fused backward has no effect, and says so."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # before heavyball, as scripts do

import heavyball


def begun(fused=True):
    model = nn.Linear(3, 2)
    opt = heavyball.AdamW(model.parameters(), fuse_backward=fused, compile=False)
    model(torch.ones(4, 3)).square().mean().backward()
    return model, opt


CLIPS = {
    "clip_grad_norm_": lambda params, bound: clip_grad_norm_(params, bound),
    "clip_grad_value_": lambda params, bound: clip_grad_value_(params, clip_value=bound),
    "by its module": lambda params, bound: torch.nn.utils.clip_grad_norm_(params, max_norm=bound),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("give", [lambda m: m.parameters(), lambda m: list(m.parameters())])
def test_a_clip_that_finds_no_gradients_warns_once(name, give):
    model, opt = begun()
    with pytest.warns(RuntimeWarning, match=r"clip_grad_.*AdamW with fuse_backward") as told:
        CLIPS[name](give(model), 1.0)
    assert told[0].filename == __file__
    opt.step()
    model(torch.ones(4, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLIPS[name](give(model), 1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CLIPS)
def test_what_clips_nothing_of_it_says_nothing(name):
    model, opt = begun()
    CLIPS[name](model.parameters(), math.inf)
    other = nn.Linear(3, 2)
    other(torch.ones(4, 3)).sum().backward()
    CLIPS[name](other.parameters(), 1e-3)
    assert all(p.grad.abs().max() <= 1e-3 for p in other.parameters())
    plain, _ = begun(fused=False)
    CLIPS[name](plain.parameters(), 1.0)
    heavyball.fuse_backward(opt).remove()
    model(torch.ones(4, 3)).sum().backward()
    CLIPS[name](model.parameters(), 1.0)


def test_a_clip_does_what_it_did():
    begun()
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = clip_grad_norm_((q for q in [p]), 1.0, norm_type=2)
        assert norm == 5.0
        torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
        clip_grad_value_(p, 0.7)
    assert p.grad.max() == pytest.approx(0.7)
