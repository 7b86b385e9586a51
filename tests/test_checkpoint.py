"""What a checkpoint says of itself, how it is brought up to date, and a run that it continues."""

import copy
import io
import pickle
from typing import Any

import continued
import fresh
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    CASES,
    CHAINS,
    DEVICE,
    KINDS,
    PRESETS,
    Tiny,
    all_params,
    assert_same_optimizers,
    averages,
    clones,
    copies,
    differences,
    eager,  # noqa: F401
    fill_gradients,
    parameters,
    snapshot,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import heavyball
from heavyball import chainable as C
from heavyball import utils
from heavyball.core.combine import leaves
from heavyball.optim import checkpoint

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def adam(params, *more, **options):
    return C.ChainOpt(params, 0.01, C.scale_by_adam, *more, **options)


# ---- in a new process


def test_a_run_goes_on_in_a_new_process_as_if_it_had_not_stopped(tmp_path):
    before = utils.compile_mode
    saved, endings = continued.begin()
    utils.compile_mode = before
    torch.save(saved, tmp_path / "saved")
    program = f"import runpy; runpy.run_path({continued.__file__!r}, run_name='__main__')"
    done = fresh.run(program, tmp_path / "saved", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    resumed = torch.load(tmp_path / "results", weights_only=True)
    assert resumed.keys() == endings.keys()
    wrong = {name: differences(resumed[name], endings[name]) for name in endings}
    assert not {name: keys for name, keys in wrong.items() if keys}


def test_the_runs_that_are_continued_differ_where_something_is_lost():
    """The comparison above sees it when one thing of a checkpoint does not come back."""
    name, case, dtype, *_ = next(r for r in continued.runs() if r[0].startswith("AdamW torch.bf"))
    run = continued.build(case, dtype, False, fresh=True)
    continued.advance(run, range(continued.STOP))
    saved = continued.torch_copy([thing.state_dict() for thing in run])
    continued.advance(run, range(continued.STOP, continued.STEPS))
    expected = continued.ending(run)
    for lost in ("", "step", "scale_by_adam.exp_avg", "seed", "lr", "schedule"):
        again = continued.build(case, dtype, False, fresh=False)
        kept = copy.deepcopy(saved)
        if lost in ("seed", "lr"):
            kept[1]["param_groups"][1][lost] = 4 if lost == "seed" else 0.5
        elif lost == "schedule":
            del kept[2]["last_epoch"]
        elif lost:
            kept[1]["state"][0][lost] *= 0
        for thing, state in zip(again, kept, strict=True):
            thing.load_state_dict(state)
        continued.advance(again, range(continued.STOP, continued.STEPS))
        assert bool(differences(continued.ending(again), expected)) == bool(lost), lost
    assert name


# ---- dtypes


@C.transform(
    byte=C.State(lambda p, o: torch.zeros_like(p, dtype=torch.int8), "bytes"),
    flag=C.State(lambda p, o: torch.zeros_like(p, dtype=torch.bool), "flags"),
    half=C.State(lambda p, o: torch.zeros_like(p, dtype=torch.bfloat16), "bfloat16"),
    single=C.zeros,
)
def many_dtypes(update, byte, flag, half, single):
    """State of every dtype, each of which matters."""
    return (
        update + byte + flag + half + single,
        byte + 1,
        update > 0,
        half + update,
        single + update,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_comes_back_as_it_was(dtype):
    params = parameters((4, 3), (), dtype=dtype)
    opt = C.ChainOpt(params, 0.01, many_dtypes, compile=False)
    train(opt, range(3))
    other = C.ChainOpt(copies(params), 0.01, many_dtypes, compile=False)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_optimizers(opt, other)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    found = [
        {key.removeprefix("many_dtypes."): v.dtype for key, v in other.state[p].items()}
        for p in all_params(other)
    ]
    names = {"step": torch.float64, "byte": torch.int8, "flag": torch.bool}
    assert found == [{**names, "half": torch.bfloat16, "single": high}] * 2
    train(opt, range(3, 5))
    train(other, range(3, 5))
    assert_same_optimizers(opt, other)


def test_state_comes_in_the_dtype_that_goes_with_the_parameters():
    source = adam(parameters(dtype=torch.float64))
    train(source, range(2))
    for dtype in (torch.float32, torch.bfloat16):
        target = adam(parameters(dtype=dtype))
        target.load_state_dict(source.state_dict())
        for p, q in zip(all_params(target), all_params(source), strict=True):
            for key, value in target.state[p].items():
                expected = torch.float64 if key == "step" else torch.float32
                assert torch.equal(value, source.state[q][key].to(expected))
                assert value.dtype == expected
        train(target, [2])


def test_a_tensor_of_another_kind_is_refused():
    source = adam(parameters((3,)))
    train(source, [0])
    saved = copy.deepcopy(source.state_dict())
    for wrong in (torch.zeros(3, dtype=torch.int8), 0.5, "text"):
        saved["state"][0]["scale_by_adam.exp_avg"] = wrong
        with pytest.raises(ValueError, match=r"scale_by_adam.exp_avg' .*expected"):
            adam(parameters((3,))).load_state_dict(saved)


# ---- the description


@every_case
def test_a_checkpoint_says_its_version_and_its_chain(case):
    opt = case(parameters())
    saved = through_a_file(opt.state_dict())
    assert saved["heavyball"] == {
        "version": checkpoint.VERSION,
        "chain": checkpoint.structure(opt.chain),
    }
    for transform in leaves(opt.chain.elements):
        assert transform.name in saved["heavyball"]["chain"]


def negative(update):
    return -update


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        (
            (C.scale_by_adam(betas=(0.5, 0.5), amsgrad=False),),
            "scale_by_adam | decoupled | descend",
        ),
        ((C.scale_by_adam(amsgrad=True),), "scale_by_adam(amsgrad=True) | decoupled | descend"),
        ((C.exp_avg, C.schedule_free(c=5.0)), "exp_avg | decoupled | schedule_free"),
        ((C.scale_by_adopt(clip_exponent=None), C.sign), None),
        ((C.graft((C.exp_avg, C.sign), C.scale_by_lion),), None),
        ((C.parallel(C.exp_avg, C.sign, weights=(1.0, 2.0)),), None),
        ((C.apply(fn=negative), C.apply(fn=torch.tanh)), None),
        (
            (C.route(C.when(C.exp_avg, C.sign, name="*.bias", max_ndim=1), otherwise=()),),
            "route(when(exp_avg | sign, name='*.bias', max_ndim=1), otherwise=())",
        ),
    ],
)
def test_a_description_names_what_decides_on_the_state(chain, text):
    found = checkpoint.structure(C.ChainOpt([("a.bias", torch.zeros(2))], 0.1, *chain).chain)
    assert text is None or found == text
    assert "0x" not in found
    assert found == checkpoint.structure(C.ChainOpt([("b", torch.ones(3, 3))], 1.0, *chain).chain)


