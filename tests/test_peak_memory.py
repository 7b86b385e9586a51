"""How much memory a step needs at its peak, beyond parameters, gradients and state."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import heavyball

C = heavyball.chainable
LARGEST = 2**16
COUNT = 24


def peak_of(act) -> int:
    """The most bytes that were allocated at one time since the beginning, as torch's profiler saw."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        act()
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def test_the_measure_sees_what_is_allocated() -> None:
    def act() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        torch.zeros(500)
        del second

    assert 12000 <= peak_of(act) <= 12000 + 1024


def extra(chain, dtype=torch.float32, **options) -> float:
    """Bytes at the peak of a later step, over the float32 bytes of the largest parameter."""
    params = [nn.Parameter(torch.ones(256, 256, dtype=dtype)) for _ in range(COUNT)]
    opt = C.ChainOpt(params, 0.01, *chain, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return peak_of(opt.step) / (4 * LARGEST)


CHAINS = {
    "adam": (C.scale_by_adam,),
    "with sums": (C.clip_by_global_norm, C.scale_by_adam, C.cautious, C.schedule_free),
}
FORMS = ("bfloat16", "8bit", "4bit", "rank1")
STORAGE = ({}, *({"storage_dtype": form} for form in FORMS), {"ecc": "bf16+8"})


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("form", STORAGE, ids=str)
def test_without_foreach_a_step_needs_a_few_parameters(chain: str, form: dict) -> None:
    """One parameter's old and new state, update and temporaries, never 24 parameters' of them."""
    found = extra(CHAINS[chain], compile=False, foreach=False, **form)
    # Adam's update, two moments before and after, the gradient and what they are computed from; with
    # other formats the random bits and what the encoding needs.
    assert found < (12 if form else 10), found


@pytest.mark.parametrize("chain", CHAINS)
def test_a_kernel_needs_next_to_nothing(chain: str) -> None:
    # a few pointers and partial sums
    assert extra(CHAINS[chain], compile=True, foreach=False) < 0.05


def test_the_bound_tells_apart_what_keeps_every_parameters_tensors() -> None:
    # with foreach the tensors before a sum wait for the others'
    assert extra(CHAINS["with sums"], compile=False, foreach=None) > COUNT


def test_bfloat16_parameters_too() -> None:
    assert extra(CHAINS["adam"], torch.bfloat16, compile=False, foreach=False) < 12
