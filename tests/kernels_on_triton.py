"""Triton kernels beside plain torch: on a GPU, or in Triton's interpreter on tensors of the CPU.

`test_triton.py` runs this file in the interpreter; without TRITON_INTERPRET=1 it needs a GPU.
"""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import operations
import pytest
import torch
from helpers import CONDITIONS, conditional, made_plans, modifies, one_step
from triton.language import core, semantic
from triton.runtime import interpreter

import heavyball
from heavyball.compiler.triton import device as cuda
from heavyball.compiler.triton import printer as triton_printer
from heavyball.compiler.triton import rows as triton_rows
from heavyball.compiler.triton.printer import BLOCK
from heavyball.numerics import host
from heavyball.runtime.step import working_param
from heavyball.state.held import held

C = heavyball.chainable
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NUMPY = {  # those that numpy has under another name
    "erf": np.vectorize(math.erf, otypes=[float]),
    "nearbyint": np.rint,
    "atan2": np.arctan2,
    "pow": np.power,
}
# The interpreter pays for every block, whatever is in it: two of them are a chunk there.
CHUNK = 2 * BLOCK if INTERPRETED else triton_printer.CHUNK
# one element; less than a block; several axes; two blocks of which one is not full
SHAPES = ((1,), (7,), (3, 5, 2), (BLOCK + 77,))
LONG = (2 * CHUNK + BLOCK + 5,)


