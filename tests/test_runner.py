"""Many parameters at once: sums over all of them, and how much memory a step takes."""

import weakref

import pytest
import torch
from helpers import (
    all_params,
    assert_same,
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import heavyball
from heavyball import chainable as C

FOREACH = [None, True, False]
every_foreach = pytest.mark.parametrize("foreach", FOREACH)
DOUBLE = torch.float64
# a dozen roundings, relative to values of about 1
CLOSE = {"rtol": 0, "atol": 30 * 2.0**-52}


def direction(opt, before, lr=1.0):
    """What was subtracted from each parameter, over lr."""
    return [(a - b.detach()) / lr for a, b in zip(before, all_params(opt), strict=True)]


def one_step(chain, shapes=((3,), (2, 2), (4,)), foreach=None, groups=None):
    """Gradients, and the update that a chain makes of them."""
    params = parameters(*shapes, dtype=DOUBLE)
    opt = C.ChainOpt(groups(params) if groups else params, 1.0, *chain, foreach=foreach)
    fill_gradients(params, 0)
    before = clones(params)
    opt.step()
    grads = [p.grad for p in params]
    return grads, [a - b.detach() for a, b in zip(before, params, strict=True)]


def norm_of(tensors):
    return sum(t.square().sum() for t in tensors).sqrt()


def clipped(tensors, bound):
    factor = min(1.0, bound / (norm_of(tensors) + 1e-6))
    return [t * factor for t in tensors]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- sums over all parameters


@every_foreach
def test_a_global_clip_is_torchs_over_all_groups(foreach):
    params = parameters((3,), (2, 2), (4,), dtype=DOUBLE)
    other = copies(params)
    opt = C.ChainOpt(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.25}],
        1.0,
        C.clip_by_global_norm(max_norm=0.5),
        foreach=foreach,
    )
    reference = torch.optim.SGD([{"params": other[:1]}, {"params": other[1:], "lr": 0.25}], 1.0)
    for seed in range(3):
        fill_gradients(params, seed)
        fill_gradients(other, seed)
        opt.step()
        torch.nn.utils.clip_grad_norm_(other, 0.5)
        reference.step()
    assert_close(params, other)


@every_foreach
def test_only_parameters_with_a_gradient_count(foreach):
    params = parameters((3,), (2, 2), (4,), dtype=DOUBLE)
    opt = C.ChainOpt(params, 1.0, C.clip_by_global_norm(max_norm=0.1), foreach=foreach)
    train(opt, [0])
    fill_gradients(params, 1)
    params[1].grad = None
    before = clones(params)
    opt.step()
    grads = [params[0].grad, params[2].grad]
    found = direction(opt, before)
    assert_close([found[0], found[2]], clipped(grads, 0.1))


@every_foreach
def test_each_group_may_have_its_own_bound_for_the_common_norm(foreach):
    grads, updates = one_step(
        (C.clip_by_global_norm,),
        foreach=foreach,
        groups=lambda ps: [
            {"params": ps[:1], "max_norm": 0.25},
            {"params": ps[1:], "max_norm": 0.75},
        ],
    )
    length = norm_of(grads) + 1e-6
    assert_close(
        updates, [g * (b / length) for g, b in zip(grads, (0.25, 0.75, 0.75), strict=True)]
    )


@every_foreach
def test_two_global_clips_sum_what_reaches_each(foreach):
    grads, updates = one_step(
        (
            C.clip_by_global_norm(max_norm=2.0),
            C.apply(fn=lambda u: u**3),
            C.clip_by_global_norm(max_norm=0.5),
        ),
        foreach=foreach,
    )
    cubes = [u**3 for u in clipped(grads, 2.0)]
    assert norm_of(cubes) > 0.5
    assert_close(updates, clipped(cubes, 0.5))


@every_foreach
def test_three_global_clips_and_moments_between_them(foreach):
    chain = (
        C.clip_by_global_norm(max_norm=1.0),
        C.exp_avg,
        C.clip_by_global_norm(max_norm=0.5),
        C.scale_by_adam,
        C.clip_by_global_norm(max_norm=0.25),
    )
    grads, updates = one_step(chain, foreach=foreach)
    # at the first step the means are the gradient, and Adam's update g / (|g| + eps)
    once = clipped(clipped(grads, 1.0), 0.5)
    assert_close(updates, clipped([g / (g.abs() + 1e-8) for g in once], 0.25))


