"""Chains that read the loss: a step whose loss is no finite number leaves everything as it was."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import all_params, fill_gradients, parameters, snapshot
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.core import loss as loss_module
from heavyball.presets import ALL_PRESETS
from heavyball.state.declare import scalar

SHAPES = ((4, 3), (5,), ())
BAD = (math.nan, math.inf, -math.inf, 2.0**505, -1e300)


@C.transform
def by_loss(update: Tensor, *, loss: Tensor) -> Tensor:
    """Steps as long as the loss."""
    return update * loss


@C.transform(mean=scalar(0.0))
def mean_loss(update: Tensor, mean: Tensor, *, loss: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the mean of the losses so far."""
    mean = mean + (loss - mean) / step
    return update / mean, mean


CHAINS: dict[str, tuple[Any, ...]] = {
    "a user's": (by_loss, C.exp_avg),
    "a user's mean": (C.exp_avg, mean_loss),
    "in one route": (
        C.route(C.when(by_loss, C.scale_by_adam, min_ndim=2), otherwise=(C.exp_avg,)),
    ),
    "in a branch": (C.parallel((C.exp_avg, by_loss), C.scale_by_adam),),
    "accumulated": (C.accumulate(k=2), C.polyak_rate, C.scale_by_adam),
    "skipping": (C.skip_not_finite, C.momo(use_fstar=True, bias_correction=True)),
    "matrices": (C.polyak_rate, C.route(C.when(C.muon, min_ndim=2), otherwise=(C.sign,))),
    "a basis": (C.polyak_rate, C.soap_precond(precondition_frequency=2), C.parameter_ema),
    "behind the write": (C.polyak_rate(polyak_beta=0.5), C.scale_by_adam, C.lookahead(k=2)),
}
PRESETS = sorted(
    name
    for name, preset in ALL_PRESETS.items()
    if preset(parameters((2, 2)), lr=1e-3, compile=False).chain.reads_loss
)
CASES = [*PRESETS, *CHAINS]


def made(name: str, params: list[Tensor], **options: Any) -> C.ChainOpt:
    if name in CHAINS:
        return C.ChainOpt(params, 0.1, *CHAINS[name], **options)
    return ALL_PRESETS[name](params, lr=0.1, weight_decay=0.1, warmup_steps=3, **options)