class LibDevice:
    """What the interpreter does not have."""

    def __getattr__(self, name: str):
        fn = NUMPY.get(name) or getattr(np, name)

        def call(*arguments):
            with np.errstate(all="ignore"):
                given = [a.handle.data for a in arguments]
                data = np.asarray(fn(*given)).astype(given[0].dtype)
            widest = max(arguments, key=lambda a: a.handle.data.size)
            handle = interpreter.TensorHandle(data, widest.handle.dtype)
            return core.tensor(handle, widest.type)

        return call


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print tensors of the CPU as Triton; patch its language once a launch, not once a call."""
    if not INTERPRETED:
        return
    triton_printer.DEVICES.add("cpu")  # this process runs nothing else
    monkeypatch.setattr(cuda, "libdevice", LibDevice)
    for module in (triton_printer, cuda):
        monkeypatch.setattr(module, "CHUNK", CHUNK)

    def call(self, *arguments, **options):
        return self.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    # what the interpreter finds out again with each operation
    monkeypatch.setattr(interpreter, "_get_np_dtype", _dtype)
    monkeypatch.setattr(core.tensor, "__init__", _tensor)
    monkeypatch.setattr(core.block_type, "__init__", _block_type)
    monkeypatch.setattr(semantic.TritonSemantic, "broadcast_impl_value", _broadcast)
    # without `debug`, nobody looks at what it finds
    overflow = "binary_op_sanitize_overflow_impl"
    monkeypatch.setattr(semantic.TritonSemantic, overflow, lambda *_: None)


REAL_DTYPE, DTYPES = interpreter._get_np_dtype, dict[str, np.dtype]()
REAL_BLOCK_TYPE, BLOCK_TYPES = core.block_type.__init__, dict[tuple, dict]()
REAL_BROADCAST = semantic.TritonSemantic.broadcast_impl_value


def _dtype(kind: core.dtype) -> np.dtype:
    # a type of pointers has no hash
    if kind.name not in DTYPES:
        DTYPES[kind.name] = REAL_DTYPE(kind)
    return DTYPES[kind.name]


@functools.cache
def _shape(*sizes: int) -> tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))


def _tensor(self: core.tensor, handle: interpreter.TensorHandle, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*(type.shape if type.is_block() else ()))


def _block_type(self: core.block_type, element_ty: core.dtype, shape) -> None:
    key = element_ty.name, *(getattr(n, "value", n) for n in shape)
    if key not in BLOCK_TYPES:
        REAL_BLOCK_TYPE(self, element_ty, shape)
        BLOCK_TYPES[key] = dict(vars(self))
    vars(self).update(BLOCK_TYPES[key])


def _broadcast(self, x: core.tensor, y: core.tensor) -> tuple[core.tensor, core.tensor]:
    alike = x.type.is_block() and y.type.is_block() and x.type.shape.values == y.type.shape.values
    return (x, y) if alike else REAL_BROADCAST(self, x, y)


def values(shape: tuple, seed: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def optimizer(chain, shapes, dtype=torch.float32, compile=True, **options):
    params = [torch.nn.Parameter(values(s, i, dtype)) for i, s in enumerate(shapes)]
    return params, C.ChainOpt(params, options.pop("lr", 0.05), *chain, compile=compile, **options)


def fill(params, step: int, grads=None) -> None:
    for i, p in enumerate(params):
        p.grad = values(tuple(p.shape), 100 * step + 50 + i, grads or p.dtype)


def pair(chain, shapes=SHAPES, dtype=torch.float32, steps=3, mode=True, **options):
    """The same steps eagerly and through kernels."""
    found = []
    for compiled in (False, mode):
        params, opt = optimizer(chain, shapes, dtype, compiled, **options)
        for step in range(steps):
            fill(params, step)
            one_step(opt)
        found.append((params, opt))
    return found


def assert_near(found, roundings: int = 64) -> None:
    """Parameters and state agree to so many roundings of the tensor's largest entry.

    A step is some twenty operations of one rounding each, and torch's own fused multiply-adds drop
    some of them; three steps are below 64. A parameter of fewer bits may round to either neighbour
    in each step, and what is computed from it follows. A mask is not continuous: one entry in a
    thousand may differ wholly.
    """
    (eager, one), (compiled, two) = found
    for p, q in zip(eager, compiled, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        tensors = [(p.detach(), q.detach())]
        tensors += [(t, two.state[q][k]) for k, t in one.state[p].items()]
        unit = torch.finfo(p.dtype).eps
        bound = 4 * unit if p.dtype in (torch.bfloat16, torch.float16) else roundings * unit
        for a, b in tensors:
            scale = a.double().abs().max().clamp(min=1e-30)
            wrong = (a.double() - b.double()).abs() > bound * scale
            assert wrong.sum() <= a.numel() // 1000, (a.shape, (a - b).abs().max(), scale)


def chain_of(name: str) -> tuple:
    if name == "prodigy_plus_d":
        return (C.prodigy_plus_d(d0=0.1),)
    if name == "prodigy_d":
        return (C.prodigy_d(d0=0.1),)
    transform = C.TRANSFORMS[name]
    return (transform, C.scale_by_adam) if modifies(transform) else (transform,)


# Products of whole matrices run in plain torch on CUDA.
KERNELS = [name for name, t in C.TRANSFORMS.items() if not t.whole]


@pytest.mark.parametrize("name", KERNELS)
def test_every_transform(name: str) -> None:
    matrices = C.TRANSFORMS[name].rules.requires is not None
    shapes = ((5, 6), (BLOCK + 77, 2)) if matrices else ((1,), (BLOCK + 77,), (5, 6))
    assert_near(pair(chain_of(name), shapes, steps=2))


# numbers of a tensor are float64 in any kernel
LEVELS = (
    ("elements", torch.float32),
    ("elements", torch.float64),
    ("numbers", torch.float32),
    ("rows", torch.float32),
    ("columns", torch.float64),
)


@pytest.mark.parametrize(("level", "dtype"), LEVELS)
def test_every_operation(level: str, dtype: torch.dtype) -> None:
    operations.check(level, dtype, DEVICE, filler=CHUNK, shifts=3 if level == "elements" else 1)


@pytest.mark.parametrize("of", [operations.of_all, operations.of_axes])
@pytest.mark.parametrize("shape", [(7, 5), (3, CHUNK // 2)])
def test_every_sum(of, shape: tuple) -> None:
    operations.check_sums(of, shape, DEVICE)


def _size(update, *, mean, beta):
    return (beta * mean + update).abs().sum(dtype=torch.float64)


@C.transform(mean=C.zeros, over_all=_size)
def weighed(update, mean, *, total, beta: C.Live = 0.9):
    """A state that the kernel for the sum writes, rounded, since the step does not need it."""
    return update / total, beta * mean + update


COMPOSITE = {
    "sums of states": (weighed, C.scale_by_adam, C.clip_by_global_norm(max_norm=0.5)),
    "cautious, schedule-free": (C.scale_by_adam, C.cautious, C.schedule_free),
    "global clip": (C.clip_by_global_norm(max_norm=0.5), C.scale_by_laprop),
    "skip, accumulate": (C.skip_not_finite, C.accumulate(k=2), C.scale_by_adam),
    "two sums": (
        C.skip_not_finite,
        C.clip_by_global_norm(max_norm=0.5),
        C.orthograd,
        C.scale_by_adam(amsgrad=True),
        C.clip_update_rms,
        C.trust_region,
        C.cautious_decay(weight_decay=0.1),
        C.parameter_ema(beta=0.5),
    ),
}


# three in a kernel
CONDITIONED = [[*CONDITIONS][n : n + 3] for n in range(0, len(CONDITIONS), 3)]


@pytest.mark.parametrize("names", CONDITIONED, ids=", ".join)
def test_conditions_and_numbers(names: list[str]) -> None:
    dtype = torch.float64 if {"plus", "either"} & {*names} else torch.float32
    chain = (C.exp_avg, conditional(*names)(strength=0.7))
    assert_near(pair(chain, ((1,), (BLOCK + 77,)), dtype, steps=2))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in COMPOSITE),
        *zip(COMPOSITE, itertools.cycle([torch.bfloat16, torch.float64]), strict=False),
    ],
    ids=str,
)
def test_composite_chains(name: str, dtype: torch.dtype) -> None:
    assert_near(pair(COMPOSITE[name], dtype=dtype, warmup_steps=2, stochastic_rounding=False))


def test_dtypes_may_be_mixed() -> None:
    found = []
    kinds = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
    for compiled in (False, True):
        params = [torch.nn.Parameter(values((9,), i, kind)) for i, kind in enumerate(kinds)]
        options = {"compile": compiled, "stochastic_rounding": False}
        opt = C.ChainOpt(params, 0.05, C.clip_by_global_norm, C.scale_by_adam, **options)
        for step in range(2):
            fill(params, step)
            opt.step()
        found.append((params, opt))
    assert_near(found)


@C.transform()
def less_some(update):
    """Looks at a part of the tensor, which is neither all elements nor one for each along an axis."""
    return update - update[:2].mean() if update.ndim > 1 else update


def test_parameters_without_a_kernel_take_part_in_sums() -> None:
    chain = (less_some, C.clip_by_global_norm(max_norm=0.5))
    with pytest.warns(RuntimeWarning, match="neither all elements, nor one for each along some"):
        assert_near(pair(chain, ((7,), (4, 3, 3, 3), (6, 5)), mode="auto"))


@pytest.mark.parametrize(
    ("chain", "dtype"),
    [
        ((C.adaptive_gradient_clip, C.scale_by_adam, C.cautious), torch.float32),
        (
            (C.skip_not_finite, C.factored_rms(min_dim=4), C.clip_update_rms, C.parameter_ema),
            torch.bfloat16,
        ),
    ],
    ids=str,
)
def test_rows_and_columns(chain: tuple, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    shapes = ((5, 6), (6, 5), (7, BLOCK + 9), (1, 9), (9, 1), (4,))
    assert_near(pair(chain, shapes, dtype, steps=2))


# Two factored axes, and before, between and behind them others; ties, and axes of one element.
FACTORED = (
    (3, 4, 2, 2),
    (4, 3, 2),
    (4, 4, 3),
    (2, 4, 3),
    (5, 2, 3, 4),
    (2, 4, 3, 5, 2),
    (1, 4, 1, 3, 2),
    (3, BLOCK + 9, 2),
)


@pytest.mark.parametrize(
    ("dtype", "shapes"), [(torch.float32, FACTORED), (torch.float64, FACTORED[::2])], ids=str
)
def test_two_axes_of_several(dtype: torch.dtype, shapes: tuple, monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 3)
    chain = (C.skip_not_finite, C.factored_rms(min_dim=3), C.clip_update_rms)
    assert_near(pair(chain, shapes, dtype, steps=2))


@C.transform()
def less_each_mean(update):
    """Sums along every single axis, and along the others."""
    for axis in range(update.ndim):
        others = [other for other in range(update.ndim) if other != axis]
        rest = (update * update).mean(others, keepdim=True)
        update = update - update.mean(axis, keepdim=True) / (1 + rest)
    return update


def test_means_along_every_axis(monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    assert_near(pair((less_each_mean,), ((5, 6), (6, 1, 5)), steps=2))
    with pytest.warns(RuntimeWarning, match="sums over different axes .* on CUDA"):
        assert_near(pair((less_each_mean,), ((3, 5, 6),), steps=2, mode="auto"))


@pytest.mark.parametrize("chain", [(C.scale_by_adam,), (C.orthograd, C.sign(graft=True))])
def test_several_chunks(chain: tuple) -> None:
    assert_near(pair(chain, (LONG, (3,), (CHUNK,)), steps=2))


def test_stochastic_rounding_gives_the_same_bits() -> None:
    (eager, _), (compiled, _) = pair((C.sign,), ((BLOCK + 77,), (5,)), torch.bfloat16, lr=0.011)
    for p, q in zip(eager, compiled, strict=True):
        assert torch.equal(p, q)


def test_a_kernel_for_a_sum_rounds_with_the_bits_of_its_step() -> None:
    chain, shapes = (weighed,), ((BLOCK + 77,), (5,))
    (eager, one), (compiled, two) = pair(chain, shapes, storage_dtype="bfloat16")
    for p, q in zip(eager, compiled, strict=True):
        # a fused multiply-add decides otherwise where a value lies on the edge
        mean, other = one.state[p]["weighed.mean"], two.state[q]["weighed.mean"]
        assert (mean == other).double().mean() > 0.99


def test_not_finite_gradients() -> None:
    found = []
    for compiled in (False, True):
        params, opt = optimizer((C.skip_not_finite, C.scale_by_adam), SHAPES, compile=compiled)
        for step in range(3):
            fill(params, step)
            if step == 1:
                params[1].grad[2] = float("nan")
                params[3].grad[5] = float("inf")
            opt.step()
        found.append((params, opt))
    assert_near(found)


def test_nan_passes_through_as_in_eager_mode() -> None:
    found = []
    for compiled in (False, True):
        params, opt = optimizer((C.scale_by_adam, C.softsign), SHAPES, compile=compiled)
        fill(params, 0)
        params[3].grad[5], params[3].grad[6] = float("nan"), float("inf")
        opt.step()
        found.append(params[3].detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7, equal_nan=True)


@contextlib.contextmanager
def watched() -> Iterator[tuple[list, list]]:
    """The launches of a step, and every call outside of them that would wait for a device."""
    launches, waits, inside = [], [], [False]
    start = cuda.DeviceTable._start

    def launch(self, run):
        launches.append(run.__name__)
        inside[0] = True
        try:
            start(self, run)
        finally:
            inside[0] = False

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda.DeviceTable, "_start", launch))
        stack.enter_context(mock.patch.object(host, "on_host", return_value=False))
        for name in (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "nonzero",
            "__float__",
            "__int__",
            "__bool__",
        ):
            real = getattr(torch.Tensor, name)

            def call(self, *arguments, real=real, name=name, **options):
                if not inside[0]:
                    waits.append(name)
                return real(self, *arguments, **options)

            stack.enter_context(mock.patch.object(torch.Tensor, name, call))
        yield launches, waits


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ((C.scale_by_adam,), 1),
        ((C.scale_by_adam, C.cautious), 2),
        ((C.clip_by_global_norm, C.scale_by_adam), 2),
        ((C.skip_not_finite, C.clip_by_global_norm, C.scale_by_adam, C.cautious), 4),
    ],
)
def test_one_launch_per_pass_and_no_waiting(chain: tuple, expected: int) -> None:
    lr = torch.tensor(0.05, device=DEVICE)
    params, opt = optimizer(chain, SHAPES, lr=lr)
    for step in range(3):
        fill(params, step)
        lr.fill_(0.05 / (step + 1))
        with watched() as (launches, waits):
            opt.step()
        assert len(launches) == expected
        # the first step finds out what there is
        assert step == 0 or not waits


def test_a_basis_does_not_make_a_step_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # where the tensors are on the CPU it looks whether they are finite, which costs nothing there
    monkeypatch.setattr("heavyball.transforms.soap._finite", lambda update: update)
    params, opt = optimizer((C.soap_precond(precondition_frequency=100),), ((6, 6), (5, 7)))
    for step in range(4):
        fill(params, step)
        with watched() as (_, waits):
            opt.step()
        # the first step finds out what there is, and makes the bases
        assert step == 0 or not waits


def test_buffers_stay_and_are_filled_only_after_changes() -> None:
    params, opt = optimizer((C.scale_by_adam,), SHAPES)
    fill(params, 0)
    with pytest.MonkeyPatch.context() as patch:
        plans = made_plans(patch)
        opt.step()
    table = plans[0].tables[0]
    places = [t.data_ptr() for t in (table.mirror.tensor, table.hyper.tensor, table.scratch)]
    with mock.patch.object(cuda, "_pinned_like", wraps=cuda._pinned_like) as pinned:
        opt.step()
        assert pinned.call_count == 0
        opt.param_groups[0]["lr"] = 0.01
        opt.step()
        assert pinned.call_count == 1
        fill(params, 1)
        opt.step()
        assert pinned.call_count == 2
    assert places == [
        t.data_ptr() for t in (table.mirror.tensor, table.hyper.tensor, table.scratch)
    ]


def test_a_captured_copy_has_memory_of_its_own(monkeypatch) -> None:
    mirror = cuda.Mirror(torch.zeros(3), torch.device("cpu"))
    assert mirror.send(torch.ones(3))
    assert not mirror.send(torch.ones(3))
    monkeypatch.setattr(cuda, "_capturing", lambda device: True)
    assert mirror.send(torch.ones(3))
    (kept,) = mirror._captured
    monkeypatch.undo()
    # a replay may have filled the tensor with what was captured, so it is filled again every time
    assert mirror.send(torch.full((3,), 2.0))
    assert mirror.send(torch.full((3,), 2.0))
    assert torch.equal(kept, torch.ones(3))
    assert torch.equal(mirror.tensor, torch.full((3,), 2.0))


def test_groups_have_numbers_of_their_own() -> None:
    found = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(values((9,), i, torch.float32)) for i in range(2)]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5, "betas": (0.5, 0.6)}]
        opt = C.ChainOpt(groups, 0.05, C.scale_by_adam, compile=compiled)
        for step in range(3):
            fill(params, step)
            opt.step()
        found.append((params, opt))
    assert_near(found)


def test_unaligned_tensors(monkeypatch) -> None:
    plans, found = made_plans(monkeypatch), []
    for compiled in (False, True):
        params = [torch.nn.Parameter(values((41,), 0, torch.float32)[1:])]
        opt = C.ChainOpt(params, 0.05, C.scale_by_adam, compile=compiled)
        for step in range(2):
            fill(params, step)
            opt.step()
        found.append((params, opt))
    assert not plans[0].tables[0].aligned
    assert_near(found)


def test_results_do_not_depend_on_other_parameters() -> None:
    chain = (C.scale_by_adam, C.cautious)
    (_, _), (alone, _) = pair(chain, (LONG,), steps=2)
    (_, _), (among, _) = pair(chain, (LONG, (3,), (77,)), steps=2)
    assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize(
    ("chain", "dtype"),
    [
        (
            (C.prodigy_plus_d(d0=0.1, slice_p=3), C.scale_by_exp_avg_sq, C.clip_update_rms),
            torch.float32,
        ),
        (
            (C.prodigy_plus_d(d0=0.1), C.factored_rms(min_dim=4), C.cautious, C.schedule_free),
            torch.bfloat16,
        ),
        ((C.prodigy_d(d0=0.1, slice_p=5), C.scale_by_adam), torch.bfloat16),
    ],
    ids=str,
)
def test_slices(chain: tuple, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    shapes = ((7, BLOCK + 9), (5, 6), (6, 5, 3, 3), (1,), LONG, (12,))
    assert_near(pair(chain, shapes, dtype, steps=2, lr=1.0, stochastic_rounding=False))


def test_slices_in_fewer_bits() -> None:
    """Their random bits are counted within the slice."""
    chain = (C.prodigy_plus_d(d0=0.1, narrow_sums=True), C.scale_by_exp_avg_sq)
    found = pair(chain, ((BLOCK + 77,), (5, 6)), steps=2, lr=1.0)
    (_, one), (_, two) = found
    for p, q in zip(found[0][0], found[1][0], strict=True):
        a, b = (o.state[x]["prodigy_plus_d.s"] for o, x in ((one, p), (two, q)))
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


FORMATS = (
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": "float16"},
    {"ecc": "bf16+8"},
    {"ecc": "fp16+16"},
    {"ecc": {"exp_avg": "bf16+16", "exp_avg_sq": "fp16+8"}},
)


def assert_values_near(found, formats: dict, tolerance: float) -> None:
    """What the stored tensors stand for agrees, but for one entry in a thousand."""
    (eager, one), (compiled, two) = found
    for p, q in zip(eager, compiled, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        holds = one.registry.programs()[p].holds
        pairs = [(working_param(x, opt.state[x]) for x, opt in ((p, one), (q, two)))]
        for key in holds.keys() & one.state[p].keys():
            kept = (held(s, key, holds[key]) for s in (one.state[p], two.state[q]))
            pairs.append(k.load(torch.float32) for k in kept)
        for a, b in pairs:
            wrong = (a - b).abs() > tolerance * a.abs().max().clamp(min=1e-30)
            assert wrong.sum() <= a.numel() // 1000, (formats, a.shape, (a - b).abs().max())


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_state_in_fewer_bits(formats: dict) -> None:
    shapes = ((BLOCK + 77,), (1,), (5, 6))
    found = pair((C.scale_by_adam, C.cautious), shapes, steps=2, **formats)
    # The random bits are the same, so only what lies on an edge may go the other way, as far as
    # from one neighbour of the format to the next.
    assert_values_near(found, formats, 64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_parameters_with_a_correction(dtype: torch.dtype, bits: int) -> None:
    formats = {"param_ecc": f"{'bf' if dtype == torch.bfloat16 else 'fp'}16+{bits}"}
    found = pair((C.scale_by_adam,), ((BLOCK + 77,), (5, 6)), dtype, steps=2, **formats)
    # one step of a correction on the largest entry: half an ulp over 127
    step = torch.finfo(dtype).eps / 2 / 127 if bits == 8 else 64 * torch.finfo(torch.float32).eps
    assert_values_near(found, formats, 2 * step)


def test_rows_in_fewer_bits(monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    for form in (
        {"storage_dtype": {"row": "bfloat16"}},
        {"ecc": {"row": "bf16+8", "col": "fp16+8"}},
    ):
        chain = (C.factored_rms(min_dim=4), C.clip_update_rms)
        found = pair(chain, ((5, 6), (7, BLOCK + 9)), steps=2, **form)
        assert_values_near(found, form, 64 * torch.finfo(torch.float32).eps)


def test_corrections_have_the_same_bits() -> None:
    """The sign of a constant has no rounding of its own, so every bit must agree."""
    for kind in ("bf16+8", "bf16+16", "fp16+8", "fp16+16"):
        dtype = torch.bfloat16 if kind[0] == "b" else torch.float16
        (eager, one), (compiled, two) = pair(
            (C.sign,), ((BLOCK + 77,), (5,)), dtype, lr=2**-9, steps=4, param_ecc=kind
        )
        for p, q in zip(eager, compiled, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(one.state[p]["param:correction"], two.state[q]["param:correction"])


# whole blocks; a block of the kernel that is not full, and for 8 bits one of codes; two axes; too small
CODED = ((BLOCK,), (CHUNK + BLOCK + 384,), (128, 9), (16, 64), (7,))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse formats hold tensors of fewer elements than they are for: the interpreter is slow."""
    monkeypatch.setattr("heavyball.state.formats.SMALLEST", 128)


