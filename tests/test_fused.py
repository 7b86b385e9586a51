"""Stepping inside `backward()`: the same bits as the ordinary step, and clear errors elsewhere."""

import copy
import gc
import itertools
import pickle
import warnings

import pytest
import torch
from helpers import (
    CASES,
    KINDS,
    Tiny,
    all_params,
    assert_same,
    assert_same_optimizers,
    averages,
    clones,
    copies,
    differences,
    fill_gradients,
    loss_of,
    parameters,
    snapshot,
)
from test_runner import Peak
from torch import nn

import heavyball
from heavyball import chainable as C
from heavyball.compiler.run.engine import Engine

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
SUMS = [case for case in CASES if case(parameters((1,))).chain.total_keys]
LOCAL = [case for case in CASES if case not in SUMS]
local_case = pytest.mark.parametrize("case", LOCAL, ids=repr)


def pull(params, seed):
    """A loss whose gradients are normal and different for every step."""
    twins = copies(params)
    fill_gradients(twins, seed)
    return sum((p * q.grad).sum() for p, q in zip(params, twins, strict=True))


def ordinary_steps(opt, seeds):
    for seed in seeds:
        opt.zero_grad()
        pull(all_params(opt), seed).backward()
        opt.step()


def fused_steps(opt, seeds):
    for seed in seeds:
        pull(all_params(opt), seed).backward()
        assert all(p.grad is None for p in all_params(opt))
        opt.step()


# ---- the same results


@pytest.mark.parametrize(
    ("dtype", "compile"),
    [(torch.float32, "auto"), (torch.bfloat16, False)],
    ids=["kernels, float32", "eager, bfloat16"],
)
@local_case
def test_results_are_those_of_the_ordinary_step_bit_for_bit(case, dtype, compile):
    ordinary = case(parameters(dtype=dtype), compile=compile)
    fused = case(parameters(dtype=dtype), compile=compile, fuse_backward=True)
    ordinary_steps(ordinary, range(3))
    fused_steps(fused, range(3))
    assert_same_optimizers(fused, ordinary)
    if averages(fused):
        assert not differences(snapshot(fused.eval()), snapshot(ordinary.eval()))
        fused.train()
        ordinary.train()
    for opt, steps in ((ordinary, ordinary_steps), (fused, fused_steps)):
        opt.param_groups[0]["lr"] /= 3
        steps(opt, range(3, 4))
    assert_same_optimizers(fused, ordinary)


@pytest.mark.parametrize("name", ["AdamW", "FactoredAdamW", "SFAdamW"])
def test_large_tensors_and_strides_are_no_exception(name):
    ends = []
    for fuse in (False, True):
        params = parameters((300, 301), (70_001,), (2, 3, 4, 5))
        params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
        opt = heavyball.PRESETS[name](params, caution=True, fuse_backward=fuse)
        (fused_steps if fuse else ordinary_steps)(opt, range(3))
        ends.append(snapshot(opt))
    assert not differences(*ends)


def test_a_model_trains_alike_in_every_kind_of_layer():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 7)
        )

    ends = []
    for fuse in (False, True):
        net = model()
        opt = heavyball.AdamW(net.parameters(), 0.01, fuse_backward=fuse)
        for step in range(5):
            opt.zero_grad()
            tokens = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            opt.step()
        ends.append(snapshot(opt))
    assert not differences(*ends)


def test_groups_keep_their_own_values():
    def make(**options):
        first, second = parameters((4, 3), ()), parameters((2, 3, 2), (4,))
        groups = [{"params": first}, {"params": second, "lr": 0.1, "betas": (0.5, 0.6)}]
        return heavyball.AdamW(groups, 0.01, **options)

    ordinary, fused = make(), make(fuse_backward=True)
    ordinary_steps(ordinary, range(3))
    fused_steps(fused, range(3))
    assert_same_optimizers(fused, ordinary)


