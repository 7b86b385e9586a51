"""`opt.updates()` says what `step()` then does, and changes nothing."""

import copy

import pytest
import torch
from helpers import all_params, differences, fill_gradients, parameters, snapshot, train

import heavyball
from heavyball import chainable as C


@pytest.mark.parametrize("compile", ["auto", False])
@pytest.mark.parametrize(
    "name", ["AdamW", "SFAdamW", "SOAP", "Muon", "Prodigy", "ProdigyPlusScheduleFree", "PSGDKron"]
)
def test_updates_are_those_of_the_step(name, compile):
    params = parameters()
    opt = heavyball.PRESETS[name](params, compile=compile, warmup_steps=3)
    train(opt, range(3))
    fill_gradients(params, 3)
    params[1].grad = None
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    found = opt.updates()
    assert set(found) == {"0", "2", "3"}
    assert not differences(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups
    opt.step()
    for number, update in found.items():
        p = params[int(number)]
        assert torch.equal(p.detach() - before[number], update)


def test_updates_go_by_name_and_refuse_what_a_step_refuses():
    named = list(zip("abcd", parameters(), strict=True))
    opt = C.ChainOpt(named, 0.1, C.sign, C.parameter_ema)
    fill_gradients(all_params(opt), 0)
    torch.testing.assert_close(opt.updates()["b"], -0.1 * named[1][1].grad.sign())
    opt.eval()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        opt.updates()