def test_functions_are_described_by_their_names():
    chain = C.ChainOpt(parameters(), 0.1, C.apply(fn=negative)).chain
    assert checkpoint.structure(chain) == "apply(fn=negative) | decoupled | descend"


def test_another_chain_is_refused_with_both_and_what_differs():
    source = adam(parameters(), C.cautious)
    train(source, range(2))
    target = C.ChainOpt(parameters(), 0.01, C.exp_avg, C.exp_avg, C.cautious)
    with pytest.raises(ValueError, match="a different chain") as error:
        target.load_state_dict(source.state_dict())
    text = str(error.value)
    assert "scale_by_adam | cautious | decoupled | descend" in text
    assert "exp_avg | exp_avg | cautious | decoupled | descend" in text
    assert "missing state: exp_avg, exp_avg.1;" in text
    assert "no place: scale_by_adam (exp_avg, exp_avg_sq)" in text
    assert "strict=False" in text


@pytest.mark.parametrize(
    "other",
    [
        lambda ps: adam(ps),
        lambda ps: adam(ps, C.cautious(scale="sum_plus_one")),
        lambda ps: C.ChainOpt(ps, 0.01, C.centralize, C.scale_by_adam, C.cautious),
        lambda ps: C.ChainOpt(ps, 0.01, C.cautious, C.scale_by_adam),
        lambda ps: adam(ps, C.cautious, C.independent),
    ],
)
def test_a_chain_with_the_same_state_is_another_chain_all_the_same(other):
    source = adam(parameters(), C.cautious)
    for steps in (0, 2):
        train(source, range(steps))
        with pytest.raises(ValueError, match="a different chain"):
            other(parameters()).load_state_dict(source.state_dict())


