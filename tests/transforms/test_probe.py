"""`probe` and `opt.metrics()`: against sums made by hand, in every way to step."""

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C

F64 = torch.float64


def weights(dtype=F64):
    made = torch.Generator().manual_seed(1)
    shapes = (4, 3), (5,), (2, 3, 2)
    return [nn.Parameter(torch.randn(s, generator=made, dtype=F64).to(dtype)) for s in shapes]


def fill(params, step, without=()):
    made = torch.Generator().manual_seed(50 + step)
    for place, p in enumerate(params):
        grad = torch.randn(p.shape, generator=made, dtype=F64).to(p.dtype)
        p.grad = None if place in without else grad


def norm(tensors) -> float:
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def numbers(opt) -> dict[str, float]:
    found = opt.metrics()
    assert all(isinstance(v, Tensor) and v.ndim == 0 for v in found.values())
    return {name: v.item() for name, v in found.items()}


NAMES = {
    *("lr", "effective_lr", "grad_norm", "update_norm", "param_norm", "update_to_param"),
    "skipped_steps",
}


@pytest.mark.parametrize("name", heavyball.PRESETS)
def test_metrics_are_those_of_the_change_of_the_parameters(name):
    params = weights()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}]
    opt = heavyball.PRESETS[name](groups, compile=False, metrics=True)
    plain = weights()
    twin = heavyball.PRESETS[name](
        [{"params": plain[:2]}, {"params": plain[2:], "lr": 1e-3}], compile=False
    )
    for step in range(4):
        fill(params, step)
        fill(plain, step)
        before = [p.detach().clone() for p in params]
        opt.step()
        twin.step()
        found = numbers(opt)
        for index, members in enumerate((slice(0, 2), slice(2, 3))):
            own = params[members]
            moved = [p - b for p, b in zip(own, before[members], strict=True)]
            group = {k.split("/", 1)[1]: v for k, v in found.items() if k[6] == str(index)}
            assert set(group) == NAMES | ({"d"} if "d" in opt.param_groups[0] else set())
            assert group["grad_norm"] == pytest.approx(norm(p.grad for p in own), rel=1e-9)
            assert group["update_norm"] == pytest.approx(norm(moved), rel=1e-6, abs=1e-14)
            assert group["param_norm"] == pytest.approx(norm(own), rel=1e-9)
            ratio = group["update_norm"] / group["param_norm"]
            assert group["update_to_param"] == pytest.approx(ratio, rel=1e-9)
            assert group["lr"] == opt.param_groups[index]["lr"]
            if "d" in group:
                assert group["d"] == opt.d[index]
                assert group["effective_lr"] == pytest.approx(opt.effective_lr[index])
    # and nothing of the step has changed
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@contextlib.contextmanager
def backward_of(opt):
    yield opt


CHAIN = (C.probe("in"), C.scale_by_adam, C.probe("adam"), C.cautious, C.decoupled, C.probe("end"))


@pytest.fixture
def kernels(monkeypatch):
    """The other tests of this folder run as written."""
    monkeypatch.setattr(heavyball.utils, "compile_mode", "auto")


@pytest.mark.parametrize("way", ["compiled", "eager", "foreach", "fused", "whole"])
def test_probes_measure_what_passes(way, kernels):
    dtype = torch.float32
    params = weights(dtype)
    chain = CHAIN
    if way == "whole":
        chain = (C.probe("in"), C.soap_precond(C.scale_by_adam, C.probe("adam")), C.probe("end"))
    opt = C.ChainOpt(
        params,
        0.1,
        *chain,
        weight_decay=0.1,
        compile=way in ("compiled", "fused"),
        foreach=False if way == "foreach" else None,
        fuse_backward=way == "fused",
    )
    for step in range(3):
        fill(params, step)
        grads = [p.grad.clone() for p in params]
        before = [p.detach().clone() for p in params]
        if way == "fused":
            for p in params:
                p.grad = None
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
        opt.step()
        found = numbers(opt)
        size = sum(p.numel() for p in params)
        assert found["group_0/in/norm"] == pytest.approx(norm(grads), rel=1e-5)
        assert found["group_0/in/rms"] == pytest.approx(norm(grads) / size**0.5, rel=1e-5)
        assert found["group_0/in/cosine"] == pytest.approx(1.0, rel=1e-5)
        largest = max(g.abs().max().item() for g in grads)
        assert found["group_0/in/max"] == pytest.approx(largest, rel=1e-5)
        if way != "whole":
            update = [(b - p) / 0.1 for p, b in zip(params, before, strict=True)]
            assert found["group_0/end/norm"] == pytest.approx(norm(update), rel=1e-4)
            along = sum((u * g).sum().item() for u, g in zip(update, grads, strict=True))
            cosine = along / norm(update) / norm(grads)
            assert found["group_0/end/cosine"] == pytest.approx(cosine, rel=1e-4)
        elif step:
            assert found["group_0/adam/rms"] > 0


