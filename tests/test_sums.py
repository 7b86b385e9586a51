"""States that a kernel for a sum over all parameters stores, against the eager path, which does not."""

import re

import pytest
import torch
from test_compiler import assert_near, pair, values

import heavyball
from heavyball.chainable import zeros

C = heavyball.chainable
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@C.transform(total=zeros)
def running(update, total):
    """A direction that needs the old state, and whose own needs the new one."""
    return update + total, total + update


def _size(update, *, mean, beta):
    return (beta * mean + update).abs().sum(dtype=F64)


@C.transform(mean=zeros, over_all=_size)
def weighed(update, mean, *, total, beta: C.Live = 0.9):
    """Divide by a sum over a state that the direction itself does not need."""
    return update / total, beta * mean + update


@C.transform()
def unprintable(update):
    """The kernels do not know the operation, which vectors alone ask for."""
    return update.cumsum(0) if update.ndim == 1 else update


def touched(source: str) -> tuple[set[str], set[str]]:
    """The tensors that a kernel reads and those that it writes."""
    names = dict(re.findall(r"#define TENSOR_(\d+) .*// (\S+)\n", source))
    read = {names[n] for n in re.findall(r"load\(t(\d+) \+", source)}
    # what is rounded at random is an assignment
    return read, {names[n] for n in re.findall(r"(?:store\w*\(| )t(\d+)(?: \+|\[\w+\] =)", source)}


def kernels(*chain, dtype=F32, shape=(5, 6)):
    p = torch.nn.Parameter(values(shape, 0, dtype))
    opt = C.ChainOpt([p], 0.05, *chain, compile=True)
    p.grad = torch.ones_like(p)
    opt.step()
    return [touched(source) for source in opt.kernel_sources()]


MOMENTS = {"scale_by_adam.exp_avg", "scale_by_adam.exp_avg_sq"}


def test_the_step_of_prodigy_reads_neither_its_sums_nor_the_first_weights() -> None:
    shares, step = kernels(C.scale_by_adam, C.prodigy_d)
    assert shares == ({"grad", "param", "prodigy_d.p0", "prodigy_d.s"}, {"prodigy_d.s"})
    assert step == ({"grad", "param", *MOMENTS}, {"param", *MOMENTS})


def test_a_step_behind_a_sum_reads_the_new_moments_and_no_gradient() -> None:
    shares, step = kernels(C.scale_by_adam, C.clip_by_global_norm)
    assert shares == ({"grad", *MOMENTS}, MOMENTS)
    assert step == ({"param", *MOMENTS}, {"param"})


def test_of_several_sums_the_first_that_can_stores_a_state() -> None:
    chain = C.exp_avg, C.clip_by_global_norm, C.scale_by_exp_avg_sq, C.clip_by_global_norm
    mean, square = "exp_avg", "scale_by_exp_avg_sq.exp_avg_sq"
    assert kernels(*chain) == [
        ({"grad", mean}, {mean}),
        ({mean, square}, {square}),
        ({"param", mean, square}, {"param"}),
    ]


def test_a_state_waits_where_its_old_value_is_needed_or_its_new_one_is_rounded() -> None:
    shares, step = kernels(running, C.clip_by_global_norm)
    assert shares == ({"grad", "running.total"}, set())
    assert step == ({"grad", "param", "running.total"}, {"param", "running.total"})
    narrow = C.exp_avg, C.clip_by_global_norm
    p = torch.nn.Parameter(values((5, 6), 0, F32))
    opt = C.ChainOpt([p], 0.05, *narrow, compile=True, storage_dtype="bfloat16")
    p.grad = torch.ones_like(p)
    opt.step()
    assert [touched(source)[1] for source in opt.kernel_sources()] == [set(), {"exp_avg", "param"}]


@C.transform(over_all=lambda update, *, ahead: (update * ahead).sum(dtype=F64))
def along(update, *, total):
    """Looks at what an element behind it offers."""
    return update / (1 + total.abs())


