"""Chains around whole transforms, with kernels and without: the same steps."""

import copy
import itertools

import pytest
import test_whole
import torch
from helpers import CASES, QUICK, anywhere, made_plans, parameters
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from heavyball import chainable as C
from heavyball.chainable import transform, whole_transform, zeros
from heavyball.compiler.passes import segments
from heavyball.compiler.run import kernels, waves
from heavyball.runtime import step as runner

MATRICES = ((5, 6), (6, 5), (5, 6), (1, 9), (3, 2, 2, 2), (300, 260), (5, 6), (200, 190))
ALL = (*MATRICES, (), (7,), (70_001,))


@whole_transform
def squared_whole(update, *, param, grad, lr, scheduled_beta2: torch.Tensor | None = None):
    """Asks for all that it can: tensors, numbers, and one that may be missing."""
    weight = 1.0 if scheduled_beta2 is None else scheduled_beta2
    return update + 0.1 * param * weight + 0.01 * grad + lr


@whole_transform(provides=("grad", "step", "scheduled_beta2"))
def provides_numbers(update, *, step, count: int):
    rows = update.flatten(1)
    return update * 2, update * 0.5, step + 1, 0.5 + 0.1 * torch.tanh(rows.mean(1))


@transform(old=zeros)
def keeps_last(update, old, *, step):
    """Its old state is wanted behind a cut."""
    return update + old / step, update


CHAINS = {
    "muon": (anywhere(C.muon),),
    "orthogonalize": (C.exp_avg, anywhere(C.orthogonalize), C.cautious),
    "mars": (C.mars, anywhere(C.muon), C.clip_update_rms, C.schedule_free),
    "route": (C.route(C.when(C.muon, min_ndim=2), otherwise=C.scale_by_adam),),
    "accumulate": (C.accumulate(k=2), anywhere(C.muon), C.cautious),
    "finite, clipped": (C.skip_not_finite, C.clip_by_global_norm(max_norm=0.5), anywhere(C.muon)),
    "parallel": (C.parallel(anywhere(C.muon), C.scale_by_adam, weights=(0.5, 1.5)),),
    "two in parallel": (C.parallel(anywhere(C.muon), anywhere(C.orthogonalize)), C.grams),
    "graft": (C.graft(anywhere(C.muon(nesterov=False)), C.scale_by_adam), C.trust_region),
    "lion": (C.scale_by_lion, anywhere(C.orthogonalize), C.scale_by_lion),
    "factored": (
        C.factored_rms(min_dim=4),
        anywhere(C.scale_by_normuon),
        C.parameter_ema(beta=0.5),
    ),
    "everything told": (C.palm_beta2, C.exp_avg, squared_whole, C.scale_by_adam),
    "numbers": (keeps_last, provides_numbers, squared_whole, C.scale_by_adam, C.cautious),
    "gates": (test_whole.enters, C.scale_by_adam, C.exp_avg, C.cautious),
    "soap": (C.soap_precond(precondition_frequency=2), C.cautious, C.schedule_free),
    "prodigy": (C.prodigy_d(d0=1e-2, slice_p=3), anywhere(C.muon), C.cautious),
    # its sums are taken after the step
    "prodigy plus": (C.prodigy_plus_d(d0=1e-2), anywhere(C.orthogonalize), C.schedule_free),
    "rms": (C.scale_by_exp_avg_sq, anywhere(C.orthogonalize), C.adamc(weight_decay=0.1)),
}


def values(shape, seed, dtype):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(dtype)


def pair(chain, shapes, dtype=torch.float32, steps=4, missing=(), **options):
    found = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(values(s, i, dtype)) for i, s in enumerate(shapes)]
        opt = C.ChainOpt(params, 0.05, *chain, compile=compiled, **options)
        for step in range(steps):
            for i, p in enumerate(params):
                grad = values(tuple(p.shape), 100 * step + i, dtype)
                p.grad = None if (step, i) in missing else grad
            opt.step()
        found.append((params, opt))
    return found