def test_zeros_are_counted():
    p = nn.Parameter(torch.ones(6))
    opt = C.ChainOpt([p], 0.1, C.probe("u"), C.sign, compile=False)
    p.grad = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.0, 4.0])
    opt.step()
    found = numbers(opt)
    assert found["group_0/u/zeros"] == 2
    assert found["group_0/u/max"] == 4


@pytest.mark.parametrize("compile", ["auto", False])
def test_what_has_no_part_in_a_step_is_not_counted(compile, kernels):
    params = weights(torch.float32)
    opt = C.ChainOpt(
        params, 0.1, C.skip_not_finite, C.scale_by_adam, C.probe("u"), metrics=True, compile=compile
    )
    fill(params, 0)
    opt.step()
    fill(params, 1, without=(0,))
    before = [p.detach().clone() for p in params]
    opt.step()
    found = numbers(opt)
    assert found["group_0/grad_norm"] == pytest.approx(norm(p.grad for p in params[1:]), rel=1e-5)
    assert found["group_0/param_norm"] == pytest.approx(norm(params), rel=1e-5)
    moved = norm(p - b for p, b in zip(params, before, strict=True))
    assert found["group_0/update_norm"] == pytest.approx(moved, rel=1e-5)
    for skipped in (1, 2):
        fill(params, 2)
        params[1].grad[0] = float("nan")
        opt.step()
        found = numbers(opt)
        assert found["group_0/skipped_steps"] == skipped
        assert found["group_0/update_norm"] == 0
        assert math.isnan(found["group_0/grad_norm"])


def test_a_first_call_asks_for_them():
    params, plain = weights(torch.float32), weights(torch.float32)
    opt, twin = heavyball.SFAdamW(params, compile=False), heavyball.SFAdamW(plain, compile=False)
    for step in range(4):
        fill(params, step)
        fill(plain, step)
        before = [p.detach().clone() for p in params]
        opt.step()
        twin.step()
        found = numbers(opt)
        assert math.isnan(found["group_0/update_norm"]) == (step == 0)
        assert found["group_0/param_norm"] == pytest.approx(norm(params), rel=1e-5)
    moved = norm(p - b for p, b in zip(params, before, strict=True))
    assert found["group_0/update_norm"] == pytest.approx(moved, rel=1e-4)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_no_checkpoint_has_them():
    params = weights()
    opt = heavyball.AdamW(params, metrics=True)
    probed = C.ChainOpt(weights(), 0.1, C.scale_by_adam, C.probe("u"), metrics=True)
    for each in (opt, probed):
        fill([p for g in each.param_groups for p in g["params"]], 0)
        each.step()
    assert set(opt.state_dict()["state"][0]) == {
        *("step", "scale_by_adam.exp_avg", "scale_by_adam.exp_avg_sq")
    }
    heavyball.AdamW(weights()).load_state_dict(opt.state_dict())
    C.ChainOpt(weights(), 0.1, C.scale_by_adam).load_state_dict(probed.state_dict())
    probed.load_state_dict(C.ChainOpt(weights(), 0.1, C.scale_by_adam).state_dict())
    assert "behind_step" not in opt.routing() + repr(opt.chain)


def test_a_probe_parses_and_stands_anywhere():
    text = "probe(name='a') | skip_not_finite | scale_by_adam | decoupled | probe(name='b')"
    opt = C.ChainOpt(weights(), 0.1, text)
    assert repr(C.parse(repr(opt.chain))[0]) == "probe(name='a')"
    graft = C.graft((C.sign, C.probe("c")), C.exp_avg)
    params = weights()
    opt = C.ChainOpt(params, 0.1, graft, compile=False)
    fill(params, 0)
    opt.step()
    assert numbers(opt)["group_0/c/rms"] == pytest.approx(1.0)