@every_foreach
def test_a_sum_inside_a_branch_is_over_the_parameters_of_that_branch(foreach):
    chain = (C.route(C.when(C.clip_by_global_norm(max_norm=0.5), ndim=1), otherwise=()),)
    grads, updates = one_step(chain, foreach=foreach)
    ends = clipped([grads[0], grads[2]], 0.5)
    assert_close(updates, [ends[0], grads[1], ends[1]])


@every_foreach
def test_each_branch_has_its_own_sum(foreach):
    chain = (
        C.route(
            C.when(C.clip_by_global_norm(max_norm=0.5), ndim=1),
            otherwise=C.clip_by_global_norm(max_norm=0.25),
        ),
    )
    grads, updates = one_step(chain, foreach=foreach)
    ends = clipped([grads[0], grads[2]], 0.5)
    assert_close(updates, [ends[0], *clipped([grads[1]], 0.25), ends[1]])


@every_foreach
@pytest.mark.parametrize("reverse", [False, True])
def test_a_common_sum_behind_branches_with_sums_is_over_all_parameters(foreach, reverse):
    bounds = {1: 0.5, 2: 0.25}
    ndim = 2 if reverse else 1
    chain = (
        C.route(
            C.when(C.clip_by_global_norm(max_norm=bounds[ndim]), ndim=ndim),
            otherwise=C.clip_by_global_norm(max_norm=bounds[3 - ndim]),
        ),
        C.apply(fn=lambda u: 5 * u),
        C.clip_by_global_norm(max_norm=0.125),
    )
    grads, updates = one_step(chain, foreach=foreach)
    ends = clipped([grads[0], grads[2]], 0.5)
    inside = [5 * u for u in (ends[0], *clipped([grads[1]], 0.25), ends[1])]
    assert_close(updates, clipped(inside, 0.125))


@every_foreach
def test_a_common_sum_behind_a_branch_with_two_sums(foreach):
    chain = (
        C.route(
            C.when(
                C.clip_by_global_norm(max_norm=0.5),
                C.apply(fn=lambda u: u**3),
                C.clip_by_global_norm(max_norm=0.01),
                ndim=1,
            ),
            otherwise=(),
        ),
        C.clip_by_global_norm(max_norm=0.125),
    )
    grads, updates = one_step(chain, foreach=foreach)
    cubes = [u**3 for u in clipped([grads[0], grads[2]], 0.5)]
    ends = clipped(cubes, 0.01)
    assert_close(updates, clipped([ends[0], grads[1], ends[1]], 0.125))


@every_foreach
def test_sums_in_the_branches_of_a_graft(foreach):
    chain = (
        C.graft(
            [C.clip_by_global_norm(max_norm=0.5), C.sign],
            [C.apply(fn=lambda u: 3 * u), C.clip_by_global_norm(max_norm=0.25)],
        ),
    )
    grads, updates = one_step(chain, foreach=foreach)
    sizes = [norm_of([u]) for u in clipped([3 * g for g in grads], 0.25)]
    expected = [g.sign() * (m / norm_of([g.sign()])) for g, m in zip(grads, sizes, strict=True)]
    assert_close(updates, expected)