def assert_near(found, exact=False):
    """Within what roundings grow to: Newton-Schulz magnifies those of its input up to 500 times."""
    (eager, one), (compiled, two) = found
    for p, q in zip(eager, compiled, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        unit = 2**-7 if p.dtype == torch.bfloat16 else 2e-4 if p.dtype == torch.float32 else 1e-12
        tensors = [(p.detach(), q.detach(), unit)]
        tensors += [(t, two.state[q][k], max(unit, 2e-4)) for k, t in one.state[p].items()]
        for a, b, bound in tensors:
            assert a.dtype == b.dtype
            scale = a.double().abs().max().clamp(min=1e-3)
            wrong = (a.double() - b.double()).abs() > bound * scale
            # masks and signs are not continuous
            assert wrong.sum() <= a.numel() // 300, (p.shape, (a - b).abs().max())


@pytest.mark.parametrize("name", CHAINS)
def test_kernels_between_products_do_what_the_plain_chain_does(name):
    dtype = (torch.float32, torch.float64)[len(name) % 2]
    shapes = MATRICES if name in ("numbers", "gates") else ALL
    assert_near(pair(CHAINS[name], shapes, dtype, missing={(0, 0), (1, 4), (2, 0)}))


SOAP = C.soap_precond(precondition_frequency=2)
IN_BASIS = {
    "soap": (SOAP,),
    "laprop": (C.soap_precond(C.scale_by_laprop, precondition_frequency=1), C.cautious),
    "schedule-free": (
        C.mars,
        C.soap_precond(C.palm_beta2, C.scale_by_exp_avg_sq, precondition_frequency=2),
        C.schedule_free,
    ),
    "accumulate": (C.accumulate(k=2), SOAP),
    "nothing between": (C.soap_precond(anywhere(C.orthogonalize(method="svd"))), C.exp_avg),
    "twice": (C.soap_precond(C.exp_avg), SOAP),
    "clipped": (C.clip_by_global_norm(max_norm=0.5), SOAP, C.clip_by_rms),
    "split": (C.soap_precond(split=True, max_precond_dim=4, spread_refreshes=True),),
}


@pytest.mark.parametrize("name", IN_BASIS)
def test_kernels_around_a_basis_do_what_the_plain_chain_does(name):
    # square, so that no basis has columns that no gradient decides on
    shapes = ((5, 5), (5, 5), (8, 8), (3, 3, 3), (7,), ())
    assert_near(pair(IN_BASIS[name], shapes, torch.float64, steps=7, missing={(0, 0), (3, 1)}))


@pytest.mark.parametrize("order", [1, -1])
def test_a_branch_that_may_end_the_step_is_run_as_it_is_written(order):
    """The other branch sees the gradient that only set up the basis."""
    chain = C.graft(*(SOAP, C.exp_avg(beta=0.5))[::order])
    param = torch.nn.Parameter(torch.zeros(4, 4))
    gradients = [values((4, 4), seed, torch.float32) for seed in range(3)]
    opt = C.ChainOpt([param], 0.01, chain)
    kernels.warned.clear()
    param.grad = gradients[0]
    with pytest.warns(
        RuntimeWarning, match="to_eigenbasis may end the step in one branch of graft"
    ):
        opt.step()
    for param.grad in gradients[1:]:
        opt.step()
    mean = (0.25 * gradients[0] + 0.5 * gradients[1] + gradients[2]) / 1.75
    torch.testing.assert_close(opt.state[param]["exp_avg"], mean)


@pytest.mark.parametrize("name", ["muon", "route", "accumulate"])
def test_bfloat16_parameters_are_rounded_alike(name):
    assert_near(pair(CHAINS[name], ALL, torch.bfloat16))
    (eager, _), (compiled, _) = pair(CHAINS[name], ALL[4:], torch.bfloat16, steps=1)
    same = [torch.equal(p, q) for p, q in zip(eager, compiled, strict=True)]
    assert sum(same) > len(same) // 2  # the same random bits


FRONT = (C.mars, C.accumulate(k=2), C.centralize, C.clip_by_global_norm(max_norm=0.5))
MIDDLE = (C.exp_avg, C.scale_by_adam, C.scale_by_lion, C.stable_adamw, C.factored_rms(min_dim=4))
WHOLE = (C.muon, C.orthogonalize(method="quintic-5"), C.scale_by_normuon(scale="match_rms_adamw"))
BACK = (C.clip_update_rms, C.scale_by_rms, C.exp_avg, C.cautious, C.schedule_free)


# every chain has kernels of its own to compile
@settings(max_examples=2 if QUICK else 4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_random_chains(data):
    picks = [data.draw(st.sampled_from((None, *stage))) for stage in (FRONT, MIDDLE)]
    picks += [anywhere(data.draw(st.sampled_from(WHOLE))), data.draw(st.sampled_from(BACK))]
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    chain = [t for t in picks if t is not None]
    missing = data.draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=3))
    assert_near(pair(chain, ALL[:9], dtype, missing=missing))