# Strips of 512 are added up in float32, each term once more rounded where it is a product; a norm has
# half the relative error of its square.
STRIP_ERROR = 513 * 2.0**-24
SCALES = 1e-42, 1e-36, 1e-24, 1e-13, 1.0, 1e15, 1e19, 1e30


@C.transform
def absolute(update):
    return update.abs()


def scattered(scale: float) -> Tensor:
    """Several strips and a rest: zeros, one of another size, and the others."""
    made = torch.randn(5 * 512 + 77, generator=torch.Generator().manual_seed(7), dtype=F64)
    made[512:1024] = 0
    made[1024:1536] *= 1e-6
    return (scale * made).float()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sides", [1, 40])
def test_sums_in_strips_are_right_at_every_size(scale, sides, kernels):
    """sides: 40 makes a tensor that is cut into chunks."""
    grad = scattered(scale).repeat(sides)
    p = nn.Parameter(torch.zeros_like(grad))
    chain = C.probe("in"), absolute, C.probe("out")
    opt = C.ChainOpt([p], 1.0, *chain, metrics=True, compile=True)
    p.grad = grad.clone()
    opt.step()
    found, update = numbers(opt), -p.detach().double()
    saturated = grad.clamp(-(2.0**56), 2.0**56)  # as chains see it
    for what, tensor in {"in": saturated, "out": update}.items():
        size = norm([tensor])
        assert found[f"group_0/{what}/norm"] == pytest.approx(size, rel=STRIP_ERROR, abs=0)
        assert found[f"group_0/{what}/max"] == tensor.abs().max().item()
        assert found[f"group_0/{what}/zeros"] == (tensor == 0).sum().item()
    assert found["group_0/grad_norm"] == pytest.approx(norm([grad]), rel=STRIP_ERROR, abs=0)
    for what in ("update", "param"):
        assert found[f"group_0/{what}_norm"] == pytest.approx(
            norm([update]), rel=STRIP_ERROR, abs=0
        )
    # the products that a cosine is made of are float32, and so may be 0 or infinite
    if 1e-18 < scale < 1e18:
        cosine = (update * grad).sum().item() / norm([update]) / norm([grad])
        assert found["group_0/out/cosine"] == pytest.approx(cosine, abs=3 * STRIP_ERROR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_a_strip(bad, kernels):
    p = nn.Parameter(torch.zeros(2000))
    opt = C.ChainOpt([p], 1.0, C.probe("in"), metrics=True, compile=True)
    p.grad = torch.ones(2000)
    p.grad[700] = bad
    opt.step()
    found = numbers(opt)
    # an infinite entry is the bound behind the head of a chain
    for name in ("grad_norm", *(("in/norm", "in/max", "param_norm") if bad != bad else ())):
        assert found[f"group_0/{name}"] == pytest.approx(bad, nan_ok=True)


FORMATS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, corrected": {"dtype": torch.bfloat16, "param_ecc": "bf16+8"},
    "8bit": {"storage_dtype": "8bit"},
    "4bit": {"storage_dtype": "4bit"},
    "state in bfloat16": {"storage_dtype": "bfloat16"},
    "gate": {"gate": True},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 1e-24])
def test_strips_of_every_format_are_added_up_again(name, scale, kernels):
    """What cannot be read back from the tensors is put aside, and is what eager steps measure."""
    options = dict(FORMATS[name])
    dtype, gate = options.pop("dtype", torch.float32), options.pop("gate", False)
    found = []
    for compile in (True, False):
        p = nn.Parameter(scattered(1e-3 * scale)[:2560].to(dtype))
        gates = (C.accumulate(2),) if gate else ()
        chain = *gates, C.scale_by_adam, C.probe("adam"), C.decoupled, C.probe("end")
        opt = C.ChainOpt(
            [p], scale, *chain, weight_decay=0.1, metrics=True, compile=compile, **options
        )
        for step in range(2):
            p.grad = (scattered(1.0)[:2560] * (1 + step)).to(dtype)
            opt.step()
        found.append(numbers(opt))
    compiled, eager = found
    for key, value in eager.items():
        # the two round updates, codes and weights at the same places, but for fused multiply-adds
        if key.endswith(("norm", "rms", "cosine", "to_param")):
            assert compiled[key] == pytest.approx(value, rel=1e-4, abs=1e-4 * scale), key
