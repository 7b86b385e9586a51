"""Every warning is shown at the line of the user's that led to it."""

import pathlib
import re
import threading
import warnings

import pytest
import torch
from helpers import fill_gradients, parameters

import heavyball
from heavyball import chainable as C
from heavyball import errors as module


def by_step(opt, params):
    opt.step()


def by_closure(opt, params):
    opt.step(lambda: 0.0)


def by_the_wrapper_of_a_scheduler(opt, params):
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    opt.step()


def by_a_step_hook(opt, params):
    opt.register_step_pre_hook(lambda *_: None)
    opt.step()


def by_step_parameter(opt, params):
    for p in params:
        opt.step_parameter(p)


def by_backward(opt, params):
    heavyball.fuse_backward(opt)
    sum(p.square().sum() for p in params).backward()


def by_hooks_of_a_trainer(opt, params):
    for p in params:
        p.register_post_accumulate_grad_hook(opt.step_parameter)
    sum(p.square().sum() for p in params).backward()


WAYS = {
    fn.__name__: fn
    for fn in (
        by_step,
        by_closure,
        by_the_wrapper_of_a_scheduler,
        by_a_step_hook,
        by_step_parameter,
        by_backward,
        by_hooks_of_a_trainer,
    )
}


@C.transform()
def unprintable(update):
    """No kernel can be printed for this.

    u' = erfinv(erf(u))

    Shapes: all (*).
    """
    return update.erf().erfinv()


CHAINS = {
    "elementwise": (C.scale_by_adam,),
    "matrix": (C.soap_precond(),),
    "rate": (C.prodigy_plus_d, C.scale_by_exp_avg_sq),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_warns_at_the_line_that_led_to_it(name, way, monkeypatch):
    monkeypatch.setattr("heavyball.compiler.run.kernels.warned", set())
    params = parameters((4, 3), (3, 4))
    fill_gradients(params, 0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        WAYS[way](C.ChainOpt(params, 1.0, *CHAINS[name], unprintable), params)
    assert any("without a compiled kernel" in str(w.message) for w in seen)
    code = WAYS[way].__code__
    last = max(line for *_, line in code.co_lines() if line)
    for w in seen:
        assert w.filename == __file__
        assert code.co_firstlineno < w.lineno <= last


def test_a_thread_without_a_line_of_the_users_shows_where_the_main_thread_is(monkeypatch):
    monkeypatch.setattr(module, "INNER", {*module.INNER, "test_warn"})
    seen = []
    monkeypatch.setattr(warnings, "warn_explicit", lambda m, c, name, line, **_: seen.append(name))
    other = threading.Thread(target=module.warn, args=("said",))
    other.start()
    other.join()
    # nor do the lines of this file count here, so it is that of who runs the test
    assert seen
    assert not re.search(r"/(heavyball|torch)/|threading|test_warn", seen[0])


def test_no_other_place_counts_frames():
    package = pathlib.Path(heavyball.__file__).parent
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"warnings\.warn\b|stacklevel", path.read_text())
    ]
    assert not found
