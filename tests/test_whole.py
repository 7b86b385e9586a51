"""Transforms of whole tensors: how they are called, what they keep, and how they end a step."""

import pytest
import torch
from helpers import parameters, snapshot, train

from heavyball import chainable as C
from heavyball.chainable import State, Transform, transform, whole_transform, zeros
from heavyball.numerics import normals
from heavyball.transforms import TRANSFORMS

SEEN: list = []


@pytest.fixture(autouse=True)
def fresh():
    SEEN.clear()


def _factors(param, options):
    return tuple(None if n > 4 else torch.eye(n, device=param.device) for n in param.shape)


@whole_transform(factors=State(_factors, "one per small axis", several=True))
def counted(update, factors, *, count: int, step, weight: float = 1.0):
    SEEN.append((tuple(update.shape), count, float(step), type(weight)))
    new = tuple(None if f is None else f + weight for f in factors)
    return update * 1.0, new


@whole_transform(host=("weight",), provides=("gate", "step"), opaque=("basis",))
def enters(update, *, count: int, weight: float = 1.0):
    SEEN.append(("enter", count, weight))
    turn = torch.full((len(update), 1, 1), float(count), dtype=update.dtype)
    return update * 1.0, count > 1, count - 1, (turn, None, "label")


@whole_transform
def leaves(update, *, basis, count: int):
    turn, nothing, label = basis
    assert (nothing, label, turn.shape) == (None, "label", (len(update), 1, 1))
    SEEN.append(("leave", count))
    return update * turn


def _turn(seen, *, vectors, squares, count, step):
    SEEN.append(("after", count, float(step), len(vectors), len(squares)))
    return seen + 1, tuple(-v for v in vectors), tuple(s * 4 for s in squares)


@whole_transform(seen=zeros, after=_turn, due=lambda count: count % 2 == 0)
def turning(update, seen):
    return update * 1.0, seen


@transform(
    mean=zeros.holding("moment"), square=zeros.holding("square"), other=zeros.holding("values")
)
def inner(update, mean, square, other):
    return update * 1.0, mean + update, square + update**2, other + update


@whole_transform
def passes(update):
    return update * 1.0


def _params(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]


def _steps(opt, params, steps=1):
    for k in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + k + i).reshape(p.shape)
        opt.step()


def test_a_state_of_several_tensors_has_flat_keys_and_none_where_there_is_none():
    (p,) = _params((3, 7))
    opt = C.ChainOpt([p], 0.1, counted)
    _steps(opt, [p], 2)
    assert set(opt.state[p]) == {"step", "counted.factors.0"}
    assert torch.equal(opt.state[p]["counted.factors.0"], torch.eye(3) + 2)
    expected = [((1, 3, 7), 1, 1.0, torch.Tensor), ((1, 3, 7), 2, 2.0, torch.Tensor)]
    assert expected == SEEN


def test_small_parameters_of_one_shape_share_a_call_and_large_ones_do_not():
    params = _params((3, 4), (3, 4), (3, 5), (200, 200), (200, 200), (3, 4))
    _steps(C.ChainOpt(params, 0.1, counted), params)
    # in any order: the larger may run side by side
    assert sorted(shape for shape, *_ in SEEN) == [(1, 3, 5), *[(1, 200, 200)] * 2, (3, 3, 4)]
    SEEN.clear()
    _steps(C.ChainOpt(params, 0.1, counted, foreach=False), params)
    assert len(SEEN) == 6


def test_parameters_of_different_counts_or_groups_do_not_share_a_call():
    params = _params((3, 4), (3, 4), (3, 4))
    opt = C.ChainOpt([{"params": params[:2]}, {"params": params[2:], "weight": 2.0}], 0.1, counted)
    _steps(opt, params[:1])
    SEEN.clear()
    _steps(opt, params)
    assert sorted(count for _, count, *_ in SEEN) == [1, 1, 2]
    assert torch.equal(opt.state[params[2]]["counted.factors.0"], torch.eye(3) + 2)


def test_the_count_follows_the_step_tensor_when_somebody_replaces_or_writes_it():
    (p,) = _params((3, 4))
    opt = C.ChainOpt([p], 0.1, counted)
    _steps(opt, [p], 2)
    opt.state[p]["step"].fill_(10)
    _steps(opt, [p])
    opt.load_state_dict(opt.state_dict())
    opt.state[p]["step"] = torch.tensor(40.0, dtype=torch.float64)
    _steps(opt, [p])
    assert [count for _, count, *_ in SEEN] == [1, 2, 11, 41]