def test_a_preset_and_the_chain_that_it_stands_for_share_checkpoints():
    source = heavyball.AdamW(parameters(), weight_decay=0.25)
    train(source, range(2))
    target = adam(copies(all_params(source)), C.decoupled)
    target.load_state_dict(source.state_dict())
    assert not differences(snapshot(source), snapshot(target))


@every_case
def test_a_checkpoint_without_a_description_is_told_by_its_keys(case):
    source = case(parameters())
    train(source, range(2))
    saved = source.state_dict()
    del saved["heavyball"]
    target = case(copies(all_params(source)))
    target.load_state_dict(saved)
    assert not differences(snapshot(source), snapshot(target))


# ---- versions


def test_a_newer_version_is_refused():
    saved = adam(parameters()).state_dict()
    saved["heavyball"]["version"] = checkpoint.VERSION + 1
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"version {checkpoint.VERSION + 1}, .* up to"):
            adam(parameters()).load_state_dict(saved, strict=strict)


@pytest.mark.parametrize("entry", ["state", "param_groups"])
def test_what_is_no_state_dict_is_refused(entry):
    saved = adam(parameters()).state_dict()
    del saved[entry]
    with pytest.raises(ValueError, match=f"'{entry}' is missing"):
        adam(parameters()).load_state_dict(saved)


@pytest.mark.parametrize("described", [{}, {"version": "one"}, {"version": True}, 3.5, "old"])
def test_a_description_that_is_none_is_refused(described):
    saved = {**adam(parameters()).state_dict(), "heavyball": described}
    with pytest.raises(ValueError, match="version"):
        adam(parameters()).load_state_dict(saved)


def old_checkpoint() -> tuple[dict[str, Any], C.ChainOpt]:
    """A checkpoint of version 1 in which `exp_avg` was called `old_mean`, and its optimizer."""
    opt = C.ChainOpt(parameters(), 0.01, C.exp_avg, C.exp_avg(beta=0.5), C.exp_avg)
    train(opt, range(3))
    saved = checkpoint.rename_transform(copy.deepcopy(opt.state_dict()), "exp_avg", "old_mean")
    saved["heavyball"]["version"] = 1
    return saved, opt


def test_a_checkpoint_is_brought_up_version_by_version(monkeypatch):
    saved, opt = old_checkpoint()
    assert set(saved["state"][0]) == {"step", "old_mean", "old_mean.1", "old_mean.2"}
    assert {"beta", "old_mean.1.beta", "old_mean.2.beta"} <= set(saved["param_groups"][0])
    assert saved["heavyball"]["chain"].startswith("old_mean | old_mean | old_mean | decoupled")
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {})
    order = []

    @checkpoint.migration(1)
    def halve(state_dict):
        order.append(1)
        assert state_dict["heavyball"]["version"] == 1
        for state in state_dict["state"].values():
            state["old_mean"] = state["old_mean"] / 2
        return state_dict

    @checkpoint.migration(2)
    def rename(state_dict):
        order.append(2)
        assert state_dict["heavyball"]["version"] == 2
        return checkpoint.rename_transform(state_dict, "old_mean", "exp_avg")

    unchanged = copy.deepcopy(saved)
    target = C.ChainOpt(parameters(), 0.01, C.exp_avg, C.exp_avg(beta=0.5), C.exp_avg)
    target.load_state_dict(saved)
    assert order == [1, 2]
    for p, q in zip(all_params(opt), all_params(target), strict=True):
        assert torch.equal(target.state[q]["exp_avg"], opt.state[p]["exp_avg"] / 2)
        assert torch.equal(target.state[q]["exp_avg.1"], opt.state[p]["exp_avg.1"])
    assert target.param_groups[0]["exp_avg.1.beta"] == 0.5
    # what was given is as it was
    assert saved["heavyball"] == unchanged["heavyball"]
    for number, state in unchanged["state"].items():
        assert saved["state"][number].keys() == state.keys()
        assert all(torch.equal(saved["state"][number][k], v) for k, v in state.items())


