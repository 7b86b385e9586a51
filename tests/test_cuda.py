"""What only a GPU shows: presets beside the CPU, steps without waits, capture, other devices' state."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import heavyball
from heavyball import chainable as C

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# a matrix of several tiles, one that is square, a kernel, a vector of several chunks, single numbers
SHAPES = ((130, 70), (24, 24), (8, 3, 3, 3), (20_011,), (5,), ())
# no basis is arbitrary after one gradient: every axis that has one is at most as long as the rest
FULL_RANK = ((24, 24), (20_011,), (5,), ())
# chains whose step is kernels alone, so that nothing may wait for the device
POINTWISE = [
    name
    for name, cls in heavyball.PRESETS.items()
    if not any(
        node.transform.whole
        for program in cls([nn.Parameter(torch.zeros(3, 3))]).chain.programs
        for node in program.flat
    )
]


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(device: str, dtype: torch.dtype, shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(values(s, i).to(device, dtype)) for i, s in enumerate(shapes)]


def fill(params: list[nn.Parameter], step: int) -> None:
    for place, p in enumerate(params):
        p.grad = values(tuple(p.shape), 1000 * (step + 1) + place).to(p.device, p.dtype)


def stepped(name: str, device: str, dtype=torch.float32, steps: int = 4, shapes=SHAPES, **options):
    params = parameters(device, dtype, shapes)
    opt = heavyball.PRESETS[name](params, **options)
    for step in range(steps):
        fill(params, step)
        opt.step()
    return params, opt


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Any call that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def largest_error(found: list[nn.Parameter], expected: list[nn.Parameter]) -> float:
    """Relative to the largest change that any element of a parameter could have seen."""
    worst = 0.0
    for p, q in zip(found, expected, strict=True):
        scale = q.detach().double().abs().max().clamp(min=1e-30)
        worst = max(
            worst, float((p.detach().cpu().double() - q.detach().double()).abs().max() / scale)
        )
    return worst


@pytest.mark.parametrize("name", heavyball.PRESETS)
def test_a_preset_steps_as_on_the_cpu(name: str) -> None:
    if "PSGD" in name:
        pytest.skip("its noise is drawn on the device of the parameter, so it is another one")
    shapes = FULL_RANK if "SO" in name else SHAPES
    found, _ = stepped(name, "cuda", torch.float64, shapes=shapes)
    expected, _ = stepped(name, "cpu", torch.float64, shapes=shapes, compile=False)
    # float64 roundings, which the eigenvectors of a matrix and its polar factor blow up by at most
    # the inverse of their gaps
    assert largest_error(found, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_kernels_step_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    found, _ = stepped(name, "cuda", dtype, stochastic_rounding=False)
    expected, _ = stepped(name, "cuda", dtype, stochastic_rounding=False, compile=False)
    for p, q in zip(found, expected, strict=True):
        unit = torch.finfo(dtype).eps
        scale = q.detach().double().abs().max().clamp(min=1e-30)
        wrong = (p.double() - q.double()).abs() > (
            4 if dtype == torch.bfloat16 else 64
        ) * unit * scale
        assert wrong.sum() <= q.numel() // 1000, (p.shape, (p - q).abs().max())


# matrix methods whose steps are products alone, without a decomposition that reports how it went
PRODUCTS = ("Muon", "NorMuon", "PSGDKron", "DelayedPSGD", "CachedPSGDKron")


@pytest.mark.parametrize("name", [*POINTWISE, *PRODUCTS])
def test_no_step_waits_for_the_device(name: str) -> None:
    params, opt = stepped(name, "cuda", steps=2)
    for step in range(2, 5):
        fill(params, step)
        torch.cuda.synchronize()
        with no_waiting():
            opt.step()
            opt.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("name", POINTWISE)
def test_a_captured_step_replays_as_it_was(name: str) -> None:
    params, opt = stepped(name, "cuda", steps=3)
    others, plain = stepped(name, "cuda", steps=3)
    static = [p.grad for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for step in range(5, 9):
        fill(others, step)
        for grad, q in zip(static, others, strict=True):
            grad.copy_(q.grad)
        graph.replay()
        plain.step()
    torch.cuda.synchronize()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_a_step_of_soap_without_a_refresh_does_not_wait() -> None:
    params, opt = stepped("SOAP", "cuda", steps=2, precondition_frequency=100)
    for step in range(2, 5):
        fill(params, step)
        with no_waiting():
            opt.step()


MATRIX = [name for name in heavyball.PRESETS if name not in POINTWISE]


@pytest.mark.parametrize("name", MATRIX)
def test_kernels_around_products_step_as_plain_torch(name: str) -> None:
    """In float64, so that decompositions do not blow a rounding up."""
    shapes = FULL_RANK if "SO" in name else SHAPES
    found, opt = stepped(name, "cuda", torch.float64, shapes=shapes)
    assert opt.plan().kernels
    expected, _ = stepped(name, "cuda", torch.float64, shapes=shapes, compile=False)
    for p, q in zip(found, expected, strict=True):
        assert (p - q).abs().max() <= 1e-9 * q.abs().max()


def test_partial_sums_of_many_chunks_arrive_in_order() -> None:
    """The last program of a tensor adds up what the others left behind: often, and bit for bit."""
    size = 3_000_001
    results = []
    for _ in range(2):
        params = [nn.Parameter(values((size,), 0).to("cuda", torch.float32))]
        opt = C.ChainOpt(params, 0.01, C.scale_by_adam, C.cautious, C.clip_update_rms)
        grads = [values((size,), 1 + k).to("cuda", torch.float32) for k in range(4)]
        for step in range(200):
            params[0].grad = grads[step % 4]
            opt.step()
        results.append(params[0].detach().clone())
    assert torch.equal(*results)
    params = [nn.Parameter(values((size,), 0).to("cuda", torch.float32))]
    opt = C.ChainOpt(params, 0.01, C.scale_by_adam, C.cautious, C.clip_update_rms, compile=False)
    for step in range(200):
        params[0].grad = grads[step % 4]
        opt.step()
    wrong = (params[0] - results[0]).abs() > 1e-4 * params[0].abs().max()
    assert wrong.sum() < size // 1000


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "SOAP", "ProdigyPlusScheduleFree"])
def test_a_checkpoint_moves_between_devices(name: str) -> None:
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        params, opt = stepped(name, here)
        saved = copy.deepcopy(opt.state_dict())
        others = [nn.Parameter(p.detach().to(there)) for p in params]
        loaded = heavyball.PRESETS[name](others)
        loaded.load_state_dict(saved)
        for p, q in zip(params, others, strict=True):
            for key, tensor in loaded.state[q].items():
                assert tensor.device.type == there, key
                assert torch.equal(tensor.cpu(), opt.state[p][key].cpu()), key
        fill(others, 9)
        loaded.step()


def test_parameters_on_two_devices() -> None:
    params = parameters("cpu", torch.float32, ((7, 5), (4,)))
    params += parameters("cuda", torch.float32, ((7, 5), (4,)))
    opt = C.ChainOpt(params, 0.01, C.clip_by_global_norm(max_norm=0.1), C.scale_by_adam, C.cautious)
    for step in range(3):
        for k in (0, 1):
            params[k].grad = values(tuple(params[k].shape), 10 * step + k).float()
            params[k + 2].grad = params[k].grad.cuda()
        opt.step()
    for k in (0, 1):
        torch.testing.assert_close(
            params[k].detach(), params[k + 2].detach().cpu(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", ["SOAP", "Muon", "PSGDKron", "PrecondSchedulePaLMSOAP"])
def test_matrix_methods_train_in_bfloat16(name: str) -> None:
    params, opt = stepped(name, "cuda", torch.bfloat16, steps=6)
    assert all(p.isfinite().all() for p in params)
    assert all(t.device.type == "cuda" for p in params for t in opt.state[p].values())


def test_fused_backward_steps_on_the_device() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
    other = copy.deepcopy(model)
    fused = heavyball.AdamW(model.parameters(), 1e-2, fuse_backward=True)
    plain = heavyball.AdamW(other.parameters(), 1e-2)
    x = values((8, 16), 3).to("cuda", torch.float32)
    for _ in range(4):
        model(x).square().mean().backward()
        fused.step()
        other(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