def test_a_closure_is_a_step_like_any_other():
    ends = []
    for fuse in (False, True):
        model = Tiny()
        opt = heavyball.AdamW(model.parameters(), 0.01, fuse_backward=fuse)

        def closure(model=model, opt=opt):
            opt.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        losses = [opt.step(closure).item() for _ in range(3)]
        ends.append((losses, snapshot(opt)))
    assert ends[0][0] == ends[1][0]
    assert not differences(ends[0][1], ends[1][1])


def test_a_tied_weight_is_stepped_once_with_the_sum_of_its_gradients():
    ends = []
    for fuse in (False, True):
        weight = parameters((3, 3))[0]
        opt = heavyball.AdamW([weight], 0.01, fuse_backward=fuse)
        for _ in range(3):
            opt.zero_grad()
            x = torch.ones(2, 3)
            (torch.tanh(x @ weight.T) @ weight.T).square().sum().backward()
            opt.step()
        assert opt.state[weight]["step"] == 3
        ends.append(snapshot(opt))
    assert not differences(*ends)


def test_a_parameter_that_takes_no_part_is_left_alone():
    params = parameters((4,), (3,))
    opt = heavyball.AdamW(params, fuse_backward=True)
    before = params[1].detach().clone()
    params[0].sum().backward()
    opt.step()
    assert torch.equal(params[1], before)
    assert not opt.state.get(params[1])
    assert opt.state[params[0]]["step"] == 1


def test_an_empty_parameter_is_harmless():
    params = parameters((0,), (3,))
    opt = heavyball.AdamW(params, fuse_backward=True)
    fused_steps(opt, range(2))
    assert not opt.state.get(params[0])


def test_accumulation_inside_the_chain_works():
    ends = []
    for fuse in (False, True):
        opt = C.ChainOpt(parameters(), 0.1, C.accumulate(k=2), C.scale_by_adam, fuse_backward=fuse)
        (fused_steps if fuse else ordinary_steps)(opt, range(5))
        ends.append(snapshot(opt))
    assert not differences(*ends)


def set_value(key, value):
    def change(opt):
        opt.param_groups[0][key] = copy.deepcopy(value)

    return change


def shorten_betas(opt):
    opt.param_groups[0]["betas"][0] *= 0.5  # a list, in place


def halve_tensor(opt):
    opt.param_groups[0]["lr"].mul_(0.5)


def move_state(opt):
    for state in opt.state.values():
        state.update({key: value.clone() for key, value in state.items()})


def reset_state(opt):
    for state in opt.state.values():
        for key in state:
            state[key].data = torch.zeros_like(state[key])


def move_parameters(opt):
    for p in all_params(opt):
        p.data = p.data.clone()


def transpose_parameters(opt):
    for p in all_params(opt):
        if p.ndim == 2:
            p.data = p.data.T.contiguous().T


def without_kernels(opt):
    heavyball.utils.compile_mode = None


def with_kernels(opt):
    heavyball.utils.compile_mode = "auto"


