"""`load_state_dict(strict=False)`: what matches is loaded, and the rest is named."""

import copy

import pytest
import torch
from helpers import (
    Tiny,
    all_params,
    assert_same,
    assert_same_optimizers,
    copies,
    differences,
    eager,  # noqa: F401
    parameters,
    plain_group,
    same_bits,
    snapshot,
    train,
)
from torch import nn

import heavyball
from heavyball import chainable as C


def chain(params, *elements, lr=0.01, **options):
    return C.ChainOpt(params, lr, *elements, **options)


def trained(*elements, params=None, steps=3, **options):
    opt = chain(parameters() if params is None else params, *elements, **options)
    train(opt, range(steps))
    return opt


def test_all_of_a_matching_dict_is_loaded_and_nothing_is_left():
    source = trained(C.scale_by_adam, C.cautious, weight_decay=0.5)
    for strict in (True, False):
        target = chain(copies(all_params(source)), C.scale_by_adam, C.cautious, lr=1.0)
        left = target.load_state_dict(source.state_dict(), strict=strict)
        assert left == ([], [])
        assert left.missing_keys == left.unexpected_keys == []
        train(target, [3])
        other = copy.deepcopy(source)
        train(other, [3])
        assert_same_optimizers(target, other)


def test_an_element_more_begins_anew_and_the_rest_is_loaded():
    source = trained(C.scale_by_adam)
    target = chain(copies(all_params(source)), C.mars, C.scale_by_adam, C.cautious)
    left = target.load_state_dict(source.state_dict(), strict=False)
    key = "mars.last_grad"
    entries = [k for k in target.chain.hyper if k not in source.chain.hyper]
    expected = [f"param_groups.0.{k}" for k in entries] + [f"{n}.{key}" for n in range(4)]
    assert left.missing_keys == expected
    assert left.unexpected_keys == []
    for p, q in zip(all_params(source), all_params(target), strict=True):
        assert not target.state[q][key].any()
        assert {k for k in target.state[q] if k not in source.state[p]} == {key}
        for k, value in source.state[p].items():
            assert same_bits(target.state[q][k], value)
            assert target.state[q][k].data_ptr() != value.data_ptr()
    train(target, [3])
    assert target.state[all_params(target)[0]]["step"] == 4


def test_an_element_more_keeps_the_state_that_it_has():
    source, target = trained(C.exp_avg), trained(C.exp_avg, C.scale_by_lion, steps=2)
    own = [target.state[p]["scale_by_lion.exp_avg"].clone() for p in all_params(target)]
    target.load_state_dict(source.state_dict(), strict=False)
    kept = [target.state[p]["scale_by_lion.exp_avg"] for p in all_params(target)]
    assert_same(kept, own)
    for p, q in zip(all_params(source), all_params(target), strict=True):
        assert same_bits(target.state[q]["exp_avg"], source.state[p]["exp_avg"])


