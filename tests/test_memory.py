"""A memory plan against the bytes that are really held, and against counting by hand."""

import itertools
import math

import pytest
import torch
from helpers import (
    CASES,
    Tiny,
    averages,
    eager,  # noqa: F401
    parameters,
    train,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import heavyball
from heavyball import chainable as C
from heavyball import memory_plan

SHAPES = ((40, 33), (64,), (), (3, 4, 3, 3), (0, 5), (1,), (2, 1), (130, 2))
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def held(opt):
    train(opt, range(1))
    return opt.state_bytes()


class NoMemory(TorchDispatchMode):
    """Fails where a tensor is made that has memory, unless it is one number, as groups may hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.device.type == "meta", func
        return result


# ---- against what is held


DTYPED = [*zip(CASES, itertools.cycle([torch.float32, torch.bfloat16]), strict=False)]


@pytest.mark.parametrize(("case", "dtype"), DTYPED, ids=str)
def test_a_plan_is_what_is_held_to_the_byte(case, dtype):
    params = parameters(*SHAPES, dtype=dtype)
    opt = case(params)
    plan = heavyball.memory_plan(params, case)
    assert plan.state_bytes == held(opt)
    assert plan.state_bytes == sum(plan.per_transform.values())
    assert plan.state_bytes == sum(plan.per_parameter.values())
    for place, (param, planned) in enumerate(zip(params, plan.parameters, strict=True)):
        state = opt.state.get(param, {})
        found = {key: t.numel() * t.element_size() for key, t in state.items()}
        assert planned.state == found
        assert planned.name == str(place)
        assert (planned.shape, planned.dtype) == (tuple(param.shape), dtype)
    opt.eval()
    assert opt.state_bytes() == plan.state_bytes + plan.evaluation_bytes
    assert bool(plan.evaluation_bytes) == averages(opt)


COUNTED = ({"mars": True}, {"gradient_clipping": "l2_clip"}, {})


@pytest.mark.parametrize(
    ("name", "options"), [*zip(heavyball.PRESETS, itertools.cycle(COUNTED), strict=False)]
)
def test_a_preset_may_be_named_or_given_and_its_options_count(name, options):
    model = Tiny()
    expected = held(heavyball.PRESETS[name](model.parameters(), **options))
    for preset in (name, heavyball.PRESETS[name]):
        assert memory_plan(model, preset, **options).state_bytes == expected


FORMATS = [
    {"storage_dtype": "float16", "param_ecc": "bf16+8"},
    {"storage_dtype": "8bit"},
    {"storage_dtype": "4bit"},
    {"storage_dtype": "rank1"},
    {"ecc": "bf16+8", "param_ecc": "bf16+16"},
]


FORMATTED = [("AdamW", options) for options in FORMATS]
FORMATTED += zip(heavyball.PRESETS, itertools.cycle(FORMATS), strict=False)


@pytest.mark.parametrize(("name", "options"), FORMATTED, ids=str)
def test_formats_of_fewer_bits_are_planned_to_the_byte(name, options):
    shapes = (
        (40, 33),
        (),
        (3, 4, 3, 3),
        (0, 5),
        (66, 65),
        (33, 128),
    )  # the last two are large enough for codes
    params = parameters(*shapes, dtype=torch.bfloat16)
    opt = heavyball.PRESETS[name](params, **options)
    plan = memory_plan(params, name, **options)
    assert plan.state_bytes == held(opt)
    corrections = plan.per_transform.get("param", 0)
    each = {"bf16+8": 1, "bf16+16": 2}.get(options.get("param_ecc"), 0)
    assert corrections == each * sum(p.numel() for p in params)
    opt.eval()
    assert opt.state_bytes() == plan.state_bytes + plan.evaluation_bytes


def test_a_format_of_fewer_bits_takes_fewer_bytes():
    def bytes_each(**options):
        plan = memory_plan([torch.empty(1024, 1024, device="meta")], "AdamW", **options)
        return (plan.state_bytes - 8) / 1024**2

    assert bytes_each() == 8
    assert bytes_each(storage_dtype="bfloat16") == 4
    assert bytes_each(storage_dtype={"exp_avg": "bfloat16"}) == 6
    assert bytes_each(ecc="bf16+8") == 6
    assert bytes_each(ecc="fp16+16") == 8
    # codes, and a bfloat16 scale for each 32 of them
    assert bytes_each(storage_dtype="8bit") == 2 * (1 + 2 / 32)
    # two codes a byte, and a float32 scale for each 128 of them
    assert bytes_each(storage_dtype="4bit") == 2 * (1 / 2 + 4 / 128)
    # a float32 for each row and each column, and the signs of one
    assert bytes_each(storage_dtype="rank1") == 2 * 2 * 4 / 1024 + 1 / 8


# ---- what may be given


def test_a_plan_says_what_each_transform_takes():
    plan = memory_plan(
        nn.Linear(64, 10), (C.exp_avg, C.exp_avg, C.scale_by_adam(amsgrad=True), C.schedule_free)
    )
    assert plan.per_transform == {
        "step": 16,
        "exp_avg": 4 * 650,
        "exp_avg.1": 4 * 650,
        "scale_by_adam": 3 * 4 * 650,
        "schedule_free": 4 * 650 + 3 * 16,
    }
    assert plan.per_parameter == {
        "weight": 8 + 24 * 640 + 24,
        "bias": 8 + 24 * 10 + 24,
    }
    assert plan.elements == 650
    assert plan.parameter_bytes == plan.gradient_bytes == plan.evaluation_bytes == 2600
    assert plan.chain.endswith("decoupled | schedule_free")


def test_parameters_come_in_every_form_that_an_optimizer_takes():
    model = Tiny()
    expected = memory_plan(model, "AdamW").state_bytes
    named = list(model.named_parameters())
    forms = [
        model.parameters(),
        list(model.parameters()),
        named,
        model.named_parameters(),
        [{"params": model.parameters()}],
        [{"params": named[:1]}, {"params": named[1:], "lr": 0.5}],
        [{"params": model.matrix}, {"params": [model.vector, model.kernel, model.number]}],
        Tiny().to("meta"),
        [torch.empty(p.shape, device="meta") for p in model.parameters()],
    ]
    for form in forms:
        assert memory_plan(form, "AdamW").state_bytes == expected
    assert list(memory_plan(named, "AdamW").per_parameter) == [name for name, _ in named]


@pytest.mark.parametrize(
    "chain",
    [
        "scale_by_adam(amsgrad=True) | cautious",
        (C.scale_by_adam(amsgrad=True), C.cautious),
        [C.scale_by_adam(amsgrad=True), C.cautious],
        "AdamW:amsgrad=True,caution=True",
    ],
)
def test_chains_come_as_elements_and_as_text(chain):
    opt = heavyball.AdamW(Tiny().parameters(), amsgrad=True, caution=True)
    assert memory_plan(Tiny(), chain).state_bytes == held(opt)


def test_one_transform_is_a_chain_and_an_option_goes_before_the_text():
    assert memory_plan(Tiny(), C.exp_avg).per_transform == {"step": 32, "exp_avg": 4 * 29}
    text = "AdamW:amsgrad=True"
    assert memory_plan(Tiny(), text).per_transform["scale_by_adam"] == 12 * 29
    assert memory_plan(Tiny(), text, amsgrad=False).per_transform["scale_by_adam"] == 8 * 29


def test_routes_follow_names_and_shapes():
    model = Tiny()
    chain = C.route(
        C.when(C.exp_avg, name="m*"), C.when(C.scale_by_adam, max_ndim=1), otherwise=C.sign
    )
    opt = C.ChainOpt(model.named_parameters(), 0.1, chain)
    plan = memory_plan(model, chain)
    assert plan.state_bytes == held(opt)
    assert plan.per_transform == {"step": 32, "exp_avg": 48, "scale_by_adam": 8 * 5}


def test_shared_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    plan = memory_plan(model, "AdamW")
    assert plan.elements == 16 + 4 + 4 + 16 + 4
    assert plan.state_bytes == 3 * 8 + 8 * 24
    assert plan.gradient_bytes == 4 * 24
    assert plan.per_parameter["2.weight"] == 0


def test_a_learning_rate_and_hyper_parameters_of_a_group_count():
    params = parameters((4, 3), (4,))
    groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}]
    opt = heavyball.SGD(groups, lr=0.1)
    assert memory_plan(groups, "SGD", lr=0.5).state_bytes == held(opt)
    assert memory_plan(groups, "SGD").per_parameter == {"0": 8 + 48 + 8, "1": 8}


@pytest.mark.parametrize(
    ("chain", "options", "error", "message"),
    [
        ("AdamWW:eps=1", {}, ValueError, "AdamWW.*AdamW"),
        ("scale_by_adm", {}, ValueError, "scale_by_adam"),
        ("AdamW", {"nonsense": 1}, TypeError, "nonsense"),
        (torch.optim.AdamW, {}, TypeError, "AdamW is not an optimizer of heavyball"),
        (C.ChainOpt, {}, TypeError, "chain itself"),
        ((C.exp_avg, 3), {}, TypeError, "element 1"),
        (3, {}, TypeError, "element 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(chain, options, error, message):
    with pytest.raises(error, match=message):
        memory_plan(Tiny(), chain, **options)


@pytest.mark.parametrize("given", [torch.zeros(3), [1, 2], [{"params": [None]}]])
def test_what_is_no_parameter_is_refused(given):
    with pytest.raises(TypeError, match="memory_plan"):
        memory_plan(given, "AdamW")


# ---- nothing is allocated


@every_case
def test_a_plan_makes_no_array_and_changes_nothing(case):
    model = Tiny()
    before = [(id(p), p._version, p.requires_grad, p.grad) for p in model.parameters()]
    with NoMemory():
        memory_plan(model, case)
    assert before == [(id(p), p._version, p.requires_grad, p.grad) for p in model.parameters()]


def test_a_model_that_fits_on_no_machine_can_be_planned():
    width, inner, layers = 8192, 28672, 80
    with torch.device("meta"):
        block = [nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)]
        model = nn.Sequential(*block * 1, *(nn.Linear(width, width) for _ in range(layers)))
        model = model.to(torch.bfloat16)
    elements = sum(p.numel() for p in model.parameters())
    with NoMemory():
        plan = memory_plan(model, "AdamW")
    assert plan.elements == elements == 2 * width * inner + layers * (width * width + width)
    assert plan.state_bytes == 8 * elements + 8 * len(plan.parameters)
    assert plan.parameter_bytes == 2 * elements


# ---- what it prints


def test_a_plan_is_readable():
    text = str(memory_plan(nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))), "SFAdamW"))
    plan = memory_plan(nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))), "SFAdamW")
    assert f"state: {plan.state_bytes:,} bytes" in text
    assert "schedule_free" in text
    assert "in evaluation mode: 2,592 bytes more (2.531 KiB)" in text
    assert "largest:" in text
    assert len(text.splitlines()) < 25
    assert math.isclose(plan.state_bytes / plan.elements, 8 + 18 * 32 / 648)
    assert "parameters:" in str(memory_plan(nn.Linear(2, 2), C.sign))