coarse = pytest.mark.usefixtures("small")


@coarse
@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_codes(form: str, random: bool) -> None:
    shapes = (*CODED, *(((BLOCK + 9,),) if form == "8bit" else ()))
    options = {"storage_dtype": form, "stochastic_rounding": random}
    found = pair((C.scale_by_adam, C.cautious), shapes, steps=2, **options)
    assert_held_alike(found, at_least=0.999)


@coarse
def test_codes_of_parameters_in_sixteen_bits_and_of_state_that_stays() -> None:
    for form in ("8bit", "4bit"):
        found = pair((C.exp_avg, C.sign), CODED, torch.bfloat16, steps=2, storage_dtype=form)
        assert_held_alike(found, at_least=0.999)
        params, opt = optimizer((C.skip_not_finite, C.scale_by_adam), CODED, storage_dtype=form)
        fill(params, 0)
        opt.step()
        before = [{k: t.clone() for k, t in opt.state[p].items() if t.ndim} for p in params]
        for p in params:
            p.grad.fill_(float("nan"))
        opt.step()
        for p, kept in zip(params, before, strict=True):
            assert kept
            assert all(torch.equal(t, opt.state[p][k]) for k, t in kept.items())


@coarse
def test_codes_of_what_is_not_finite() -> None:
    for form in ("8bit", "4bit"):
        found = []
        for compiled in (False, True):
            params, opt = optimizer((C.exp_avg,), ((BLOCK,),), compile=compiled, storage_dtype=form)
            fill(params, 0)
            params[0].grad[100], params[0].grad[200] = float("nan"), float("inf")
            opt.step()
            found.append(opt.state[params[0]])
        for key, tensor in found[0].items():
            torch.testing.assert_close(found[1][key], tensor, rtol=0, atol=0, equal_nan=True)


