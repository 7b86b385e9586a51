"""`opt.plan()`: which kernels step which parameters, what they move, and what runs eagerly and why."""

import math

import pytest
import torch
from helpers import fill_gradients, parameters
from torch import nn

import heavyball
from heavyball import chainable as C

SHAPES = ((30, 40), (40,), (5, 30))
ELEMENTS = sum(map(math.prod, SHAPES))


def planned(*chain, shapes=SHAPES, dtype=torch.float32, **options):
    opt = C.ChainOpt(parameters(*shapes, dtype=dtype), 0.1, *chain, **options)
    fill_gradients((p for g in opt.param_groups for p in g["params"]), 0)
    return opt.plan()


# What a step of one float32 element reads and writes, in bytes, and in how many passes.
TRAFFIC = {
    "descend": ((C.exp_avg(beta=0.9),), 4 * (3 + 2), 1),  # p, g, m; p, m
    "adam": ((C.scale_by_adam,), 4 * (4 + 3), 1),  # p, g, m, v; p, m, v
    "lion": ((C.scale_by_lion,), 4 * (3 + 2), 1),
    # the moments and the agreeing signs; then p, g, m and v again
    "cautious": ((C.scale_by_adam, C.cautious), 4 * (3 + 2) + 4 * (4 + 1), 2),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_kernel_says_its_passes_and_bytes(name: str) -> None:
    chain, per_element, passes = TRAFFIC[name]
    plan = planned(*chain)
    (kernel,) = plan.kernels
    assert (kernel.purpose, kernel.device, kernel.wave) == ("step", "cpu", None)
    assert kernel.parameters == ("0", "1", "2")
    assert kernel.elements == ELEMENTS
    assert kernel.passes == passes
    assert kernel.bytes_moved == plan.bytes_moved == per_element * ELEMENTS
    assert (plan.eager, plan.waves, plan.reordered, plan.without_gradient) == ((), (), (), ())


def test_low_precision_moves_fewer_bytes() -> None:
    chain, shapes = (C.scale_by_adam,), ((64, 64),)
    full = planned(*chain, shapes=shapes).bytes_moved
    half = planned(*chain, shapes=shapes, dtype=torch.bfloat16, storage_dtype="bfloat16")
    assert half.bytes_moved == full / 2
    # 2 x 16 bits of the parameter, 16 of the gradient, and twice two codes with a scale for 32 of them
    coded = planned(*chain, shapes=shapes, dtype=torch.bfloat16, storage_dtype="8bit")
    assert coded.bytes_moved == 64 * 64 * (3 * 2 + 2 * 2 * (1 + 2 / 32))
    coded = planned(*chain, shapes=shapes, dtype=torch.bfloat16, storage_dtype="4bit")
    assert coded.bytes_moved == 64 * 64 * (3 * 2 + 2 * 2 * (1 / 2 + 4 / 128))


def test_sums_over_all_parameters_have_kernels_of_their_own() -> None:
    plan = planned(C.scale_by_adam, C.clip_by_global_norm)
    assert [k.purpose for k in plan.kernels] == ["sums for clip_by_global_norm", "step"]


def test_waves_and_what_runs_between_their_kernels() -> None:
    plan = planned(C.route(C.when(C.muon, min_ndim=2), otherwise=C.scale_by_adam))
    assert [(k.purpose, k.wave, k.parameters) for k in plan.kernels] == [
        ("step", None, ("1",)),
        ("segment 0", 0, ("0", "2")),
        ("segment 1", 0, ("0", "2")),
    ]
    assert [(wave.parameters, wave.calls) for wave in plan.waves] == [(("0", "2"), ("muon",))]
    alone = planned(C.muon, shapes=((4, 4), (4, 4)), foreach=False)
    assert [wave.parameters for wave in alone.waves] == [("0",), ("1",)]


@C.transform()
def sorts(update):
    return update.flatten().sort().values.reshape(update.shape)


REASONS = {
    "no compiler": ((C.scale_by_adam,), {"compile": False}, "compile=False"),
    "no form": ((sorts,), {}, "sort"),
    "sum behind products": ((C.muon, C.clip_by_global_norm), {}, "after muon"),
}


@pytest.mark.filterwarnings("ignore:the chain .* runs without a compiled kernel")
@pytest.mark.parametrize("name", REASONS)
def test_the_reason_for_an_eager_step(name: str) -> None:
    chain, options, reason = REASONS[name]
    plan = planned(*chain, shapes=((4, 3), (3, 3)), **options)
    assert not plan.kernels
    (eager,) = plan.eager
    assert eager.parameters == ("0", "1")
    assert chain[0].name in eager.chain
    assert reason in eager.reason
    assert plan.reasons == {"0": eager.reason, "1": eager.reason}
    assert eager.reason in str(plan)


def test_kernels_switched_off_and_parameters_that_are_there_twice(monkeypatch) -> None:
    (p,) = parameters((3,))
    with pytest.warns(UserWarning, match="duplicate"):
        opt = heavyball.AdamW([p, p])
    fill_gradients([p], 0)
    assert "twice" in opt.plan().reasons["1"]
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    assert "compile_mode" in opt.plan().reasons["1"]


def test_a_plan_names_parameters_and_reads_well() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = heavyball.AdamW(model.named_parameters())
    fill_gradients(model.parameters(), 0)
    model[1].bias.grad = None
    model[0].weight.grad = model[0].weight.grad.T.contiguous().T
    assert str(opt.plan()).splitlines() == [
        repr(opt.chain),
        "kernels: 1, which move 672 bytes (672 B)",
        "  step on cpu: 3 parameters (0.weight, 0.bias, 1.weight), 24 elements, 1 pass, 672 bytes",
        "copied into another order: 1 parameter (0.weight)",
        "without a gradient: 1 parameter (1.bias)",
    ]


def test_looking_at_a_plan_steps_nothing() -> None:
    one, other = (parameters((4, 3), (3,)) for _ in range(2))
    opts = heavyball.SOAP(one), heavyball.SOAP(other)
    for step in range(4):
        for params, opt in zip((one, other), opts, strict=True):
            fill_gradients(params, step)
            if opt is opts[0]:
                assert opt.plan().kernels
                opt.plan()
            opt.step()
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