@every_foreach
def test_dtypes_may_be_mixed_under_one_sum(foreach):
    params = [
        nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    opt = C.ChainOpt(params, 1.0, C.clip_by_global_norm(max_norm=3.0), foreach=foreach)
    opt.step()
    # nine entries of 2 have the norm 6, so each becomes 1 but for the 1e-6 in the denominator
    for p, eps in zip(params, (1e-6, 2.0**-7, 1e-6), strict=True):
        torch.testing.assert_close(
            p.detach().double(), torch.ones(3, dtype=DOUBLE), rtol=0, atol=eps
        )


@every_foreach
def test_a_value_that_is_not_finite_in_one_group_skips_the_step_of_all(foreach):
    params = parameters((3,), (2, 2), dtype=DOUBLE)
    opt = C.ChainOpt(
        [{"params": params[:1]}, {"params": params[1:]}],
        0.1,
        C.skip_not_finite,
        C.clip_by_global_norm,
        C.scale_by_adam,
        C.parameter_ema,
        weight_decay=0.5,
        foreach=foreach,
    )
    plain = C.ChainOpt(
        copies(params),
        0.1,
        C.clip_by_global_norm,
        C.scale_by_adam,
        C.parameter_ema,
        weight_decay=0.5,
    )
    for seed, bad in enumerate([torch.inf, None, torch.nan, None, -torch.inf]):
        fill_gradients(params, seed)
        before = snapshot(opt)
        if bad is None:
            opt.step()
            train(plain, [seed])
            continue
        params[1].grad[0, 0] = bad
        opt.step()
        changed = {
            name.split(".", 1)[1] for name in differences(before, snapshot(opt)) if "." in name
        }
        if seed:
            assert changed == {"step", "skip_not_finite.skipped"}
    assert [opt.state[p]["skip_not_finite.skipped"] for p in params] == [3, 3]
    assert_same(params, all_params(plain))
    assert not differences(
        {k: v for k, v in snapshot(plain).items() if not k.endswith("step")},
        {k: v for k, v in snapshot(opt).items() if not k.endswith(("step", "skipped"))},
    )


@every_foreach
def test_a_guard_in_one_branch_leaves_the_other_branch_alone(foreach):
    chain = C.route(C.when(C.skip_not_finite, ndim=1), otherwise=()), C.exp_avg
    params = parameters((3,), (2, 2), (4,))
    opt = C.ChainOpt(params, 0.1, *chain, foreach=foreach)
    fill_gradients(params, 0)
    params[0].grad[1] = torch.nan
    before = clones(params)
    opt.step()
    moved = [not same_bits(a, b) for a, b in zip(params, before, strict=True)]
    assert moved == [False, True, False]


@every_foreach
def test_a_frozen_parameter_adds_nothing_to_a_sum_behind_the_gate(foreach):
    """ADOPT's first step fills its second moment only, so a late parameter must not count yet."""
    params = parameters((3,), (4,), dtype=DOUBLE)
    opt = C.ChainOpt(
        params, 1.0, C.scale_by_adopt, C.clip_by_global_norm(max_norm=0.25), foreach=foreach
    )
    alone = copies(params[:1])
    other = C.ChainOpt(alone, 1.0, C.scale_by_adopt, C.clip_by_global_norm(max_norm=0.25))
    for seed in range(3):
        fill_gradients(params, seed)
        alone[0].grad = params[0].grad.clone()
        if seed < 2:
            params[1].grad = None
        opt.step()
        other.step()
    assert_same(params[:1], alone)


@every_foreach
def test_parameters_that_are_still_accumulating_do_not_count(foreach):
    params = parameters((3,), (4,), dtype=DOUBLE)
    opt = C.ChainOpt(
        params, 1.0, C.accumulate(k=2), C.clip_by_global_norm(max_norm=0.25), foreach=foreach
    )
    params[0].grad = torch.zeros_like(params[0])
    opt.step()  # from here on the first is one gradient ahead of the second
    before = clones(params)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    opt.step()
    # only the first is through, with the mean of 0 and 2
    expected = clipped([torch.ones(3, dtype=DOUBLE)], 0.25)
    assert_close(direction(opt, before), [*expected, torch.zeros(4, dtype=DOUBLE)])


@every_foreach
def test_infinite_gradients_do_not_make_a_sum_infinite_for_good(foreach):
    params = parameters((3,), (4,))
    opt = C.ChainOpt(params, 0.1, C.clip_by_global_norm, C.scale_by_adam, foreach=foreach)
    for seed in range(3):
        fill_gradients(params, seed)
        if seed == 1:
            params[0].grad[0] = 1e30
        opt.step()
    assert all(torch.isfinite(value).all() for value in snapshot(opt).values())


def test_sums_stay_on_the_device_as_float64_numbers():
    seen = []

    @C.transform(over_all=lambda update: update.square().sum())
    def look(update, *, total):
        seen.append((total.dtype, total.ndim))
        return update

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        train(C.ChainOpt(parameters((3,), (2,), dtype=dtype), 0.1, look), [0])
    assert set(seen) == {(torch.float64, 0)}


# ---- order and repetition


@pytest.mark.parametrize("count", [1, 2])
def test_a_function_runs_once_per_step_or_once_more_for_each_sum_behind_it(count):
    calls = []

    def note(update):
        calls.append(1)
        return update

    chain = [C.apply(fn=note), *[C.clip_by_global_norm] * count]
    runs = {}
    for foreach in FOREACH:
        calls.clear()
        train(C.ChainOpt(parameters((3,), (4,)), 0.1, *chain, foreach=foreach), [0])
        runs[foreach] = len(calls)
    assert runs == {None: 2, True: 2, False: 2 * (1 + count)}


@pytest.mark.parametrize(
    "chain", [(C.scale_by_adam, C.cautious), (C.scale_by_laprop, C.schedule_free)]
)
def test_a_parameter_does_not_notice_the_others(chain):
    together = C.ChainOpt(parameters(), 0.1, *chain, weight_decay=0.1)
    train(together, range(3))
    for place in range(4):
        params = parameters()
        alone = C.ChainOpt(params[place : place + 1], 0.1, *chain, weight_decay=0.1)
        for seed in range(3):
            fill_gradients(params, seed)
            alone.step()
        assert same_bits(params[place], all_params(together)[place])


def test_many_groups_keep_their_own_values_at_every_step():
    groups = [{"params": parameters((2,), dtype=DOUBLE), "lr": 2.0**-i} for i in range(6)]
    opt = C.ChainOpt(groups, 1.0, C.sign)
    for step in range(3):
        for i, group in enumerate(opt.param_groups):
            group["lr"] = 2.0 ** -(i + step)
        before = clones(all_params(opt))
        train(opt, [step])
        for i, (p, start) in enumerate(zip(all_params(opt), before, strict=True)):
            torch.testing.assert_close(
                (p.detach() - start).abs(), torch.full_like(start, 2.0 ** -(i + step)), **CLOSE
            )


# ---- memory


class Peak(TorchDispatchMode):
    """The most bytes that the tensors made in its time held at once, those of `known` left out."""

    def __init__(self, known):
        super().__init__()
        self.known = {address(t) for t in known}
        self.made = []
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(t) for t in found]
        held = {
            address(t): t.untyped_storage().nbytes() for r in self.made if (t := r()) is not None
        }
        now = sum(size for place, size in held.items() if place not in self.known)
        self.bytes = max(self.bytes, now)
        return result