# What happens between steps: preset, arguments, dtype, and a change for each step.
CHANGES = {
    "schedule": ("AdamW", {}, [set_value("lr", lr) for lr in (0.1, 0.05, 0.05, 0.0)]),
    "decay": ("AdamW", {}, [set_value("weight_decay", wd) for wd in (0.0, 0.1)]),
    "list": ("AdamW", {}, [set_value("betas", [0.5, 0.9]), shorten_betas, shorten_betas]),
    "tensor": ("AdamW", {"lr": torch.tensor(0.5)}, [halve_tensor, halve_tensor]),
    "to a tensor": ("AdamW", {}, [set_value("lr", torch.tensor(0.5)), halve_tensor]),
    "seed": ("AdamW", {}, [set_value("seed", 3), set_value("seed", 4)]),
    "momentum": ("SGD", {}, [set_value("momentum", m) for m in (0.9, 0.0, 0.5)]),
    "warm-up": ("AdamW", {}, [set_value("warmup_steps", n) for n in (5, 2)]),
    "other state": ("SFAdamW", {}, [move_state, reset_state]),
    "parameters": ("SFAdamW", {}, [move_parameters, transpose_parameters]),
    "kernels": ("AdamW", {}, [without_kernels, with_kernels]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_steps_acts_as_in_the_ordinary_step(name, dtype):
    preset, arguments, changes = CHANGES[name]
    ends = []
    for fuse in (False, True):
        params = parameters((4, 3), (5,), dtype=dtype)
        opt = heavyball.PRESETS[preset](params, **copy.deepcopy(arguments), fuse_backward=fuse)
        steps = fused_steps if fuse else ordinary_steps
        steps(opt, range(2))
        shots = [snapshot(opt)]
        for seed, change in enumerate(changes):
            change(opt)
            steps(opt, [10 + seed, 20 + seed])
            shots.append(snapshot(opt))
        ends.append(shots)
    for one, other in zip(*ends, strict=True):
        assert not differences(one, other)


def test_gradients_of_another_layout_are_stepped_alike():
    ends = []
    for fuse in (False, True):
        (param,) = parameters((4, 3))
        opt = heavyball.AdamW([param], 0.1, fuse_backward=fuse)
        for seed in range(6):
            opt.zero_grad()
            (twin,) = copies([param])
            fill_gradients([twin], seed)
            weight = twin.grad
            # a product with a transposed tensor has a transposed gradient; a sum has an expanded one
            loss = param.sum() if seed == 4 else (param.T * weight.T.contiguous()).sum()
            (loss if seed % 2 else (param * weight).sum()).backward()
            opt.step()
        ends.append(snapshot(opt))
    assert not differences(*ends)


def test_little_python_runs_for_a_parameter_that_is_stepped_again(monkeypatch):
    """The whole engine is only for what has changed; else one row of a table is launched again."""
    opt = heavyball.AdamW(parameters(), fuse_backward=True)
    fused_steps(opt, range(2))
    monkeypatch.setattr(Engine, "step_again", lambda *_: pytest.fail("the engine ran"))
    monkeypatch.setattr(opt.registry, "jobs", lambda *_: pytest.fail("jobs were made"))
    opt.param_groups[0]["lr"] = 0.5
    before = snapshot(opt)
    pull(all_params(opt), 2).backward()
    assert len(differences(before, snapshot(opt))) == 4 * len(all_params(opt))


# ---- when it happens


def test_a_parameter_is_stepped_and_its_gradient_freed_before_backward_goes_on():
    first, second = parameters((4,), (4,))
    opt = heavyball.SGD([first, second], 0.5, fuse_backward=True)
    start, seen = second.detach().clone(), []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((second.detach().clone(), second.grad))
            return grad

    # backward reaches `second` before the watch, and `first` behind it
    (Watch.apply(first * 1.0) + second).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], start - 0.5, rtol=0, atol=0)
    assert seen[0][1] is None
    opt.step()


def test_step_is_a_step_to_schedulers_and_hooks():
    opt = heavyball.AdamW(parameters((3,)), 0.1, fuse_backward=True)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            fused_steps(opt, [0])
            scheduler.step()
    assert calls == ["before", "after"] * 2
    assert opt.param_groups[0]["lr"] == 0.1 * 0.25


def test_torch_autograd_grad_steps_nothing():
    opt = heavyball.AdamW(parameters((3,)), fuse_backward=True)
    before = snapshot(opt)
    (grad,) = torch.autograd.grad(pull(all_params(opt), 0), all_params(opt))
    assert grad.shape == (3,)
    assert not differences(before, snapshot(opt))


def test_a_gradient_assigned_by_hand_is_stepped_by_step_and_freed():
    ordinary, fused = (
        heavyball.AdamW(parameters((4, 3), (4,)), fuse_backward=f) for f in (False, True)
    )
    for opt in (ordinary, fused):
        for seed in range(3):
            opt.zero_grad()
            first, second = all_params(opt)
            pull([first], seed).backward()
            fill_gradients([second], 7)
            opt.step()
    assert_same_optimizers(fused, ordinary)
    assert all_params(fused)[1].grad is None


# ---- what is refused