@pytest.mark.parametrize("foreach", [None, False])
def test_foreach_changes_only_how_many_wait_for_each_other(foreach, monkeypatch):
    monkeypatch.setattr(waves, "WAVE", 100)
    seen = []
    serve, run = runner.serve, waves.Wave.run

    def counted(wave, *args):
        with monkeypatch.context() as patch:
            patch.setattr(runner, "serve", lambda c, stack: seen.append(len(c)) or serve(c, stack))
            run(wave, *args)

    monkeypatch.setattr(waves.Wave, "run", counted)
    assert_near(pair((C.muon,), MATRICES, foreach=foreach, steps=2))
    assert max(seen) == (1 if foreach is False else 3)


def test_temporary_tensors_are_shared_by_the_waves_of_a_step_and_then_given_back(monkeypatch):
    monkeypatch.setattr(waves, "WAVE", 100_000)
    plans, made = made_plans(monkeypatch), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    params = [torch.nn.Parameter(torch.randn(300, 300)) for _ in range(5)]
    opt = C.ChainOpt(params, 0.1, C.exp_avg, C.orthogonalize, compile=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(300, 300)
        made.clear()
        opt.step()
    assert [a for a in made if a and isinstance(a[0], int) and a[0] >= 90_000] == [(90_000,)]
    assert not any(wave.scratch for plan in plans for wave in plan.whole.waves)


def cut_of(*chain, shape=(4, 5), dtype=torch.float32):
    param = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    param.grad = torch.randn_like(param)
    opt = C.ChainOpt([param], 0.1, *chain)
    (job,) = opt.registry.jobs()
    return segments.cut(job.program, param.shape, param.dtype, job.state, job.group)


def reads(graph):
    return {v.args[0] for v in graph.values if v.op in ("load", "number")}


def test_muon_is_two_kernels_and_one_temporary_tensor():
    found = cut_of(C.muon)
    first, second = (part.graph for part in found.parts)
    assert set(first.outputs) == {"muon.momentum_buffer", "step", "call.0.update"}
    assert set(second.outputs) == {"param"}
    assert reads(second) == {"param", "step", "whole.0.update"}
    assert not found.sized


def test_what_was_overwritten_is_carried_and_what_was_not_is_computed_again():
    kept = cut_of(keeps_last, C.orthogonalize, wants_old)
    assert [n for n in kept.levels if n.startswith("carry")] == []  # the new state is read back
    again = cut_of(C.exp_avg, C.orthogonalize, C.cautious)
    assert again.levels.keys() == {"call.0.update", "whole.0.update"}
    assert "grad" in reads(again.parts[1].graph)
    numbers = cut_of(C.clip_by_norm, C.orthogonalize, wants_total)
    assert [n for n in numbers.levels if n.startswith("carry")] == []
    assert sum(n.startswith("carry") for n in numbers.numbers) == 1
    stored = cut_of(provides_tensor, C.orthogonalize, wants_old)
    assert sum(n.startswith("carry") for n in stored.levels) == 1


@transform
def wants_old(update, *, grad):
    return update + grad


@transform(old=zeros, provides=("grad",))
def provides_tensor(update, old):
    """An old state is wanted behind a cut, as the gradient."""
    return update, update, old * 2


@transform
def wants_total(update, *, grad):
    return update * (grad * grad).sum(dtype=torch.float64)


def test_the_carried_tensors_are_the_right_ones():
    for chain in (
        (provides_tensor, C.orthogonalize, wants_old),
        (C.clip_by_norm, C.orthogonalize, wants_total, C.orthogonalize, C.exp_avg, wants_total),
        (provides_tensor, C.muon, wants_old, C.orthogonalize, C.cautious),
    ):
        assert_near(pair(chain, MATRICES[:6], torch.float64))


def test_within_turns_the_states_of_the_kernels_between():
    test_whole.SEEN.clear()
    chain = (C.within(test_whole.turning, test_whole.inner, leave=test_whole.passes),)
    assert_near(pair(chain, ((3, 4), (3, 4), (5, 4)), torch.float64, missing={(1, 0)}))


def test_what_one_whole_transform_provides_may_be_for_the_next_alone():
    for chain in (
        (test_whole.enters, test_whole.leaves, C.exp_avg),
        (C.to_eigenbasis, C.from_eigenbasis, C.exp_avg),
        (provides_numbers, squared_whole),
    ):
        assert_near(pair(chain, ((3, 4), (5, 4), (3, 4)), torch.float64, missing={(1, 0)}))


def test_several_states_noise_and_decisions_are_those_of_the_plain_chain():
    for chain in ((test_whole.counted, C.exp_avg), (test_whole.noisy, C.exp_avg)):
        test_whole.SEEN.clear()
        assert_near(pair(chain, ((3, 4), (3, 4), (3, 7)), torch.float64, missing={(1, 0)}))
        half = len(test_whole.SEEN) // 2
        assert sorted(test_whole.SEEN[:half]) == sorted(test_whole.SEEN[half:])


def test_channels_last_and_transposed_parameters():
    for compiled in (False, True):
        ends = []
        for layout in (torch.contiguous_format, torch.channels_last):
            p = torch.nn.Parameter(
                values((4, 3, 2, 5), 0, torch.float64).contiguous(memory_format=layout)
            )
            opt = C.ChainOpt([p], 0.1, C.muon, C.cautious, compile=compiled)
            for step in range(3):
                p.grad = values((4, 3, 2, 5), step, torch.float64).contiguous(memory_format=layout)
                opt.step()
            ends.append(p.detach().contiguous())
        torch.testing.assert_close(*ends, atol=1e-11, rtol=0)


def test_plans_are_used_again_and_survive_what_users_do(monkeypatch):
    plans = made_plans(monkeypatch)
    params = [torch.nn.Parameter(values(s, i, torch.float32)) for i, s in enumerate(MATRICES)]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = C.ChainOpt(params, 0.05, C.muon, C.cautious, compile=True)
    other = C.ChainOpt(plain, 0.05, C.muon, C.cautious, compile=False)

    def steps(first, count):
        for step, (ps, o) in itertools.product(
            range(first, first + count), ((params, opt), (plain, other))
        ):
            for i, p in enumerate(ps):
                p.grad = values(tuple(p.shape), 100 * step + i, torch.float32)
            o.step()

    steps(0, 2)
    steps(2, 2)
    assert len(plans) == 1
    for o in (opt, other):
        o.param_groups[0]["lr"] = 0.01
        o.param_groups[0]["momentum"] = 0.5
    steps(4, 1)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    steps(5, 2)
    for o, ps in ((opt, params), (other, plain)):
        o.state[ps[0]]["step"].fill_(7)
    steps(7, 1)
    assert float(opt.state[params[0]]["step"]) == 8
    assert_near([(plain, other), (params, opt)])


def test_the_number_of_kernels_does_not_grow_with_shapes_or_values():
    params = [torch.nn.Parameter(torch.randn(n, 3 + n)) for n in range(2, 12)]
    opt = C.ChainOpt(params, 0.05, C.exp_avg, C.muon(steps=3), compile=True)
    for lr in (0.1, 0.2):
        opt.param_groups[0]["lr"] = lr
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert [kernel.purpose for kernel in opt.plan().kernels] == ["segment 0", "segment 1"]
    assert len(opt.kernel_sources()) == 2


def test_a_sum_over_all_behind_a_whole_transform_runs_eagerly_and_says_so():
    param = torch.nn.Parameter(torch.randn(3, 3))
    opt = C.ChainOpt([param], 0.1, C.muon, C.clip_by_global_norm, compile=True)
    param.grad = torch.randn(3, 3)
    with pytest.raises(
        RuntimeError, match="clip_by_global_norm sums over all parameters after muon"
    ):
        opt.step()


HAVING_WHOLE = [
    case for case in CASES if any(p.has_whole for p in case(parameters((1,))).chain.programs)
]


@pytest.mark.parametrize("case", HAVING_WHOLE, ids=repr)
def test_a_number_beside_a_vector_of_one_is_stepped_as_each_alone(case) -> None:
    """A learnable temperature has the shape (), a bias of one output (1,): both may share a stack."""
    for shapes in (((), (1,)), ((1,), (), (1, 1), ())):
        ends = []
        for options in ({"compile": False, "foreach": False}, {"compile": False}, {}):
            params = [torch.nn.Parameter(torch.full(shape, 1.5)) for shape in shapes]
            opt = case(params, lr=1e-2, **options)
            for step in range(7):
                for place, p in enumerate(params):
                    p.grad = torch.full_like(p, 0.3 + 0.1 * step - 0.35 * place)
                opt.step()
            ends.append([p.detach() for p in params])
        for others in ends[1:]:
            torch.testing.assert_close(others, ends[0], rtol=1e-5, atol=1e-6)
