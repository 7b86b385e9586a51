"""The compiled path against the eager one, which is plain torch and the reference."""

import copy
import gc
import multiprocessing
import os
import pickle
import threading
import warnings
import weakref

import fresh
import pytest
import torch
from helpers import CONDITIONS, QUICK, anywhere, conditional, modifies, one_step
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import heavyball
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.printer import BATCH, CHUNK, SMALL
from heavyball.compiler.run import engine, kernels
from heavyball.compiler.run import table as launch

C = heavyball.chainable

# What random chains are made of: stages in the order that makes sense, each taken or left out.
STAGES = (
    (
        C.centralize,
        C.mars,
        C.orthograd,
        C.adaptive_gradient_clip,
        C.clip_by_global_norm(max_norm=0.5),
    ),
    (
        C.exp_avg,
        C.scale_by_adam,
        C.scale_by_laprop,
        C.scale_by_adopt,
        C.scale_by_nadam,
        C.scale_by_lion,
        C.factored_rms(min_dim=4),
        C.focus,
        C.stable_adamw,
        C.heavyball_momentum,
        C.scale_by_ademamix,
        C.scale_by_rms(centered=True),
    ),
    (C.clip_update_rms, C.trust_region, C.mu_law, C.sign(graft=True)),
    (C.cautious, C.grams, C.cautious(scale="sum_plus_one")),
    (C.decoupled(weight_decay=0.1), C.cautious_decay(weight_decay=0.1), C.adamc(weight_decay=0.1)),
    (C.schedule_free, C.parameter_ema(beta=0.5)),
)
SHAPES = ((), (1,), (7,), (5, 6), (6, 5), (1, 9), (9, 1), (4, 5, 3, 2), (70_001,), (300, 260))


def values(shape: tuple, seed: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(dtype)


def pair(chain, shapes, dtype=torch.float32, steps=3, grads=None, **options):
    """The same steps without and with kernels."""
    found = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(values(s, i, dtype)) for i, s in enumerate(shapes)]
        opt = C.ChainOpt(params, 0.05, *chain, compile=compiled, **options)
        for step in range(steps):
            for i, p in enumerate(params):
                p.grad = values(tuple(p.shape), 100 * step + i, grads or dtype)
            one_step(opt)
        found.append((params, opt))
    return found


def assert_near(found, roundings: int = 64) -> None:
    """Parameters and state agree to so many roundings of the tensor's largest entry.

    A step is some twenty operations of one rounding each, and fused multiply-adds drop some of
    them; three steps are below 64. A sign or a comparison is not continuous: an entry may differ
    wholly where its argument is itself a rounding error, so one in a thousand may. Sums are taken
    in another order, in float64: for float64 parameters their n roundings show, as a random walk.
    """
    (eager, one), (compiled, two) = found
    largest = max(p.numel() for p in eager)
    if eager[0].dtype == torch.float64:
        roundings += round(4 * largest**0.5)
    for p, q in zip(eager, compiled, strict=True):
        tensors = [(p.detach(), q.detach(), p.dtype)]
        tensors += [(t, two.state[q][k], t.dtype) for k, t in one.state[p].items()]
        assert one.state[p].keys() == two.state[q].keys()
        for a, b, dtype in tensors:
            unit = torch.finfo(torch.float32 if p.dtype != torch.float64 else p.dtype).eps
            if dtype in (torch.bfloat16, torch.float16):
                # a parameter rounds once more, to either neighbour
                unit = torch.finfo(dtype).eps / roundings
            scale = a.double().abs().max().clamp(min=1e-30)
            wrong = (a.double() - b.double()).abs() > roundings * unit * scale
            assert wrong.sum() <= a.numel() // 1000, (
                a.shape,
                (a.double() - b.double()).abs().max(),
            )


@pytest.mark.parametrize("name", C.TRANSFORMS)
def test_every_transform_has_a_kernel_that_does_what_it_does(name: str) -> None:
    # a kernel takes half a second to compile, so one dtype each, in turn
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    dtype = dtypes[list(C.TRANSFORMS).index(name) % 4]
    chain = [anywhere(C.TRANSFORMS[name])]
    chain += [C.scale_by_adam] if modifies(C.TRANSFORMS[name]) else []
    chain = [C.to_eigenbasis, *chain] if name == "from_eigenbasis" else chain
    assert_near(pair(chain, SHAPES[:8], dtype, stochastic_rounding=False))


