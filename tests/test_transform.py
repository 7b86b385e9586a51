"""The decorator: what it reads from a function, what it refuses, and configured copies."""

import copy
import dataclasses
import inspect
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from helpers import (
    all_params,
    assert_same,
    clones,
    eager,  # noqa: F401
    parameters,
    same_bits,
    snapshot,
    train,
)
from torch import Tensor

from heavyball import chainable as C


@C.transform(total=C.zeros)
def add_up(update, total, *, share=0.5, sizes=(1.0, 2.0), sign: bool = False, word="plain"):
    """Sum updates.

    u' = total
    """
    total = total + share * sizes[0] * update
    return total, total


@C.transform()
def double(update):
    """Twice the update."""
    return 2 * update


def step_once(transform, *shapes, lr=1.0, **options):
    """One step of a chain of one element; gives the parameters and what was subtracted from them."""
    params = parameters(*shapes, dtype=torch.float64)
    before = clones(params)
    opt = C.ChainOpt(params, lr, transform, **options)
    train(opt, [0])
    return opt, params, [a - b.detach() for a, b in zip(before, params, strict=True)]


# ---- what is declared


def test_floats_are_live_and_everything_else_is_fixed():
    assert add_up.hyper == {"share": 0.5, "sizes": (1.0, 2.0)}
    assert add_up.options == {"sign": False, "word": "plain"}
    assert list(add_up.states) == ["total"]
    assert add_up.name == "add_up"
    assert add_up.summary == "Sum updates."
    assert "u' = total" in add_up.doc


def test_the_function_itself_stays_callable():
    update, state = add_up.update(
        torch.ones(2), torch.zeros(2), share=torch.tensor(0.5), sizes=(torch.tensor(2.0),)
    )
    assert_same([update, state], [torch.ones(2), torch.ones(2)])


def test_hyper_parameters_arrive_as_numbers_in_tensors_and_options_as_they_are():
    seen = {}

    @C.transform()
    def look(update, *, factor=2.0, pair=(1.0, 3.0), count=2, word="x", flag=True, none=None):
        seen.update(factor=factor, pair=pair, count=count, word=word, flag=flag, none=none)
        return update

    step_once(look, (2,))
    assert isinstance(seen["factor"], Tensor)
    assert seen["factor"].ndim == 0
    assert seen["factor"] == 2
    assert isinstance(seen["pair"], tuple)
    assert [p.item() for p in seen["pair"]] == [1, 3]
    assert (seen["count"], seen["word"], seen["flag"], seen["none"]) == (2, "x", True, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_function_sees_float32_or_float64_and_never_a_tensor_without_dimension(dtype):
    seen = []

    @C.transform(total=C.zeros)
    def look(update, total, *, param, grad, step, lr):
        seen.append([update, total, param, grad])
        assert step.ndim == lr.ndim == 0
        return update, total + update

    params = parameters((), (3, 2), dtype=dtype)
    opt = C.ChainOpt(params, 0.1, look)
    train(opt, range(2))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for tensors in seen:
        assert {t.dtype for t in tensors} == {expected}
    assert {tuple(t.shape) for tensors in seen for t in tensors} == {(1,), (3, 2)}
    assert opt.state[params[0]]["look.total"].shape == ()
    assert params[0].shape == ()


def test_context_is_given_by_name():
    seen = []

    @C.transform()
    def look(update, *, step, param, grad, lr, base_lr):
        seen.append((step.item(), param.clone(), grad, lr.item(), base_lr.item()))
        return update

    (p,) = parameters((3,), dtype=torch.float64)
    opt = C.ChainOpt([p], 0.5, double, look, warmup_steps=4)
    for seed in range(2):
        before = p.detach().clone()
        train(opt, [seed])
        step, param, grad, lr, base_lr = seen[-1]
        assert (step, lr, base_lr) == (seed + 1, 0.5 * (seed + 1) / 4, 0.5)
        assert same_bits(param, before)
        assert same_bits(grad, p.grad)


def test_optional_context_is_none_until_something_before_provides_it():
    seen = []

    @C.transform()
    def look(update, *, signal: Tensor | None = None):
        seen.append(signal)
        return update

    @C.transform(provides=("signal",))
    def send(update):
        return update, update.sum()

    step_once(look, (2,))
    params = parameters((2,))
    train(C.ChainOpt(params, 0.1, send, look), [0])
    assert seen[0] is None
    assert seen[1] is not None
    params = parameters((2,))
    train(C.ChainOpt(params, 0.1, look, send), [0])
    assert seen[2] is None


def test_what_is_provided_reaches_only_the_elements_behind():
    seen = []

    @C.transform(provides=("grad",))
    def hide(update, *, grad):
        return update, torch.zeros_like(grad)

    @C.transform()
    def look(update, *, grad):
        seen.append(grad)
        return update

    params = parameters((3,))
    train(C.ChainOpt(params, 0.1, look, hide, look), [0])
    assert same_bits(seen[0], params[0].grad)
    assert (seen[1] == 0).all()


def test_a_learning_rate_that_is_provided_is_that_of_everything_behind():
    """The decay and the write included, and instead of the warm-up's."""
    seen = []

    @C.transform(provides=("lr",))
    def halve(update, *, lr):
        return update, lr / 2

    @C.transform()
    def look(update, *, lr, base_lr):
        seen.append((lr.item(), base_lr.item()))
        return update

    params = parameters((3,), dtype=torch.float64)
    start = clones(params)
    opt = C.ChainOpt(params, 0.5, look, halve, look, weight_decay=0.25, warmup_steps=2)
    train(opt, [0])
    assert seen == [(0.25, 0.5), (0.125, 0.5)]
    expected = start[0] * (1 - 0.125 * 0.25) - 0.125 * params[0].grad
    torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=1e-15)


