"""parallel, graft and route as parts of an optimizer: what they refuse, print, pick and carry on."""

import copy
import pickle

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
    parameters,
    same_bits,
    snapshot,
    train,
)
from torch import nn

from heavyball import chainable as C

# ---- refusals


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: C.parallel(), ValueError, r"parallel: 0 chain\(s\)"),
        (lambda: C.parallel(C.sign), ValueError, r"parallel: 1 chain\(s\)"),
        (lambda: C.parallel(C.sign, []), ValueError, "parallel: an empty chain"),
        (lambda: C.parallel(C.sign, 3), TypeError, "parallel: element 0 is 3"),
        (lambda: C.parallel(C.sign, [C.exp_avg, "x"]), TypeError, "parallel: element 1 is 'x'"),
        (lambda: C.parallel(C.sign, C.exp_avg, weights=(1.0,)), ValueError, "expected 2 numbers"),
        (lambda: C.parallel(C.sign, C.exp_avg, weights=1.0), TypeError, "weights=1.0"),
        (
            lambda: C.parallel(C.sign, C.exp_avg, weights=(1.0, float("nan"))),
            ValueError,
            "weights=.*nan",
        ),
        (lambda: C.graft(C.sign, ()), ValueError, "graft: magnitude: an empty chain"),
        (lambda: C.graft(None, C.sign), TypeError, "graft: direction: element 0 is None"),
        (lambda: C.route(), ValueError, "route: no rules"),
        (lambda: C.route(C.sign), TypeError, "route: rule 0 is sign"),
        (lambda: C.route(C.when(C.sign, ndim=1), otherwise=3), TypeError, "otherwise: element 0"),
        (lambda: C.when(C.sign), ValueError, "no condition.*otherwise"),
        (lambda: C.when(C.sign, ndim=1.0), TypeError, "ndim=1.0"),
        (lambda: C.when(C.sign, min_ndim=True), TypeError, "min_ndim=True"),
        (lambda: C.when(C.sign, max_ndim="2"), TypeError, "max_ndim='2'"),
        (lambda: C.when(C.sign, name=3), TypeError, "name=3"),
        (lambda: C.when(C.sign, predicate=3), TypeError, "predicate=3"),
        (lambda: C.when("sign", ndim=1), TypeError, "when: element 0 is 'sign'"),
    ],
)
def test_a_wrong_combination_is_refused_and_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_parameter_that_no_rule_matches_is_refused_with_the_rules():
    chain = C.route(C.when(C.sign, ndim=1), C.when(C.exp_avg, ndim=2))
    with pytest.raises(ValueError, match=r"no rule matches.*\(2, 3, 2\).*ndim=1.*otherwise"):
        C.ChainOpt(parameters(), 0.1, chain)
    opt = C.ChainOpt(parameters((3,)), 0.1, chain)
    with pytest.raises(ValueError, match="no rule matches"):
        opt.add_param_group({"params": parameters((2, 3, 2))})
    assert len(opt.param_groups) == 1
    train(opt, [0])
    named = [("conv.weight", nn.Parameter(torch.ones(1, 1, 1)))]
    with pytest.raises(ValueError, match=r"'conv\.weight'"):
        C.ChainOpt(named, 0.1, chain)


def test_rules_about_names_need_names():
    chain = C.route(C.when(C.sign, name="*.bias"), otherwise=C.exp_avg)
    with pytest.raises(ValueError, match="named_parameters"):
        C.ChainOpt(parameters(), 0.1, chain)


# ---- parallel and graft in an optimizer


def test_weights_are_live_and_belong_to_the_group():
    chain = C.parallel(C.sign, C.exp_avg, weights=(0.5, 2.0))
    opt = C.ChainOpt(parameters(), 0.1, chain)
    assert opt.param_groups[0]["weights"] == (0.5, 2.0)
    train(opt, range(2))
    only_signs = C.ChainOpt(copies(all_params(opt)), 0.1, C.sign)
    opt.param_groups[0]["weights"] = (1.0, 0.0)
    train(opt, [2])
    train(only_signs, [2])
    assert_same(all_params(opt), all_params(only_signs))
    negative = C.ChainOpt(parameters(), 0.1, C.parallel(C.sign, C.exp_avg, weights=(1.0, -1.0)))
    train(negative, [0])
    # m_1 = g, so the update is sign(g) - g
    for p, before in zip(all_params(negative), parameters(), strict=True):
        expected = before.detach() - 0.1 * (p.grad.sign() - p.grad)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


