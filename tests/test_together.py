"""Numbers that the parameters of a group decide together: kernels, groups, checkpoints, no waiting."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import DEVICE, clones, copies, parameters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import heavyball
from heavyball import chainable as C
from heavyball import utils
from heavyball.diagnostics import advice
from heavyball.numerics import host

SHAPES = ((40, 36), (36, 40), (300, 257), (13,), (10,), (1,), (4, 3, 3, 3), ())
MAKERS: dict[str, Any] = {
    "plus": heavyball.ProdigyPlusScheduleFree,
    "plus, whole": lambda p: heavyball.ProdigyPlusScheduleFree(p, factored=False, use_speed=True),
    "plus, adopt": lambda p: heavyball.ProdigyPlusScheduleFree(p, use_adopt=True, use_cautious=True),
    "plus, muon": lambda p: heavyball.ProdigyPlusScheduleFree(p, use_muon_pp=True),
    "authors": heavyball.Prodigy,
    "authors, sliced": lambda p: heavyball.Prodigy(p, slice_p=7, use_bias_correction=True),
    "authors, clipped": lambda p: C.ChainOpt(
        p, 1.0, C.skip_not_finite, C.scale_by_adam, C.prodigy_d, C.clip_by_global_norm
    ),
    "authors, soap": lambda p: C.ChainOpt(
        p, 1.0, C.route(C.when(C.soap_precond(), min_ndim=2), otherwise=C.scale_by_adam), C.prodigy_d
    ),
    "authors, muon": lambda p: C.ChainOpt(
        p, 1.0, C.route(C.when(C.muon, min_ndim=2), otherwise=C.scale_by_adam), C.prodigy_d
    ),
    "authors, psgd": lambda p: C.ChainOpt(p, 1.0, C.psgd_kron, C.prodigy_d),
}  # fmt: skip


@pytest.fixture
def eager() -> Iterator[None]:
    before, utils.compile_mode = utils.compile_mode, None
    yield
    utils.compile_mode = before


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:4]}, {"params": params[4:], "lr": 0.5}]


def pull(params: list[nn.Parameter], step: int) -> None:
    for place, p in enumerate(params):
        made = torch.Generator().manual_seed(100 * step + place)
        noise = torch.randn(p.shape, generator=made, dtype=torch.float64)
        p.grad = (p.detach().double() + 0.3 * noise.to(p.device)).to(p.dtype)


def walk(opt: Any, params: list[nn.Parameter], steps: Any) -> None:
    for step in steps:
        pull(params, step)
        opt.step()


# ---- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_kernels_do_what_the_chain_does(
    name: str, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    params = parameters(*SHAPES, dtype=dtype)
    twins = copies(params)
    opt = MAKERS[name](grouped(params))
    walk(opt, params, range(6))
    utils.compile_mode, before = None, utils.compile_mode
    try:
        other = MAKERS[name](grouped(twins))
        walk(other, twins, range(6))
    finally:
        utils.compile_mode = before
    # a kernel fuses multiplications and additions, and adds in another order: a few roundings, which
    # the noise of bfloat16 sums and of rounding weights at random makes larger
    bound = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(opt.param_groups, other.param_groups, strict=True):
        assert float(a["d"]) == pytest.approx(float(b["d"]), rel=bound)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=1e-7)


def test_slices_are_part_of_the_pass_that_steps() -> None:
    """One kernel for the statistics, the direction and the write, whatever the shapes."""
    params = parameters((300, 7), (13,), (10,), (1,))
    opt = heavyball.ProdigyPlusScheduleFree(
        params, factored=False, use_stableadamw=False, compile=True
    )
    walk(opt, params, range(2))
    assert len(opt.kernel_sources()) <= 3  # by the number of dimensions, and for one element
    assert all("pass_1" not in source for source in opt.kernel_sources())


@pytest.mark.parametrize("factored", [False, True])
def test_slices_are_looked_at_where_the_parameter_is_read_anyway(factored: bool) -> None:
    params = parameters((300, 257))
    opt = heavyball.ProdigyPlusScheduleFree(params, factored=factored, compile=True)
    walk(opt, params, range(2))
    (source,) = opt.kernel_sources()
    name = re.search(r"#define (\w+) .*// param\n", source).group(1)  # type: ignore[union-attr]
    reading = [k for k, part in enumerate(source.split("PART void pass_")[1:]) if name in part]
    assert reading == [source.count("PART void pass_") - 1] != [0]


# ---- no step waits for the device


class Waits(TorchDispatchMode):
    """Counts what brings a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", [n for n in MAKERS if "muon" not in n and "psgd" not in n and "soap" not in n]
)
def test_no_step_reads_a_number_from_the_device(
    name: str, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "on_host", lambda tensor: False)  # as on an accelerator
    params = parameters(*SHAPES)
    opt = MAKERS[name](grouped(params))
    for step in range(4):
        pull(params, step)
        with Waits() as waits:
            opt.step()
        assert waits.count == 0