def address(tensor):
    return tensor.untyped_storage()._cdata


ELEMENTS = 10_000


def peak(count, chain, foreach):
    """Tensors of the size of a parameter that a step makes and holds at once, for `count` of them."""
    params = parameters(*[(ELEMENTS,)] * count)
    opt = C.ChainOpt(params, 0.1, *chain, foreach=foreach)
    train(opt, [0])
    fill_gradients(params, 1)
    known = [t for p in params for t in (p, p.grad, *opt.state[p].values())]
    with Peak(known) as mode:
        opt.step()
    return mode.bytes / (4 * ELEMENTS)


def test_the_measure_of_memory_counts_what_is_held_and_forgets_what_is_not():
    known = torch.ones(ELEMENTS)
    with Peak([known]) as mode:
        kept = [known + 1, known * 2]
        for _ in range(5):
            known.add_(known * 3)
        view = kept[0][:3]
    assert mode.bytes == 3 * 4 * ELEMENTS
    assert view.shape == (3,)


WITH_SUM = (C.scale_by_adam, C.clip_by_global_norm(max_norm=0.1))
TWO_SUMS = (C.clip_by_global_norm, *WITH_SUM)


@pytest.mark.parametrize("chain", [WITH_SUM, TWO_SUMS], ids=["one sum", "two sums"])
def test_foreach_false_holds_the_intermediate_tensors_of_one_parameter_at_a_time(chain):
    one, many = peak(1, chain, False), peak(8, chain, False)
    # numbers and views weigh nothing against a parameter of 10,000 elements
    assert many == pytest.approx(one, abs=0.1)


@pytest.mark.parametrize("foreach", [None, True])
def test_otherwise_a_sum_keeps_them_for_all_parameters(foreach):
    one, many = peak(1, WITH_SUM, foreach), peak(8, WITH_SUM, foreach)
    # at least the update and the two new moments of each
    assert many >= one + 7 * 3


@every_foreach
def test_a_chain_without_a_sum_never_holds_those_of_two_parameters(foreach):
    chain = C.scale_by_adam, C.cautious
    assert peak(8, chain, foreach) == pytest.approx(peak(1, chain, foreach), abs=0.1)


def test_a_later_step_makes_no_state_again():
    """A state that an option leaves out is missing for good, and must not be made at every step."""
    params = parameters((ELEMENTS,))
    plain = peak(1, (C.scale_by_adam,), None)
    longer = peak(1, (C.scale_by_adam(amsgrad=True),), None)
    assert plain < longer
    opt = heavyball.AdamW(params)
    train(opt, range(2))
    state = {k: v.data_ptr() for k, v in opt.state[params[0]].items()}
    train(opt, [2])
    assert {k: v.data_ptr() for k, v in opt.state[params[0]].items()} == state
