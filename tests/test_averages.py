"""Averages of the weights stay whole whatever the optimizer itself writes and whatever interrupts it."""

import contextlib
import warnings

import pytest
import torch
from helpers import all_params, clones, fill_gradients, parameters

from heavyball import chainable as C
from heavyball.compiler.run import watch
from heavyball.optim.writes import Writes

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


# ---- weights that somebody writes where torch counts no writes


def into_data(p, new):
    p.data.copy_(new)


def other_memory(p, new):
    p.data = new.clone()


def from_a_vector(p, new):
    torch.nn.utils.vector_to_parameters(new.flatten(), [p])


def exchanged(p, new):
    """As averages are swapped in."""
    p.data, new.data = new.data.clone(), p.data


def merged(p, new):
    """As peft merges an adapter."""
    p.data += new - p.data


def counted(p, new):
    with torch.no_grad():
        p.copy_(new)


WAYS = (into_data, other_memory, from_a_vector, exchanged, merged, counted)


def trained(average, **options):
    opt = C.ChainOpt(parameters(), 0.01, *AVERAGES[average], **options)
    for step in range(3):
        fill_gradients(all_params(opt), step)
        opt.step()
    return opt


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("average", ["parameter_ema", "schedule_free"])
@pytest.mark.parametrize("compile", ["auto", False])
def test_weights_written_while_training_are_noticed(way, average, compile):
    """They are the average and the point to train on; the other parameters go on bit for bit."""
    for look in ("eval", "step", "state_dict"):
        opt, twin = trained(average, compile=compile), trained(average, compile=compile)
        params = all_params(opt)
        written = max(params, key=torch.Tensor.numel)
        new = torch.randn(written.shape, generator=torch.Generator().manual_seed(3))
        way(written, new.to(written.dtype))
        held = written.detach().clone()
        if look == "step":
            fill_gradients(params, 9)
        with pytest.warns(UserWarning, match="other weights were written"):
            getattr(opt, look)()
        if look == "step":
            fill_gradients(all_params(twin), 9)
            twin.step()
            far = (written - held).abs().max().item()
            assert 0 < far < 0.1  # one step from there
        opt.eval(), twin.eval()
        for p, q in zip(params, all_params(twin), strict=True):
            if p is not written:
                assert torch.equal(p, q)
            elif look != "step":
                torch.testing.assert_close(p.detach(), held)


def no_write(p):
    p.data = p.data.clone()


def another_row(p):
    p.data[0] = 0


def the_same_values(p):
    p.data.copy_(p.data.clone())


@pytest.mark.parametrize(
    "change", [no_write, another_row, the_same_values], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("options", [{}, {"fuse_backward": True}, {"compile": False}], ids=str)
def test_what_is_no_loaded_weights_warns_of_nothing(change, options):
    """Memory that has moved, and edits of a part: the fixture makes the warning an error."""
    opt = C.ChainOpt(parameters(), 0.01, *AVERAGES["schedule_free"], **options)
    params = all_params(opt)
    for step in range(6):
        if options.get("fuse_backward"):
            sum((p * (1 + step)).sin().sum() for p in params).backward()
        else:
            fill_gradients(params, step)
        opt.step()
        for p in params:
            if p.ndim == 2:
                change(p)
        if step == 3:
            opt.eval()
            opt.train()
    with opt.averaged():
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("layout", ["strided", "transposed", "empty", "one", "bfloat16"])
@pytest.mark.parametrize("compiler", [True, False])
def test_a_write_is_seen_in_every_layout(layout, compiler, monkeypatch):
    if compiler:
        assert watch.sampler() is not None
    else:
        monkeypatch.setattr(watch, "sampler", lambda: None)
    made = torch.arange(60.0).reshape(6, 10)
    p = {
        "strided": made[::2, ::3],
        "transposed": made.t(),
        "empty": made[:0],
        "one": made[3, 3],
        "bfloat16": made.bfloat16(),
    }[layout]
    noted = Writes([p])
    assert not noted.changed()
    if p.numel():
        p.data.copy_(p + 1)
        assert noted.changed() == noted.changed(p) == {p}
        noted.note(p)
        assert not noted.changed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_come_between_two_looks_change_nothing(dtype, monkeypatch):
    """What was sampled with or without a compiler compares with what the other one samples."""
    p = torch.arange(1.0, 61.0).to(dtype)
    sampler = watch.sampler
    assert sampler() is not None
    for first, second in ((sampler, lambda: None), (lambda: None, sampler)):
        monkeypatch.setattr(watch, "sampler", first)
        noted = Writes([p])
        monkeypatch.setattr(watch, "sampler", second)
        assert not noted.changed()
        p.data.copy_(p / 2 + 1)
        assert noted.changed() == {p}


@pytest.mark.parametrize("options", [{}, {"fuse_backward": True}, {"compile": False}], ids=str)
def test_parameters_made_of_one_buffer_are_told_apart(options):
    """They share the count of what is written into any of them; the fixture makes a warning an error."""
    flat = torch.linspace(-1, 1, 800)
    params = [torch.nn.Parameter(flat[i : i + 200].view(10, 20)) for i in range(0, 600, 200)]
    opt = C.ChainOpt(params[:2], 0.01, *AVERAGES["schedule_free"], **options)
    other = C.ChainOpt(params[2:], 0.01, C.scale_by_adam)

    def step():
        sum((p - 2).square().sum() for p in params).backward()
        opt.step()
        other.step()
        other.zero_grad()
        opt.zero_grad()

    for _ in range(4):
        step()
        flat[700:].add_(1)
    with opt.averaged():
        average = clones(params)
    assert not any(map(torch.equal, clones(params)[:2], average[:2]))
    with torch.no_grad():
        params[1].fill_(0.5)
    with pytest.warns(UserWarning, match="parameter 1 of group 0 .* other weights were written"):
        step()