# ---- groups


def test_d_is_in_the_group_and_at_hand() -> None:
    params = parameters((8, 6), (5,))
    opt = heavyball.ProdigyPlusScheduleFree(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    )
    walk(opt, params, range(5))
    assert opt.d == [float(group["d"]) for group in opt.param_groups]
    mean = 2 / sum(1 / d for d in opt.d)
    assert opt.effective_lr == pytest.approx([mean, 0.5 * mean])
    assert opt.param_groups[0]["d"].dtype == torch.float64
    assert opt.param_groups[0]["d"].shape == ()
    with pytest.raises(AttributeError, match="AdamW has no d"):
        _ = heavyball.AdamW(params).d


def test_a_group_that_never_had_a_gradient_does_not_hold_the_mean_back() -> None:
    params = parameters((8, 6), (5,))
    opt = heavyball.ProdigyPlusScheduleFree([{"params": params[:1]}, {"params": params[1:]}])
    alone = copies(params[:1])
    single = heavyball.ProdigyPlusScheduleFree(alone)
    for step in range(6):
        pull(params[:1], step)
        alone[0].grad = params[0].grad.clone()
        opt.step()
        single.step()
    assert torch.equal(params[0], alone[0])


def test_groups_do_not_share_the_memory_of_their_numbers() -> None:
    params = parameters((8, 6), (5,))
    opt = heavyball.Prodigy([{"params": params[:1]}, {"params": params[1:]}], split_groups=True)
    opt.param_groups[0]["d"].fill_(0.5)
    assert opt.d == [0.5, 1e-6]


def test_a_skipped_step_changes_no_number() -> None:
    params = parameters((8, 6), (5,))
    opt = C.ChainOpt(params, 1.0, C.skip_not_finite, C.scale_by_adam, C.prodigy_d(d0=1e-2))
    walk(opt, params, range(3))
    before = {k: v.clone() for k, v in opt.param_groups[0].items() if isinstance(v, Tensor)}
    weights = clones(params)
    pull(params, 3)
    params[1].grad[0] = torch.nan
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert torch.equal(opt.param_groups[0]["d"], before["d"])


def test_two_rates_in_a_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="prodigy_d and prodigy_plus_d both decide"):
        C.ChainOpt(parameters(), 1.0, C.prodigy_d, C.scale_by_adam, C.prodigy_plus_d)


def test_a_rate_runs_before_the_moments_wherever_it_is_written() -> None:
    chain = (C.clip_by_norm, C.scale_by_adam, C.prodigy_d)
    first = C.ChainOpt(parameters(), 1.0, *chain)
    assert repr(first.chain).startswith("prodigy_d | clip_by_norm | scale_by_adam")
    guarded = C.ChainOpt(parameters(), 1.0, C.skip_not_finite, *chain[1:])
    assert repr(guarded.chain).startswith("skip_not_finite | prodigy_d | scale_by_adam")


# ---- saving and copying