@pytest.mark.parametrize("case", SUMS, ids=repr)
def test_a_chain_with_a_sum_over_all_parameters_is_refused_with_the_element(case):
    key = case(parameters((1,))).chain.total_keys[0]
    with pytest.raises(
        ValueError, match=f"fuse_backward: .*{key}.* needs a sum over all parameters"
    ):
        case(parameters(), fuse_backward=True)
    opt = case(parameters())
    with pytest.raises(ValueError, match=key):
        heavyball.fuse_backward(opt)
    fill_gradients(all_params(opt), 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=f"step_parameter.*{key}"):
        opt.step_parameter(all_params(opt)[0])
    assert not differences(before, snapshot(opt))
    opt.step()  # as before
    assert differences(before, snapshot(opt))


def test_only_the_chains_in_use_are_asked():
    routed = C.route(C.when(C.clip_by_global_norm, min_ndim=2), otherwise=C.sign)
    C.ChainOpt(parameters((3,)), 0.1, routed, fuse_backward=True)
    opt = C.ChainOpt(parameters((3,)), 0.1, routed, fuse_backward=True)
    with pytest.raises(ValueError, match="clip_by_global_norm"):
        opt.add_param_group({"params": parameters((3, 3))})
    assert len(opt.param_groups) == 1
    fused_steps(opt, range(2))


@pytest.mark.parametrize("case", [case for case in KINDS if case in LOCAL], ids=repr)
def test_a_second_backward_before_step_is_refused(case):
    opt = case(parameters(), fuse_backward=True)
    pull(all_params(opt), 0).backward()
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"parameter . of group 0 .*second gradient.*accumulate"):
        pull(all_params(opt), 1).backward()
    assert not differences(before, snapshot(opt))
    with pytest.raises(RuntimeError, match="has a gradient again"):
        opt.step()
    opt.zero_grad()
    opt.step()
    fused_steps(opt, [2])


def test_a_second_backward_through_a_retained_graph_is_refused():
    opt = heavyball.SGD(parameters((3,)), fuse_backward=True)
    loss = pull(all_params(opt), 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        loss.backward()
    opt.zero_grad()
    opt.step()
    # a graph that needs the parameter's old value is refused by torch
    loss = all_params(opt)[0].square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_value_that_backward_still_needs_is_not_changed_unnoticed():
    (weight,) = parameters((3, 3))
    opt = heavyball.SGD([weight], fuse_backward=True)
    x = torch.ones(3, requires_grad=True)
    # the gradient of `weight` is complete at once, that of x still needs its value
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((weight.detach() @ (x * 2)).sum() + weight.sum()).backward()
    assert opt.state[weight]["step"] == 1


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("compile", ["auto", False])
def test_a_grad_scaler_is_refused(unscale, compile):
    opt = heavyball.AdamW(parameters((3,)), fuse_backward=True, compile=compile)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(pull(all_params(opt), 0)).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="GradScaler with fuse_backward"):
        scaler.step(opt)
    # without the scaler, it goes on
    opt.step()
    fused_steps(opt, [1])


def test_a_grad_scaler_that_is_switched_off_is_harmless():
    ordinary, fused = (
        heavyball.AdamW(parameters()),
        heavyball.AdamW(parameters(), fuse_backward=True),
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ordinary_steps(ordinary, range(2))
    for seed in range(2):
        scaler.scale(pull(all_params(fused), seed)).backward()
        scaler.step(fused)
        scaler.update()
    assert_same_optimizers(fused, ordinary)


def test_backward_in_evaluation_mode_is_refused_and_changes_nothing():
    opt = heavyball.SFAdamW(parameters(), fuse_backward=True)
    fused_steps(opt, range(2))
    opt.eval()
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"backward\(\) in evaluation mode"):
        pull(all_params(opt), 2).backward()
    assert not differences(before, snapshot(opt))
    opt.zero_grad()
    opt.train()
    fused_steps(opt, [3])


def test_two_optimizers_that_step_one_parameter_in_backward_are_refused():
    params = parameters((3,))
    one = heavyball.SGD(params, fuse_backward=True)
    other = heavyball.AdamW(params, fuse_backward=True)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="2 optimizers that step inside backward"):
        params[0].sum().backward()
    assert torch.equal(params[0], before)
    params[0].grad = None
    heavyball.fuse_backward(one).remove()
    fused_steps(other, range(2))
    del other
    one.zero_grad()
    ordinary_steps(one, range(2))