def test_a_false_gate_ends_the_step_and_later_elements_see_the_smaller_step():
    (p,) = _params((3, 4))
    before = p.detach().clone()
    opt = C.ChainOpt([p], 0.1, enters, C.scale_by_adam, leaves, weight_decay=0.5)
    _steps(opt, [p])
    assert torch.equal(p, before)
    assert not opt.state[p]["scale_by_adam.exp_avg"].any()
    assert opt.state[p]["step"] == 1
    _steps(opt, [p])
    # the second gradient is the first that Adam sees, so its bias correction is that of step 1
    sign = torch.sin(torch.arange(12.0)).reshape(3, 4).sign()
    torch.testing.assert_close(p, before * (1 - 0.05) - 0.1 * 2 * sign, rtol=1e-5, atol=1e-6)
    assert SEEN == [("enter", 1, 1.0), ("enter", 2, 1.0), ("leave", 1)]


@pytest.mark.parametrize("foreach", [None, False])
def test_a_whole_transform_does_not_run_while_an_earlier_gate_is_closed(foreach):
    params = _params((3, 4), (3, 4))
    chain = (C.accumulate(k=2), counted, C.clip_by_global_norm)
    opt = C.ChainOpt(params, 0.1, *chain, foreach=foreach, compile=False)
    before = [p.detach().clone() for p in params]
    _steps(opt, params)
    assert SEEN == []
    assert all(map(torch.equal, params, before))
    assert torch.equal(opt.state[params[0]]["counted.factors.0"], torch.eye(3))
    _steps(opt, params, 3)
    # foreach=False computes what comes before a sum twice, and keeps one result
    assert {count for _, count, *_ in SEEN} == {1, 2}
    assert torch.equal(opt.state[params[0]]["counted.factors.0"], torch.eye(3) + 2)


def test_after_the_write_the_states_between_may_turn():
    params = _params((3, 4), (3, 4))
    chain = C.within(turning, inner, leave=passes)
    opt = C.ChainOpt(params, 0.1, chain)
    _steps(opt, params, 3)
    assert SEEN == [("after", 2, 2.0, 1, 1)]
    g = [torch.sin(torch.arange(12.0) + k).reshape(3, 4) for k in range(3)]
    state = opt.state[params[0]]
    torch.testing.assert_close(state["inner.mean"], -(g[0] + g[1]) + g[2])
    torch.testing.assert_close(state["inner.square"], (g[0] ** 2 + g[1] ** 2) * 4 + g[2] ** 2)
    torch.testing.assert_close(state["inner.other"], g[0] + g[1] + g[2])
    assert torch.equal(state["turning.seen"], torch.ones(3, 4))


@whole_transform
def noisy(update, *, noise, chance):
    SEEN.append(chance(3))
    return noise(update.shape) + 10 * noise(update.shape, salt=1)


def test_noise_depends_on_seed_place_and_step_and_not_on_the_company(tmp_path):
    def run(foreach, seed=0, resume=False):
        params = _params((5, 6), (5, 6), dtype=torch.float64)
        opt = C.ChainOpt(params, 1.0, noisy, seed=seed, foreach=foreach)
        _steps(opt, params)
        if resume:
            torch.save(opt.state_dict(), tmp_path / "state")
            opt = C.ChainOpt(params, 1.0, noisy, seed=seed, foreach=foreach)
            opt.load_state_dict(torch.load(tmp_path / "state"))
        middle = [p.detach().clone() for p in params]
        torch.manual_seed(len(SEEN))
        before = torch.get_rng_state()
        _steps(opt, params)
        assert torch.equal(before, torch.get_rng_state())
        return [m - p.detach() for m, p in zip(middle, params, strict=True)]

    together, alone = run(None), run(False)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], run(None, seed=1)[0])
    assert torch.equal(together[1], run(None, resume=True)[1])
    assert len(set(SEEN[:2])) == 2
    assert all(0 <= c < 1 for c in SEEN)


def test_normals_are_standard_and_independent_of_their_salt():
    one, other = (normals(100_001, 12345, 7, salt, torch.device("cpu")) for salt in (0, 1))
    # four standard errors of mean, variance and correlation
    assert abs(one.mean()) < 4 / 1e5**0.5
    assert abs(one.var() - 1) < 4 * (2 / 1e5) ** 0.5
    assert abs((one * other).mean()) < 4 / 1e5**0.5
    assert abs((one[1:] * one[:-1]).mean()) < 4 / 1e5**0.5
    # the normal distribution's own quantiles
    quantiles = torch.distributions.Normal(0.0, 1.0).cdf(one.sort().values.float())
    assert (quantiles - torch.linspace(0, 1, len(one))).abs().max() < 2 / 1e5**0.5