def test_branches_see_the_same_update_and_keep_states_of_their_own():
    opt = C.ChainOpt(
        parameters(), 0.1, C.parallel([C.exp_avg, C.exp_avg], C.exp_avg), C.exp_avg(beta=0.1)
    )
    train(opt, range(3))
    state = opt.state[all_params(opt)[0]]
    assert set(state) == {"step", "exp_avg", "exp_avg.1", "exp_avg.2", "exp_avg.3"}
    # the third has the same input and beta as the first, the second averages the first's output
    assert same_bits(state["exp_avg"], state["exp_avg.2"])
    assert not same_bits(state["exp_avg"], state["exp_avg.1"])


def test_combinations_nest():
    inner = C.parallel(C.sign, C.graft(C.exp_avg, C.sign))
    chain = C.route(C.when(C.parallel(inner, C.scale_by_adam), min_ndim=2), otherwise=inner)
    opt = C.ChainOpt(parameters(), 0.1, chain, C.cautious)
    other = copy.deepcopy(opt)
    train(opt, range(3))
    train(other, range(3))
    assert_same_optimizers(opt, other)
    shown = opt.routing()
    assert "parallel(parallel(sign, graft(exp_avg, sign)" in shown
    assert all(torch.isfinite(p).all() for p in all_params(opt))


def test_a_route_may_stand_in_a_branch_and_in_a_route():
    inner = C.route(C.when(C.exp_avg, max_ndim=1), otherwise=())
    chain = (
        C.parallel(C.route(C.when(C.sign, ndim=1), otherwise=C.exp_avg), C.scale_by_lion),
        C.route(C.when(inner, C.clip_by_norm, max_ndim=2), otherwise=C.sign),
    )
    opt = C.ChainOpt(parameters(), 0.1, *chain)
    both = ", scale_by_lion, weights=(1.0, 1.0))"
    assert [shown.removesuffix(" | decoupled | descend") for shown in rows(opt).values()] == [
        f"parallel(exp_avg{both} | clip_by_norm",
        f"parallel(sign{both} | exp_avg | clip_by_norm",
        f"parallel(exp_avg{both} | sign",
        f"parallel(exp_avg{both} | exp_avg | clip_by_norm",
    ]
    train(opt, range(3))
    for place, first in enumerate([C.exp_avg, C.sign, C.exp_avg, C.exp_avg]):
        ndim = parameters()[place].ndim
        rest = [C.sign] if ndim == 3 else [*([C.exp_avg] if ndim < 2 else []), C.clip_by_norm]
        alone = C.ChainOpt(parameters(), 0.1, C.parallel(first, C.scale_by_lion), *rest)
        train(alone, range(3))
        assert same_bits(all_params(opt)[place], all_params(alone)[place])


def test_a_branch_that_skips_a_step_makes_the_whole_update_skip_it():
    """ADOPT's first step only fills its second moment, so a graft with it moves nothing either."""
    params = parameters()
    before = clones(params)
    opt = C.ChainOpt(params, 0.1, C.graft(C.scale_by_adopt, C.exp_avg), weight_decay=0.5)
    train(opt, [0])
    assert_same(params, before)
    train(opt, [1])
    assert all((a != b).any() for a, b in zip(params, before, strict=True))


def test_behind_a_graft_the_steps_that_were_skipped_do_not_count():
    """The second step is the first of the average behind, so the average is that update."""
    seen = []

    @C.transform()
    def look(update, *, step):
        seen.append((update, step.item()))
        return update

    (p,) = parameters((3,))
    opt = C.ChainOpt([p], 0.1, C.graft(C.scale_by_adopt, C.sign), look, C.exp_avg)
    train(opt, range(2))
    assert same_bits(opt.state[p]["exp_avg"], seen[1][0])
    train(opt, [2])
    assert [step for _, step in seen] == [1, 1, 2]


def test_what_a_branch_changes_of_the_context_stays_in_the_branch():
    seen = []

    @C.transform()
    def look(update, *, grad):
        seen.append(grad)
        return update

    params = parameters((3,), dtype=torch.float64)
    train(C.ChainOpt(params, 0.5, C.parallel([C.maximize, look], look), look), [0])
    grad = params[0].grad
    assert_same(seen, [-grad, grad, grad])


def test_an_accumulated_gradient_in_a_graft_steps_once_in_k():
    params = parameters()
    opt = C.ChainOpt(params, 0.1, C.accumulate(k=3), C.graft(C.exp_avg, C.scale_by_adam))
    moved = []
    for seed in range(6):
        before = clones(params)
        train(opt, [seed])
        moved.append(not same_bits(params[0], before[0]))
    assert moved == [False, False, True, False, False, True]


# ---- route