def test_an_optimizer_that_is_gone_steps_nothing():
    params = parameters((3,))
    old = heavyball.SGD(params, 0.5, fuse_backward=True)
    del old
    gc.collect()
    before = params[0].detach().clone()
    params[0].sum().backward()
    assert torch.equal(params[0], before)
    assert params[0].grad is not None
    new = heavyball.AdamW(params, fuse_backward=True)
    new.zero_grad()
    fused_steps(new, range(2))


def test_an_optimizer_whose_gradients_another_one_frees_says_so():
    shared, own = parameters((3,), (4,))
    fused = heavyball.SGD([shared], fuse_backward=True)
    ordinary = heavyball.AdamW([own, shared])
    pull([shared, own], 0).backward()
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .* another optimizer"):
        ordinary.step()
    fused.step()
    heavyball.fuse_backward(fused).remove()
    pull([shared, own], 1).backward()
    ordinary.step()


def test_a_parameter_that_stands_twice_is_refused():
    (param,) = parameters((3,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* in the optimizer twice"):
            heavyball.SGD([param, param], fuse_backward=True)


def test_replicas_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes"):
        heavyball.SGD(parameters((3,)), fuse_backward=True)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_a_bool(value):
    with pytest.raises(TypeError, match="fuse_backward="):
        heavyball.SGD(parameters((3,)), fuse_backward=value)


def test_other_peoples_optimizers_are_refused():
    with pytest.raises(TypeError, match="expected an optimizer of heavyball, got SGD"):
        heavyball.fuse_backward(torch.optim.SGD(parameters((3,))))


# ---- errors inside backward


def test_an_error_leaves_backward_and_names_the_parameter():
    embedding = nn.Embedding(5, 3, sparse=True)
    named = [("table", embedding.weight)]
    opt = heavyball.AdamW(named, fuse_backward=True)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"'table' of shape \(5, 3\) has a sparse gradient"):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert not differences(before, snapshot(opt))


def test_a_wrong_hyper_parameter_is_named_and_nothing_changes():
    opt = heavyball.AdamW(parameters(), fuse_backward=True)
    fused_steps(opt, range(2))
    opt.param_groups[0]["betas"] = (0.9, 1.5)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"parameter group 0: betas=\(0.9, 1.5\)"):
        pull(all_params(opt), 2).backward()
    assert not differences(before, snapshot(opt))
    opt.param_groups[0]["betas"] = (0.9, 0.99)
    opt.zero_grad()
    fused_steps(opt, [3])


def test_after_an_error_the_parameters_stepped_so_far_have_been_stepped_once():
    params = parameters((3,), (4,))
    opt = heavyball.SGD(params, 0.5, fuse_backward=True)
    before = clones(params)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError):
        (Fails.apply(params[0] * 1.0).sum() + params[1].sum()).backward()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1] - 0.5)
    opt.step()
    fused_steps(opt, range(2))


# ---- parameters come and go


def test_hooks_follow_a_group_that_is_added():
    ends = []
    for fuse in (False, True):
        opt = heavyball.AdamW(parameters((3, 2)), fuse_backward=fuse)
        steps = fused_steps if fuse else ordinary_steps
        steps(opt, range(2))
        opt.add_param_group({"params": parameters((5,)), "lr": 0.1})
        steps(opt, range(2, 4))
        ends.append(snapshot(opt))
    assert not differences(*ends)


def test_a_parameter_that_was_frozen_joins_when_it_is_trained():
    ends = []
    for fuse in (False, True):
        params = parameters((3,), (4,))
        params[1].requires_grad_(False)
        opt = heavyball.AdamW(params, fuse_backward=fuse)
        for seed in range(6):
            opt.zero_grad()
            params[1].requires_grad_(seed > 1)
            pull(params, seed).backward()
            assert not fuse or seed < 3 or params[1].grad is None
            opt.step()
        ends.append(snapshot(opt))
    assert ends[0]["1.step"] == 4
    assert not differences(*ends)


