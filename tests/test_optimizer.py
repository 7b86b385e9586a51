"""ChainOpt as a torch optimizer: parameters, groups, refusals, modes, saving, and what it prints."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from helpers import (
    Tiny,
    all_params,
    assert_same,
    assert_same_optimizers,
    clones,
    copies,
    differences,
    eager,  # noqa: F401
    fill_gradients,
    live_keys,
    loss_of,
    parameters,
    plain_group,
    same_bits,
    snapshot,
    train,
)
from torch import nn

import heavyball
from heavyball import chainable as C


def adam(params, **options):
    return C.ChainOpt(params, 0.01, C.scale_by_adam, **options)


def schedule_free(params, lr=0.05, **options):
    return heavyball.SFAdamW(params, lr, weight_decay=0.1, **options)


def averaging(params, lr=0.05, **options):
    return C.ChainOpt(params, lr, C.exp_avg, C.parameter_ema(beta=0.8), **options)


AVERAGES = {"schedule_free": schedule_free, "parameter_ema": averaging}
every_average = pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- parameters and groups


def test_parameters_may_come_in_every_form_that_torch_takes():
    forms = {
        "list": lambda ps: ps,
        "tuple": tuple,
        "generator": lambda ps: (p for p in ps),
        "groups": lambda ps: [{"params": ps[:2]}, {"params": ps[2:]}],
        "group of one tensor": lambda ps: [{"params": p} for p in ps],
        "group of a generator": lambda ps: [{"params": (p for p in ps)}],
        "pairs": lambda ps: [(f"p{i}", p) for i, p in enumerate(ps)],
        "groups of pairs": lambda ps: [{"params": [(f"p{i}", p)]} for i, p in enumerate(ps)],
    }
    results = {}
    for name, form in forms.items():
        params = parameters()
        train(adam(form(params)), range(2))
        results[name] = params
    for params in results.values():
        assert_same(params, results["list"])


def test_names_are_kept():
    model = Tiny()
    opt = adam(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    other = adam(Tiny().named_parameters())
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["param_names"] == names
    copied = copy.deepcopy(opt)
    assert copied.param_groups[0]["param_names"] == names


def test_the_list_of_parameters_given_is_not_changed():
    params = parameters()
    groups = [{"params": params, "lr": 0.1}]
    adam(groups)
    assert groups == [{"params": params, "lr": 0.1}]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (lambda p: [], ValueError),
        (lambda p: p, TypeError),
        (lambda p: [p, 1.0], TypeError),
        (lambda p: [("a", p), nn.Parameter(torch.zeros(2))], ValueError),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError),
        (lambda p: [{"params": {p}}], TypeError),
        (lambda p: [p * 2], ValueError),
        (lambda p: 3, TypeError),
    ],
)
def test_what_torch_does_not_take_as_parameters_is_refused_as_there(params, error):
    for make in (adam, torch.optim.AdamW):
        with pytest.raises(error):
            make(params(nn.Parameter(torch.ones(3))))


def test_a_parameter_given_twice_in_a_group_is_stepped_twice_with_a_warning_as_in_torch():
    results = []
    for make in (heavyball.SGD, torch.optim.SGD):
        (p,) = parameters((3,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = make([p, p], 0.125)
        p.grad = torch.ones(3)
        opt.step()
        results.append(p)
    assert_same(results[:1], results[1:])


def test_every_hyper_parameter_is_in_the_group_under_its_own_name():
    opt = C.ChainOpt(
        parameters(), 0.1, C.scale_by_adam(betas=(0.8, 0.9)), C.clip_by_norm, weight_decay=0.1
    )
    live = {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-8,
        "max_norm": 1.0,
        "weight_decay": 0.1,
        "warmup_steps": 0.0,
    }
    assert plain_group(opt.param_groups[0]).items() >= live.items()
    assert set(live_keys(opt)) == set(live)
    assert opt.defaults.items() >= plain_group(opt.param_groups[0]).items()


@pytest.mark.parametrize(
    ("wrong", "meant"), [("beta", "betas"), ("weight_decy", "weight_decay"), ("LR", None)]
)
def test_an_unknown_entry_of_a_group_is_refused_with_the_known_and_the_nearest(wrong, meant):
    params = parameters((2,), (3,))
    with pytest.raises(ValueError, match=f"'{wrong}'") as caught:
        adam([{"params": params[:1]}, {"params": params[1:], wrong: 0.5}])
    message = str(caught.value)
    for known in ("lr", "betas", "eps", "weight_decay", "warmup_steps"):
        assert known in message
    assert meant is None or f"did you mean '{meant}'" in message
    opt = adam(params[:1])
    with pytest.raises(ValueError, match=f"'{wrong}'"):
        opt.add_param_group({"params": params[1:], wrong: 0.5})
    assert len(opt.param_groups) == 1
    train(opt, [0])


def test_entries_that_trainers_and_schedulers_add_are_left_alone():
    kept = {"name": "head", "initial_lr": 0.5, "max_lr": 1.0, "_mine": [1, 2]}
    opt = adam([{"params": parameters(), **kept}])
    train(opt, [0])
    assert {key: opt.param_groups[0][key] for key in kept} == kept


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("lr", -0.1, ValueError),
        ("lr", float("inf"), ValueError),
        ("lr", "0.1", TypeError),
        ("lr", torch.tensor([0.1, 0.2]), ValueError),
        ("lr", torch.tensor(-0.1), ValueError),
        ("lr", torch.tensor(1), ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", (0.9,), ValueError),
        ("betas", 0.9, TypeError),
        ("eps", float("nan"), ValueError),
        ("weight_decay", -1.0, ValueError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", None, TypeError),
    ],
)
def test_a_wrong_value_in_a_group_is_refused_and_named(key, value, error):
    opt = adam(parameters((2,)))
    with pytest.raises(error, match=key):
        opt.add_param_group({"params": parameters((3,)), key: value})
    assert len(opt.param_groups) == 1
    with pytest.raises(error, match=key):
        adam([{"params": parameters((3,)), key: value}])


OVERLAPPING = torch.zeros(1).expand(3).requires_grad_()


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=torch.bool), "bool"),
        (OVERLAPPING, "overlap"),
    ],
    ids=["complex", "integer", "bool", "expanded"],
)
def test_a_parameter_that_cannot_be_optimized_is_refused_and_named(param, message):
    good = parameters((2,))
    with pytest.raises(ValueError, match=rf"1 of group 0 of shape \(3,\).*{message}"):
        adam([*good, param])
    with pytest.raises(ValueError, match=f"'bad'.*{message}"):
        adam([("good", good[0]), ("bad", param)])
    opt = adam(good)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [param]})
    assert len(opt.param_groups) == 1
    train(opt, range(2))
    assert opt.state[good[0]]["step"] == 2


def test_an_empty_group_and_empty_tensors_are_harmless():
    opt = adam([{"params": []}, {"params": parameters((0, 3), (3,))}])
    train(opt, range(2))
    assert torch.isfinite(opt.param_groups[1]["params"][1]).all()
    assert "0 elements" in repr(opt)


# ---- refusals of a step


def last_of_three(replace):
    """Three parameters with gradients, the last made wrong by `replace`."""
    params = parameters((2, 2), (3,), (4,))
    fill_gradients(params, 0)
    replace(params[2])
    return params


def make_sparse(p):
    p.grad = p.grad.to_sparse()


def make_complex(p):
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones(4, dtype=torch.complex64)
    p.data = torch.ones(4)


def make_integer(p):
    p.grad = None
    p.requires_grad_(False)
    p.data = torch.ones(4, dtype=torch.int32)
    p.grad = torch.ones(4, dtype=torch.int32)
    p.data = torch.ones(4)


def make_longer(p):
    p.data = torch.ones(5)
    p.grad = None
    p.grad = torch.ones(5)
    p.data = torch.ones(4)


def make_broadcastable(p):
    p.data = torch.ones(1)
    p.grad = None
    p.grad = torch.ones(1)
    p.data = torch.ones(4)


def make_double(p):
    p.data = p.data.double()
    p.grad = None
    p.grad = torch.ones(4, dtype=torch.float64)
    p.data = torch.ones(4)


BAD_GRADIENTS = {
    "sparse": (make_sparse, "sparse"),
    "complex": (make_complex, "complex64"),
    "integer": (make_integer, "int32"),
    "longer": (make_longer, r"\(5,\)"),
    "broadcastable": (make_broadcastable, r"\(1,\)"),
    "float64 for float32": (make_double, "float64"),
}


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_changes(
    kind, steps_before, foreach
):
    spoil, message = BAD_GRADIENTS[kind]
    params = parameters((2, 2), (3,), (4,))
    opt = C.ChainOpt(
        [{"params": params[:2]}, {"params": params[2:]}],
        0.1,
        C.skip_not_finite,
        C.scale_by_adam,
        C.clip_by_global_norm,
        weight_decay=0.1,
        foreach=foreach,
    )
    train(opt, range(steps_before))
    fill_gradients(params, 5)
    spoil(params[2])
    before, groups = snapshot(opt), [plain_group(g) for g in opt.param_groups]
    with pytest.raises(ValueError, match=rf"0 of group 1 of shape \(4,\).*{message}"):
        opt.step()
    assert not differences(before, snapshot(opt))
    assert groups == [plain_group(g) for g in opt.param_groups]
    params[2].grad = None
    fill_gradients(params, 5)
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [steps_before + 1] * 3


def test_a_bad_gradient_is_named_where_there_are_names():
    params = last_of_three(make_sparse)
    opt = adam([(f"layer.{i}", p) for i, p in enumerate(params)])
    with pytest.raises(ValueError, match=r"'layer\.2'"):
        opt.step()


def test_a_gradient_in_another_precision_is_taken_where_torch_was_told_to_expect_it():
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.full((4,), 1 + 2.0**-20)
    opt = C.ChainOpt([p], 2.0**-3, C.exp_avg)
    opt.step()
    assert (opt.state[p]["exp_avg"] == 1 + 2.0**-20).all()
    assert (p == -(2.0**-3)).all()


def test_a_parameter_that_moved_to_another_device_is_refused_before_anything_changes():
    params = parameters((3,), (2,))
    opt = adam(params)
    train(opt, range(2))
    moved = nn.Parameter(torch.zeros(2, device="meta"))
    moved.grad = torch.zeros(2, device="meta")
    torch.utils.swap_tensors(params[1], moved)
    fill_gradients(params[:1], 3)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"meta.*cpu"):
        opt.step()
    assert same_bits(params[0], before)
    assert opt.state[params[0]]["step"] == 2


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "warmup_steps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "a lot", None, (0.9, 0.9, 0.9)])
def test_a_hyper_parameter_that_became_wrong_is_refused_before_anything_changes(key, value):
    params = parameters((3,), (2,))
    opt = adam([{"params": params[:1]}, {"params": params[1:]}])
    train(opt, range(2))
    if key == "betas" and isinstance(value, float):
        value = (0.9, value)
    opt.param_groups[1][key] = value
    before = snapshot(opt)
    fill_gradients(params, 2)
    with pytest.raises((ValueError, TypeError), match=rf"group 1.*{key}"):
        opt.step()
    assert not differences(before, snapshot(opt))


def test_a_value_that_the_constructor_refuses_is_refused_in_the_group_too():
    """x cannot be recovered from y when beta is 0, so schedule-free refuses it."""
    betas = (0.0, 0.999)
    with pytest.raises(ValueError, match="beta"):
        heavyball.SFAdamW(parameters(), betas=betas)
    with pytest.raises(ValueError, match="beta"):
        heavyball.SFAdamW([{"params": parameters(), "betas": betas}])
    opt = heavyball.SFAdamW(parameters())
    train(opt, range(2))
    opt.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match="beta"):
        train(opt, [2])


def test_a_list_in_the_group_may_be_changed_in_place():
    (p,), (q,) = parameters((3,)), parameters((3,))
    changed, replaced = adam([p]), adam([q])
    for opt in (changed, replaced):
        opt.param_groups[0]["betas"] = [0.9, 0.99]
        train(opt, range(2))
    changed.param_groups[0]["betas"][0] = 0.5
    replaced.param_groups[0]["betas"] = [0.5, 0.99]
    for opt in (changed, replaced):
        train(opt, [2])
    assert_same([p], [q])
    changed.param_groups[0]["betas"][0] = float("nan")
    with pytest.raises(ValueError, match="betas"):
        train(changed, [3])


def test_a_group_that_has_lost_an_entry_is_refused_before_anything_changes():
    opt = adam(parameters((3,)))
    train(opt, [0])
    before = snapshot(opt)
    del opt.param_groups[0]["eps"]
    with pytest.raises(ValueError, match="'eps'"):
        train(opt, [1])
    assert not differences(before, snapshot(opt))


def test_a_learning_rate_that_a_schedule_ends_just_below_zero_is_taken():
    opt = adam(parameters((3,)))
    opt.param_groups[0]["lr"] = -1e-20
    train(opt, [0])


def test_an_exception_in_the_closure_changes_nothing():
    opt = adam(parameters((3,)))
    train(opt, [0])
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert not differences(before, snapshot(opt))
    assert opt.step(lambda: None) is None
    assert opt.step(lambda: 3.5) == 3.5


# ---- arguments of the constructor


def test_the_argument_weight_decay_is_that_of_the_default_decay():
    """p <- p (1 - lr wd) - lr u"""
    (p,) = parameters((3,), dtype=torch.float64)
    start = p.detach().clone()
    opt = C.ChainOpt([p], 0.1, C.sign, weight_decay=0.5)
    fill_gradients([p], 0)
    opt.step()
    expected = start * (1 - 0.1 * 0.5) - 0.1 * p.grad.sign()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=4 * 2.0**-52)


def test_the_argument_weight_decay_is_that_of_the_chains_own_decay():
    opt = C.ChainOpt(parameters(), 0.1, C.sign, C.l1_decay, weight_decay=0.5)
    assert opt.param_groups[0]["weight_decay"] == 0.5
    assert "decoupled" not in repr(opt)
    same = C.ChainOpt(parameters(), 0.1, C.sign, C.l1_decay(weight_decay=0.5))
    train(opt, range(3))
    train(same, range(3))
    assert_same_optimizers(opt, same)


def test_two_different_weight_decays_are_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0\.2.*0\.1.*l1_decay"):
        C.ChainOpt(parameters(), 0.1, C.l1_decay(weight_decay=0.1), weight_decay=0.2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weight_decay": -0.1}, ValueError),
        ({"weight_decay": float("nan")}, ValueError),
        ({"weight_decay": "much"}, TypeError),
        ({"weight_decay": True}, TypeError),
        ({"warmup_steps": -1}, ValueError),
        ({"warmup_steps": float("inf")}, ValueError),
        ({"foreach": 1}, TypeError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_and_named(options, error):
    (name,) = options
    with pytest.raises(error, match=name):
        C.ChainOpt(parameters(), 0.1, C.sign, **options)
    with pytest.raises(TypeError, match="weight_decy"):
        C.ChainOpt(parameters(), 0.1, C.sign, weight_decy=0.1)


@pytest.mark.parametrize("make", [adam, schedule_free])
def test_warm_up_is_linear_in_the_steps_of_each_parameter(make):
    """lr_t = lr min(1, t / warmup)"""
    warm, by_hand = make(parameters(), warmup_steps=4), make(parameters())
    lr = by_hand.param_groups[0]["lr"]
    for step in range(1, 7):
        by_hand.param_groups[0]["lr"] = lr * min(1, step / 4)
        train(warm, [step])
        train(by_hand, [step])
        assert warm.param_groups[0]["lr"] == lr
        assert not differences(snapshot(warm), snapshot(by_hand))


def test_warm_up_of_a_parameter_that_comes_late_begins_with_it():
    early, late = parameters((3,)), parameters((4,))
    opt = C.ChainOpt(early, 0.5, C.sign, warmup_steps=4)
    train(opt, range(6))
    opt.add_param_group({"params": late})
    before = clones(early + late)
    train(opt, [6])
    # two roundings to float32 of values below 4
    moved = [(a - b).abs().max().item() for a, b in zip(early + late, before, strict=True)]
    assert moved == pytest.approx([0.5, 0.5 / 4], abs=1e-6)


# ---- train, eval, averaged


@every_average
def test_evaluation_mode_is_idempotent_and_returns_the_optimizer(make):
    opt = make(parameters())
    train(opt, range(4))
    training = snapshot(opt)
    assert opt.train() is opt
    assert opt.train(True) is opt
    assert not differences(training, snapshot(opt))
    assert opt.eval() is opt
    evaluating = snapshot(opt)
    moved = differences(training, evaluating)
    assert {name for name in moved if "." not in name} == {"0", "1", "2", "3"}
    assert opt.eval() is opt
    assert opt.train(False) is opt
    assert opt.train(mode=False) is opt
    assert not differences(evaluating, snapshot(opt))
    assert opt.train(mode=True) is opt
    assert not differences(training, snapshot(opt))


def test_schedule_free_evaluates_at_the_average_of_the_iterates():
    """With sign steps of constant length, x is the plain mean of z_1..z_t (equal weights)."""
    (p,) = parameters((5,), dtype=torch.float64)
    z, iterates = p.detach().clone(), []
    opt = C.ChainOpt([p], 0.1, C.sign, C.schedule_free(beta=0.7))
    for seed in range(6):
        train(opt, [seed])
        z = z - 0.1 * p.grad.sign()
        iterates.append(z)
    opt.eval()
    # x comes from y and z by x = y + (1 - 1 / beta)(z - y): some dozen roundings of values below 4
    expected = torch.stack(iterates).mean(0)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=100 * 2.0**-52)


def test_parameter_ema_evaluates_at_the_weighted_mean_of_the_parameters():
    (p,) = parameters((5,), dtype=torch.float64)
    opt, seen = averaging([p]), []
    for seed in range(6):
        train(opt, [seed])
        seen.append(p.detach().clone())
    weights = 0.8 ** torch.arange(5, -1, -1, dtype=torch.float64)
    opt.eval()
    expected = weights @ torch.stack(seen) / weights.sum()
    # six averages of values below 4
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=50 * 2.0**-52)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_average
def test_training_is_the_same_to_the_bit_however_often_one_evaluates(make, dtype):
    opt, plain = make(parameters(dtype=dtype)), make(parameters(dtype=dtype))
    opt.eval().train()
    for seed in range(5):
        train(opt, [seed])
        train(plain, [seed])
        for _ in range(seed):
            opt.eval()
            opt.train()
        with opt.averaged():
            pass
    assert_same_optimizers(opt, plain)


@every_average
def test_a_step_in_evaluation_mode_raises_and_changes_nothing(make):
    opt = make(parameters())
    train(opt, range(2))
    opt.eval()
    before, calls = snapshot(opt), []
    with pytest.raises(RuntimeError, match="evaluation mode"):
        opt.step(lambda: calls.append(1))
    assert not calls
    assert not differences(before, snapshot(opt))
    opt.train()
    train(opt, [2])


@every_average
def test_averaged_is_evaluation_mode_inside_and_the_mode_of_before_outside(make):
    opt, other = make(parameters()), make(parameters())
    for each in (opt, other):
        train(each, range(3))
    training, evaluating = snapshot(opt), snapshot(other.eval())
    with opt.averaged() as inside:
        assert inside is opt
        assert not differences(evaluating, snapshot(opt))
        with opt.averaged():
            assert not differences(evaluating, snapshot(opt))
        assert not differences(evaluating, snapshot(opt))
    assert not differences(training, snapshot(opt))
    with other.averaged():
        assert not differences(evaluating, snapshot(other))
    assert not differences(evaluating, snapshot(other))


@every_average
def test_averaged_goes_back_after_an_exception(make):
    opt = make(parameters())
    train(opt, range(3))
    training = snapshot(opt)
    with pytest.raises(ZeroDivisionError), opt.averaged():
        1 / 0  # noqa: B018
    assert not differences(training, snapshot(opt))

    def train_inside():
        with opt.averaged():
            opt.train()
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        train_inside()
    assert not differences(training, snapshot(opt))
    train(opt, [3])


@every_average
def test_the_mode_must_be_a_bool(make):
    opt = make(parameters())
    for value in (0, None, "eval"):
        with pytest.raises(TypeError, match="mode="):
            opt.train(value)


@every_average
def test_before_the_first_step_there_is_nothing_to_average(make):
    opt = make(parameters())
    before = snapshot(opt)
    opt.eval()
    assert not differences(before, snapshot(opt))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        train(opt, [0])
    train(opt.train(), [0])


def test_without_an_average_the_modes_do_nothing():
    opt = adam(parameters())
    train(opt, range(2))
    before, groups = snapshot(opt), [plain_group(g) for g in opt.param_groups]
    assert opt.eval() is opt
    assert opt.train() is opt
    with opt.averaged() as inside:
        assert inside is opt
    opt.eval()
    assert not differences(before, snapshot(opt))
    assert groups == [plain_group(g) for g in opt.param_groups]
    train(opt, [2])


def test_two_averages_in_a_chain_do_not_lose_the_training_weights():
    elements = C.exp_avg, C.parameter_ema(beta=0.5), C.parameter_ema(beta=0.9)
    try:
        opt = C.ChainOpt(parameters(), 0.1, *elements)
    except ValueError as error:
        assert "parameter_ema" in str(error)  # noqa: PT017 (refusing it is as good)
        return
    train(opt, range(3))
    before = snapshot(opt)
    opt.eval()
    opt.train()
    assert not differences(before, snapshot(opt))


@every_average
def test_a_group_added_in_evaluation_mode_joins_it(make):
    early, late = parameters((3,)), parameters((4,))
    opt, plain = make(early), make(copies(early))
    for each in (opt, plain):
        train(each, range(3))
    opt.eval()
    before = clones(late)
    opt.add_param_group({"params": late})
    plain.add_param_group({"params": copies(late)})
    assert [g["train_mode"] for g in opt.param_groups] == [False, False]
    with pytest.raises(RuntimeError, match="evaluation mode"):
        opt.step()
    opt.eval()
    assert_same(late, before)
    opt.train()
    assert_same(late, before)
    train(opt, range(3, 6))
    train(plain, range(3, 6))
    assert_same(all_params(opt), all_params(plain))
    assert [g["train_mode"] for g in opt.param_groups] == [True, True]


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("saved", [True, False])
@every_average
def test_loading_brings_the_mode_that_was_saved(make, saved, current, order):
    source = Tiny()
    opt = make(source.parameters())
    train(opt, range(4))
    opt.train(saved)
    files = through_a_file([source.state_dict(), opt.state_dict()])

    target = Tiny(seed=3)
    loaded = make(target.parameters())
    train(loaded, range(10, 12))
    loaded.train(current)
    steps = [(target, files[0]), (loaded, files[1])]
    for thing, state in steps if order == "model first" else reversed(steps):
        thing.load_state_dict(state)
    assert_same_optimizers(loaded, opt)
    if not saved:
        with pytest.raises(RuntimeError, match="evaluation mode"):
            loaded.step()
    assert not differences(snapshot(opt.eval()), snapshot(loaded.eval()))
    assert not differences(snapshot(opt.train()), snapshot(loaded.train()))
    train(opt, range(4, 6))
    train(loaded, range(4, 6))
    assert_same_optimizers(loaded, opt)


# ---- saving, loading, copying


def different_chains():
    return {
        "another moment": lambda ps: C.ChainOpt(ps, 0.1, C.scale_by_laprop),
        "less state": lambda ps: C.ChainOpt(ps, 0.1, C.sign),
        "more state": lambda ps: C.ChainOpt(ps, 0.1, C.scale_by_adam, C.exp_avg),
        "another writer": lambda ps: C.ChainOpt(ps, 0.1, C.scale_by_adam, C.schedule_free),
        "an average more": lambda ps: C.ChainOpt(ps, 0.1, C.scale_by_adam, C.parameter_ema),
        "same groups": lambda ps: C.ChainOpt(ps, 0.1, C.scale_by_adam_atan2, C.trust_region),
    }


@pytest.mark.parametrize("name", different_chains())
def test_the_state_of_another_chain_is_refused_and_nothing_changes(name):
    source = adam(parameters())
    train(source, range(2))
    target = different_chains()[name](parameters())
    train(target, range(3))
    before, groups = snapshot(target), [plain_group(g) for g in target.param_groups]
    with pytest.raises(ValueError, match="load_state_dict"):
        target.load_state_dict(source.state_dict())
    assert not differences(before, snapshot(target))
    assert groups == [plain_group(g) for g in target.param_groups]
    train(target, [3])


def test_the_state_of_torchs_optimizer_is_refused_by_name():
    source = torch.optim.AdamW(parameters())
    train(source, [0])
    with pytest.raises(ValueError, match=r"a state dict of torch\.optim"):
        heavyball.AdamW(parameters()).load_state_dict(source.state_dict())


def test_other_groups_or_sizes_are_refused_and_nothing_changes():
    source = adam(parameters())
    train(source, range(2))
    for target in (
        adam([{"params": parameters((3,))}, {"params": parameters((2,))}]),
        adam(parameters((4, 3), (4,))),
    ):
        train(target, [0])
        before = snapshot(target)
        with pytest.raises(ValueError, match="group"):
            target.load_state_dict(source.state_dict())
        assert not differences(before, snapshot(target))
        train(target, [1])


def test_loading_shares_no_memory_with_the_dict():
    source, target = (
        schedule_free(parameters(), lr=torch.tensor(0.125)),
        schedule_free(parameters()),
    )
    train(source, range(3))
    saved = source.state_dict()
    target.load_state_dict(saved)
    before, kept = snapshot(target), copy.deepcopy(saved)
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(7)
    saved["param_groups"][0]["lr"].fill_(7)
    saved["param_groups"][0]["betas"] = (0.5, 0.5)
    assert not differences(before, snapshot(target))
    assert target.param_groups[0]["lr"] == 0.125
    assert target.param_groups[0]["betas"] == (0.9, 0.999)
    target.load_state_dict(kept)
    unchanged = copy.deepcopy(kept)
    train(target, range(2))
    for number, state in kept["state"].items():
        assert_same(state.values(), unchanged["state"][number].values())


def test_a_checkpoint_of_an_optimizer_without_state_loads():
    source, target = adam(parameters()), adam(parameters())
    train(target, [0])
    target.load_state_dict(through_a_file(source.state_dict()))
    assert not any(target.state.values())
    train(source, range(2))
    params = copies(parameters())
    fresh = adam(params)
    fresh.load_state_dict(adam(parameters()).state_dict())
    train(fresh, range(2))
    assert_same_optimizers(fresh, source)


def test_loaded_hyper_parameters_replace_those_of_the_constructor():
    source = adam(parameters(), weight_decay=0.25)
    source.param_groups[0]["betas"] = (0.5, 0.75)
    target = adam(parameters())
    target.load_state_dict(through_a_file(source.state_dict()))
    assert plain_group(target.param_groups[0]) == plain_group(source.param_groups[0])


def test_hooks_of_the_user_see_and_may_replace_what_is_saved_and_loaded():
    opt, calls = adam(parameters()), []
    train(opt, range(2))
    opt.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 5})
    saved = opt.state_dict()
    assert saved["extra"] == 5
    other = adam(parameters())

    def replace(o, loading):
        calls.append(loading["extra"])
        state = {n: {k: v * 2 for k, v in s.items()} for n, s in loading["state"].items()}
        return {"param_groups": loading["param_groups"], "state": state}

    def after(o):
        calls.append(float(o.state[all_params(o)[0]]["step"]))

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(saved)
    assert calls == ["before saving", 5, 4.0]
    for p, q in zip(all_params(opt), all_params(other), strict=True):
        for key, value in opt.state[p].items():
            assert torch.equal(other.state[q][key], 2 * value)
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_a_hook_that_raises_leaves_no_trace():
    source, opt = adam(parameters()), adam(parameters())
    train(source, range(3))
    handle = opt.register_load_state_dict_pre_hook(lambda o, loading: 1 / 0)
    before = snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.load_state_dict(source.state_dict())
    handle.remove()
    assert not differences(before, snapshot(opt))
    opt.load_state_dict(source.state_dict())
    for p, q in zip(all_params(opt), all_params(source), strict=True):
        assert_same(opt.state[p].values(), source.state[q].values())


def test_routing_by_name_outlives_a_checkpoint_whose_names_have_a_prefix():
    """As DataParallel and compiled modules give them."""

    def make(prefix=""):
        model = Tiny()
        named = [(prefix + name, p) for name, p in model.named_parameters()]
        chain = C.route(C.when(C.exp_avg, name="matrix"), otherwise=C.scale_by_lion)
        return C.ChainOpt(named, 0.1, chain)

    source, target = make(), make()
    train(source, range(2))
    saved = source.state_dict()
    names = saved["param_groups"][0]["param_names"]
    saved["param_groups"][0]["param_names"] = [f"module.{name}" for name in names]
    table = [line.split()[1:] for line in target.routing().splitlines()]
    try:
        target.load_state_dict(saved)
    except ValueError as error:
        assert "module.matrix" in str(error)  # noqa: PT017 (refusing it is as good)
    else:
        assert [line.split()[1:] for line in target.routing().splitlines()] == table
    for opt in (target, copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        train(opt, [2])
        keys = {p.ndim: set(opt.state[p]) for p in all_params(opt)}
        assert keys[2] == {"step", "exp_avg"}
        assert keys[1] == {"step", "scale_by_lion.exp_avg"}


def test_the_checkpoint_holds_nothing_but_tensors_and_plain_values():
    opt = schedule_free(parameters())
    train(opt, range(2))
    saved = opt.eval().state_dict()
    for state in saved["state"].values():
        assert all(isinstance(key, str) for key in state)
        assert all(type(value) is torch.Tensor for value in state.values())
    for value in plain_group(saved["param_groups"][0]).values():
        assert isinstance(value, (bool, int, float, tuple, list, type(None)))


@C.transform(total=C.zeros)
def running_total(update, total, *, share=0.5):
    total = total + share * update
    return total, total


def test_an_optimizer_of_the_users_own_transform_can_be_pickled():
    opt = C.ChainOpt(parameters(), 0.1, running_total(share=0.25))
    train(opt, range(2))
    other = pickle.loads(pickle.dumps(opt))
    train(opt, [2])
    train(other, [2])
    assert_same_optimizers(opt, other)


def test_an_optimizer_of_a_local_transform_can_be_copied_and_says_why_it_cannot_be_pickled():
    @C.transform(total=C.zeros)
    def local_total(update, total):
        return update + total, update + total

    opt = C.ChainOpt(parameters(), 0.1, local_total)
    train(opt, range(2))
    other = copy.deepcopy(opt)
    train(opt, [2])
    train(other, [2])
    assert_same_optimizers(opt, other)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local_total"):
        pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_changes_its_dtype_trains_on(dtype):
    model = Tiny()
    opt = schedule_free(model.parameters())
    train(opt, range(3))
    model.to(dtype)
    before = snapshot(opt)
    train(opt, range(3, 5))
    assert all(p.dtype == dtype for p in model.parameters())
    # as an optimizer that was built for these parameters would hold it
    fresh = schedule_free(copies(model.parameters())).init_state()
    assert [{k: v.dtype for k, v in s.items()} for s in opt.state.values()] == [
        {k: v.dtype for k, v in s.items()} for s in fresh.state.values()
    ]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {"0", "1", "2"} <= {name.split(".")[0] for name in differences(before, snapshot(opt))}
    assert all(state["step"] == 5 for state in opt.state.values())


def test_steps_in_inference_mode_and_outside_may_follow_each_other():
    """State that begins in inference mode is made outside of it, so that any step may change it."""
    runs = []
    for inside in (range(0), range(2), range(1, 2)):
        params = parameters((3,))
        opt = heavyball.AdamW(params)
        for step in range(3):
            with torch.inference_mode(step in inside):
                train(opt, [step])
        assert opt.state[all_params(opt)[0]]["step"] == 3
        runs.append(snapshot(opt))
    assert not differences(runs[0], runs[1])
    assert not differences(runs[0], runs[2])


def test_a_step_does_not_leave_a_graph_behind():
    model = Tiny()
    opt = schedule_free(model.parameters())
    loss_of(model).backward(create_graph=False)
    opt.step()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(v.requires_grad for state in opt.state.values() for v in state.values())
    versions = [p._version for p in model.parameters()]
    loss = loss_of(model)
    loss_of(model).backward()
    opt.step()
    # autograd must notice that a weight of an old graph has changed
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- looking at it


def real_bytes(opt):
    return sum(v.untyped_storage().nbytes() for state in opt.state.values() for v in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [adam, schedule_free, averaging])
def test_state_bytes_are_the_bytes_held(make, dtype):
    opt = make(parameters(dtype=dtype))
    assert opt.state_bytes() == 0
    train(opt, range(2))
    training = opt.state_bytes()
    assert training == real_bytes(opt) > 0
    opt.eval()
    assert opt.state_bytes() == real_bytes(opt)
    opt.train()
    assert opt.state_bytes() == training


def test_repr_shows_the_chain_its_hyper_parameters_and_the_bytes():
    params = parameters((4, 3), (4, 3), (5,))
    opt = C.ChainOpt(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}],
        0.125,
        C.scale_by_adam(betas=(0.8, 0.95)),
        C.cautious,
        weight_decay=0.5,
    )
    empty = repr(opt)
    assert empty.startswith("ChainOpt(")
    assert "state: 0 bytes" in empty
    train(opt, range(2))
    shown = repr(opt)
    assert "scale_by_adam(betas=(0.8, 0.95)) | cautious | decoupled | descend" in shown
    for expected in ("lr=0.125", "lr=0.25", "betas=(0.8, 0.95)", "eps=1e-08", "weight_decay=0.5"):
        assert expected in shown
    # float32 moments of 2 x 12 and 5 elements, and three counts of 8 bytes
    total = 2 * 4 * (12 + 12 + 5) + 3 * 8
    assert total == opt.state_bytes()
    assert f"{total} bytes" in shown
    assert re.search(rf"2 x \(4, 3\) float32, {2 * 4 * 12 + 8} bytes each", shown)
    assert re.search(rf"1 x \(5,\) float32, {2 * 4 * 5 + 8} bytes each", shown)
    assert f"{total / 29:.4g} per element" in shown
    opt.param_groups[1]["lr"] = torch.tensor(0.0625)
    assert "lr=0.0625" in repr(opt)


def test_repr_of_a_large_state_is_readable():
    opt = C.ChainOpt([nn.Parameter(torch.zeros(300, 1000))], 0.1, C.exp_avg)
    train(opt, [0])
    assert "1,200,008 bytes (1.144 MiB)" in repr(opt)


def test_chains_without_state_hold_nothing_but_the_count():
    for opt in (
        heavyball.SGD(parameters()),
        C.ChainOpt(parameters(), 0.1, C.sign, C.clip_by_norm, weight_decay=0.1),
    ):
        train(opt, range(2))
        assert all(set(state) == {"step"} for state in opt.state.values())
        assert opt.state_bytes() == 8 * 4


def test_state_that_an_option_switches_off_is_not_held():
    full = {
        name: {k.rsplit(".", 1)[-1] for k, v in opt.state[all_params(opt)[0]].items() if v.ndim}
        for name, opt in {
            "adam": heavyball.AdamW(parameters()),
            "amsgrad": heavyball.AdamW(parameters(), amsgrad=True),
            "rms": heavyball.RMSprop(parameters()),
            "momentum": heavyball.RMSprop(parameters(), momentum=0.5),
            "centered": heavyball.RMSprop(parameters(), centered=True),
        }.items()
        if train(opt, [0]) is None
    }
    assert full == {
        "adam": {"exp_avg", "exp_avg_sq"},
        "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "rms": {"exp_avg_sq"},
        "momentum": {"exp_avg_sq", "momentum_buffer"},
        "centered": {"exp_avg_sq", "grad_avg"},
    }


def test_routing_shows_which_parameter_got_which_chain():
    chain = C.route(C.when(C.scale_by_lion, max_ndim=1), otherwise=[C.exp_avg, C.sign]), C.cautious
    model = Tiny()
    named = C.ChainOpt(model.named_parameters(), 0.1, *chain)
    rows = {line.split()[0]: line for line in named.routing().splitlines()[1:]}
    assert set(rows) == {"matrix", "vector", "kernel", "number"}
    for name in ("vector", "number"):
        assert rows[name].endswith("scale_by_lion | cautious | decoupled | descend")
    for name in ("matrix", "kernel"):
        assert rows[name].endswith("exp_avg | sign | cautious | decoupled | descend")
    assert "(2, 3, 2)" in rows["kernel"]
    plain = C.ChainOpt([{"params": [p]} for p in parameters()], 0.1, *chain)
    assert len(plain.routing().splitlines()) == 5
    assert plain.routing().splitlines()[4].startswith("group 3[0]  ()")


def test_a_copy_prints_the_same():
    opt = schedule_free(parameters())
    train(opt, range(2))
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(other) == repr(opt)
        assert other.routing() == opt.routing()
        assert live_keys(other) == live_keys(opt)


def test_a_new_optimizer_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = schedule_free(Tiny().named_parameters())
        train(opt, range(2))
        repr(opt.eval())
        copy.deepcopy(opt)


def test_a_misspelt_option_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        C.ChainOpt(parameters(), 0.1, C.sign, weight_decy=0.1)


def test_what_is_known_is_named_once():
    with pytest.raises(TypeError, match="shampo_beta") as caught:
        heavyball.SOAP([torch.nn.Parameter(torch.zeros(3, 3))], shampo_beta=0.9)
    known = str(caught.value).split("known: ")[1].split("; did you mean")[0].split(", ")
    assert len(known) == len(set(known))
