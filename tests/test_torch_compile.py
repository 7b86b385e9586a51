"""Compiled models, and compiled training steps that step an optimizer: torch.compile looks into none."""

import copy
import logging
import pathlib

import pytest
import torch

import heavyball

# one preset of each kind of step: elementwise, averaged weights, sums over all, matrices, a found rate
KINDS = {
    "AdamW": {},
    "SFAdamW": {},
    "LAMB": {},
    "Muon": {},
    "SOAP": {},
    "PSGDKron": {},
    "ProdigyPlusScheduleFree": {"lr": 1.0},
}


def a_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def an_optimizer(name, model, **more):
    return heavyball.PRESETS[name](model.named_parameters(), **KINDS[name], compile=False, **more)


def train(model, opt, compiled=None, steps=3):
    """The losses of some steps; compiled: a transformation of the function that makes one."""
    inputs = torch.arange(24.0).reshape(4, 6).sin()

    def step():
        loss = model(inputs).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    step = step if compiled is None else compiled(step)
    return [step().item() for _ in range(steps)]


def is_ours(code):
    return pathlib.Path(heavyball.__file__).parent in pathlib.Path(code.co_filename).parents


@pytest.fixture
def traced():
    """The functions of this library that torch.compile has made graphs of."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    seen = []
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)  # pytest would collect it
    handle = register_bytecode_hook(lambda code, _: seen.append(code))
    torch._dynamo.reset()
    yield lambda: [code.co_qualname for code in seen if is_ours(code)]
    handle.remove()
    torch._dynamo.reset()


def in_eager_graphs(fn):
    return torch.compile(fn, backend="eager")


@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_training_step_is_the_plain_one_and_looks_into_no_optimizer(name, traced):
    model = a_model()
    twin = copy.deepcopy(model)
    expected = train(twin, an_optimizer(name, twin))
    assert train(model, an_optimizer(name, model), in_eager_graphs) == expected
    assert not traced()


@pytest.mark.parametrize("name", ["SFAdamW", "Muon"])
def test_a_compiled_model_is_trained_as_the_plain_one(name, traced):
    model = a_model()
    twin = copy.deepcopy(model)
    expected = train(twin, an_optimizer(name, twin))
    compiled = torch.compile(model, backend="aot_eager")
    opt = an_optimizer(name, compiled)
    assert train(compiled, opt) == pytest.approx(expected, rel=1e-5)
    assert not traced()
    # saved from the compiled model, its state goes on with the plain one
    an_optimizer(name, twin).load_state_dict(opt.state_dict())


def by_a_scheduler(model, opt):
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)


def by_hooks(model, opt):
    opt.register_step_pre_hook(lambda *_: None)
    opt.register_step_post_hook(lambda *_: None)


def by_fused_backward(model, opt):
    heavyball.fuse_backward(opt)


@pytest.mark.parametrize("way", [by_a_scheduler, by_hooks, by_fused_backward])
def test_nor_where_others_wrap_the_step(way, traced):
    model = a_model()
    twin = copy.deepcopy(model)
    expected = train(twin, an_optimizer("SOAP", twin))
    opt = an_optimizer("SOAP", model)
    way(model, opt)
    assert train(model, opt, in_eager_graphs) == pytest.approx(expected, rel=1e-5)
    assert not traced()


def test_nor_into_what_else_an_optimizer_does(traced):
    model = a_model()
    opt = an_optimizer("SFAdamW", model, metrics=True)
    twin = copy.deepcopy(model)
    other = an_optimizer("SFAdamW", twin, metrics=True)

    def evaluated(model, opt):
        opt.eval()
        loss = model(torch.ones(2, 6)).sum()
        opt.train()
        norm = opt.metrics()["group_0/update_norm"]
        with opt.averaged():
            return loss + norm + model(torch.ones(2, 6)).sum()

    train(model, opt)
    train(twin, other)
    assert in_eager_graphs(evaluated)(model, opt).item() == evaluated(twin, other).item()
    assert not traced()


def test_a_step_that_is_compiled_alone_is_the_step(traced):
    model = a_model()
    twin = copy.deepcopy(model)
    opt, other = an_optimizer("Muon", model), an_optimizer("Muon", twin)
    compiled = torch.compile(opt.step, backend="eager")
    for _ in range(2):
        for one, step in ((model, compiled), (twin, other.step)):
            one(torch.ones(2, 6)).sum().backward()
            step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not traced()