def rows(opt):
    """The routing table by parameter."""
    return {
        line.split("  ")[0].strip(): line.split("  ")[-1].strip()
        for line in opt.routing().splitlines()[1:]
    }


def test_the_first_rule_that_matches_decides():
    chain = C.route(
        C.when(C.sign, name="vec*"),
        C.when(C.exp_avg, max_ndim=2, min_ndim=1),
        C.when(C.scale_by_adam, predicate=lambda name, p: p.numel() > 4),
        otherwise=C.scale_by_lion,
    )
    opt = C.ChainOpt(Tiny().named_parameters(), 0.1, chain)
    tail = " | decoupled | descend"
    assert rows(opt) == {
        "matrix": "exp_avg" + tail,
        "vector": "sign" + tail,
        "kernel": "scale_by_adam" + tail,
        "number": "scale_by_lion" + tail,
    }


def test_all_conditions_of_a_rule_must_hold():
    chain = C.route(
        C.when(C.sign, name="*e*", ndim=3, predicate=lambda name, p: name.startswith("k")),
        otherwise=C.exp_avg,
    )
    found = rows(C.ChainOpt(Tiny().named_parameters(), 0.1, chain))
    assert {name for name, shown in found.items() if shown.startswith("sign")} == {"kernel"}


def test_a_predicate_sees_the_name_and_the_parameter_once_each():
    model, seen = Tiny(), []

    def predicate(name, p):
        seen.append((name, p))
        return False

    C.ChainOpt(
        model.named_parameters(), 0.1, C.route(C.when(C.sign, predicate=predicate), otherwise=())
    )
    assert [name for name, _ in seen] == [name for name, _ in model.named_parameters()]
    assert all(a is b for (_, a), b in zip(seen, model.parameters(), strict=True))
    nameless = []
    chain = C.route(C.when(C.sign, predicate=lambda n, p: nameless.append(n)), otherwise=())
    C.ChainOpt(parameters((2,)), 0.1, chain)
    assert nameless == [None]


def test_the_choice_is_made_when_the_parameter_is_added():
    answers = iter([True, False])
    chain = C.route(C.when(C.exp_avg, predicate=lambda n, p: next(answers)), otherwise=C.sign)
    opt = C.ChainOpt(parameters((3,), (4,)), 0.1, chain)
    table = opt.routing()
    train(opt, range(3))
    assert opt.routing() == table
    assert [len(opt.state[p]) for p in all_params(opt)] == [2, 1]


@pytest.mark.parametrize("otherwise", [(), [C.sign], C.sign])
def test_each_parameter_trains_as_in_an_optimizer_of_its_own_chain(otherwise):
    chain = C.route(
        C.when(C.scale_by_lion, C.clip_by_norm, ndim=1),
        C.when([C.exp_avg, C.cautious], ndim=2),
        otherwise=otherwise,
    )
    opt = C.ChainOpt(parameters(), 0.1, C.centralize, chain, weight_decay=0.1)
    train(opt, range(3))
    rest = [C.sign] if otherwise else []
    for place, elements in enumerate(
        [[C.exp_avg, C.cautious], [C.scale_by_lion, C.clip_by_norm], rest, rest]
    ):
        alone = C.ChainOpt(parameters(), 0.1, C.centralize, *elements, weight_decay=0.1)
        train(alone, range(3))
        assert same_bits(all_params(opt)[place], all_params(alone)[place])


def test_parameters_may_have_different_writers():
    chain = C.exp_avg, C.route(C.when(C.schedule_free, ndim=1), otherwise=C.descend)
    opt = C.ChainOpt(parameters(), 0.1, *chain)
    train(opt, range(4))
    before = snapshot(opt)
    opt.eval()
    moved = {name for name in differences(before, snapshot(opt)) if "." not in name}
    assert moved == {"1"}
    opt.train()
    assert not differences(before, snapshot(opt))


def test_parameters_may_have_different_decays():
    chain = C.sign, C.route(C.when(C.l1_decay(weight_decay=0.5), ndim=1), otherwise=())
    opt = C.ChainOpt(parameters(), 0.1, *chain)
    table = rows(opt)
    assert table["group 0[1]"] == "sign | l1_decay(weight_decay=0.5) | descend"
    assert table["group 0[0]"] == "sign | decoupled | descend"
    assert len({k for k in opt.param_groups[0] if "weight_decay" in k}) == 2


def test_hyper_parameters_of_all_branches_are_in_every_group():
    chain = C.route(C.when(C.exp_avg, ndim=1), otherwise=C.scale_by_adam)
    opt = C.ChainOpt([{"params": [p]} for p in parameters()], 0.1, chain)
    for group in opt.param_groups:
        assert {"beta", "betas", "eps", "weight_decay"} <= set(group)