@pytest.mark.parametrize("name", ["plus", "authors", "plus, muon"])
def test_saved_copied_and_pickled_numbers_go_on_as_they_were(name: str) -> None:
    params = parameters(*SHAPES)
    opt = MAKERS[name](grouped(params))
    walk(opt, params, range(4))
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    loaded = copies(params)
    again = MAKERS[name](grouped(loaded))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    twin = copy.deepcopy(opt)
    third = pickle.loads(pickle.dumps(opt))
    others = [again, twin, third]
    walk(opt, params, range(4, 7))
    for other in others:
        mine = [p for g in other.param_groups for p in g["params"]]
        walk(other, mine, range(4, 7))
        assert other.d == opt.d
        assert all(torch.equal(p, q) for p, q in zip(params, mine, strict=True))
        assert other.param_groups[0]["d"] is not opt.param_groups[0]["d"]


def test_a_saved_dict_shares_no_memory_with_who_loads_it() -> None:
    params = parameters((8, 6))
    opt, other = heavyball.Prodigy(params), heavyball.Prodigy(copies(params))
    other.load_state_dict(opt.state_dict())
    opt.param_groups[0]["d"].fill_(0.5)
    assert other.d == [1e-6]


def test_a_frozen_optimizer_loads_without_the_state_that_is_gone() -> None:
    params = parameters((8, 6))
    make = lambda p: heavyball.ProdigyPlusScheduleFree(p, prodigy_steps=3)  # noqa: E731
    opt = make(params)
    walk(opt, params, range(5))
    twins = copies(params)
    other = make(twins)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    walk(opt, params, range(5, 7))
    walk(other, twins, range(5, 7))
    assert torch.equal(params[0], twins[0])
    assert "prodigy_plus_d.p0" not in other.state[twins[0]]


def test_state_takes_few_bytes() -> None:
    param = nn.Parameter(torch.randn(512, 2048, device=DEVICE))
    opt = heavyball.ProdigyPlusScheduleFree([param])
    param.grad = torch.randn_like(param)
    opt.step()
    # z 4, p0 4 / 11, s 2 / 11, and the means over rows and columns
    assert opt.state_bytes() / param.numel() < 4.6
    frozen = heavyball.ProdigyPlusScheduleFree([param], prodigy_steps=1)
    frozen.step()
    saved = opt.state_bytes() - frozen.state_bytes()
    assert saved == pytest.approx(6 / 11 * param.numel(), abs=6)


def test_row_and_column_means_of_bfloat16_weights_may_be_bfloat16() -> None:
    for dtype, fp32, expected in (
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, False, torch.float32),
    ):
        param = nn.Parameter(torch.randn(40, 36, device=DEVICE).to(dtype))
        opt = heavyball.ProdigyPlusScheduleFree([param], factored_fp32=fp32)
        param.grad = torch.randn_like(param)
        opt.step()
        assert opt.state[param]["factored_rms.row"].dtype == expected


# ---- warnings


def messages(make: Any, steps: int, clip: bool = False) -> list[str]:
    params = parameters((8, 6), (5,))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt = make(params)
        for step in range(steps):
            pull(params, step)
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 0.1)
            opt.step()
    return [str(w.message) for w in found if "compiled" not in str(w.message)]


def test_what_users_get_wrong_is_said_once() -> None:
    assert not messages(heavyball.Prodigy, advice.LOOK + 5)
    [lr] = messages(lambda p: heavyball.Prodigy(p, lr=1e-3, d0=1e-3), 5)
    assert "lr=0.001 in parameter group 0" in lr
    assert "d_coef" in lr
    clipped = messages(heavyball.Prodigy, advice.LOOK + 5, clip=True)
    assert sum("norm of all gradients was 0.1 in 4 of the first 4" in m for m in clipped) == 1
    [still] = messages(lambda p: heavyball.Prodigy(p, d_coef=1e-9), advice.LOOK + 5)
    assert "d of parameter group 0 is still d0=1e-06 after 200 steps" in still
    assert not messages(lambda p: heavyball.AdamW(p, lr=1e-3), 5)
