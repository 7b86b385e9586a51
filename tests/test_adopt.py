"""State dicts of other optimizers: each goes on here as the original does, and back in torch."""

import copy
import pathlib
import warnings

import prodigyopt
import pytest
import schedulefree
import torch
from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
from torch import nn

import heavyball
from heavyball import chainable as C
from heavyball.checkpoint import adopt, to_torch

HERE = pathlib.Path(__file__).parent
SHAPES = ((4, 3), (5,), (2, 3, 2))
T = torch.optim


def weights(shapes=SHAPES):
    made = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(shape, generator=made, dtype=torch.float64)) for shape in shapes
    ]


def fill(params, step):
    made = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made, dtype=torch.float64) + 0.2 * p.detach()


def run(opt, steps):
    params = [p for g in opt.param_groups for p in g["params"]]
    for step in steps:
        fill(params, step)
        opt.step()
    return [p.detach().clone() for p in params]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def distance(one, two, start):
    """The largest difference over the movement since the start."""
    moved = max((a - s).abs().max().item() for a, s in zip(two, start, strict=True))
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True)) / moved


def coupled(rule, **options):
    def make(params, lr=1e-3):
        return C.ChainOpt(params, lr, C.coupled, rule, compile=False, **options)

    return make


def preset(name, **options):
    def make(params):
        return heavyball.PRESETS[name](params, compile=False, **options)

    return make


def quiet(make):
    def build(params):
        opt = make(params)
        getattr(opt, "train", lambda: None)()
        return opt

    return build