def test_a_late_group_is_routed_too():
    chain = C.route(C.when(C.exp_avg, ndim=1), otherwise=C.sign)
    opt = C.ChainOpt(parameters((3,)), 0.1, chain)
    train(opt, [0])
    opt.add_param_group({"params": parameters((2,), (2, 2))})
    assert [shown.split(" ")[0] for shown in rows(opt).values()] == ["exp_avg", "exp_avg", "sign"]
    train(opt, [1])


def test_a_routed_optimizer_can_be_saved_copied_and_pickled():
    chain = C.route(C.when(C.exp_avg, name="*e*"), otherwise=C.scale_by_lion), C.cautious
    opt = C.ChainOpt(Tiny().named_parameters(), 0.1, *chain)
    train(opt, range(2))
    loaded = C.ChainOpt(Tiny().named_parameters(), 0.1, *chain)
    with torch.no_grad():
        for p, q in zip(all_params(loaded), all_params(opt), strict=True):
            p.copy_(q)
    loaded.load_state_dict(opt.state_dict())
    others = [loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    table = opt.routing()
    for each in (opt, *others):
        assert each.routing() == table
        train(each, range(2, 4))
    for other in others:
        assert_same_optimizers(opt, other)


def test_a_checkpoint_of_another_routing_is_refused():
    by_ndim = C.route(C.when(C.exp_avg, ndim=1), otherwise=C.scale_by_lion)
    other = C.route(C.when(C.exp_avg, ndim=2), otherwise=C.scale_by_lion)
    source = C.ChainOpt(parameters(), 0.1, by_ndim)
    target = C.ChainOpt(parameters(), 0.1, other)
    train(source, [0])
    train(target, [0])
    before = snapshot(target)
    with pytest.raises(ValueError, match="load_state_dict"):
        target.load_state_dict(source.state_dict())
    assert not differences(before, snapshot(target))


# ---- printing


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (
            C.parallel(C.sign, [C.exp_avg(beta=0.5), C.cautious]),
            "parallel(sign, exp_avg(beta=0.5) | cautious, weights=(1.0, 1.0))",
        ),
        (C.graft([C.exp_avg, C.sign], C.scale_by_adam), "graft(exp_avg | sign, scale_by_adam)"),
        (
            C.route(C.when(C.sign, ndim=1, name="*.bias"), otherwise=[C.exp_avg, C.sign]),
            "route(when(sign, name='*.bias', ndim=1), otherwise=exp_avg | sign)",
        ),
        (
            C.route(C.when((), min_ndim=2, max_ndim=3), otherwise=()),
            "route(when((), min_ndim=2, max_ndim=3), otherwise=())",
        ),
    ],
    ids=["parallel", "graft", "route", "empty branches"],
)
def test_a_combination_prints_as_it_is_written(element, expected):
    assert repr(element) == expected


def test_the_optimizer_prints_a_route_as_given_and_each_chain_in_the_table():
    chain = C.route(C.when(C.sign, ndim=1), otherwise=C.exp_avg)
    opt = C.ChainOpt(parameters(), 0.1, chain)
    assert repr(chain) in repr(opt)
    header = opt.routing().splitlines()[0].split()
    assert header == ["parameter", "shape", "chain"]


def test_combinations_are_immutable_and_may_be_used_twice():
    part = C.parallel(C.exp_avg, C.sign)
    opt = C.ChainOpt(parameters(), 0.1, part, part)
    train(opt, range(2))
    assert {"weights", "parallel.1.weights"} <= set(opt.param_groups[0])
    assert {"exp_avg", "exp_avg.1"} <= set(opt.state[all_params(opt)[0]])
    with pytest.raises(AttributeError):
        part.name = "other"


def test_gradients_missing_in_one_branch_only_do_not_matter_to_the_other():
    chain = C.route(C.when(C.exp_avg, ndim=1), otherwise=C.scale_by_adam)
    params = parameters((3,), (2, 2))
    opt = C.ChainOpt(params, 0.1, chain)
    for seed in range(4):
        fill_gradients(params, seed)
        params[seed % 2].grad = None
        opt.step()
    assert [opt.state[p]["step"] for p in params] == [2, 2]


def test_more_combinations_of_routes_than_can_be_checked_are_refused():
    routes = [C.route(C.when(C.sign, ndim=1), otherwise=()) for _ in range(20)]
    with pytest.raises(ValueError, match="one route"):
        C.ChainOpt([torch.zeros(2)], 0.1, *routes)
