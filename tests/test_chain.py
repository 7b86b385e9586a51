"""What a chain refuses, how it names state and hyper-parameters, and how it completes itself."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import (  # noqa: F401
    all_params,
    anywhere,
    assert_same,
    assert_same_optimizers,
    averages,
    copies,
    differences,
    eager,
    live_keys,
    modifies,
    parameters,
    plain_group,
    snapshot,
    train,
)

import heavyball
from heavyball import chainable as C


def build(*chain, lr=0.1, **options):
    return C.ChainOpt(parameters(), lr, *chain, **options)


def shown(*chain):
    """The chain as the optimizer completed it."""
    return repr(build(*chain)).splitlines()[1].strip()


# ---- refusals

BOUNDED = "atan2 already bounds"
REFUSED = {
    "two writers": ((C.descend, C.schedule_free), ("two writers", "descend", "schedule_free")),
    "one writer twice": ((C.descend, C.descend), ("two writers", "descend.1")),
    "a moment after the writer": ((C.schedule_free, C.exp_avg), ("exp_avg", "after the writer")),
    "a decay after the writer": ((C.descend, C.decoupled), ("decoupled", "after the writer")),
    "a clip after the writer": ((C.descend, C.clip_by_norm), ("clip_by_norm", "after the writer")),
    "a fork after the writer": (
        (C.descend, C.graft(C.exp_avg, C.sign)),
        ("graft", "after the writer"),
    ),
    "cautious and grams": ((C.scale_by_adam, C.cautious, C.grams), ("cautious", "grams", "sign")),
    "grams and cautious": ((C.grams, C.exp_avg, C.cautious), ("cautious", "grams", "sign")),
    "atan2 and the RMS clip": (
        (C.scale_by_adam_atan2, C.clip_update_rms),
        ("scale_by_adam_atan2", "clip_update_rms", BOUNDED),
    ),
    "the RMS clip and atan2": (
        (C.clip_update_rms, C.scale_by_adam_atan2),
        ("scale_by_adam_atan2", "clip_update_rms", BOUNDED),
    ),
    "atan2 and stable_adamw": (
        (C.scale_by_adam_atan2, C.stable_adamw),
        ("scale_by_adam_atan2", "stable_adamw", BOUNDED),
    ),
    "focus and a factored moment": (
        (C.focus, C.factored_rms),
        ("focus", "factored_rms", "no second moment"),
    ),
    "a factored moment and focus": (
        (C.factored_rms, C.exp_avg, C.focus),
        ("focus", "factored_rms", "no second moment"),
    ),
    "focus and atan2": ((C.focus, C.scale_by_adam_atan2), ("focus", "scale_by_adam_atan2")),
    "schedule_free and another average": (
        (C.parameter_ema, C.sign, C.schedule_free),
        ("schedule_free", "parameter_ema", "evaluated"),
    ),
    "an average of the decay": ((C.decoupled, C.exp_avg), ("exp_avg", "decoupled", "coupled")),
    "a moment before the guard": (
        (C.exp_avg, C.skip_not_finite),
        ("skip_not_finite", "after exp_avg", "first"),
    ),
    "a schedule that nothing uses": (
        (C.palm_beta2, C.exp_avg),
        ("palm_beta2", "no effect", "scheduled_beta2"),
    ),
    "a schedule behind its user": ((C.scale_by_adam, C.palm_beta2), ("palm_beta2", "no effect")),
    "a writer in a fork": (
        (C.parallel(C.descend, C.sign),),
        ("descend", "writer", "inside parallel"),
    ),
    "a decay in a fork": ((C.graft(C.decoupled, C.sign),), ("decoupled", "decay", "inside graft")),
    "a learning rate from a fork": (
        (C.parallel(C.stable_adamw, C.sign),),
        ("stable_adamw", "'lr'", "parallel"),
    ),
    "two averages of the weights": (
        (C.parameter_ema, C.sign, C.parameter_ema(beta=0.5)),
        ("parameter_ema", "parameter_ema.1", "evaluated"),
    ),
    "an average in a fork": (
        (C.graft(C.sign, C.parameter_ema),),
        ("parameter_ema", "observer", "inside graft"),
    ),
    "an exclusion in a fork": (
        (C.parallel([C.exp_avg, C.cautious, C.grams], C.sign),),
        ("cautious", "grams"),
    ),
    "an exclusion behind a fork": (
        (C.parallel([C.exp_avg, C.cautious], C.sign), C.grams),
        ("cautious", "grams"),
    ),
    "an exclusion in a route": (
        (C.route(C.when(C.cautious, ndim=7), otherwise=()), C.grams),
        ("cautious", "grams"),
    ),
    "two writers by a route": (
        (C.route(C.when(C.schedule_free, ndim=7), otherwise=()), C.descend),
        ("two writers", "schedule_free", "descend"),
    ),
    "something behind a writer in a route": (
        (C.route(C.when(C.schedule_free, ndim=7), otherwise=C.sign), C.exp_avg),
        ("exp_avg", "after the writer schedule_free"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_chain_that_cannot_be_right_is_refused_with_the_reason(name):
    chain, words = REFUSED[name]
    with pytest.raises(ValueError, match=words[0]) as caught:
        build(*chain)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("chain", "error", "words"),
    [
        ((), ValueError, "empty chain"),
        ((C.exp_avg, 3), TypeError, "element 1 is 3"),
        (("exp_avgg",), ValueError, "nearest: exp_avg"),
        ((None,), TypeError, "element 0 is None"),
        ((lambda update: update,), TypeError, r"element 0.*@transform.*C\.apply"),
        ((torch.sign,), TypeError, r"element 0.*C\.apply"),
        (([C.exp_avg, C.sign],), TypeError, "element 0 is .*list"),
        ((C.exp_avg, C.when(C.sign, ndim=1)), TypeError, "element 1.*`when` belongs in"),
        ((C.ChainOpt,), TypeError, "element 0"),
        ((heavyball.AdamW,), TypeError, "element 0"),
        ((C.exp_avg.update,), TypeError, "element 0"),
    ],
    ids=lambda value: str(value).split(" at 0x")[0][:30],
)
def test_what_is_no_chain_of_transforms_is_refused_and_named(chain, error, words):
    with pytest.raises(error, match=words):
        build(*chain)


def test_the_optimizers_name_is_in_the_message():
    class Mine(C.ChainOpt):
        pass

    with pytest.raises(ValueError, match="Mine: an empty chain"):
        Mine(parameters(), 0.1)


@pytest.mark.parametrize(
    "name", [n for n in C.TRANSFORMS if n not in ("weighted_sum", "transplant")]
)
def test_every_transform_makes_a_chain_that_trains(name):
    before = (C.to_eigenbasis,) if name == "from_eigenbasis" else ()
    extra = (C.scale_by_adam,) if modifies(C.TRANSFORMS[name]) else ()
    # an estimate of 1e-6 would be lost in the rounding of these weights
    begins = ("d0", "reps", "s_init")
    large = {n: 0.1 for n in begins if n in C.TRANSFORMS[name].hyper}
    opt = build(*before, anywhere(C.TRANSFORMS[name](**large)), *extra, lr=0.01)
    before = snapshot(opt)
    train(opt, range(3))
    after = snapshot(opt)
    assert {key for key in differences(before, after) if "." not in key} >= {"0", "1", "2"}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert str(name) in repr(opt)


# ---- completion


def test_a_chain_without_decay_and_writer_gets_the_default_ones():
    assert shown(C.exp_avg) == "exp_avg | decoupled | descend"
    assert shown(C.exp_avg, C.schedule_free) == "exp_avg | decoupled | schedule_free"
    assert shown(C.exp_avg, C.l1_decay) == "exp_avg | l1_decay | descend"
    assert shown(C.coupled, C.exp_avg) == "coupled | exp_avg | descend"
    assert shown(C.sign, C.decoupled, C.descend) == "sign | decoupled | descend"
    assert shown(C.parameter_ema, C.sign) == "sign | decoupled | descend | parameter_ema"


def test_the_completed_chain_is_the_chain_written_out():
    short = C.ChainOpt(parameters(), 0.1, C.scale_by_adam, weight_decay=0.25)
    long = C.ChainOpt(parameters(), 0.1, C.scale_by_adam, C.decoupled(weight_decay=0.25), C.descend)
    train(short, range(3))
    train(long, range(3))
    assert_same_optimizers(short, long)


def test_the_order_of_the_elements_is_the_order_of_the_mathematics():
    first, second = build(C.sign, C.exp_avg), build(C.exp_avg, C.sign)
    train(first, range(3))
    train(second, range(3))
    assert differences(snapshot(first), snapshot(second))
    (p,) = parameters((3,), dtype=torch.float64)
    before = p.detach().clone()
    double, plus = C.apply(fn=lambda u: 2 * u), C.apply(fn=lambda u: u + 1)
    train(C.ChainOpt([p], 1.0, double, plus), [0])
    torch.testing.assert_close(p.detach(), before - (2 * p.grad + 1), rtol=0, atol=1e-15)


# ---- names of state and of hyper-parameters


@C.transform(memory=C.zeros)
def twofold(update, memory, *, beta=0.5, gain=2.0):
    memory = memory + beta * update
    return gain * update, memory


def state_keys(opt):
    return list(opt.state[all_params(opt)[0]])


def test_a_transform_used_twice_keeps_two_states_and_two_hyper_parameters():
    opt = build(C.exp_avg(beta=0.8), C.sign, C.exp_avg(beta=0.6))
    train(opt, range(2))
    assert state_keys(opt) == ["step", "exp_avg", "exp_avg.1"]
    group = plain_group(opt.param_groups[0])
    assert (group["beta"], group["exp_avg.1.beta"]) == (0.8, 0.6)
    assert "exp_avg(beta=0.8) | sign | exp_avg(beta=0.6)" in repr(opt)
    # each acts on its own
    for key in ("beta", "exp_avg.1.beta"):
        other = copy.deepcopy(opt)
        other.param_groups[0][key] = 0.1
        plain = copy.deepcopy(opt)
        train(other, [2])
        train(plain, [2])
        assert differences(snapshot(other), snapshot(plain))


def test_the_second_owner_of_a_name_gets_it_under_its_own():
    opt = build(C.exp_avg, twofold, twofold, C.scale_by_laprop, C.scale_by_adam)
    assert set(live_keys(opt)) - {"lr", "weight_decay", "warmup_steps"} == {
        "beta",
        "twofold.beta",
        "twofold.1.beta",
        "gain",
        "twofold.1.gain",
        "betas",
        "eps",
        "scale_by_adam.betas",
        "scale_by_adam.eps",
    }
    train(opt, [0])
    assert set(state_keys(opt)) == {
        "step",
        "exp_avg",
        "twofold.memory",
        "twofold.1.memory",
        "scale_by_laprop.exp_avg",
        "scale_by_laprop.exp_avg_sq",
        "scale_by_adam.exp_avg",
        "scale_by_adam.exp_avg_sq",
    }


def test_a_qualified_name_can_be_given_per_group_and_is_suggested():
    chain = C.exp_avg, C.exp_avg
    opt = C.ChainOpt([{"params": parameters(), "exp_avg.1.beta": 0.25}], 0.1, *chain)
    assert opt.param_groups[0]["exp_avg.1.beta"] == 0.25
    with pytest.raises(ValueError, match=r"exp_avg\.1\.beta.*did you mean 'exp_avg\.1\.beta'"):
        C.ChainOpt([{"params": parameters(), "exp_avg.2.beta": 0.25}], 0.1, *chain)


def test_names_of_the_group_itself_are_never_taken_by_a_hyper_parameter():
    @C.transform()
    def greedy(update, *, lr=0.5, warmup_steps=3.0):
        return update * lr

    opt = build(greedy, lr=0.125)
    assert opt.param_groups[0]["lr"] == 0.125
    assert opt.param_groups[0]["greedy.lr"] == 0.5
    assert opt.param_groups[0]["warmup_steps"] == 0
    assert opt.param_groups[0]["greedy.warmup_steps"] == 3


STATELESS = [C.centralize, C.sign, C.clip_by_norm, C.cautious, C.clip_by_global_norm, C.coupled]


@pytest.mark.parametrize("element", STATELESS, ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_inserting_a_transform_without_state_keeps_a_checkpoint_loadable(element, place):
    chain = [C.exp_avg, C.scale_by_adam]
    source = build(*chain)
    train(source, range(3))
    chain.insert(place, element)
    target = C.ChainOpt(copies(all_params(source)), 0.1, *chain)
    saved = source.state_dict()
    for group, wanted in zip(saved["param_groups"], target.param_groups, strict=True):
        for key, value in plain_group(wanted).items():
            group.setdefault(key, value)  # what the new element needs has no value yet
    left = target.load_state_dict(saved, strict=False)  # for the chain is another one
    assert not left.missing_keys
    assert not left.unexpected_keys
    for p, q in zip(all_params(source), all_params(target), strict=True):
        assert source.state[p].keys() == target.state[q].keys()
        assert_same(source.state[p].values(), target.state[q].values())
    train(target, [3])


def test_an_element_that_has_neither_state_nor_hyper_parameters_needs_nothing_to_load():
    source = build(C.scale_by_adam)
    train(source, range(3))
    target = C.ChainOpt(copies(all_params(source)), 0.1, C.centralize, C.scale_by_adam, C.cautious)
    target.load_state_dict(source.state_dict(), strict=False)
    train(target, [3])
    assert target.state[all_params(target)[0]]["step"] == 4


def test_state_keys_do_not_depend_on_the_position():
    elements = C.exp_avg, twofold, C.scale_by_laprop
    keys = set()
    for order in itertools.permutations(elements):
        opt = build(*order)
        train(opt, [0])
        keys.add(frozenset(state_keys(opt)))
    assert len(keys) == 1


# ---- shared hyper-parameters


def test_a_shared_hyper_parameter_is_one_entry_that_several_elements_use():
    betas = C.shared("betas", (0.8, 0.95))
    chain = C.scale_by_exp_avg_sq(beta2=betas[1]), C.schedule_free(beta=betas[0])
    opt = build(*chain)
    assert opt.param_groups[0]["betas"] == (0.8, 0.95)
    assert not {"beta", "beta2"} & set(opt.param_groups[0])
    apart = build(C.scale_by_exp_avg_sq(beta2=0.95), C.schedule_free(beta=0.8))
    for each in (opt, apart):
        train(each, range(3))
    assert not differences(snapshot(opt), snapshot(apart))
    opt.param_groups[0]["betas"] = (0.7, 0.9)
    apart.param_groups[0].update(beta=0.7, beta2=0.9)
    for each in (opt, apart):
        train(each, range(3, 6))
    assert not differences(snapshot(opt), snapshot(apart))
    assert not differences(snapshot(opt.eval()), snapshot(apart.eval()))


def test_a_whole_shared_value_serves_elements_that_take_all_of_it():
    beta = C.shared("momentum", 0.5)
    opt = build(C.exp_avg(beta=beta), C.exp_avg(beta=beta))
    plain = build(C.exp_avg(beta=0.5), C.exp_avg(beta=0.5))
    assert opt.param_groups[0]["momentum"] == 0.5
    for each in (opt, plain):
        train(each, range(3))
    assert not differences(snapshot(opt), snapshot(plain))
    assert "exp_avg(beta=momentum)" in repr(opt)


def test_a_shared_value_is_checked_where_it_is_used():
    with pytest.raises(ValueError, match=r"exp_avg: beta=1\.5"):
        C.exp_avg(beta=C.shared("x", 1.5))
    with pytest.raises(TypeError, match="exp_avg: beta="):
        C.exp_avg(beta=C.shared("betas", (0.5, 0.9)))
    with pytest.raises(ValueError, match=r"scale_by_adam: betas=.*expected 2"):
        C.scale_by_adam(betas=C.shared("betas", (0.5, 0.9, 0.9)))
    with pytest.raises(IndexError, match="has 2 numbers"):
        C.shared("betas", (0.5, 0.9))[2]
    with pytest.raises(TypeError, match="one number"):
        C.shared("beta", 0.5)[0]
    with pytest.raises(TypeError, match="beta='x'"):
        C.shared("beta", "x")


def test_two_different_values_under_one_shared_name_are_refused():
    with pytest.raises(ValueError, match=r"shared 'm' is 0\.6.*0\.5"):
        build(C.exp_avg(beta=C.shared("m", 0.5)), C.exp_avg(beta=C.shared("m", 0.6)))
    with pytest.raises(ValueError, match=r"shared 'beta'.*already.*exp_avg"):
        build(C.exp_avg, C.exp_avg(beta=C.shared("beta", 0.9)))


@pytest.mark.parametrize("first_has_the_wider_interval", [True, False])
def test_a_shared_entry_stays_in_the_intervals_of_all_who_use_it(first_has_the_wider_interval):
    beta = C.shared("beta", 0.5)
    wide = C.exp_avg(beta=beta)
    chain = [wide, C.schedule_free(beta=beta)]  # an average may have beta = 0, schedule-free not
    if not first_has_the_wider_interval:
        gain = C.shared("beta", 0.5)
        chain = [C.exp_avg(beta=gain), twofold(gain=gain)]
    opt = build(*chain)
    opt.param_groups[0]["beta"] = 0.0 if first_has_the_wider_interval else 1.0
    with pytest.raises(ValueError, match="beta"):
        train(opt, [0])


# ---- copies


@pytest.mark.parametrize(
    "chain",
    [
        (C.exp_avg, C.exp_avg(beta=0.5), C.cautious(scale="none")),
        (C.parallel([C.exp_avg, C.sign], C.scale_by_adam, weights=(0.5, 2.0)),),
        (C.graft(C.exp_avg, [C.scale_by_adam, C.sign]), C.parameter_ema),
        (C.route(C.when(C.sign, C.exp_avg, ndim=1), otherwise=C.scale_by_lion), C.schedule_free),
        (C.scale_by_exp_avg_sq(beta2=C.shared("betas", (0.9, 0.99))[1]), C.schedule_free),
    ],
    ids=lambda chain: " | ".join(map(repr, chain)),
)
def test_a_pickled_chain_is_the_same_chain(chain):
    opt = build(*chain)
    again = C.ChainOpt(parameters(), 0.1, *pickle.loads(pickle.dumps(chain)))
    assert repr(again) == repr(opt)
    assert again.routing() == opt.routing()
    train(opt, range(3))
    train(again, range(3))
    assert_same_optimizers(opt, again)
    if averages(opt):
        assert not differences(snapshot(opt.eval()), snapshot(again.eval()))


def test_one_chain_serves_several_optimizers_that_do_not_touch_each_other():
    chain = C.scale_by_adam, C.parallel(C.exp_avg, C.sign)
    first = C.ChainOpt(parameters(), 0.1, *chain)
    second = C.ChainOpt(parameters(), 0.1, *chain)
    train(first, range(3))
    assert not second.state
    second.param_groups[0]["betas"] = (0.5, 0.5)
    assert first.param_groups[0]["betas"] == (0.9, 0.999)
    assert C.ChainOpt(parameters(), 0.1, *chain).param_groups[0]["betas"] == (0.9, 0.999)
