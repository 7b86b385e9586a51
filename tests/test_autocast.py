"""A step inside `torch.autocast` is the step outside, bit for bit, whatever calls it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import differences, fill_gradients, parameters, snapshot

import heavyball
from heavyball import chainable as C
from heavyball.optim.singles import sums_in

LOW = [torch.bfloat16, torch.float16]


def inside(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """All autocasts that there are on this machine."""
    stack = contextlib.ExitStack()
    if dtype is not None:
        stack.enter_context(torch.autocast("cpu", dtype))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", dtype))
    return stack


def by_step(opt: C.ChainOpt, params: list[torch.Tensor]) -> None:
    opt.step()


def one_by_one(opt: C.ChainOpt, params: list[torch.Tensor]) -> None:
    for p in params:
        opt.step_parameter(p)


def in_backward(opt: C.ChainOpt, params: list[torch.Tensor]) -> None:
    heavyball.fuse_backward(opt)
    grads = [p.grad for p in params]
    opt.zero_grad()
    # sums of products, which autocast leaves alone
    sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
    opt.step()


def trained(
    name: str, dtype: torch.dtype | None, way: Callable, steps: int = 3, **options: object
) -> Iterator[dict[str, torch.Tensor]]:
    # one with elongated sides and one that is nearly square
    params = parameters((6, 4), (4, 12), (3,))
    opt = getattr(heavyball, name)(params, lr=1e-2, **options)
    with inside(dtype):
        opt.init_state()
    for seed in range(steps):
        fill_gradients(params, seed)
        with inside(dtype):
            way(opt, params)
        yield snapshot(opt)
    with inside(dtype), opt.averaged():
        yield snapshot(opt)
    with inside(dtype):
        opt.eval()
        opt.train()
    yield snapshot(opt)


def assert_equal(name: str, dtype: torch.dtype, way: Callable, **options: object) -> None:
    runs = [trained(name, d, way, **options) for d in (None, dtype)]
    for want, got in zip(*runs, strict=True):
        assert not differences(want, got)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("AdamW", LOW[1]), *zip(heavyball.PRESETS, itertools.cycle(LOW), strict=False)],
    ids=str,
)
def test_steps_are_the_same(name: str, dtype: torch.dtype) -> None:
    assert_equal(name, dtype, by_step, compile=False)


def alone(name: str) -> bool:
    """Whether a step needs no more than the gradient of its parameter."""
    opt = getattr(heavyball, name)(parameters())
    return not any(sums_in(program) for program in opt.chain.programs)


ALONE = [name for name in heavyball.PRESETS if alone(name)]


@pytest.mark.parametrize(
    ("name", "way"),
    [*zip(ALONE, itertools.cycle([one_by_one, in_backward]), strict=False)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_steps_of_one_parameter_are_the_same(name: str, way: Callable) -> None:
    assert_equal(name, torch.bfloat16, way, compile=False)


@pytest.mark.parametrize("name", ["AdamW", "SOAP", "Muon"])
def test_compiled_steps_are_the_same(name: str) -> None:
    for way in (by_step, in_backward):
        assert_equal(name, torch.bfloat16, way)


def test_the_closure_is_the_user_s() -> None:
    (p,) = parameters((3, 3))
    found = []

    def closure() -> torch.Tensor:
        found.append((p @ p).dtype)
        p.grad = torch.ones_like(p)
        return found[0]

    with torch.autocast("cpu", torch.bfloat16):
        assert heavyball.AdamW([p]).step(closure) == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert (p @ p).dtype == torch.bfloat16


def test_the_model_sees_the_new_weights_in_the_same_block() -> None:
    (p,) = parameters((3, 3))
    x = torch.eye(3)
    opt = heavyball.SGD([p], lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = x @ p
        before.sum().backward()
        opt.step()
        after = x @ p  # autocast keeps the weights that it has cast
    assert torch.equal(after, p.detach().bfloat16())
    assert not torch.equal(after, before)
