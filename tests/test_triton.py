"""Triton kernels: run in Triton's interpreter, and compiled for a GPU that need not be there."""

import itertools
import os
from pathlib import Path

import fresh
import pytest
import torch
from helpers import QUICK

import heavyball
from heavyball.compiler.frontend.graph import record
from heavyball.compiler.pipeline import Printed, print_kernel
from heavyball.compiler.triton import device as cuda
from heavyball.runtime.step import compute_dtype

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux only")
C = heavyball.chainable

ARGUMENTS = ("table", "chunks", "hyper", "scratch", "parts", "arrived")
KINDS = ("*i64", "*i64", "*fp64", "*fp64", "*fp64", "*i32")


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if QUICK:
        # the assembler takes a kernel or refuses it; `make test-all` lets it optimize, too
        monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")


def test_in_the_interpreter() -> None:
    # Triton reads the variable when it is imported, so it needs a process of its own
    program = """
import sys, pytest, torch
assert "triton" not in sys.modules
torch.set_num_threads(1)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    inner = Path(__file__).with_name("kernels_on_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = fresh.run(program, inner, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def printed(chain: tuple, dtype: torch.dtype, shape=(8, 3), **options) -> list[Printed]:
    """The kernels of the step and of every sum over all parameters, for a GPU."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    opt = C.ChainOpt([param], 0.1, *chain, compile=False, **options)
    param.grad = torch.zeros_like(param)
    (job,) = opt.registry.jobs()
    dtypes = {"param": dtype, "grad": dtype, "share": torch.float64}
    dtypes |= {k: t.dtype for k, t in job.state.items()}
    found = []
    for share in (None, *job.program.total_keys):
        graph, _ = record(job.program, param.shape, dtype, job.state, job.group, share)
        random, holds = job.stream is not None, job.program.holds_of
        compute = compute_dtype(dtype)
        device = torch.device("cuda")
        found.append(print_kernel(graph, dtypes, compute, holds, random, device, tuple(shape)))
    return found


def ptx_of(made: Printed) -> list[str]:
    """What each pass becomes for compute capability 9.0, assembled too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, texts = cuda.load(made.source), []
    for name in made.functions:
        names = dict(zip(ARGUMENTS, KINDS, strict=True)) | {"ALIGNED": "constexpr"}
        aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(ARGUMENTS))}
        constants = {(len(ARGUMENTS),): True}
        source = ASTSource(module[name], names, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options=cuda.OPTIONS)
        assert compiled.asm["cubin"]
        texts.append(compiled.asm["ptx"])
    return texts


CHAINS = (
    (torch.bfloat16, C.scale_by_adam),
    (torch.float16, C.scale_by_adam, C.cautious, C.schedule_free),
    (torch.float32, C.skip_not_finite, C.clip_by_global_norm, C.sign(graft=True)),
    (torch.float64, C.mu_law, C.scale_by_adam_atan2, C.orthograd),
    (torch.bfloat16, C.adaptive_gradient_clip, C.factored_rms(min_dim=2)),
    (torch.float32, C.prodigy_plus_d(narrow_sums=True), C.scale_by_exp_avg_sq, C.schedule_free),
    (torch.bfloat16, C.prodigy_plus_d, C.factored_rms(min_dim=2)),
)


@pytest.mark.parametrize("chain", CHAINS)
def test_compiles_for_a_gpu(chain: tuple) -> None:
    for made in printed(chain[1:], chain[0]):
        for text in ptx_of(made):
            assert ".target sm_90" in text


@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 4, 5, 4, 3)])
def test_two_axes_of_several_compile_too(shape: tuple) -> None:
    more = () if QUICK and len(shape) > 3 else (C.cautious,)
    for made in printed((C.factored_rms(min_dim=2), *more), torch.bfloat16, shape):
        for text in ptx_of(made):
            assert ".target sm_90" in text


@pytest.mark.parametrize(
    ("dtype", "chain", "form"),
    [
        (torch.float32, C.scale_by_adam, {"storage_dtype": "bfloat16"}),
        (torch.float64, C.scale_by_adam, {"storage_dtype": "float16"}),
        (torch.bfloat16, C.scale_by_adam, {"ecc": "bf16+8", "param_ecc": "bf16+16"}),
        (torch.float16, C.scale_by_adam, {"ecc": "fp16+16", "param_ecc": "fp16+8"}),
        (torch.float32, C.factored_rms(min_dim=2), {"ecc": {"row": "bf16+8", "col": "fp16+8"}}),
        (torch.float32, C.factored_rms(min_dim=2), {"storage_dtype": {"row": "bfloat16"}}),
    ],
)
def test_formats_of_fewer_bits_compile_too(dtype: torch.dtype, chain, form: dict) -> None:
    for made in printed((chain,), dtype, **form):
        for text in ptx_of(made):
            assert ".target sm_90" in text


# `make test` has each form and each dtype once.
COARSE = [
    *itertools.product((torch.float32, torch.bfloat16, torch.float64), ("8bit", "4bit", "rank1"))
]


@pytest.mark.parametrize(("dtype", "form"), COARSE[::4] if QUICK else COARSE)
def test_coarse_formats_compile_too(dtype: torch.dtype, form: str) -> None:
    chain = (C.scale_by_adam, C.cautious) if dtype == torch.float32 else (C.scale_by_adam,)
    for made in printed(
        chain, dtype, (64, 66) if form == "rank1" else (64, 64), storage_dtype=form
    ):
        for text in ptx_of(made):
            assert ".target sm_90" in text


def test_aligned_tensors_move_sixteen_bytes_at_a_time() -> None:
    (made,) = printed((C.scale_by_adam,), torch.float32)
    (text,) = ptx_of(made)
    # param, grad and two moments in, param and two moments out; two times for 1024 over 128 threads
    assert text.count("ld.global.v4.b32") == 8
    assert text.count("st.global.v4.b32") == 6