# a new chain takes a second or two to compile, so shrinking one would take minutes
@settings(max_examples=6 if QUICK else 12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_random_chains_have_kernels_that_do_what_they_do(data: st.DataObject) -> None:
    picks = [data.draw(st.sampled_from((None, *stage))) for stage in STAGES]
    chain = [t for t in picks if t is not None] or [C.descend]
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    try:
        C.ChainOpt([torch.zeros(2)], 0.1, *chain)
    except ValueError:
        return  # a chain that excludes itself
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    assert_near(pair(chain, shapes, dtype, stochastic_rounding=False))


def test_gradients_may_have_another_dtype_than_the_parameter() -> None:
    for dtype, grads in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ):
        params = [torch.nn.Parameter(values((9, 5), 0, dtype)) for _ in range(2)]
        opts = [
            C.ChainOpt([p], 0.1, C.scale_by_adam, compile=c)
            for p, c in zip(params, (False, True), strict=True)
        ]
        for p, opt in zip(params, opts, strict=True):
            p.grad_dtype = None
            p.grad = values((9, 5), 1, grads)
            opt.step()
        torch.testing.assert_close(*params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(300, 401), (8, 6, 5, 5), (7,), ()])
def test_a_kernel_rounds_with_the_same_bits(shape: tuple) -> None:
    """The sign of a constant has no rounding of its own, so every bit must agree."""
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values(shape, 0, torch.bfloat16))
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
        opt = C.ChainOpt([torch.zeros(3), p], 1e-3, C.sign, compile=compiled, seed=7)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            opt.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


FACTORED = (C.factored_rms, C.clip_update_rms, C.cautious)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    ends = []
    for threads, neighbours in ((1, 0), (2, 0), (2, 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            p = torch.nn.Parameter(values((3 * SMALL + CHUNK // 3,), 0, torch.float32))
            m = torch.nn.Parameter(values((500, 300), 1, torch.float32))
            rest = [torch.nn.Parameter(values((9, 4), 2, torch.float32)) for _ in range(neighbours)]
            opt = C.ChainOpt(
                [*rest, p, m], 0.1, C.factored_rms, C.clip_update_rms, C.cautious, compile=True
            )
            for step in range(3):
                for q in (*rest, p, m):
                    q.grad = values(tuple(q.shape), step, torch.float32)
                opt.step()
            ends.append((p.detach().clone(), m.detach().clone()))
        finally:
            torch.set_num_threads(before)
    for end in ends[1:]:
        assert torch.equal(end[0], ends[0][0])
        assert torch.equal(end[1], ends[0][1])


def compiling(monkeypatch, folder, body: str):
    """A compiler that writes a line for each of its runs to the file that is returned."""
    log, tool = folder / "log", folder / "tool"
    real = " ".join(toolchain.compiler())
    tool.write_text(f'#!/bin/sh\necho run >> {log}\n{body}\nexec {real} "$@"\n')
    tool.chmod(0o700)
    monkeypatch.setenv("CXX", str(tool))
    monkeypatch.setenv("HEAVYBALL_CACHE", str(folder / "cache"))
    engine.forget_kernels()
    return log


def test_one_program_serves_every_shape_and_every_hyper_parameter(monkeypatch, tmp_path) -> None:
    log = compiling(monkeypatch, tmp_path, "")
    params = [torch.nn.Parameter(torch.ones(n, n + 1)) for n in range(2, 22)]
    opt = heavyball.AdamW(params, lr=1e-3, compile=True)
    for step in range(4):
        opt.param_groups[0]["lr"] = 1e-3 * (step + 1)
        opt.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert len(log.read_text().splitlines()) == 2  # the kernel, and what compares layouts


def test_several_kernels_are_compiled_at_the_same_time(monkeypatch, tmp_path) -> None:
    # each run waits for the other
    wait = f'until [ "$(wc -l < {tmp_path / "log"})" -ge 2 ]; do sleep 0.01; done'
    compiling(monkeypatch, tmp_path, wait)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    toolchain.prepare([SOURCE, SOURCE.replace("42", "43")])
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


def test_gradients_may_move_and_tensors_may_be_replaced() -> None:
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values((40, 3), 0, torch.float32))
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, compile=compiled)
        kept = []
        for step in range(6):
            p.grad = values((40, 3), step, torch.float32)
            kept.append(p.grad)  # so that the next one lies elsewhere
            if step == 2:
                p.data = p.data.clone()
            if step == 3:
                opt.state[p]["scale_by_adam.exp_avg"] = opt.state[p][
                    "scale_by_adam.exp_avg"
                ].clone()
            if step == 4:
                opt.state[p] = {k: t.clone() for k, t in opt.state[p].items()}
            opt.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "gradient transposed"])
def test_every_layout_gives_the_eager_result(layout: str) -> None:
    ends = []
    for compiled in (False, True):
        x = values((4, 6, 5, 5), 0, torch.float32)
        grad = values((4, 6, 5, 5), 1, torch.float32)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        if layout == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            x = torch.zeros(4, 6, 5, 9)[..., :5].copy_(x)
        if layout == "gradient transposed":
            grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
        p = torch.nn.Parameter(x)
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, C.cautious, C.centralize, compile=compiled)
        for _ in range(3):
            p.grad = grad.clone(memory_format=torch.preserve_format)
            opt.step()
        assert p.stride() == x.stride()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_passes_over_several_batches_each_meet_their_own_chunks() -> None:
    """Four large tensors in three batches; every other pass walks a batch backwards."""
    shapes = ((BATCH + 5,), (BATCH // 2 + 3,), (BATCH // 2 + SMALL,), (SMALL + 1,))
    assert_near(pair((C.scale_by_adam, C.cautious), shapes, steps=2))


@pytest.mark.parametrize("fused", [False, True])
def test_a_changed_seed_gives_other_random_bits(fused: bool) -> None:
    ends = []
    for compiled, seed in ((False, 5), (True, 5), (True, 6)):
        p = torch.nn.Parameter(values((300,), 0, torch.bfloat16))
        opt = C.ChainOpt([p], 1e-3, C.sign, compile=compiled, seed=3)
        for step in range(4):
            opt.param_groups[0]["seed"] = 3 if step < 2 else seed
            p.grad = torch.ones_like(p)
            opt.step_parameter(p) if fused else opt.step()
        ends.append(p.detach().clone())
    eager, same, other = ends
    assert torch.equal(eager, same)
    assert not torch.equal(same, other)


@pytest.mark.parametrize("way", ["step", "step_parameter", "backward"])
def test_a_gradient_may_change_its_dtype_between_steps(way: str) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values((300,), 0, torch.float32))
        p.grad_dtype = None
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, compile=compiled)
        if way == "backward":
            heavyball.fuse_backward(opt)
        for step, kind in enumerate(kinds):
            grad = values((300,), 1 + step, kind)
            if way == "backward":
                # the gradient takes the dtype of what the parameter is cast to
                torch.autograd.backward([_Cast.apply(p, kind)], [grad])
            else:
                p.grad = grad
            opt.step_parameter(p) if way == "step_parameter" else opt.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


