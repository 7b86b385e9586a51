"""Pieces of work side by side: which, what they give, and what other threads notice of it."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import heavyball
from heavyball import chainable as C
from heavyball.linalg import scratch
from heavyball.runtime import serve as whole
from heavyball.runtime import threads

MUCH = float(threads.LEAST)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("costs", "count", "expected"),
    [
        ((MUCH, MUCH), 2, (0, 1)),
        ((MUCH, 2 * MUCH, MUCH), 2, (1, 0, 2)),  # the longest first
        ((MUCH, MUCH, MUCH), 2, (1, 2)),  # one that has no match is done with all threads
        ((MUCH, 9 * MUCH, MUCH), 2, (0, 2)),
        ((MUCH, 9 * MUCH), 2, ()),  # a thread would wait for the other most of the time
        ((MUCH, MUCH), 1, ()),
        ((MUCH,), 2, ()),
        ((), 2, ()),
        ((MUCH / 9, MUCH / 9), 2, ()),  # done before a thread has begun
        ((MUCH,) * 4, 4, (0, 1, 2, 3)),
        ((MUCH,) * 3, 4, ()),
    ],
)
def test_which_are_done_side_by_side(costs: tuple, count: int, expected: tuple) -> None:
    assert threads.side_by_side(costs, count) == expected


def test_results_come_in_order_each_from_one_thread() -> None:
    met = threading.Barrier(2, timeout=30)  # both are at work at once

    def fn(number: int) -> tuple[int, int, int, bool]:
        met.wait()
        return number, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = threads.each(fn, [7, 8], [MUCH, 1.2 * MUCH])
    assert [f[0] for f in found] == [7, 8]
    assert len({threading.get_ident(), *(f[1] for f in found)}) == 3
    assert [f[2:] for f in found] == [(1, False)] * 2
    assert torch.get_num_threads() == 2


def test_threads_of_others_have_as_many_threads_as_before() -> None:
    threads.each(str, [1, 2], [MUCH, MUCH])
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [2]


def test_an_error_is_raised_when_nobody_works_any_more() -> None:
    ended = threading.Event()

    def fn(number: int) -> None:
        if number == 0:
            raise ValueError("zero")
        ended.wait(0.2)
        ended.set()

    with pytest.raises(ValueError, match="zero"):
        threads.each(fn, [0, 1], [MUCH, MUCH])
    assert ended.is_set()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_everything() -> None:
    x = torch.eye(3)
    with Seen() as seen:
        threads.each(lambda _: x @ x, [1, 2], [MUCH, MUCH])
    assert "mm" in seen.names


@pytest.mark.parametrize("state", [torch.inference_mode(), torch.autocast("cpu")], ids=["i", "a"])
def test_state_of_the_caller_s_thread_holds(state) -> None:
    x = torch.eye(3)
    with state:
        here = torch.mm(x, x)
        for one in threads.each(lambda _: torch.mm(x, x), [1, 2], [MUCH, MUCH]):
            assert (one.dtype, one.is_inference()) == (here.dtype, here.is_inference())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_makes_its_own_threads() -> None:
    threads.each(str, [1, 2], [MUCH, MUCH])
    assert threads.pools
    child = os.fork()
    if not child:
        os._exit(bool(threads.pools))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


CHAINS = {
    "soap": lambda: (C.soap_precond(precondition_frequency=2),),
    "psgd": lambda: (C.psgd_kron(preconditioner_update_probability=1.0),),
    "muon": lambda: (C.route(C.when(C.muon, min_ndim=2), otherwise=C.sign),),
    "shampoo": lambda: (C.graft(C.shampoo, C.scale_by_adam),),
}
# three of a kind beside one that is not, so that some are done with all threads; square, so that after
# one gradient no eigenvector is arbitrary
SHAPES = ((96, 96), (96, 96), (96, 96), (40, 40), (33,), ())


def trained(name: str, count: int, monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(count)
    monkeypatch.setattr(threads, "LEAST", 0)
    monkeypatch.setattr(whole, "STACKED", 0)  # one call for each
    threads.side_by_side.cache_clear()
    draws = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=draws, dtype=torch.float64)) for s in SHAPES
    ]
    opt = C.ChainOpt(params, 0.01, *CHAINS[name]())
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draws, dtype=torch.float64)
        opt.step()
    threads.side_by_side.cache_clear()
    return params, opt


@pytest.mark.parametrize("name", CHAINS)
def test_steps_do_not_depend_on_the_threads(name: str, monkeypatch) -> None:
    asked: list[tuple] = []
    real = threads.side_by_side

    def noted(costs, count):
        asked.append(real(costs, count))
        return asked[-1]

    noted.cache_clear = real.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(threads, "side_by_side", noted)
    one, first = trained(name, 1, monkeypatch)
    assert not any(asked)
    two, second = trained(name, 2, monkeypatch)
    again, _ = trained(name, 2, monkeypatch)
    assert any(asked)
    for p, q, r in zip(one, two, again, strict=True):
        # roundings of products with another number of threads, through five eigendecompositions
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
        assert torch.equal(q, r)
        assert first.state[p].keys() == second.state[q].keys()


def test_memory_of_a_step_is_given_back(monkeypatch) -> None:
    trained("soap", 2, monkeypatch)
    found = threads.each(lambda _: scratch.blocks.found, [1, 2], [MUCH, MUCH])
    assert found == [None, None]
    with scratch.reused():
        outer = scratch.blocks.found
        inner = threads.each(lambda _: scratch.blocks.found, [1, 2], [MUCH, MUCH])
        assert all(any(block is held for held in outer.values()) for block in inner)


def test_presets_step_on_two_threads() -> None:
    """The real threshold, with parameters large enough to reach it."""
    params = [torch.nn.Parameter(torch.randn(256, 256)) for _ in range(2)]
    opt = heavyball.SOAP(params, precondition_frequency=1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert all(p.isfinite().all() for p in params)