def test_an_element_less_is_left():
    source = trained(C.exp_avg, C.scale_by_adam, C.cautious)
    twin = trained(C.scale_by_adam)
    target = chain(copies(all_params(source)), C.scale_by_adam)
    left = target.load_state_dict(source.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == ["param_groups.0.beta", *(f"{n}.exp_avg" for n in range(4))]
    assert target.param_groups[0].keys() == twin.param_groups[0].keys()
    for p, q, t in zip(all_params(source), all_params(target), all_params(twin), strict=True):
        assert target.state[q].keys() == twin.state[t].keys()
        assert all(same_bits(v, source.state[p][k]) for k, v in target.state[q].items())


def test_state_of_another_shape_leaves_the_parameter_as_it_was():
    source = trained(C.scale_by_adam, params=parameters((4, 3), (4,)))
    target = trained(C.scale_by_adam, params=parameters((4, 3), (5,)), steps=2)
    before = snapshot(target)
    left = target.load_state_dict(source.state_dict(), strict=False)
    names = ["1.step", "1.scale_by_adam.exp_avg", "1.scale_by_adam.exp_avg_sq"]
    assert left == (names, names)
    changed = differences(before, snapshot(target))
    assert {name.split(".")[0] for name in changed} == {"0"}
    assert [target.state[p]["step"].item() for p in all_params(target)] == [3, 2]
    train(target, [5])


def test_steps_are_not_counted_on_without_what_was_gathered_in_them():
    source = torch.optim.AdamW(parameters())
    train(source, range(3))
    target = heavyball.AdamW(parameters())
    left = target.load_state_dict(source.state_dict(), strict=False)
    assert not any(target.state.values())
    assert {f"{n}.step" for n in range(4)} <= set(left.missing_keys)
    assert {f"{n}.step" for n in range(4)} <= set(left.unexpected_keys)
    assert {"param_groups.0.foreach", "param_groups.0.amsgrad"} <= set(left.unexpected_keys)
    assert target.param_groups[0]["lr"] == source.param_groups[0]["lr"]
    train(target, [3])
    assert target.state[all_params(target)[0]]["step"] == 1


def test_parameters_are_found_by_name_whatever_their_places():
    class Larger(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.body = Tiny(seed=4)

    source, larger = Tiny(), Larger()
    opt = trained(C.scale_by_adam, params=list(source.named_parameters()))
    named = [(n.removeprefix("body."), p) for n, p in larger.named_parameters()]
    target = chain(named[::-1], C.scale_by_adam, lr=0.5)
    left = target.load_state_dict(opt.state_dict(), strict=False)
    assert left.unexpected_keys == []
    keys = ("step", "scale_by_adam.exp_avg", "scale_by_adam.exp_avg_sq")
    assert set(left.missing_keys) == {f"head.{n}.{k}" for n in ("weight", "bias") for k in keys}
    for name, param in source.named_parameters():
        own = target.state[dict(named)[name]]
        assert all(same_bits(own[key], value) for key, value in opt.state[param].items())
    assert not target.state.get(larger.head.weight)
    assert target.param_groups[0]["lr"] == 0.01
    assert target.param_groups[0]["param_names"] == [n for n, _ in named[::-1]]
    train(target, [3])
    assert target.state[larger.head.weight]["step"] == 1


def test_other_numbers_of_parameters_are_refused_where_nothing_names_them():
    source = trained(C.scale_by_adam)
    target = trained(C.scale_by_adam, params=parameters((4, 3), (4,)))
    before = snapshot(target)
    with pytest.raises(ValueError, match="by name"):
        target.load_state_dict(source.state_dict(), strict=False)
    two = chain([{"params": p} for p in parameters((4, 3), (4,))], C.scale_by_adam)
    with pytest.raises(ValueError, match="groups"):
        two.load_state_dict(source.state_dict(), strict=False)
    assert not differences(before, snapshot(target))


def test_hyper_parameters_that_do_not_fit_are_left():
    source = trained(C.scale_by_adam)
    saved = source.state_dict()
    saved["param_groups"][0] |= {
        "betas": (0.9, 0.9, 0.9),
        "eps": -1.0,
        "lr": 0.5,
        "initial_lr": 0.25,
        "_mine": 7,
        "nonsense": 3,
    }
    del saved["param_groups"][0]["warmup_steps"]
    target = chain(parameters(), C.scale_by_adam, warmup_steps=3)
    own = plain_group(target.param_groups[0])
    left = target.load_state_dict(saved, strict=False)
    assert left.unexpected_keys == [f"param_groups.0.{k}" for k in ("betas", "eps", "nonsense")]
    assert left.missing_keys == ["param_groups.0.warmup_steps"]
    expected = {**own, "lr": 0.5, "initial_lr": 0.25, "_mine": 7}
    assert plain_group(target.param_groups[0]) == expected
    train(target, [3])


def test_a_parameter_that_had_no_state_when_it_was_saved_keeps_its_own():
    params = parameters((3,), (2,))
    source = chain(params, C.exp_avg)
    params[0].grad = torch.ones(3)
    source.step()
    target = trained(C.exp_avg, params=parameters((3,), (2,)), steps=2)
    before = snapshot(target)
    left = target.load_state_dict(source.state_dict(), strict=False)
    assert left == (["1.step", "1.exp_avg"], [])
    assert {n.split(".")[0] for n in differences(before, snapshot(target))} == {"0"}


def test_evaluation_mode_goes_with_the_chains_that_have_one():
    source = heavyball.SFAdamW(parameters(), 0.1)
    train(source, range(3))
    plain = chain(parameters(), C.scale_by_exp_avg_sq)
    left = plain.load_state_dict(source.eval().state_dict(), strict=False)
    assert {"param_groups.0.train_mode", "0.train_param"} <= set(left.unexpected_keys)
    train(plain, [3])
    target = chain(parameters(), C.scale_by_exp_avg_sq, C.centralize, C.schedule_free)
    with pytest.raises(RuntimeError, match="call train"):
        target.eval().load_state_dict(source.state_dict(), strict=False)
    target.train().load_state_dict(source.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        train(target, [3])
    target.train()
    assert_same(all_params(target), all_params(source.train()))
    train(target, [3])


def test_a_misfit_changes_nothing_with_strict():
    source, target = trained(C.scale_by_adam), trained(C.scale_by_adam, C.cautious, steps=2)
    before, groups = snapshot(target), [plain_group(g) for g in target.param_groups]
    with pytest.raises(ValueError, match="a different chain"):
        target.load_state_dict(source.state_dict())
    assert not differences(before, snapshot(target))
    assert groups == [plain_group(g) for g in target.param_groups]
    train(target, [2])


def test_loading_without_strict_shares_no_memory():
    source, target = trained(C.exp_avg), trained(C.exp_avg, C.scale_by_lion)
    own = {id(t) for s in target.state.values() for t in s.values()}
    target.load_state_dict(source.state_dict(), strict=False)
    taken = [t.data_ptr() for s in target.state.values() for t in s.values()]
    saved = [t.data_ptr() for s in source.state.values() for t in s.values()]
    assert not set(taken) & set(saved)
    assert own