def test_a_gate_freezes_what_stands_behind_it_but_not_what_stands_before():
    @C.transform(calls=C.scalar(0.0), provides=("gate",))
    def every_second(update, calls):
        return update, calls + 1, (calls + 1) % 2 == 0

    chain = C.exp_avg, every_second, C.exp_avg
    params = parameters((3,))
    opt = C.ChainOpt(params, 0.1, *chain, weight_decay=0.5)
    shots = [snapshot(opt)]
    for seed in range(4):
        train(opt, [seed])
        shots.append(snapshot(opt))
    moved = [not same_bits(a["0"], b["0"]) for a, b in itertools.pairwise(shots)]
    assert moved == [False, True, False, True]
    first, behind = "0.exp_avg", "0.exp_avg.1"
    for a, b, open_ in zip(shots[1:], shots[2:], moved[1:], strict=False):
        assert not same_bits(a[first], b[first])
        assert same_bits(a[behind], b[behind]) is not open_


def test_over_all_is_a_sum_over_the_parameters_with_gradients():
    totals = []

    def contribution(update, *, param):
        return (update * param).sum()

    @C.transform(over_all=contribution)
    def look(update, *, total):
        totals.append(total.item())
        return update

    params = parameters((3,), (2, 2), (4,), dtype=torch.float64)
    opt = C.ChainOpt([{"params": params[:1]}, {"params": params[1:]}], 0.1, double, look)
    train_only = [params[0], params[2]]
    for seed, p in enumerate(train_only):
        p.grad = torch.full(p.shape, float(seed + 1), dtype=torch.float64)
    expected = sum((2 * p.grad * p.detach()).sum().item() for p in train_only)
    opt.step()
    # two sums of few numbers
    assert totals == pytest.approx([expected] * 2, rel=1e-13)


def test_evaluate_gives_the_weights_to_evaluate_with():
    def halfway(param, anchor, *, share):
        return param + share * (anchor - param)

    @C.transform(kind="observer", anchor=C.copy_of_param, evaluate=halfway)
    def stay_near(update, anchor, *, share=0.25):
        return update, anchor

    (p,) = parameters((3,), dtype=torch.float64)
    start = p.detach().clone()
    opt = C.ChainOpt([p], 0.1, stay_near, C.sign)
    train(opt, range(3))
    end = p.detach().clone()
    opt.eval()
    torch.testing.assert_close(p.detach(), end + 0.25 * (start - end), rtol=0, atol=1e-15)
    opt.train()
    assert same_bits(p, end)


