"""torchtune's configurations, and its wrapper of one optimizer for each parameter in backward()."""

import copy

import pytest
import torch
from pages import code_of
from torch import nn

import heavyball

pytest.importorskip("torchao", reason="torchtune needs an older one than other frameworks")
pytest.importorskip("torchtune")

from omegaconf import OmegaConf
from torchtune import config, training

CONFIGURATIONS = {
    "preset": "{_component_: heavyball.AdamW, lr: 0.01, betas: [0.8, 0.95]}",
    "averaging": "{_component_: heavyball.SFAdamW, lr: 0.01}",
    "matrices": "{_component_: heavyball.SOAP, lr: 0.01, precondition_frequency: 2}",
    "text": "{_component_: heavyball.create, what: scale_by_adam | cautious, lr: 0.01}",
    "texts": "{_component_: heavyball.create, what: [exp_avg, scale_by_adam], lr: 0.01}",
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def loss(model, number):
    made = torch.Generator().manual_seed(number)
    return model(torch.randn(4, 6, generator=made)).square().mean()


def plain(name, steps):
    model = net()
    opt = config.instantiate(OmegaConf.create(CONFIGURATIONS[name]), model.parameters())
    for number in range(steps):
        loss(model, number).backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def in_backward(name, model):
    """As the single-device recipes do it."""
    made = OmegaConf.create(CONFIGURATIONS[name])
    each = {p: config.instantiate(made, [p]) for p in model.parameters()}
    training.register_optim_in_bwd_hooks(model=model, optim_dict=each)
    return training.create_optim_in_bwd_wrapper(model=model, optim_dict=each)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_component_trains_saves_and_resumes(name):
    whole, _ = plain(name, 6)
    model, opt = plain(name, 3)
    again = net()
    again.load_state_dict(model.state_dict())
    other = config.instantiate(OmegaConf.create(CONFIGURATIONS[name]), again.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for number in range(3, 6):
        loss(again, number).backward()
        other.step()
        other.zero_grad()
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_one_optimizer_for_each_parameter_in_backward(name):
    whole, _ = plain(name, 6)
    model = net()
    wrapper = in_backward(name, model)
    for number in range(3):
        loss(model, number).backward()
        assert all(p.grad is None for p in model.parameters())
    assert wrapper.get_optim_key("lr") == 0.01
    saved = copy.deepcopy(wrapper.state_dict())
    again = net()
    again.load_state_dict(model.state_dict())
    other = in_backward(name, again)
    other.load_state_dict(saved)
    for number in range(3, 6):
        loss(again, number).backward()
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_schedule_of_torchtune_sets_every_optimizer():
    model = net()
    wrapper = in_backward("preset", model)
    first = next(iter(wrapper.optim_map.values()))
    wrapper.set_lr_scheduler(
        training.get_cosine_schedule_with_warmup(first, num_warmup_steps=2, num_training_steps=8)
    )
    for number in range(3):
        loss(model, number).backward()
        wrapper.step_lr_scheduler()
    rates = {g["lr"] for opt in wrapper.optim_map.values() for g in opt.param_groups}
    assert rates == {wrapper.get_last_lr()}
    assert 0 < wrapper.get_last_lr() < 0.01


def test_the_page_is_a_configuration():
    made = OmegaConf.create(code_of("torchtune"))
    model = net()
    opt = config.instantiate(made.optimizer, model.parameters())
    assert isinstance(opt, heavyball.AdamW)
    loss(model, 0).backward()
    opt.step()