@coarse
@pytest.mark.parametrize(
    ("chain", "shape"), [((C.scale_by_adam,), (13, 17)), ((C.exp_avg, C.cautious), (3, 4, 16))]
)
def test_rows_and_columns_of_rank_one(chain: tuple, shape: tuple, monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    assert_held_alike(pair(chain, (shape, (5,)), steps=2, storage_dtype="rank1"))


@coarse
def test_rank_one_beside_other_rows_and_columns(monkeypatch) -> None:
    monkeypatch.setattr(triton_rows, "HEIGHT", 4)
    chain = (C.exp_avg, C.factored_rms(min_dim=4))
    options = {"storage_dtype": {"exp_avg": "rank1"}}
    assert_held_alike(pair(chain, ((16, 16),), steps=2, **options))
    with pytest.warns(RuntimeWarning, match="sums over different axes .* on CUDA"):
        pair(chain, ((64, 16),), steps=1, mode="auto", **options)


def assert_held_alike(found, at_least: float = 1.0) -> None:
    """State has the same bits, but for a part of which the rounding of a sum or product decides.

    Numbers along a row or a column are sums, of which the order differs.
    """
    (eager, one), (compiled, two) = found
    assert_near([(eager, one), (compiled, two)], roundings=2**10)
    assert not two.plan().eager
    for p, q in zip(eager, compiled, strict=True):
        for key, a in one.state[p].items():
            b = two.state[q][key]
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if a.dtype in (torch.int8, torch.uint8):
                assert (a == b).double().mean() >= at_least, key
            else:
                torch.testing.assert_close(a, b, rtol=2**-20, atol=1e-7)


# ---- programs that are cut at transforms of whole tensors

# bfloat16 would make much of a rounding of what it is given
MUON = C.muon(products="full")
WHOLE = {
    "muon": (MUON, C.cautious),
    "soap": (C.soap_precond(precondition_frequency=2),),
    "soap, schedule-free": (C.soap_precond(C.scale_by_exp_avg_sq), C.schedule_free),
    "kron": (C.exp_avg, C.psgd_kron, C.clip_by_rms),
    "gated": (C.skip_not_finite, C.accumulate(k=2), MUON, C.clip_update_rms),
    "global clip": (
        C.clip_by_global_norm(max_norm=0.1),
        C.orthogonalize(products="full"),
        C.scale_by_adam,
    ),
    "prodigy": (C.prodigy_plus_d(d0=0.1), MUON),
    "authors' prodigy": (C.prodigy_d(d0=0.1), MUON),
    "factored": (C.orthogonalize(products="full"), C.factored_rms(min_dim=2)),
    "route": (
        C.route(C.when(MUON, min_ndim=2), otherwise=C.scale_by_adam),
        C.cautious,
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    zip(WHOLE, itertools.cycle([torch.float32, torch.bfloat16]), strict=False),
    ids=str,
)
def test_products_between_kernels(name: str, dtype: torch.dtype) -> None:
    shapes = ((6, 6), (5, 7), (6, 6), (4, 3, 2)) + (((5,),) if name == "route" else ())
    lr = 1.0 if "prodigy" in name else 0.05
    found = pair(WHOLE[name], shapes, dtype, lr=lr)
    compiled = found[1][1].plan()
    assert compiled.waves
    assert not compiled.eager
    assert_near(found, roundings=2**10)