def test_a_parameter_put_in_anothers_place_is_stepped_and_the_old_one_is_not():
    old, kept, new = parameters((3,), (4,), (3,))
    opt = heavyball.SGD([old, kept], 0.5, fuse_backward=True)
    fused_steps(opt, [0])
    opt.param_groups[0]["params"][0] = new
    before = clones([old, new])
    with pytest.raises(ValueError, match="replaced a parameter in its group that has state"):
        old.sum().backward()
    opt.zero_grad()
    old.grad = None
    opt.state[new] = opt.state.pop(old)
    (old.sum() + new.sum() + kept.sum()).backward()
    opt.step()
    assert torch.equal(old, before[0])
    assert torch.equal(old.grad, torch.ones(3))
    assert torch.equal(new, before[1] - 0.5)
    fused_steps(opt, [1])


def test_a_model_that_changes_its_dtype_trains_on():
    ends = []
    for fuse in (False, True):
        params = parameters((3,), (4,))
        opt = heavyball.AdamW(params, fuse_backward=fuse)
        steps = fused_steps if fuse else ordinary_steps
        steps(opt, range(2))
        opt.zero_grad()
        for p in params:
            p.data = p.data.bfloat16()
        steps(opt, range(2, 4))
        ends.append(snapshot(opt))
    assert ends[0]["0"].dtype == torch.bfloat16
    assert not differences(*ends)


def test_state_that_was_made_before_the_first_step_is_used():
    ordinary = heavyball.SFAdamW(parameters())
    fused = heavyball.SFAdamW(parameters(), fuse_backward=True).init_state()
    ordinary_steps(ordinary, range(2))
    fused_steps(fused, range(2))
    assert_same_optimizers(fused, ordinary)


def test_remove_goes_back_to_the_ordinary_step():
    ordinary, fused = heavyball.AdamW(parameters()), heavyball.AdamW(parameters())
    handle = heavyball.fuse_backward(fused)
    assert heavyball.fuse_backward(fused) is handle
    ordinary_steps(ordinary, range(4))
    fused_steps(fused, range(2))
    handle.remove()
    ordinary_steps(fused, range(2, 4))
    assert_same_optimizers(fused, ordinary)
    assert all(p.grad is not None for p in all_params(fused))
    handle.remove()  # again changes nothing


