"""Optimizers from Hydra's configurations."""

import io
import pickle

import pytest
import torch
from pages import code_of
from torch import nn

import heavyball

pytest.importorskip("hydra")

from hydra.utils import instantiate
from omegaconf import OmegaConf

CREATE = "_target_: heavyball.create, _partial_: true"
CONFIGURATIONS = {
    "preset": f"{{{CREATE}, what: SOAP, lr: 1e-3, betas: [0.8, 0.95], no_decay: auto}}",
    "layers": f"{{{CREATE}, what: AdamW, layer_decay: 0.5, weight_decay: 0.1}}",
    "text": f"{{{CREATE}, what: 'scale_by_adam(betas=(0.8, 0.95)) | cautious', lr: 1e-3}}",
    "texts": f"{{{CREATE}, what: [exp_avg, scale_by_adam]}}",
    "element": f"{{{CREATE}, what: {{_target_: heavyball.chainable.sign}}}}",
    "class": "{_target_: heavyball.SFAdamW, betas: [0.8, 0.95], _partial_: true}",
    "chain": "{_target_: heavyball.chainable.ChainOpt, transforms: [sign, cautious], lr: 0.1,"
    " _partial_: true}",
    "schedule": f"{{{CREATE}, what: AdamW, lr: {{_target_: heavyball.chainable.cosine,"
    " T: 9, peak: 0.1}}",
    "blocks": f"{{{CREATE}, what: Muon, blocks: {{'blocks.*': [2, 4]}}}}",
    "table": f"{{{CREATE}, what: Muon, method: [[3.4, -4.7, 2.0], [3.0, -4.0, 2.0]]}}",
    "pair": f"{{{CREATE}, what: PrecondScheduleSOAP, precond_scheduler: [0.3, 9]}}",
    "made class": "{_target_: heavyball.chainable.optimizer_class, what: [sign, cautious], name: Mine}",
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def train(model, opt, steps):
    for number in steps:
        made = torch.Generator().manual_seed(number)
        opt.zero_grad()
        model(torch.randn(4, 6, generator=made)).square().mean().backward()
        opt.step()


def built(text, convert, model):
    config = OmegaConf.create(text)
    if convert:
        config._convert_ = convert
    made = instantiate(config)
    return made(model.parameters(), lr=0.1) if isinstance(made, type) else made(model)


def plain(value):
    """Nothing of a configuration library is left in a value."""
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return not type(value).__module__.startswith("omegaconf")


@pytest.mark.parametrize("convert", [None, "partial", "object", "all"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_trains_saves_and_resumes(name, convert):
    model = Net()
    opt = built(CONFIGURATIONS[name], convert, model)
    train(model, opt, range(3))
    assert plain(opt.param_groups)
    assert plain(opt.defaults)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], buffer)
    buffer.seek(0)
    again = Net()
    other = built(CONFIGURATIONS[name], convert, again)
    for into, saved in zip((again, other), torch.load(buffer, weights_only=True), strict=True):
        into.load_state_dict(saved)
    assert b"omegaconf" not in pickle.dumps(opt)
    train(model, opt, range(3, 6))
    train(again, other, range(3, 6))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_page_is_a_configuration():
    model = Net()
    opt = instantiate(OmegaConf.create(code_of("Hydra")).optimizer)(model)
    assert type(opt) is heavyball.AdamW
    assert {group["weight_decay"] for group in opt.param_groups} == {0.0, 0.1}
    assert all(group["betas"] == (0.9, 0.95) for group in opt.param_groups)
    train(model, opt, range(2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{{{CREATE}, what: AdmaW}}", "AdamW"),
        (f"{{{CREATE}, what: AdamW, betas: [0.9]}}", "expected 2 numbers"),
        (f"{{{CREATE}, what: AdamW, lr: 1.e-3x}}", "expected a number"),
        (f"{{{CREATE}, what: AdamW, bets: [0.9, 0.95]}}", "betas"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(text, says):
    with pytest.raises((TypeError, ValueError), match=says):
        instantiate(OmegaConf.create(text))(Net())