class _Cast(torch.autograd.Function):
    """A cast whose gradient stays as it comes."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return x.to(kind, copy=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        return grad, None


def test_overlapping_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        C.ChainOpt([torch.zeros(9).as_strided((3, 4), (2, 1))], 0.1, C.sign)


@C.transform()
def with_cumsum(update):
    """Uses an operation that no printer knows."""
    return update.cumsum(0)


def test_an_unknown_operation_runs_eagerly_with_one_warning_that_names_it(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "warned", set())
    p = torch.nn.Parameter(torch.ones(4))
    opt = C.ChainOpt([p], 0.1, with_cumsum)
    p.grad = torch.ones(4)
    with pytest.warns(RuntimeWarning, match="cumsum"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        opt.step()
    torch.testing.assert_close(p.detach(), 1 - 0.3 * torch.arange(1.0, 5.0))
    strict = C.ChainOpt([p], 0.1, with_cumsum, compile=True)
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cumsum"):
            strict.step()
    assert torch.equal(p.detach(), before)


def test_a_failing_compiler_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HEAVYBALL_CACHE", str(tmp_path))
    with pytest.raises(toolchain.ToolchainError, match="error"):
        toolchain.load("this is not C++")
    assert not list(tmp_path.iterdir())


def test_the_process_can_switch_kernels_off(monkeypatch) -> None:
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    monkeypatch.setattr(kernels, "build", lambda printer: pytest.fail("a kernel was built"))
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    heavyball.AdamW([p], compile=True).step()
    assert (p < 1).all()


def test_kernels_switched_off_in_mid_training_are_not_used(monkeypatch) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    opt = heavyball.AdamW([p], compile=True)
    opt.step()
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    monkeypatch.setattr(launch.Table, "launch", lambda *args: pytest.fail("a kernel ran"))
    opt.step()


@C.transform()
def scaled(update, *, bound: C.Live = 0.5):
    """Prints the same code as clip_by_norm would, with another name for its number."""
    return update * (bound / torch.linalg.vector_norm(update, dtype=torch.float64)).clamp(max=1)


def test_kernels_with_the_same_code_read_their_own_hyper_parameters() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(s)) for s in ((3,), (2, 2), (2, 2)))
    for p in (a, b, c):
        p.grad = torch.full_like(p, 2.0)
    halves = C.route(
        C.when(C.clip_by_norm(max_norm=0.5), ndim=1), otherwise=C.clip_by_norm(max_norm=0.25)
    )
    C.ChainOpt([a, b], 1.0, halves, compile=True).step()
    C.ChainOpt([c], 1.0, scaled(bound=1.0), compile=True).step()
    # a norm of b spreads over four equal entries, b / 2 each
    torch.testing.assert_close(b.detach(), torch.full((2, 2), 1 - 0.125))
    torch.testing.assert_close(c.detach(), torch.full((2, 2), 0.5))


SOURCE = 'extern "C" int answer() { return 42; }'


def test_the_cache_is_private_and_a_damaged_file_is_built_again(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HEAVYBALL_CACHE", str(tmp_path / "cache"))
    assert toolchain.load(SOURCE).answer() == 42
    (path,) = (tmp_path / "cache").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    made = path.stat().st_mtime_ns
    assert toolchain.load(SOURCE).answer() == 42
    assert path.stat().st_mtime_ns == made
    content = path.read_bytes()
    path.unlink()  # the loaded one stays mapped
    path.write_bytes(content[: len(content) // 2])
    path.chmod(0o700)
    assert toolchain.load(SOURCE).answer() == 42
    assert path.stat().st_size == len(content)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_write_is_refused(monkeypatch, tmp_path, mode: int) -> None:
    tmp_path.chmod(mode)
    monkeypatch.setenv("HEAVYBALL_CACHE", str(tmp_path))
    with pytest.raises(toolchain.ToolchainError, match="another user"):
        toolchain.load(SOURCE)


def test_the_cache_has_a_bound(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HEAVYBALL_CACHE", str(tmp_path))
    toolchain.load(SOURCE)
    size = next(tmp_path.glob("*.so")).stat().st_size
    monkeypatch.setattr(toolchain, "LIMIT_BYTES", int(2.5 * size))
    for number in range(4):
        toolchain.load(SOURCE.replace("42", str(number)))
    assert len(list(tmp_path.glob("*.so"))) == 2


STEP = """
import torch, heavyball
p = torch.nn.Parameter(torch.linspace(-1, 1, 100_000))
opt = heavyball.SFAdamW([p], compile=True)
for _ in range(3):
    p.grad = p.detach() * 0.5
    opt.step()