def test_a_checkpoint_without_a_description_is_migrated_by_hand(monkeypatch):
    saved, opt = old_checkpoint()
    del saved["heavyball"]
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {})
    checkpoint.migration(1)(lambda sd: checkpoint.rename_transform(sd, "old_mean", "exp_avg"))
    target = C.ChainOpt(copies(all_params(opt)), 0.01, C.exp_avg, C.exp_avg, C.exp_avg)
    with pytest.raises(ValueError, match="old_mean"):
        target.load_state_dict(saved)
    target.load_state_dict(checkpoint.migrate(saved, version=1))
    assert not differences(snapshot(opt), snapshot(target))


def test_a_missing_migration_is_named_and_a_second_one_is_refused(monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: lambda sd: sd})
    saved = adam(parameters()).state_dict()
    saved["heavyball"]["version"] = 1
    with pytest.raises(ValueError, match="no migration from version 2 to 3"):
        adam(parameters()).load_state_dict(saved)
    with pytest.raises(ValueError, match="from version 1 is already registered"):
        checkpoint.migration(1)(lambda sd: sd)


def test_a_renamed_transform_takes_nothing_else_with_it():
    described = {"version": 1, "chain": "sign | scale_by_sign | sign(graft=True) | apply(sign=1)"}
    saved = {
        "state": {0: {"sign": 1, "sign.x": 2, "sign.1.x": 3, "scale_by_sign.sign": 4, "signs": 5}},
        "param_groups": [{"sign": 6, "sign.1.beta": 7, "params": [0]}],
        "heavyball": described,
    }
    renamed = checkpoint.rename_transform(saved, "sign", "direction")
    assert renamed["state"][0] == {
        "direction": 1,
        "direction.x": 2,
        "direction.1.x": 3,
        "scale_by_sign.sign": 4,
        "signs": 5,
    }
    assert renamed["param_groups"] == [{"sign": 6, "direction.1.beta": 7, "params": [0]}]
    assert renamed["heavyball"]["chain"] == (
        "direction | scale_by_sign | direction(graft=True) | apply(sign=1)"
    )


# ---- init_state


DTYPED = [(case, torch.float32) for case in CASES] + [(case, torch.bfloat16) for case in KINDS]


@pytest.mark.parametrize(("case", "dtype"), DTYPED, ids=str)
def test_state_made_before_the_first_step_changes_no_bit(case, dtype):
    params = parameters(dtype=dtype)
    with_it, without = case(copies(params)), case(params)
    assert with_it.init_state() is with_it
    assert all(s["step"] == 0 for s in with_it.state.values())
    assert len(with_it.state) == len(params)
    for seed in range(2):
        for opt in (with_it, without):
            fill_gradients(all_params(opt), seed)
            all_params(opt)[seed].grad = None
            opt.step()
    assert_same_optimizers(with_it, without)


@every_case
def test_state_made_before_the_first_step_is_all_that_there_will_be(case):
    opt, stepped = case(parameters()), case(parameters())
    opt.init_state()
    train(stepped, [0])
    for p, q in zip(all_params(opt), all_params(stepped), strict=True):
        kinds = [
            {k: (v.shape, v.dtype, v.stride()) for k, v in state.items()}
            for state in (opt.state[p], stepped.state[q])
        ]
        assert kinds[0] == kinds[1]
    assert opt.state_bytes() == stepped.state_bytes()