def test_loading_compares_the_factors_with_those_of_the_shape():
    (p,), (q,) = _params((3, 4)), _params((3, 4))
    opt, other = C.ChainOpt([p], 0.1, counted), C.ChainOpt([q], 0.1, counted)
    _steps(opt, [p])
    saved = opt.state_dict()
    other.load_state_dict(saved)
    assert torch.equal(other.state[q]["counted.factors.1"], torch.eye(4) + 1)
    saved["state"][0]["counted.factors.1"] = torch.eye(5)
    with pytest.raises(ValueError, match=r"'counted.factors.1'.*\(5, 5\), expected \(4, 4\)"):
        other.load_state_dict(saved)


def test_what_cannot_be_right_is_refused():
    with pytest.raises(TypeError, match="only a @whole_transform can hold several tensors"):
        transform(several=State(_factors, "x", several=True))(lambda update, several: update)
    with pytest.raises(TypeError, match="kind='decay': expected one of 'transform', 'writer'"):
        whole_transform(kind="decay")(lambda update: update)
    with pytest.raises(ValueError, match="asks for 'count'"):
        C.ChainOpt(_params((3,)), 0.1, asks_for_count)
    with pytest.raises(ValueError, match="asks for 'basis'"):
        C.ChainOpt(_params((3,)), 0.1, enters, asks_for_basis)
    params = _params((3, 4))
    opt = C.ChainOpt(params, 0.1, wrong_shape)
    with pytest.raises(ValueError, match=r"wrong_shape returned update as \(1, 4, 3\), expected"):
        _steps(opt, params)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 of shape \(3,\): muon needs a matrix"
    ):
        C.ChainOpt(_params((3,)), 0.1, C.muon)
    with pytest.raises(TypeError, match="expected two transforms"):
        C.within(None, inner, leave=passes)


@transform
def asks_for_count(update, *, count):
    return update * count


@transform
def asks_for_basis(update, *, basis):
    return update * basis


@whole_transform
def wrong_shape(update):
    return update.mT


# ---- sums over all parameters behind a whole transform


@whole_transform(total=zeros)
def adds_in_place(update, total):
    """A whole transform that writes its state where it is, as a user's may."""
    total += update
    return total.clone(), total


def plain(t: Transform) -> bool:
    """Whether it can be followed by others: what enters a basis cannot, nor what writes."""
    return t.kind == "transform" and "eigenbasis" not in t.name


BEFORE_A_SUM = {
    **{n: t for n, t in TRANSFORMS.items() if t.whole and plain(t)},
    "apollo": C.apollo(rank=2),
    "in place": adds_in_place,
    "shampoo, mean": C.shampoo(beta2=0.9, max_precond_dim=3, split=True),
    "psgd_kron, all": C.psgd_kron(cached=True, delayed=True, q_dtype="bfloat16"),
    "soap_precond": C.soap_precond(),
    "soap_precond, split": C.soap_precond(max_precond_dim=3, split=True, precondition_frequency=1),
    "soap_precond, vectors": C.soap_precond(precondition_1d=True, merge_dims=True),
    "soap_precond, inner": C.soap_precond(C.scale_by_laprop, C.clip_by_global_norm(max_norm=1e9)),
}
SUMS = {
    "clip": (C.clip_by_global_norm(max_norm=1e9),),
    "two": (C.clip_by_global_norm(max_norm=1e9), C.sign, C.clip_by_global_norm(max_norm=1.0)),
    "d": (C.prodigy_d(d0=0.1), C.scale_by_adam),
    "branch": (C.graft(C.clip_by_global_norm(max_norm=1e9), C.sign),),
}


@pytest.mark.filterwarnings("ignore:the chain:RuntimeWarning", "ignore:lr=:RuntimeWarning")
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("name", BEFORE_A_SUM)
def test_a_sum_behind_a_whole_transform_does_not_run_it_twice(name: str, sums: str) -> None:
    def trained(*chain: object, **options: object) -> dict[str, torch.Tensor]:
        # no two of one shape, whose products would be made together, and round otherwise
        params = parameters((4, 3), (3, 6), (2, 3, 2), (5,), dtype=torch.float64)
        route = C.route(C.when(BEFORE_A_SUM[name], min_ndim=2), otherwise=C.scale_by_adam)
        opt = C.ChainOpt(params, 0.01, route, *chain, **options)
        train(opt, range(4))
        return snapshot(opt)

    found = [
        trained(*SUMS[sums], foreach=foreach, compile=compiled)
        for foreach in (None, True, False)
        for compiled in ((False, "auto") if (name, sums) == ("soap_precond", "clip") else (False,))
    ]
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-12, msg=key)
    if sums == "clip":  # one that has nothing to do
        for key, value in trained(compile=False).items():
            torch.testing.assert_close(found[0][key], value, rtol=1e-9, atol=1e-12, msg=key)