def test_loading_a_checkpoint_goes_on_bit_for_bit():
    ordinary = heavyball.AdamW(parameters(), 0.01)
    ordinary_steps(ordinary, range(3))
    fused = heavyball.AdamW(copies(all_params(ordinary)), 0.5, fuse_backward=True)
    pull(all_params(fused), 9).backward()  # a step that the checkpoint undoes
    with torch.no_grad():
        for p, q in zip(all_params(fused), all_params(ordinary), strict=True):
            p.copy_(q)
    fused.load_state_dict(ordinary.state_dict())
    ordinary_steps(ordinary, range(3, 5))
    fused_steps(fused, range(3, 5))
    assert_same_optimizers(fused, ordinary)
    assert "fuse_backward" not in str(fused.state_dict()["param_groups"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("case", LOCAL[:4], ids=repr)
def test_a_copy_is_fused_over_its_own_parameters(case, copied):
    model = Tiny()
    opt = case(model.parameters(), fuse_backward=True)
    fused_steps(opt, range(2))
    new_model, new = copied((model, opt))
    before = snapshot(opt)
    fused_steps(new, range(2, 4))
    assert all(a is b for a, b in zip(all_params(new), new_model.parameters(), strict=True))
    assert not differences(before, snapshot(opt))
    fused_steps(opt, range(2, 4))
    assert_same_optimizers(opt, new)


# ---- driven by a trainer


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        *((LOCAL[0], arguments) for arguments in (0, 1, 2)),
        *zip(LOCAL, itertools.cycle((1, 2, 0)), strict=False),
    ],
    ids=repr,
)
def test_step_parameter_in_a_trainers_own_hooks_equals_the_ordinary_step(case, arguments):
    ordinary, driven = case(parameters()), case(parameters())
    for group in driven.param_groups:
        for index, param in enumerate(group["params"]):

            def hook(p, given=(group, index)):
                driven.step_parameter(p, *given[:arguments])
                p.grad = None

            param.register_post_accumulate_grad_hook(hook)
    ordinary_steps(ordinary, range(3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(driven, lambda _: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(3):
            pull(all_params(driven), seed).backward()
            scheduler.step()
    wrong = differences(snapshot(driven), snapshot(ordinary))
    assert not wrong


def test_step_parameter_frees_the_gradient_and_leaves_the_others():
    params = parameters((3,), (4,))
    opt = heavyball.SGD(params, 0.5)
    fill_gradients(params, 0)
    before, grads = clones(params), clones(p.grad for p in params)
    opt.step_parameter(params[0])
    opt.step_parameter(params[0])  # no gradient any more
    assert params[0].grad is None
    assert_same(params, [before[0] - 0.5 * grads[0], before[1]])
    opt.step()
    assert_same(params, [before[0] - 0.5 * grads[0], before[1] - 0.5 * grads[1]])


def test_step_parameter_refuses_what_does_not_fit():
    params, (other,) = parameters((3,), (4,)), parameters((5,))
    opt = heavyball.SFAdamW(params)
    fill_gradients([*params, other], 0)
    before = clones(params)
    with pytest.raises(ValueError, match=r"shape \(5,\) is not a parameter"):
        opt.step_parameter(other)
    with pytest.raises(ValueError, match="not in the group"):
        opt.step_parameter(params[0], {"params": params})
    with pytest.raises(ValueError, match="is not at index 1"):
        opt.step_parameter(params[0], opt.param_groups[0], 1)
    opt.eval()
    with pytest.raises(RuntimeError, match=r"step_parameter\(\) in evaluation mode"):
        opt.step_parameter(params[0])
    assert_same(params, before)


# ---- what it is for

LAYERS, WIDTH = 24, 96
LAYER = 4 * WIDTH * WIDTH


def peak_of_a_step(fuse, compile):
    """The most bytes that backward and step hold above parameters, state and saved activations."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    opt = heavyball.AdamW(model.parameters(), fuse_backward=fuse, compile=compile)
    for _ in range(2):
        opt.zero_grad()
        loss = model(torch.ones(2, WIDTH)).square().mean()
        state = [t for held in opt.state.values() for t in held.values()]
        with Peak([*model.parameters(), *state, loss]) as mode:
            loss.backward()
            opt.step()
    return mode.bytes


def test_the_measure_of_memory_sees_the_gradients_of_the_ordinary_step():
    # all gradients at once; little else is as large as a layer
    assert LAYERS * LAYER <= peak_of_a_step(False, "auto") <= (LAYERS + 3) * LAYER


def test_never_more_than_one_gradient_exists():
    # activations are 1/48 of a layer
    assert peak_of_a_step(True, "auto") <= 1.5 * LAYER


def test_the_eager_step_adds_its_intermediate_tensors_for_one_parameter():
    ordinary, fused = peak_of_a_step(False, False), peak_of_a_step(True, False)
    # both hold the same intermediate tensors of one parameter at a time; only gradients differ
    assert ordinary - fused >= (LAYERS - 2) * LAYER


MATRIX = ["SOAP", "Muon", "Shampoo", "PSGDKron", "PSGDPRO", "NorMuon"]


@pytest.mark.parametrize("name", MATRIX)
def test_one_at_a_time_gives_the_same_bits_however_it_is_asked_for(name: str) -> None:
    def trained(shapes: tuple, **options: object) -> list[torch.Tensor]:
        params = parameters(*shapes)
        opt = getattr(heavyball, name)(params, lr=1e-2, compile=False, **options)
        for seed in range(6):
            fill_gradients(params, seed)
            grads = [p.grad for p in params]
            opt.zero_grad()
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
            opt.step()
        return clones(params)

    equal, unlike = ((7, 7), (7, 7), (7,), (7, 7)), ((7, 6), (5, 12), (3,))
    assert_same(trained(equal, fuse_backward=True), trained(equal, foreach=False))
    assert_same(trained(unlike, fuse_backward=True), trained(unlike, foreach=False))
    # nothing to make together
    assert_same(trained(unlike), trained(unlike, foreach=False))