def test_state_is_made_for_what_is_trained_and_has_none():
    params = parameters((3,), (2,), (0,), (4,))
    params[1].requires_grad_(False)
    opt = adam(params)
    fill_gradients(params[:1], 0)
    opt.step()
    before = snapshot(opt)
    opt.init_state()
    assert set(opt.state) == {params[0], params[3]}
    assert {n.split(".")[0] for n in differences(before, snapshot(opt))} == {"3"}
    opt.init_state()
    assert opt.state[params[0]]["step"] == 1


@every_case
def test_weights_loaded_after_init_state_are_those_that_it_is_for(case):
    opt, fresh = case(parameters()), case(parameters())
    opt.init_state()
    with torch.no_grad():
        for each in (opt, fresh):
            for p in all_params(each):
                p.mul_(2).add_(1)
    train(opt, range(2))
    train(fresh, range(2))
    assert_same_optimizers(opt, fresh)


LOOKS = {
    "planned": lambda opt: opt.plan() and opt,
    "printed": lambda opt: opt.kernel_sources() and opt,
    "planned twice": lambda opt: opt.plan() and opt.plan() and opt,
    "made and planned": lambda opt: opt.init_state().plan() and opt,
    "made and measured": lambda opt: opt.init_state().metrics() and opt,
    "made and copied": lambda opt: copy.deepcopy(opt.init_state()),
    "made and pickled": lambda opt: pickle.loads(pickle.dumps(opt.init_state())),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("chain", [(C.lookahead,), (C.scale_by_exp_avg_sq, C.schedule_free)])
def test_weights_loaded_after_a_look_at_the_optimizer_are_those_it_starts_with(look, chain):
    opt, fresh = (C.ChainOpt(parameters((4, 3)), 1e-3, *chain, compile=True) for _ in "ab")
    for each in (opt, fresh):
        fill_gradients(all_params(each), 0)
    opt = LOOKS[look](opt)
    for each in (opt, fresh):
        with torch.no_grad():
            for p in all_params(each):
                p.mul_(2).add_(1)
        train(each, range(2))
    for p, q in zip(all_params(opt), all_params(fresh), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][k], v) for k, v in fresh.state[q].items())


@pytest.mark.parametrize("way", ["written into", "replaced"])
def test_state_changed_after_init_state_is_kept(way):
    opt = C.ChainOpt(parameters((3,)), 0.01, C.scale_by_lion).init_state()
    (param,) = all_params(opt)
    if way == "replaced":
        opt.state[param]["scale_by_lion.exp_avg"] = torch.full((3,), 4.0, device=DEVICE)
    else:
        opt.state[param]["scale_by_lion.exp_avg"].fill_(4.0)
    param.grad = torch.zeros_like(param)
    opt.step()
    expected = torch.full((3,), 3.96, device=DEVICE)
    torch.testing.assert_close(opt.state[param]["scale_by_lion.exp_avg"], expected)


@pytest.mark.parametrize("look", ["planned", "copied", "pickled"])
def test_state_changed_after_init_state_is_kept_by_a_look_and_in_copies(look):
    looks = {
        "planned": lambda opt: opt.plan() and opt,
        "copied": copy.deepcopy,
        "pickled": lambda opt: pickle.loads(pickle.dumps(opt)),
    }
    opt = C.ChainOpt(parameters((3,)), 0.01, C.scale_by_lion, compile=False).init_state()
    for param in all_params(opt):
        opt.state[param]["scale_by_lion.exp_avg"].fill_(4.0)
        param.grad = torch.zeros_like(param)
    opt = looks[look](opt)
    (param,) = all_params(opt)
    param.grad = torch.zeros_like(param)
    opt.step()
    expected = torch.full((3,), 3.96, device=DEVICE)
    torch.testing.assert_close(opt.state[param]["scale_by_lion.exp_avg"], expected)


@pytest.mark.parametrize("case", [c for c in CASES if averages(c(parameters()))], ids=repr)
def test_there_is_nothing_to_average_before_the_first_step(case):
    opt = case(parameters()).init_state()
    before = clones(all_params(opt))
    opt.eval()
    assert all(torch.equal(p, b) for p, b in zip(all_params(opt), before, strict=True))
    fresh = case(parameters())
    train(opt.train(), range(3))
    train(fresh, range(3))
    assert_same_optimizers(opt, fresh)