def groups_of(opt: C.ChainOpt) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def ended(opt: C.ChainOpt, losses: list[float]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State and groups after steps with these losses; a gradient goes with the number of good ones."""
    good = 0
    for loss in losses:
        fill_gradients(all_params(opt), good)
        opt.step(loss=loss)
        good += math.isfinite(loss) and abs(loss) < 2.0**504
    counts = {"step", "loss_gate.left_out"}
    kept = {k: v for k, v in snapshot(opt).items() if k.split(".", 1)[-1] not in counts}
    return kept, groups_of(opt)


def test_every_preset_that_reads_the_loss_is_found() -> None:
    assert {"MoMo", "MoMoAdam", "ScheduleFreePlus"} <= {*PRESETS}


@pytest.mark.parametrize("compile", [False, "auto"], ids=["eager", "kernels"])
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_if_the_step_had_not_been(name: str, compile: Any) -> None:
    good = [2.0, 1.5, -3.0, 1.2, 0.0, 0.9]
    # at the first step, twice in a row, between, and last
    mixed = [BAD[0], BAD[1], *good[:2], BAD[2], *good[2:5], BAD[3], BAD[0], *good[5:], BAD[4]]
    clean, other = (
        ended(made(name, parameters(*SHAPES), compile=compile), losses) for losses in (good, mixed)
    )
    assert clean[0].keys() == other[0].keys()
    for key, value in clean[0].items():
        assert value.isfinite().all(), key
        assert torch.equal(value, other[0][key]), key
    assert clean[1] == other[1]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CASES)
def test_a_step_with_a_loss_that_is_none_changes_counts_alone(name: str, bad: float) -> None:
    opt = made(name, parameters(*SHAPES), compile=False)
    ended(opt, [1.0, 0.5])
    before, groups = snapshot(opt), copy.deepcopy(groups_of(opt))
    opt.step(loss=torch.tensor(bad, dtype=torch.float64))
    after = snapshot(opt)
    changed = {k.split(".", 1)[-1] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"step", "loss_gate.left_out"}
    assert groups_of(opt) == groups
    assert float(opt.metrics()["group_0/skipped_steps"]) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_float32_loss_that_a_closure_returns_is_judged_alike(name: str) -> None:
    opt = made(name, parameters(*SHAPES), compile=False)
    before = snapshot(opt)
    fill_gradients(all_params(opt), 0)
    opt.step(lambda: torch.tensor(math.nan))
    assert all(torch.equal(snapshot(opt)[key], value) for key, value in before.items())
    opt.step(lambda: torch.tensor(1.0))
    assert not torch.equal(snapshot(opt)["0"], before["0"])


@pytest.mark.parametrize("name", PRESETS)
def test_without_a_loss_nothing_is_changed(name: str) -> None:
    opt = made(name, parameters(*SHAPES), compile=False)
    ended(opt, [1.0])
    before, groups = snapshot(opt), copy.deepcopy(groups_of(opt))
    for closure in (None, lambda: None):
        with pytest.raises(ValueError, match="reads the loss"):
            opt.step(closure)
    assert all(torch.equal(snapshot(opt)[key], value) for key, value in before.items())
    assert groups_of(opt) == groups


@pytest.mark.parametrize("compile", [False, "auto"], ids=["eager", "kernels"])
@pytest.mark.parametrize("name", ["MoMo", "MoMoAdam"])
def test_a_loss_below_its_bound_moves_nothing_and_training_goes_on(name: str, compile: Any) -> None:
    """The mean of losses far below the bound leaves no step, until it is above it again."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = ALL_PRESETS[name]([p], lr=0.1, lower_bound=1.0, compile=compile)
    for _ in range(3):
        p.grad = torch.full_like(p, -0.01)  # <d, p> < 0 lowers the model too
        opt.step(loss=-50.0)
        assert torch.equal(p, torch.ones_like(p))
    for _ in range(40):
        p.grad = torch.full_like(p, -0.01)
        opt.step(loss=50.0)
    assert p.isfinite().all()
    assert not torch.equal(p, torch.ones_like(p))


def test_a_gate_in_front_counts_what_its_own_gradients_leave_out() -> None:
    """A gradient and the loss may both be bad: the loss is looked at first."""
    params = parameters(*SHAPES)
    opt = C.ChainOpt(params, 0.1, C.skip_not_finite, C.momo, compile=False)
    skipped = []
    for loss, bad in ((1.0, False), (math.nan, False), (1.0, True), (math.nan, True)):
        fill_gradients(params, 0)
        if bad:
            params[0].grad[0, 0] = math.nan
        opt.step(loss=loss)
        state = opt.state[params[1]]
        counts = "loss_gate.left_out", "skip_not_finite.skipped"
        skipped.append([float(state[key]) for key in counts])
    assert skipped == [[0, 0], [1, 0], [1, 1], [2, 1]]
    assert float(opt.metrics()["group_0/skipped_steps"]) == 3
    assert all(math.isfinite(float(opt.param_groups[0][k])) for k in ("momo_loss", "momo_slope"))


@pytest.mark.parametrize("compile", [False, "auto"], ids=["eager", "kernels"])
def test_a_gradient_of_almost_nothing_leaves_a_polyak_step_finite(compile: Any) -> None:
    """A momentum of before times the loss over 1e-45 would be infinite."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    opt = heavyball.ScheduleFreePlus([p], compile=compile)
    scales = []
    for size in (1.0, 1e-45, 1e-45, 1.0):
        p.grad = torch.full_like(p, size)
        opt.step(loss=1.0)
        assert p.isfinite().all()
        scales.append(float(opt.param_groups[0]["polyak_scale"]))
    assert scales[2] == 2.0**40
    assert max(scales[:2] + scales[3:]) < 1


def test_the_gate_is_not_shown_and_its_name_is_taken() -> None:
    opt = C.ChainOpt(parameters((2, 2)), 0.1, C.momo)
    assert "gate" not in repr(opt.chain)
    assert "gate" not in repr(opt.chain.programs[0])

    @C.transform(skipped=scalar(0.0))
    def loss_gate(update: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """A name that is taken."""
        return update, skipped

    with pytest.raises(ValueError, match="loss_gate"):
        C.ChainOpt(parameters((2, 2)), 0.1, loss_gate)


def test_a_gate_that_lets_all_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss_module.finite_loss

    def wrong(update: Tensor, skipped: Tensor, /, *, step: Tensor, loss: Tensor) -> Any:
        return right(update, skipped, step=step, loss=0 * step)

    monkeypatch.setattr(loss_module, "finite_loss", wrong)
    with pytest.raises(AssertionError):
        test_training_goes_on_as_if_the_step_had_not_been("MoMo", False)
    with pytest.raises(AssertionError):
        test_a_step_with_a_loss_that_is_none_changes_counts_alone("ScheduleFreePlus", math.nan)


def test_steps_inside_backward_say_who_reads_the_loss() -> None:
    for name, words in (("a user's", ": by_loss reads what"), ("in one route", "reads what step")):
        opt = made(name, parameters(*SHAPES), compile=False)
        with pytest.raises(ValueError, match=words):
            opt.fuse_backward()