print(p.double().sum().item().hex())
"""


def test_two_processes_build_at_once_and_a_third_loads(tmp_path) -> None:
    env = {**os.environ, "HEAVYBALL_CACHE": str(tmp_path / "cache")}
    both = [fresh.start(STEP, env=env) for _ in range(2)]
    done = [*(ended() for ended in both), fresh.run(STEP, env=env)]
    assert not any(process.returncode for process in done), [process.stderr for process in done]
    results = [process.stdout for process in done]
    assert len(set(results)) == 1
    assert results[0].strip()


def _child(queue, opt, p) -> None:
    torch.set_num_threads(1)  # torch's own operations would wait for threads that a fork has not
    p.grad = torch.ones_like(p)
    opt.step()
    queue.put(p.detach().sum().item())


def test_a_forked_child_can_step() -> None:
    p = torch.nn.Parameter(torch.ones(300_000))
    opt = heavyball.AdamW([p], compile=True)
    p.grad = torch.ones_like(p)
    opt.step()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, opt, p))
    child.start()
    assert queue.get(timeout=60) < 300_000
    child.join(10)


def test_several_threads_can_step_optimizers_of_their_own() -> None:
    ends: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 200_000))
        opt = heavyball.AdamW([p], compile=True)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            opt.step()
        ends[number] = p.detach().clone()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 4
    assert all(torch.equal(end, ends[0]) for end in ends.values())


def test_the_number_of_threads_may_change_between_steps() -> None:
    ends, before = [], torch.get_num_threads()
    try:
        for pattern in ((1,), (2, 1, 3)):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 200_000))
            opt = heavyball.AdamW([p], caution=True, compile=True)
            for step in range(6):
                torch.set_num_threads(pattern[step % len(pattern)])
                p.grad = torch.sin(p.detach() * (step + 1))
                opt.step()
            ends.append(p.detach().clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ends)


def test_a_loader_in_inference_mode_may_run_beside_the_steps() -> None:
    made: list[torch.Tensor] = []
    stop = threading.Event()

    def load() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                made[:] = [torch.ones(300, 300)]

    loader = threading.Thread(target=load)
    loader.start()
    try:
        ends = []
        for compiled in (False, True):
            p = torch.nn.Parameter(torch.zeros(300, 300))
            opt = heavyball.AdamW([p], lr=0.1, compile=compiled)
            for _ in range(5):
                while not made:
                    pass
                batch = made[0].clone()  # an inference tensor takes no part in autograd
                opt.zero_grad()
                ((p - batch) ** 2).sum().backward()
                opt.step()
            ends.append(p.detach().clone())
    finally:
        stop.set()
        loader.join(60)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_step_keeps_no_gradient_alive() -> None:
    p = torch.nn.Parameter(torch.ones(50))
    opt = heavyball.AdamW([p], compile=True)
    for _ in range(3):
        p.grad = torch.ones(50)
        opt.step()
        gone = weakref.ref(p.grad)
        p.grad = None
        gc.collect()
        assert gone() is None


def test_copies_step_as_the_original() -> None:
    p = torch.nn.Parameter(torch.ones(50))
    opt = heavyball.AdamW([p], compile=True)
    p.grad = torch.ones(50)
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (q,) = other.param_groups[0]["params"]
        assert q is not p
        q.grad = torch.ones(50)
        before = p.detach().clone()
        other.step()
        assert torch.equal(p.detach(), before)
        opt_again = copy.deepcopy(opt)
        (r,) = opt_again.param_groups[0]["params"]
        r.grad = torch.ones(50)
        opt_again.step()
        assert torch.equal(q.detach(), r.detach())


def test_a_step_counts_as_a_write_for_autograd() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    opt = heavyball.AdamW([w], compile=True)
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_stands_twice_is_stepped_twice() -> None:
    ends = []
    for compiled in (False, "auto"):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with pytest.warns(UserWarning, match="duplicate"):
            opt = C.ChainOpt([p, p], 0.25, C.sign, compile=compiled)
        opt.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
    assert torch.equal(ends[0], torch.full((3,), 0.5))


def conditioned(names: list[str], dtype: torch.dtype, compile: bool):
    p = torch.nn.Parameter(values((7, 11), 0, dtype))
    opt = C.ChainOpt([p], 0.1, C.exp_avg, conditional(*names)(strength=0.7), compile=compile)
    for step in range(5):
        p.grad = values((7, 11), step + 1, dtype)
        opt.step()
    return p.detach(), opt


FLOATS = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conditions_and_numbers_mix_in_every_operation(dtype: torch.dtype) -> None:
    for name in CONDITIONS:
        conditioned([name], dtype, False)[1].kernel_sources()  # raises where it cannot be printed
    # a dtype meets a third of them in `make test`
    thirds = [FLOATS.index(dtype)] if QUICK else range(3)
    for first in thirds:
        names = list(CONDITIONS)[first::3]
        ends = [conditioned(names, dtype, compile)[0] for compile in (False, True)]
        near = {} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(*ends, **near)


def test_an_update_goes_on_in_the_dtype_of_the_mathematics() -> None:
    """A condition times a number is float64: the transforms behind see float32 in both paths."""
    seen = []

    @C.transform()
    def look(update):
        seen.append(update.dtype)
        return update

    for compile in (False, True):
        p = torch.nn.Parameter(values((7,), 0, torch.float32))
        p.grad = values((7,), 1, torch.float32)
        C.ChainOpt([p], 0.1, conditional("times")(strength=0.7), look, compile=compile).step()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    "rounded",
    [
        lambda u, s: u.double(),
        lambda u, s: u.half(),
        lambda u, s: u * (3 * s).long(),
        lambda u, s: torch.zeros_like(u, dtype=torch.float64) + u,
        lambda u, s: u * ((u > 0) * 2 & 2),
    ],
)
def test_a_dtype_that_was_asked_for_is_not_replaced(rounded) -> None:
    @C.transform()
    def asking(update, *, strength: C.Live = 0.5):
        return rounded(update, strength)

    p = torch.nn.Parameter(values((7,), 0, torch.float32))
    p.grad = values((7,), 1, torch.float32)
    with pytest.raises(RuntimeError, match="runs without a compiled kernel"):
        C.ChainOpt([p], 0.1, asking, compile=True).step()
