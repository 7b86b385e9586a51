"""What the documents of HeavyBall 1.0 and prodigy-plus-schedule-free 1.9.0 show as code runs here."""

import pytest
import torch
from helpers import averages, parameters, train

import heavyball
import heavyball.utils

# from the page of heavyball 1.0.0 at PyPI, with fewer steps
GETTING_STARTED = """
import torch
import heavyball

# Create a model
model = torch.nn.Linear(16, 1)

# Create an optimizer
optimizer = heavyball.PrecondSchedulePaLMSOAP(model.parameters(), lr=1e-3)

x = torch.randn(128, 16)
y = torch.randn(128, 1)

for _ in range(10):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
"""
GROKFAST = """
C = heavyball.chainable; grokfast = C.ChainOpt(p, lr, C.exp_avg, C.scale_by_adam)
"""
# from the page of prodigy-plus-schedule-free 1.9.0 at PyPI, without its import
PRODIGY_PLUS = """
optimizer = ProdigyPlusScheduleFree(model.parameters(), lr=1.0, betas=(0.9, 0.99), beta3=None,
                                    weight_decay=0.0, weight_decay_by_lr=True,
                                    use_bias_correction=False, d0=1e-6, d_coef=1.0,
                                    prodigy_steps=0, use_speed=False, eps=1e-8,
                                    split_groups=True, split_groups_mean=True,
                                    factored=True, factored_fp32=True, fused_back_pass=False,
                                    use_stableadamw=True, use_muon_pp=False, use_cautious=False,
                                    use_grams=False, use_adopt=False, use_focus=False,
                                    stochastic_rounding=True)
"""


def test_the_first_example_of_heavyball():
    names = {}
    exec(GETTING_STARTED, names)
    with torch.no_grad():
        assert torch.isfinite(names["loss"])
    assert len(names["optimizer"].state) == 2


def test_the_chain_of_heavyballs_page():
    p = parameters()
    names = {"heavyball": heavyball, "p": p, "lr": 0.01}
    exec(GROKFAST, names)
    train(names["grokfast"], range(3))
    assert repr(names["grokfast"].chain).startswith("exp_avg | scale_by_adam")


# the table of optimizers there, and those of its section on PSGD
LISTED = (
    *("AdamW", "LaProp", "ADOPT", "SFAdamW", "PaLMSFAdamW", "SOAP", "PaLMSOAP", "SFPaLMSOAP"),
    *("PrecondScheduleSFPaLMSOAP", "PrecondSchedulePaLMSOAP", "PrecondScheduleSOAP"),
    *("PSGDKron", "PurePSGD", "DelayedPSGD", "DelayedPSGDKron"),
)


@pytest.mark.parametrize("name", LISTED)
def test_options_of_heavyballs_page(name, monkeypatch):
    options = [{"foreach": False}, {"storage_dtype": "bfloat16"}]
    if "PSGD" in name:
        options.append({"store_triu_as_line": True, "q_dtype": "float32"})
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)  # as the page says
    for given in options:
        opt = getattr(heavyball, name)(parameters(), lr=1e-3, **given)
        train(opt, range(2))


@pytest.mark.parametrize("mode", ["qr", "newtonschulz", "newtonschulz10", "svd", "eigh"])
def test_the_modes_of_heavyballs_page(mode, monkeypatch):
    monkeypatch.setattr(heavyball.utils, "zeroth_power_mode", mode)
    train(heavyball.SOAP(parameters(), precondition_frequency=1, compile=False), range(3))


def test_the_call_that_prodigy_plus_shows():
    model = torch.nn.Linear(4, 2)
    names = {"model": model, "ProdigyPlusScheduleFree": heavyball.ProdigyPlusScheduleFree}
    exec(PRODIGY_PLUS, names)
    opt = names["optimizer"]
    train(opt, range(3))
    assert averages(opt)
    opt.eval()
    opt.train()


# what its page names one by one
CONFIGURATIONS = (
    *({"use_stableadamw": False}, {"split_groups_mean": False}, {"use_speed": True}),
    *({"split_groups_mean": False, "use_speed": True}, {"split_groups": False}),
    *({"prodigy_steps": 3}, {"factored": False}, {"factored_fp32": False}, {"eps": None}),
    *({"use_stableadamw": True, "eps": 1e8}, {"use_muon_pp": True}, {"use_cautious": True}),
    *({"use_grams": True}, {"use_adopt": True}, {"use_orthograd": True}, {"use_focus": True}),
    *({"d0": 1e-8}, {"d_coef": 2.0}, {"fused_back_pass": True}),
)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_a_configuration_that_prodigy_plus_names(options):
    model = torch.nn.Linear(4, 2)
    opt = heavyball.ProdigyPlusScheduleFree(model.parameters(), compile=False, **options)
    for _ in range(5):
        model(torch.ones(3, 4)).square().mean().backward()
        if not options.get("fused_back_pass"):
            opt.step()
            opt.zero_grad()
    assert all(p.isfinite().all() for p in opt.eval().param_groups[0]["params"])