def test_an_observer_sees_the_parameter_after_the_write_wherever_it_stands():
    seen = []

    @C.transform(kind="observer")
    def look(update, *, param):
        seen.append(param.clone())
        return update

    _, params, _ = step_once(look, (3,))
    assert_same(seen, params)
    params = parameters((3,), dtype=torch.float64)
    train(C.ChainOpt(params, 0.1, look, C.sign, C.schedule_free), [0])
    assert_same(seen[1:], params)


def test_a_writer_of_ones_own_takes_the_place_of_the_default():
    @C.transform(kind="writer")
    def ascend(update, *, param, lr):
        return param + lr * update

    opt, params, moved = step_once(ascend, (3,), lr=0.5)
    assert "descend" not in repr(opt)
    torch.testing.assert_close(moved[0], -0.5 * params[0].grad, rtol=0, atol=1e-15)


def test_states_begin_as_declared_and_none_is_no_state():
    @C.transform(
        zero=C.zeros,
        start=C.copy_of_param,
        number=C.scalar(2.5),
        row=C.State(lambda p, o: p.new_ones(p.shape[-1:]) if p.ndim > 1 else None, "a row"),
        maybe=C.zeros.needs("flag"),
        often=C.zeros.needs("share"),
    )
    def keep(update, zero, start, number, row, maybe, often, *, flag: bool = False, share=0.0):
        seen.append((zero, start, number, row, maybe, often))
        return update, zero, start, number, row, maybe, often

    seen = []
    params = parameters((2, 3), (4,))
    before = clones(params)
    opt = C.ChainOpt(params, 0.1, keep)
    train(opt, [0])
    keys = {f"keep.{n}" for n in ("zero", "start", "number", "row")}
    assert set(opt.state[params[0]]) == {"step", *keys}
    assert set(opt.state[params[1]]) == {"step", *keys} - {"keep.row"}
    for p, start, states in zip(params, before, seen, strict=True):
        assert (states[0] == 0).all()
        assert same_bits(states[1], start)
        assert states[2] == 2.5
        assert states[2].dtype == torch.float64
        assert (states[3] is None) == (p.ndim == 1)
        assert states[4] is None
        assert states[5] is None
    assert opt.state[params[0]]["keep.row"].shape == (3,)
    # a state that a live hyper-parameter asks for comes when it does
    opt.param_groups[0]["share"] = 0.5
    train(opt, [1])
    assert (opt.state[params[1]]["keep.often"] == 0).all()
    flagged = C.ChainOpt(parameters((4,)), 0.1, keep(flag=True))
    train(flagged, [0])
    assert "keep.maybe" in flagged.state[all_params(flagged)[0]]


# ---- what is refused


def declare(fn, **options):
    return C.transform(**options)(fn)