MATRIX = ((4, 3), (3, 5))
# the original, the chain of the same method, shapes, how near
ORIGINALS = {
    "SGD": (lambda p: T.SGD(p, 0.1), preset("SGD"), SHAPES),
    "SGD, momentum": (
        lambda p: T.SGD(p, 0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
        preset("SGD", momentum=0.5),
        SHAPES,
    ),
    "SGD, nesterov": (
        lambda p: T.SGD(p, 0.1, momentum=0.9, nesterov=True),
        preset("SGD", momentum=0.5, nesterov=True),
        SHAPES,
    ),
    "Adam": (lambda p: T.Adam(p, 0.03, weight_decay=0.1), coupled(C.scale_by_adam), SHAPES),
    "AdamW": (
        lambda p: T.AdamW(p, 0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
        preset("AdamW"),
        SHAPES,
    ),
    "AdamW, amsgrad": (
        lambda p: T.AdamW(p, 0.03, amsgrad=True, maximize=True),
        preset("AdamW", amsgrad=True, maximize=True),
        SHAPES,
    ),
    "NAdam": (lambda p: T.NAdam(p, 0.03, weight_decay=0.1), preset("NAdam"), SHAPES),
    "NAdam, decoupled": (
        lambda p: T.NAdam(p, 0.03, weight_decay=0.1, decoupled_weight_decay=True),
        preset("NAdam", decoupled_weight_decay=True),
        SHAPES,
    ),
    "RMSprop": (lambda p: T.RMSprop(p, 0.03, weight_decay=0.1), preset("RMSprop"), SHAPES),
    "RMSprop, all": (
        lambda p: T.RMSprop(p, 0.03, momentum=0.9, centered=True),
        preset("RMSprop", momentum=0.1, centered=True),
        SHAPES,
    ),
    "Adagrad": (
        lambda p: T.Adagrad(p, 0.1, lr_decay=0.1, weight_decay=0.1),
        preset("Adagrad"),
        SHAPES,
    ),
    "Adafactor": (lambda p: T.Adafactor(p, 0.1, weight_decay=0.1), preset("Adafactor"), SHAPES),
    "Adafactor, all": (
        lambda p: T.Adafactor(p, 0.1, beta2_decay=-0.5, eps=(None, 0.3), d=2.0, weight_decay=0.1),
        preset("Adafactor"),
        SHAPES,
    ),
    "Adafactor, both eps": (
        lambda p: T.Adafactor(p, 0.1, eps=(0.2, 0.3)),
        preset("Adafactor", eps=(0.1, 0.1)),
        SHAPES,
    ),
    "schedulefree": (
        quiet(lambda p: schedulefree.AdamWScheduleFree(p, 0.03, weight_decay=0.1, warmup_steps=6)),
        preset("SFAdamW"),
        SHAPES,
    ),
    "schedulefree, SGD": (
        quiet(lambda p: schedulefree.SGDScheduleFree(p, 0.03, weight_decay=0.1)),
        lambda p: C.ChainOpt(p, 1.0, C.schedule_free, compile=False),
        SHAPES,
    ),
    "prodigyopt": (
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, weight_decay=0.1),
        preset("Prodigy"),
        SHAPES,
    ),
    "prodigyopt, beta3": (
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, beta3=0.9, safeguard_warmup=True),
        preset("Prodigy", beta3=0.8, safeguard_warmup=True),
        SHAPES,
    ),
    "prodigyopt, coupled": (
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, weight_decay=0.1, decouple=False, slice_p=3),
        preset("Prodigy", decouple=False, slice_p=3),
        SHAPES,
    ),
    "prodigy-plus": (
        quiet(lambda p: ProdigyPlusScheduleFree(p, d0=1e-2)),
        preset("ProdigyPlusScheduleFree"),
        (*SHAPES, (33, 36)),  # where the largest axis comes first, a row is averaged wrongly there,
    ),
    "prodigy-plus, full": (
        quiet(lambda p: ProdigyPlusScheduleFree(p, d0=1e-2, factored=False, use_speed=True)),
        preset("ProdigyPlusScheduleFree", factored=False, use_speed=True),
        SHAPES,
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_was_saved_goes_on_as_the_original_does(name):
    original, ours, shapes = ORIGINALS[name]
    params = weights(shapes)
    theirs = original(params)
    run(theirs, range(5))
    theirs.param_groups[0]["lr"] *= 0.5  # as a schedule does
    saved = copy.deepcopy(theirs.state_dict())
    mine = copies(params)
    opt = ours(mine)
    report = adopt(opt, saved)
    assert report.matching, report
    assert not report.invented or "SGD" in name, report
    assert "param_groups.0.lr" in report.taken
    start = [p.detach().clone() for p in params]
    right = run(theirs, range(5, 15))
    found = run(opt, range(5, 15))
    assert distance(found, right, start) < (1e-5 if "plus" in name else 1e-6)


def test_torchs_muon_goes_on_with_its_products_in_full_precision(monkeypatch):
    params = weights(MATRIX)
    theirs = T.Muon(params, lr=0.02, weight_decay=0.1)

    def products(grad, coefficients, steps, eps):
        a, b, c = coefficients
        x = grad.T if grad.shape[0] > grad.shape[1] else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if grad.shape[0] > grad.shape[1] else x

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", products)
    run(theirs, range(5))
    mine = copies(params)
    opt = heavyball.Muon(mine, compile=False, use_muon=lambda name, p: True)
    report = adopt(opt, copy.deepcopy(theirs.state_dict()))
    assert report.matching
    start = [p.detach().clone() for p in params]
    right, found = run(theirs, range(5, 15)), run(opt, range(5, 15))
    assert distance(found, right, start) < 1e-6


@pytest.mark.parametrize("name", ["schedulefree", "prodigy-plus", "schedulefree, SGD"])
def test_a_dict_of_evaluation_mode_leaves_the_optimizer_in_it(name):
    original, ours, shapes = ORIGINALS[name]
    params = weights(shapes)
    theirs = original(params)
    run(theirs, range(5))
    trained = [p.detach().clone() for p in params]
    theirs.eval()
    mine = copies(params)
    opt = ours(mine)
    adopt(opt, copy.deepcopy(theirs.state_dict()))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        opt.step()
    opt.train()
    for p, right in zip(mine, trained, strict=True):
        torch.testing.assert_close(p.detach(), right, rtol=1e-9, atol=1e-9)
    theirs.train()
    start = [p.detach().clone() for p in params]
    right, found = run(theirs, range(5, 12)), run(opt, range(5, 12))
    assert distance(found, right, start) < (1e-5 if "plus" in name else 1e-6)


# of heavyball 3.2.1, which has this library's import name: float64 weights, 5 steps, the dict and the
# weights of then, and the weights 10 steps later; gradients as `fill` makes them
PYPI = {
    "AdamW": lambda p: heavyball.AdamW(p, compile=False),
    "SFAdamW": lambda p: heavyball.SFAdamW(p, compile=False),
    "SOAP": lambda p: heavyball.SOAP(p, compile=False, precondition_frequency=1000),
    "PSGDKron": lambda p: C.ChainOpt(
        p,
        1.0,
        C.exp_avg,
        C.psgd_kron(preconditioner_update_probability=0.0),
        C.trust_region,
        compile=False,
    ),
    "Muon": lambda p: C.ChainOpt(
        p,
        1.0,
        C.parallel(C.apply, C.muon_momentum(nesterov=False)),
        C.orthogonalize(method="quintic-5", scale="original"),
        compile=False,
    ),
}


@pytest.mark.parametrize("name", PYPI)
def test_what_the_pypi_package_has_saved_goes_on_as_it_did(name):
    saved = torch.load(HERE / "checkpoints" / "pypi-heavyball-3.2.1.pt", weights_only=True)[name]
    params = copies(saved["weights"])
    opt = PYPI[name](params)
    report = adopt(opt, saved["state_dict"])
    assert report.matching, report
    assert not report.invented
    found = run(opt, range(5, 15))
    assert distance(found, saved["later"], saved["weights"]) < 1e-6


# ---- another chain


def test_moments_go_by_their_meaning_into_another_chain():
    params = weights(MATRIX)
    theirs = T.AdamW(params, 0.03, betas=(0.8, 0.95))
    run(theirs, range(5))
    opt = heavyball.Muon(copies(params), lr=0.5, compile=False, use_muon=lambda name, p: p.ndim > 1)
    report = adopt(opt, theirs.state_dict())
    assert not report.matching
    assert {"0.exp_avg", "1.exp_avg"} <= set(report.taken)
    assert {"0.exp_avg_sq", "param_groups.0.lr", "param_groups.0.betas"} <= set(report.left)
    assert opt.param_groups[0]["lr"] == 0.5
    for p, q in zip(params, opt.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(
            opt.state[q]["muon.momentum_buffer"], theirs.state[p]["exp_avg"], rtol=1e-9, atol=1e-12
        )
        assert opt.state[q]["step"] == 5
    run(opt, range(5, 8))


def test_momentum_of_sgd_becomes_adams_mean_and_the_square_begins():
    params = weights()
    theirs = T.SGD(params, 0.1, momentum=0.9)
    run(theirs, range(50))
    opt = heavyball.AdamW(copies(params), compile=False)
    report = adopt(opt, theirs.state_dict())
    assert "0.momentum_buffer" in report.taken
    assert {"0.scale_by_adam.exp_avg_sq"} <= set(report.invented)
    q = opt.param_groups[0]["params"][0]
    torch.testing.assert_close(
        opt.state[q]["scale_by_adam.exp_avg"], 0.1 * theirs.state[params[0]]["momentum_buffer"]
    )


# chains with the state that was saved, which go on otherwise
OTHERS = {
    "SOAP": (T.AdamW, preset("SOAP")),
    "LAMB": (T.AdamW, preset("LAMB")),
    "Prodigy": (T.AdamW, preset("Prodigy")),
    "Shampoo": (T.AdamW, preset("Shampoo")),
    "cautious": (T.AdamW, lambda p: C.ChainOpt(p, 0.7, C.scale_by_adam, C.cautious)),
    "lookahead": (T.AdamW, lambda p: C.ChainOpt(p, 0.7, C.scale_by_adam, C.lookahead)),
    "schedule_free": (T.AdamW, lambda p: C.ChainOpt(p, 0.7, C.scale_by_adam, C.schedule_free)),
    "other decay": (
        lambda p: T.Adam(p, weight_decay=0.1),
        lambda p: C.ChainOpt(p, 0.7, C.scale_by_adam, C.independent, weight_decay=0.3),
    ),
    "beta3": (lambda p: prodigyopt.Prodigy(p, d0=1e-2, beta3=0.9), preset("Prodigy")),
    "no beta3": (lambda p: prodigyopt.Prodigy(p, d0=1e-2), preset("Prodigy", beta3=0.9)),
    "bias": (
        lambda p: prodigyopt.Prodigy(p, d0=1e-2, use_bias_correction=True),
        preset("Prodigy"),
    ),
    "no clip": (
        quiet(lambda p: ProdigyPlusScheduleFree(p, use_stableadamw=False)),
        preset("ProdigyPlusScheduleFree"),
    ),
    "by lr": (
        quiet(lambda p: ProdigyPlusScheduleFree(p, weight_decay=0.1, weight_decay_by_lr=False)),
        preset("ProdigyPlusScheduleFree"),
    ),
    "mask": (
        quiet(lambda p: ProdigyPlusScheduleFree(p, use_cautious=True)),
        preset("ProdigyPlusScheduleFree"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_chain_that_goes_on_otherwise_keeps_its_own_numbers(name):
    original, ours = OTHERS[name]
    params = weights(MATRIX)
    theirs = original(params)
    run(theirs, range(3))
    opt = ours(copies(params))
    before = {k: v for k, v in opt.param_groups[0].items() if k in ("lr", "weight_decay", "betas")}
    report = adopt(opt, copy.deepcopy(theirs.state_dict()))
    assert not report.matching
    assert "param_groups.0.lr" in report.left
    assert before == {k: opt.param_groups[0][k] for k in before}
    run(opt, range(3, 5))


@pytest.mark.parametrize("look", [C.probe("seen"), C.parameter_ema, C.clip_by_global_norm])
def test_what_a_user_adds_around_it_leaves_the_method_the_same(look):
    params = weights()
    theirs = T.AdamW(params, 0.03)
    run(theirs, range(3))
    chain = (look, C.scale_by_adam) if look is C.clip_by_global_norm else (C.scale_by_adam, look)
    opt = C.ChainOpt(copies(params), 0.7, *chain, weight_decay=0.1)
    assert adopt(opt, theirs.state_dict()).matching
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.03, 0.01)


@pytest.mark.parametrize("decay", [C.decoupled, C.coupled, C.independent, C.l1_decay])
@pytest.mark.parametrize("theirs", [T.Adam, T.AdamW])
def test_a_decay_that_the_original_lacks_ends(theirs, decay):
    """A chain that decays by itself goes on as one that does not, or says that it does not match."""
    params = weights()
    theirs = theirs(params, 0.03, weight_decay=0.0)
    run(theirs, range(3))
    mine = copies(params)
    chain = (decay, C.scale_by_adam) if decay is C.coupled else (C.scale_by_adam, decay)
    opt = C.ChainOpt(mine, 0.7, *chain, weight_decay=0.3, compile=False)
    assert adopt(opt, copy.deepcopy(theirs.state_dict())).matching
    start = [p.detach().clone() for p in params]
    assert distance(run(opt, range(3, 9)), run(theirs, range(3, 9)), start) < 1e-6


@pytest.mark.parametrize("same", [True, False])
def test_groups_that_are_cut_otherwise_match_if_their_numbers_are_equal(same):
    params = weights(MATRIX)
    theirs = T.AdamW(
        [{"params": [params[0]], "lr": 0.03}, {"params": [params[1]], "lr": 0.03 if same else 0.1}]
    )
    run(theirs, range(3))
    mine = copies(params)
    opt = heavyball.AdamW(mine, lr=0.7, compile=False)
    report = adopt(opt, copy.deepcopy(theirs.state_dict()))
    assert report.matching == same
    assert opt.param_groups[0]["lr"] == (0.03 if same else 0.7)
    assert ("param_groups.0.lr" in report.left) != same
    if same:
        start = [p.detach().clone() for p in params]
        assert distance(run(opt, range(3, 9)), run(theirs, range(3, 9)), start) < 1e-6


@pytest.mark.parametrize("damage", ["missing", "text", "list"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_none_is_refused_and_changes_nothing(key, damage):
    params = weights()
    theirs = T.AdamW(params)
    run(theirs, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    if damage == "missing":
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = "x" if damage == "text" else [1.0]
    opt = heavyball.AdamW(copies(params), lr=0.7)
    run(opt, range(2))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"not as torch\.optim\.Adam writes it"):
        adopt(opt, saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)


def test_a_switch_that_the_chain_lacks_makes_it_another_one():
    params = weights()
    theirs = T.AdamW(params, amsgrad=True, maximize=True)
    run(theirs, range(3))
    opt = heavyball.AdamW(copies(params), lr=0.7)
    report = adopt(opt, theirs.state_dict())
    assert not report.matching
    assert {"0.max_exp_avg_sq", "param_groups.0.maximize"} <= set(report.left)
    assert opt.param_groups[0]["lr"] == 0.7


def test_what_torch_keeps_of_adafactor_and_adagrad_is_told():
    params = weights()
    for theirs in (T.Adagrad(params, 0.1), T.Adafactor(params, 0.1)):
        run(theirs, range(3))
        opt = heavyball.AdamW(copies(params))
        report = adopt(opt, theirs.state_dict())
        assert not report.matching
        assert report.left
        run(opt, range(2))
    opt = C.ChainOpt(copies(params), 0.1, C.palm_beta2, C.factored_rms(min_dim=1))
    theirs = T.Adafactor(params, 0.1)
    run(theirs, range(3))
    adopt(opt, theirs.state_dict())
    q = opt.param_groups[0]["params"][0]
    column = theirs.state[params[0]]["row_var"]
    torch.testing.assert_close(opt.state[q]["factored_rms.col"], column)


# ---- which is which, and what is refused


def test_parameters_match_by_name_where_both_sides_have_them():
    params = dict(zip("abc", weights(), strict=True))
    theirs = T.AdamW(params.items(), 0.03)
    run(theirs, range(3))
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
    order = [(f"module.{n}", twins[n]) for n in "cab"]
    opt = heavyball.AdamW([{"params": order[:1], "weight_decay": 0.5}, {"params": order[1:]}])
    report = adopt(opt, theirs.state_dict())
    assert report.matching
    assert "module.c.exp_avg" in report.taken
    bias = 1 - 0.9**3
    for n in "abc":
        torch.testing.assert_close(
            opt.state[twins[n]]["scale_by_adam.exp_avg"] * bias, theirs.state[params[n]]["exp_avg"]
        )
    assert [g["weight_decay"] for g in opt.param_groups] == [0.01, 0.01]
    with pytest.raises(ValueError, match="'d'"):
        adopt(
            heavyball.AdamW([(n, twins[m]) for n, m in zip("abd", "abc", strict=True)]),
            theirs.state_dict(),
        )


def snapshot(opt):
    return copy.deepcopy(
        {"state": dict(opt.state_dict()["state"]), "groups": opt.state_dict()["param_groups"]}
    )


WRONG = {
    "no dict": [1, 2],
    "nothing": {},
    "no groups": {"state": {}},
    "unknown": {"state": {}, "param_groups": [{"params": [0, 1, 2], "lr": 0.1}]},
}


@pytest.mark.parametrize(
    "name", [*WRONG, "ours", "fewer", "a shape", "a square", "no number", "an entry"]
)
def test_what_cannot_be_taken_over_changes_nothing(name):
    params = weights()
    opt = heavyball.AdamW(copies(params), compile=False)
    run(opt, range(2))
    theirs = T.AdamW(weights(SHAPES[:2]) if name == "fewer" else params)
    run(theirs, range(2))
    saved = copy.deepcopy(theirs.state_dict())
    if name == "a shape":
        saved["state"][0]["exp_avg"] = torch.zeros(7)
    elif name == "a square":
        saved["state"][0]["exp_avg_sq"].fill_(-1)
    elif name == "no number":
        saved["state"][0]["step"] = "many"
    elif name == "an entry":
        del saved["param_groups"][0]["eps"], saved["param_groups"][0]["lr"]
    elif name == "ours":
        saved = opt.state_dict()
    elif name in WRONG:
        saved = WRONG[name]
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]], snapshot(opt)
    with pytest.raises(ValueError, match=r"adopt|load_state_dict"):
        adopt(opt, saved)
    after = [p.detach().clone() for p in opt.param_groups[0]["params"]], snapshot(opt)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_only_optimizers_of_heavyball_adopt():
    with pytest.raises(TypeError, match="AdamW"):
        adopt(T.AdamW(weights()), {})
    with pytest.raises(TypeError, match="AdamW"):
        to_torch(T.AdamW(weights()))


# ---- to torch

BACK = {
    "SGD": (preset("SGD", lr=0.1), T.SGD),
    "SGD, momentum": (
        preset("SGD", lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
        T.SGD,
    ),
    "SGD, nesterov": (preset("SGD", lr=0.1, momentum=0.9, nesterov=True), T.SGD),
    "Adam": (
        lambda p: C.ChainOpt(p, 0.03, C.coupled(weight_decay=0.1), C.scale_by_adam, compile=False),
        T.Adam,
    ),
    "AdamW": (preset("AdamW", lr=0.03, betas=(0.8, 0.9), weight_decay=0.1), T.AdamW),
    "AdamW, 8 bit": (preset("AdamW", lr=0.03, storage_dtype="bfloat16"), T.AdamW),
    "AdamW, amsgrad": (preset("AdamW", lr=0.03, amsgrad=True, maximize=True), T.AdamW),
    "NAdam": (preset("NAdam", lr=0.03, weight_decay=0.1), T.NAdam),
    "NAdam, decoupled": (
        preset("NAdam", lr=0.03, weight_decay=0.1, decoupled_weight_decay=True),
        T.NAdam,
    ),
    "RMSprop": (preset("RMSprop", lr=0.03, weight_decay=0.1), T.RMSprop),
    "RMSprop, all": (preset("RMSprop", lr=0.03, momentum=0.9, centered=True), T.RMSprop),
}


@pytest.mark.parametrize("name", BACK)
def test_torch_goes_on_as_this_would(name, tmp_path):
    ours, theirs = BACK[name]
    params = weights()
    opt = ours(params)
    run(opt, range(5))
    opt.param_groups[0]["lr"] *= 0.5
    torch.save(to_torch(opt), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = theirs(copies(params))
    assert set(saved["param_groups"][0]) == set(other.state_dict()["param_groups"][0])
    other.load_state_dict(saved)
    start = [p.detach().clone() for p in params]
    right, found = run(opt, range(5, 15)), run(other, range(5, 15))
    assert distance(found, right, start) < (1e-2 if "bit" in name else 1e-6)
    # and back again
    again = ours(copies(params))
    assert adopt(again, other.state_dict()).matching


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (preset("Lion"), "scale_by_lion"),
        (preset("SOAP"), "to_eigenbasis"),
        (preset("AdamW", caution=True), "cautious"),
        (preset("AdamW", warmup_steps=5), "warmup_steps"),
        (preset("SFAdamW"), "schedule_free"),
        (preset("Muon"), "routes|muon"),
        (lambda p: C.ChainOpt(p, 0.1, C.scale_by_adam(eps_placement="inside")), "eps_placement"),
        (lambda p: C.ChainOpt(p, 0.1, C.graft(C.sign, C.exp_avg)), "branches"),
        (lambda p: C.ChainOpt(p, 0.1, C.heavyball_momentum, weight_decay=0.1), "decay"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_chain_that_torch_does_not_have_is_refused_by_name(make, why):
    opt = make(weights())
    with pytest.raises(ValueError, match=why):
        to_torch(opt)


def test_several_groups_and_names_go_to_torch():
    named = list(zip("abc", weights(), strict=True))
    opt = heavyball.AdamW([{"params": named[:1], "lr": 0.1, "tag": "x"}, {"params": named[1:]}])
    run(opt, range(2))
    saved = to_torch(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = T.AdamW([{"params": named[:1]}, {"params": named[1:]}])
        other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.001]
    assert other.param_groups[0]["tag"] == "x"
    assert other.param_groups[1]["param_names"] == ["b", "c"]