# ---- torch.distributed.checkpoint


def two_groups(model: nn.Module, case: Any, named: bool, **options: Any) -> Any:
    found: list[Any] = list(model.named_parameters() if named else model.parameters())
    return case([{"params": found[:2]}, {"params": found[2:], "lr": 0.25}], **options)


MODES = [
    pytest.param(case, mode, id=f"{case}-{mode}")
    for case in [*PRESETS[::3], *CHAINS[:2]]
    for mode in (("train", "eval") if averages(case(parameters((2, 2)))) else ("train",))
]


# torch flattens the names of all parameters into each, and cannot read them back
@pytest.mark.parametrize(
    ("named", "flat"),
    [(False, False), (True, False), (False, True)],
    ids=["places", "names", "places, flat"],
)
@pytest.mark.parametrize(("case", "mode"), MODES)
def test_torchs_state_dict_functions_carry_the_whole_state(case, mode, named, flat):
    model, other = Tiny(), Tiny(seed=3)
    opt, target = two_groups(model, case, named), two_groups(other, case, named, lr=0.5)
    train(opt, range(2))
    opt.train(mode == "train")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(model, opt, options=options)
    other.load_state_dict(model.state_dict())
    target.init_state().train(mode == "train")  # with the tensors that are to be written into
    set_optimizer_state_dict(other, target, saved, options=options)
    assert_same_optimizers(opt, target)
    for each in (opt, target):
        train(each.train(), [3])
    assert_same_optimizers(opt, target)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("case", "mode"), MODES[-5:])
@pytest.mark.parametrize("way", ["state_dict()", "get_optimizer_state_dict"])
def test_distributed_checkpoints_are_saved_and_loaded(case, mode, way, tmp_path):
    def content(model, opt):
        if way == "state_dict()":
            return opt.state_dict()
        return get_optimizer_state_dict(model, opt)

    model, other = Tiny(), Tiny(seed=3)
    opt = two_groups(model, case, named=False)
    target = two_groups(other, case, named=False, lr=0.5).init_state()
    train(opt, range(3))
    opt.train(mode == "train")
    target.train(mode == "train")
    saved = {"model": model.state_dict(), "optimizer": content(model, opt)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"model": other.state_dict(), "optimizer": content(other, target)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(loaded["model"])
    if way == "state_dict()":
        target.load_state_dict(loaded["optimizer"])
    else:
        set_optimizer_state_dict(other, target, loaded["optimizer"])
    assert_same_optimizers(opt, target)
    for each in (opt, target):
        train(each.train(), [3])
    assert_same_optimizers(opt, target)


@pytest.mark.parametrize("strict", [True, False])
def test_an_average_without_the_weights_that_it_is_of_is_refused(strict):
    opt, target = (heavyball.SFAdamW(parameters(), 0.1) for _ in range(2))
    train(opt, range(3))
    saved = opt.eval().state_dict()
    for state in saved["state"].values():
        del state["train_param"]
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*train_param"):
        target.load_state_dict(saved, strict=strict)
    opt, target = (heavyball.SFAdamW(parameters(), 0.1) for _ in range(2))
    target.load_state_dict(opt.eval().state_dict())  # before the first step both are the same


def test_a_parameter_that_never_had_a_gradient_is_saved_once_its_state_is_made():
    model, other = Tiny(), Tiny()
    opt, target = heavyball.AdamW(model.parameters()), heavyball.AdamW(other.parameters())
    fill_gradients(list(model.parameters())[:2], 0)
    opt.step()
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        set_optimizer_state_dict(other, target, get_optimizer_state_dict(model, opt))
    opt.init_state()
    other.load_state_dict(model.state_dict())
    target = heavyball.AdamW(other.parameters())
    set_optimizer_state_dict(other, target, get_optimizer_state_dict(model, opt))
    assert_same_optimizers(opt, target)
