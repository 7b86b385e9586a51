"""Averages of the weights stay whole whatever the optimizer itself writes and whatever interrupts it."""

import contextlib
import warnings

import pytest
import torch
from helpers import all_params, clones, fill_gradients, parameters

from heavyball import chainable as C

AVERAGES = {
    "parameter_ema": (C.exp_avg, C.parameter_ema(beta=0.9)),
    "schedule_free": (C.scale_by_exp_avg_sq, C.schedule_free),
    "window_average": (C.exp_avg, C.window_average(k=3, every=1)),
}


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights were written")
        yield


def shown(opt):
    """The weights to train with and those to evaluate with."""
    with opt.averaged():
        average = clones(all_params(opt))
    return clones(all_params(opt)), average


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("element", [C.sam, C.asam, C.looksam])
def test_a_second_gradient_leaves_the_average_alone(element, average):
    """With gradients that do not depend on the weights it is the chain without it."""

    def run(*chain):
        opt = C.ChainOpt(parameters(), 0.01, *chain, compile=False)
        for step in range(5):

            def closure(step=step):
                fill_gradients(all_params(opt), step)
                return torch.tensor(1.0)

            opt.step(closure)
        return shown(opt)

    found, plain = run(element, *AVERAGES[average]), run(*AVERAGES[average])
    for a, b in zip(found, plain, strict=True):
        # looksam adds and takes away what its gradients have in common
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("alone", [False, True])
def test_a_step_that_an_exception_ends_leaves_the_averages_alone(average, alone):
    failing = []

    def fail(update):
        if failing and not failing.pop():
            raise MemoryError
        return update

    opt = C.ChainOpt(parameters(), 0.01, C.apply(fn=fail), *AVERAGES[average], compile=False)
    for step in range(6):
        fill_gradients(all_params(opt), step)
        if step == 3:
            failing[:] = [False, True, True]
        before = shown(opt)
        with contextlib.suppress(MemoryError):
            if alone:
                for p in all_params(opt):
                    opt.step_parameter(p)
            opt.step()
        if step == 3:
            after = shown(opt)
            for old, new, mean in zip(before[0], *after, strict=True):
                # what was stepped has moved, and its average is not at its weights
                assert torch.equal(old, new) or not torch.equal(new, mean)
            assert not torch.equal(before[0][0], after[0][0])
        failing.clear()