CHAINS = {
    "offered": (along, C.scale_by_adam, C.schedule_free),
    "adam, prodigy": (C.scale_by_adam, C.prodigy_d),
    "prodigy of slices": (C.scale_by_adam, C.prodigy_d(slice_p=7)),
    "prodigy, norm": (C.scale_by_adam, C.prodigy_d, C.clip_by_global_norm(max_norm=0.5)),
    "norm, prodigy": (C.clip_by_global_norm(max_norm=0.5), C.scale_by_adam, C.prodigy_d),
    "gate": (C.accumulate(k=2), C.scale_by_adam, C.prodigy_d),
    "gate and norm": (C.accumulate(k=2), C.exp_avg, C.clip_by_global_norm(max_norm=0.5)),
    "skip": (C.skip_not_finite, C.scale_by_adam, C.clip_by_global_norm(max_norm=0.5)),
    "delayed": (C.scale_by_adopt, C.clip_by_global_norm(max_norm=0.5)),
    "rows": (C.factored_rms(min_dim=4), C.clip_by_global_norm(max_norm=0.5)),
    "two norms": (
        C.exp_avg,
        C.clip_by_global_norm(max_norm=0.5),
        C.scale_by_exp_avg_sq,
        C.clip_by_global_norm(max_norm=0.1),
    ),
    "old and new": (running, C.clip_by_global_norm(max_norm=0.5)),
    "mask": (C.scale_by_adam, C.clip_by_global_norm(max_norm=0.5), C.cautious),
    "fork": (
        C.graft(C.exp_avg, C.scale_by_adam),
        C.clip_by_global_norm(max_norm=0.5),
    ),
}
SHAPES = ((), (1,), (7,), (5, 6), (70_001,), (300, 260))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.filterwarnings("ignore:lr=0.05")
def test_kernels_that_share_the_writing_do_what_the_chain_does(name: str, dtype) -> None:
    assert_near(pair(CHAINS[name], SHAPES, dtype, steps=4))


def test_what_is_rounded_at_random_takes_the_bits_of_its_step() -> None:
    found = pair((weighed,), ((300, 7), (70_001,)), F32, steps=3, storage_dtype="bfloat16")
    (eager, one), (compiled, two) = found
    for p, q in zip(eager, compiled, strict=True):
        mean, other = one.state[p]["weighed.mean"], two.state[q]["weighed.mean"]
        assert mean.dtype == BF16
        # a fused multiply-add decides otherwise where a value lies on the edge
        assert (mean == other).double().mean() > 0.99
    sources = two.kernel_sources()
    assert [touched(source)[1] for source in sources] == [{"weighed.mean"}, {"param"}]


def test_one_parameter_at_a_time_and_all_at_once_are_the_same() -> None:
    ends = []
    for foreach in (None, False):
        params = [torch.nn.Parameter(values(s, i, F32)) for i, s in enumerate(SHAPES)]
        opt = heavyball.Prodigy(params, foreach=foreach, compile=True)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = values(tuple(p.shape), 100 * step + i, F32)
            opt.step()
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


def test_a_parameter_without_a_kernel_stands_beside_those_that_have_one() -> None:
    found = []
    for compiled in (False, "auto"):
        params = [torch.nn.Parameter(values(s, i, F32)) for i, s in enumerate(SHAPES[2:])]
        chain = unprintable, C.scale_by_adam, C.prodigy_d, C.clip_by_global_norm(max_norm=0.5)
        opt = C.ChainOpt(params, 1.0, *chain, compile=compiled)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = values(tuple(p.shape), 100 * step + i, F32)
            opt.step()
        found.append((params, opt))
    assert_near(found)
    assert torch.allclose(*(torch.stack([opt.param_groups[0]["d"]]) for _, opt in found))


def test_a_skipped_step_stores_nothing() -> None:
    params = [torch.nn.Parameter(values((5, 6), 0, F32))]
    chain = C.skip_not_finite, C.scale_by_adam, C.prodigy_d, C.clip_by_global_norm
    opt = C.ChainOpt(params, 1.0, *chain, compile=True)
    for bad in (False, False, True):
        params[0].grad = values((5, 6), 3, F32)
        before = {k: t.clone() for k, t in opt.state[params[0]].items()}
        if bad:
            params[0].grad[2, 3] = float("inf")
        opt.step()
    for key, tensor in before.items():
        if key not in ("step", "skip_not_finite.skipped"):
            assert torch.equal(tensor, opt.state[params[0]][key]), key


def test_a_group_that_comes_late_has_sums_of_its_own() -> None:
    found = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(values((9, 7), i, F32)) for i in range(2)]
        opt = heavyball.Prodigy(params[:1], compile=compiled, d0=1e-2)
        for step in range(6):
            if step == 3:
                opt.add_param_group({"params": params[1:], "lr": 0.5})
            for i, p in enumerate(params[: 1 + (step >= 3)]):
                p.grad = values((9, 7), 100 * step + i, F32)
            opt.step()
        found.append((params, opt))
    assert_near(found)