@pytest.mark.parametrize(
    ("fn", "options", "words"),
    [
        (lambda: None, {}, "update"),
        (lambda update, mean: update, {}, "mean"),
        (lambda update: update, {"mean": C.zeros}, "mean"),
        (lambda update, b, a: update, {"a": C.zeros, "b": C.zeros}, "update, a, b"),
        (lambda update, *states: update, {"a": C.zeros}, r"\*states"),
        (lambda update, **rest: update, {}, r"\*\*rest"),
        (lambda update, *, beta=1.0: update, {}, r"beta=1\.0"),
        (lambda update, *, eps=-1.0: update, {}, r"eps=-1\.0"),
        (lambda update, *, eps=float("nan"): update, {}, "eps=nan"),
    ],
    ids=["no argument", "undeclared", "missing", "order", "args", "kwargs", "beta", "eps", "nan"],
)
def test_a_signature_that_differs_from_what_is_declared_raises_and_names_it(fn, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        declare(fn, **options)


def test_context_that_nothing_provides_raises_at_construction_with_what_there_is():
    @C.transform()
    def wonder(update, *, curvature):
        return update

    with pytest.raises(ValueError, match=r"wonder asks for 'curvature'.*step"):
        C.ChainOpt(parameters(), 0.1, wonder)


@pytest.mark.parametrize(
    ("result", "states"),
    [
        (lambda u, m: u, {"mean": C.zeros}),
        (lambda u, m: (u, m, m), {"mean": C.zeros}),
        (lambda u, m: None, {"mean": C.zeros}),
        (lambda u, m: (None, m), {"mean": C.zeros}),
        (lambda u, m: [u, m], {"mean": C.zeros}),
    ],
    ids=["too few", "too many", "none", "no update", "a list"],
)
def test_a_wrong_number_of_results_raises_at_the_step_and_names_them(result, states):
    @C.transform(**states)
    def clumsy(update, mean):
        return result(update, mean)

    opt = C.ChainOpt(parameters((3,)), 0.1, clumsy)
    with pytest.raises(TypeError, match=r"clumsy returned.*2 values: update, mean"):
        train(opt, [0])


def test_what_is_provided_counts_among_the_results():
    @C.transform(provides=("signal",))
    def forget(update):
        return update

    opt = C.ChainOpt(parameters((3,)), 0.1, forget)
    with pytest.raises(TypeError, match=r"forget returned.*update, signal"):
        train(opt, [0])


def test_the_parameter_stays_as_it_was_when_its_transform_raises():
    @C.transform(mean=C.zeros)
    def fail(update, mean):
        raise ArithmeticError("no")

    params = parameters((3,))
    before = clones(params)
    opt = C.ChainOpt(params, 0.1, C.exp_avg, fail)
    with pytest.raises(ArithmeticError, match="no"):
        train(opt, [0])
    assert_same(params, before)
    assert (opt.state[params[0]]["exp_avg"] == 0).all()
    assert opt.state[params[0]]["step"] == 0


# ---- configured copies


def test_a_configured_copy_leaves_the_original_alone():
    before = repr(add_up), dict(add_up.hyper), dict(add_up.options)
    other = add_up(share=0.25, word="odd")
    assert other is not add_up
    assert other.hyper["share"] == 0.25
    assert other.options["word"] == "odd"
    assert (repr(add_up), add_up.hyper, add_up.options) == before
    again = other(share=0.125)
    assert again.hyper["share"] == 0.125
    assert again.options["word"] == "odd"
    assert other.hyper["share"] == 0.25


def test_a_transform_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        C.exp_avg.name = "other"


def test_options_may_be_given_by_position_in_the_order_of_the_signature():
    assert repr(C.exp_avg(0.5)) == repr(C.exp_avg(beta=0.5))
    assert repr(C.scale_by_adam((0.8, 0.9), 1e-6)) == repr(
        C.scale_by_adam(betas=(0.8, 0.9), eps=1e-6)
    )
    with pytest.raises(TypeError, match="exp_avg: 4 arguments given"):
        C.exp_avg(0.5, True, False, 0.6)
    with pytest.raises(TypeError, match="exp_avg: 'beta' was given twice"):
        C.exp_avg(0.5, beta=0.6)


@pytest.mark.parametrize("name", C.TRANSFORMS)
def test_an_unknown_option_raises_with_the_known_ones_and_the_nearest(name):
    t = C.TRANSFORMS[name]
    known = [*t.hyper, *t.options]
    for option in known:
        with pytest.raises(TypeError, match=f"{name} has no option '{option}_'") as caught:
            t(**{f"{option}_": 0.5})
        message = str(caught.value)
        assert all(k in message for k in known)
        assert f"did you mean '{option}'" in message
    with pytest.raises(TypeError, match="known: none" if not known else "known"):
        t(nothing_like_it=1)


@pytest.mark.parametrize("name", C.TRANSFORMS)
def test_every_live_hyper_parameter_refuses_values_outside_its_interval(name):
    t = C.TRANSFORMS[name]
    for key, default in t.hyper.items():
        for bad in (float("nan"), float("inf"), -float("inf"), -0.5, 1.0):
            if bad in t.domain(key):
                continue
            value = (bad, *default[1:]) if isinstance(default, tuple) else bad
            with pytest.raises(ValueError, match=f"{name}: {key}=.*expected.* in"):
                t(**{key: value})
        for bad in ("much", True, [[0.5]], 0.5j):
            with pytest.raises(TypeError, match=f"{name}: {key}="):
                t(**{key: bad})
        if isinstance(default, tuple):
            with pytest.raises(ValueError, match=f"{name}: {key}=.*expected {len(default)} num"):
                t(**{key: (*default, 0.5)})
        if key.startswith("beta"):
            # Shampoo's own beta2 is 1, for a plain sum
            assert 1.0 not in t.domain(key) or key == "beta2_scale" or name == "shampoo"
            assert -0.5 not in t.domain(key)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: C.cautious(scale="men"), ValueError, "scale='men'.*'mean'.*'none'"),
        (lambda: C.scale_by_adam(amsgrad=1), TypeError, "amsgrad=1"),
        (lambda: C.sign(graft="yes"), TypeError, "graft='yes'"),
        (lambda: C.accumulate(k=0), ValueError, "k=0"),
        (lambda: C.accumulate(k=1.5), TypeError, r"k=1\.5"),
        (lambda: C.accumulate(k=True), TypeError, "k=True"),
        (lambda: C.apply(fn=3), TypeError, "fn=3"),
        (lambda: C.factored_rms(min_dim="large"), TypeError, "min_dim='large'"),
        (lambda: C.mars(gamma=None), TypeError, "gamma=None"),
    ],
)
def test_a_fixed_option_refuses_what_is_not_of_its_kind(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_hyper_parameter_that_may_be_none_is_then_no_live_one():
    opt = C.ChainOpt(parameters(), 0.1, C.mars(max_norm=None), C.exp_avg)
    assert "max_norm" not in opt.param_groups[0]
    assert "max_norm" in C.ChainOpt(parameters(), 0.1, C.mars, C.exp_avg).param_groups[0]
    train(opt, range(2))


def test_an_annotated_option_takes_what_its_annotation_says():
    @C.transform()
    def pick(update, *, mode: Literal["a", "b"] = "a", count: int | None = None):
        return update

    assert pick(mode="b", count=3).options == {"mode": "b", "count": 3}
    assert pick(count=None).options["count"] is None
    with pytest.raises(ValueError, match="mode='c'"):
        pick(mode="c")
    with pytest.raises(TypeError, match=r"count=1\.5"):
        pick(count=1.5)


# ---- repr, copies, pickle


CONFIGURED = [
    C.exp_avg(beta=0.5),
    C.scale_by_adam(betas=(0.8, 0.95), eps=1e-6, eps_placement="inside", amsgrad=True),
    C.cautious(scale="sum_plus_one", strict=False),
    C.mars(max_norm=None),
    C.schedule_free(c=0.5, caution="grams"),
    C.accumulate(k=4),
    C.scale_by_ademamix(alpha_warmup=10),
    *C.TRANSFORMS.values(),
]


@pytest.mark.parametrize("transform", CONFIGURED, ids=repr)
def test_repr_is_the_expression_that_makes_it(transform):
    again = eval(repr(transform), dict(C.TRANSFORMS))
    assert (again.hyper, again.options) == (transform.hyper, transform.options)
    assert repr(again) == repr(transform)


@pytest.mark.parametrize("transform", CONFIGURED, ids=repr)
def test_transforms_can_be_copied_and_pickled(transform):
    for other in (
        copy.copy(transform),
        copy.deepcopy(transform),
        pickle.loads(pickle.dumps(transform)),
    ):
        assert repr(other) == repr(transform)
        assert (other.name, other.hyper, other.options) == (
            transform.name,
            transform.hyper,
            transform.options,
        )
        assert other.update is transform.update


@pytest.mark.parametrize("name", C.TRANSFORMS)
def test_every_transform_is_public_and_documented(name):
    t = C.TRANSFORMS[name]
    assert t.summary.endswith(".")
    if t.name not in ("weighted_sum", "transplant"):
        assert getattr(C, name) is t
        assert name in C.__all__
    assert inspect.signature(t.update)


def test_a_function_of_the_users_own_can_stand_in_a_chain_by_apply():
    _, params, moved = step_once(C.apply(fn=torch.neg), (3,))
    torch.testing.assert_close(moved[0], -params[0].grad, rtol=0, atol=1e-15)
    with pytest.raises(TypeError, match=r"apply.*\(3,\)"):
        step_once(C.apply(fn=torch.sum), (3,))


def test_an_option_may_be_a_function():
    @C.transform()
    def through(update, *, fn: Callable = torch.neg):
        return fn(update)

    _, params, moved = step_once(through(fn=partial(torch.mul, other=3.0)), (3,))
    torch.testing.assert_close(moved[0], 3 * params[0].grad, rtol=0, atol=1e-14)


# ---- pure functions


@pytest.mark.parametrize("swapped", [True, False])
def test_a_transform_may_hand_on_an_old_state_as_another_state(swapped):
    """The new state is computed from the old one, whatever the order in which it is written."""

    @C.transform(newest=C.zeros, older=C.zeros, oldest=C.zeros)
    def remember(update, newest, older, oldest):
        return update, update, newest, older

    @C.transform(one=C.zeros, other=C.copy_of_param)
    def swap(update, one, other):
        return update, other, one

    params = parameters((3, 3), ())
    start = clones(params)
    opt = C.ChainOpt(params, 0.1, swap if swapped else remember)
    history = []
    for seed in range(4):
        train(opt, [seed])
        history.append([p.grad.clone() for p in params])
        for place, p in enumerate(params):
            state = opt.state[p]
            if swapped:
                expected = [start[place], torch.zeros_like(p)]
                pair = [state["swap.one"], state["swap.other"]]
                assert_same(pair if seed % 2 == 0 else pair[::-1], expected)
                continue
            past = [torch.zeros_like(p)] * 3 + [h[place] for h in history]
            assert_same(
                [state["remember.newest"], state["remember.older"], state["remember.oldest"]],
                [past[-1], past[-2], past[-3]],
            )


def test_a_transform_may_hand_on_a_view_of_its_own_state():
    @C.transform(kept=C.copy_of_param)
    def transpose(update, kept):
        return update, kept.transpose(0, 1)

    @C.transform(kept=C.copy_of_param)
    def flip(update, kept):
        return update, kept.flip(0)

    for transform, expected in ((transpose, torch.t), (flip, lambda x: x.flip(0))):
        (p,) = parameters((3, 3))
        start = p.detach().clone()
        opt = C.ChainOpt([p], 0.0, transform)
        train(opt, [0])
        assert_same(opt.state[p].values(), [torch.tensor(1.0).double(), expected(start)])


def test_a_transform_may_hand_on_the_gradient_or_the_parameter_as_state():
    @C.transform(grads=C.zeros, params=C.zeros)
    def remember(update, grads, params, *, grad, param):
        return update, grad, param

    (p,) = parameters((3,))
    opt = C.ChainOpt([p], 0.5, remember)
    for seed in range(3):
        before = p.detach().clone()
        train(opt, [seed])
        kept = p.grad.clone()
        p.grad.zero_()
        assert_same([opt.state[p][f"remember.{n}"] for n in ("grads", "params")], [kept, before])
        assert not same_bits(p, before)


def test_the_update_may_be_the_state_itself():
    @C.transform(kept=C.zeros)
    def keep(update, kept):
        return kept, update

    (p,) = parameters((3,), dtype=torch.float64)
    opt = C.ChainOpt([p], 1.0, keep, double)
    train(opt, [0])
    before, grad = p.detach().clone(), p.grad.clone()
    train(opt, [1])
    torch.testing.assert_close(p.detach(), before - 2 * grad, rtol=0, atol=1e-14)
