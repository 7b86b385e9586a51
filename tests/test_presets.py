"""One suite over all presets, and over chains that no preset has."""

import copy
import inspect
import io
import itertools
import pickle
from functools import partial

import pytest
import torch
from helpers import (
    CASES,
    DEVICE,
    KINDS,
    Tiny,
    all_params,
    assert_same,
    assert_same_optimizers,
    averages,
    batch,
    changed_values,
    clones,
    copies,
    differences,
    eager,  # noqa: F401
    fill_gradients,
    live_keys,
    loss_of,
    parameters,
    same_bits,
    snapshot,
    train,
)
from torch import nn
from torch.optim import lr_scheduler

import heavyball
from heavyball import chainable as C
from heavyball.presets import CLIPPINGS, DEFAULTS

EPS = 2.0**-52

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_kind = pytest.mark.parametrize("case", KINDS, ids=repr)
every_preset = pytest.mark.parametrize("name", heavyball.PRESETS)


# ---- the step


@every_kind
def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned(case):
    model, plain = Tiny(), Tiny()
    opt, reference = case(model.parameters()), case(plain.parameters())
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        returned = [opt.step(closure) for _ in range(3)]
    for loss in returned:
        expected = loss_of(plain)
        assert torch.equal(loss, expected)
        reference.zero_grad()
        expected.backward()
        assert reference.step() is None
    assert seen == [True] * 3
    assert_same_optimizers(opt, reference)


@every_case
def test_a_parameter_without_gradient_is_left_alone_and_the_others_do_not_feel_it(case):
    params = parameters()
    others = copies(params[:1] + params[2:])
    # with noise, another one without a gradient keeps the others in their places
    left_out = parameters((2, 2)) if case.noisy else []
    opt, without = case(params), case([*others[:1], *left_out, *others[1:]])
    before = params[1].detach().clone()
    for seed in range(2):
        fill_gradients(others, seed)
        for p, q in zip(params[:1] + params[2:], others, strict=True):
            p.grad = q.grad.clone()
        opt.step()
        without.step()
    assert same_bits(params[1], before)
    assert not opt.state.get(params[1])
    assert params[1].grad is None
    assert_same(params[:1] + params[2:], others)
    if averages(opt):
        opt.eval()
        assert same_bits(params[1], before)
        opt.train()
    # it joins, and is frozen with its state when its gradients stop
    train(opt, [2])
    shot = snapshot(opt)
    fill_gradients(params, 3)
    params[1].grad = None
    opt.step()
    changed = {name.split(".")[0] for name in differences(shot, snapshot(opt))}
    assert changed == {"0", "2", "3"}
    assert [opt.state[p]["step"].item() for p in params] == [4, 1, 4, 4]


per_parameter = [case for case in CASES if case.per_parameter]


@pytest.mark.parametrize("case", per_parameter, ids=repr)
def test_parameters_that_join_late_behave_as_in_a_fresh_optimizer(case):
    """One whose gradients begin late, and a group that is added."""
    early, late = parameters((4, 3), (4,)), parameters((3, 4), (), (2, 3, 2))
    waiting, *alone = copies([early[1], *late])
    opt = case(early)
    for seed in range(2):
        fill_gradients(early[:1], seed)
        opt.step()
    value = opt.param_groups[0]["lr"] / 3
    opt.add_param_group({"params": late, "lr": value})
    fresh = case([{"params": [*copies(early[:1]), waiting]}, {"params": alone, "lr": value}])
    for seed in range(3):
        fill_gradients(early + late, seed)
        for p, q in zip([waiting, *alone], early[1:] + late, strict=True):
            p.grad = q.grad.clone()
        opt.step()
        fresh.step()
    assert_same(early[1:] + late, [waiting, *alone])
    assert [opt.state[p]["step"].item() for p in early + late] == [5, 3, 3, 3, 3]


@every_kind
def test_zero_grad_to_none_and_to_zero_train_alike(case):
    results = []
    for to_none in (True, False):
        model = Tiny()
        opt = case(model.parameters())
        for seed in range(4):
            opt.zero_grad(set_to_none=to_none)
            assert all((p.grad is None) == (to_none or seed == 0) for p in model.parameters())
            loss_of(model, seed).backward()
            opt.step()
        results.append(snapshot(opt))
    assert not differences(*results)


@every_case
def test_foreach_does_not_change_a_bit(case):
    opts = [case(parameters(), foreach=value) for value in (True, False)]
    for opt in opts:
        train(opt, range(3))
    assert_same_optimizers(*opts)


class Tied(nn.Module):
    """One weight that two layers use."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False, device=DEVICE) for _ in "ab")
        self.second.weight = self.first.weight
        with torch.no_grad():
            self.first.weight.copy_(parameters((3, 3))[0])

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@every_kind
def test_a_tied_weight_is_stepped_once_with_the_sum_of_its_gradients(case):
    model = Tied()
    single = nn.Parameter(model.first.weight.detach().clone())
    opt, reference = case(model.parameters()), case([single])
    for seed in range(3):
        x = batch(seed)[0]
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        reference.zero_grad()
        (torch.tanh(x @ single.T) @ single.T).square().mean().backward()
        reference.step()
    assert model.first.weight is model.second.weight
    assert opt.state[model.first.weight]["step"] == 3
    # two orders of adding two gradients: one float32 rounding of values below 1 at each of 3 steps,
    # which a sign or a division by a root mean square may turn into the same relative error of a step
    torch.testing.assert_close(model.first.weight, single, rtol=0, atol=3e-6)
    copied_model, copied = copy.deepcopy((model, opt))
    assert copied_model.first.weight is copied_model.second.weight
    assert all_params(copied)[0] is copied_model.first.weight


# ---- training


def frozen_entries(snapshots):
    """State tensors of which some element never had two different values."""
    still = []
    for key in snapshots[-1]:
        seen = [shot[key] for shot in snapshots if key in shot]
        moved = torch.zeros_like(seen[0], dtype=torch.bool)
        for a, b in itertools.pairwise(seen):
            moved |= a != b
        if not moved.all():
            still.append(key)
    return still


# whose updates have another unit than the weights' steps
UNUSUAL_LR = {"Adadelta": 20.0, "ASGD": 0.2}
UNUSUAL_LR |= dict.fromkeys(("DoG", "LDoG", "DoWG", "DAdaptAdam", "DAdaptSGD", "DAdaptLion"), 1.0)


@every_case
def test_training_lowers_the_loss_and_every_state_tensor_keeps_changing(case):
    model = Tiny()
    opt = case(model.parameters(), lr=UNUSUAL_LR.get(case.name, 0.05))
    if case.name == "SGD-nesterov":
        opt = heavyball.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    start = loss_of(model).item()
    shots = []
    for step in range(12):
        opt.zero_grad()
        loss_of(model).backward()
        if case.skips and step == 5:
            model.vector.grad[0] = torch.nan
        opt.step()
        opt.param_groups[0]["lr"] *= 1.01  # or the largest learning rate so far would stay
        if step < 9:
            shots.append(snapshot(opt))
    assert len(shots[0]) >= 2 * len(all_params(opt))  # each has at least a count
    # what follows beta, which stays, and the norm of the first weights
    still = (*case.still, "last_beta", "target_norm")  # which follows beta, and that stays
    assert not [key for key in frozen_entries(shots) if not key.endswith(still)]
    # a learning rate of 0.05 is a step of 2 to 7 per cent for most of these, so that twelve of them do
    # more than this; plain SGD's are the smallest
    assert loss_of(model).item() < 0.9 * start
    if averages(opt):
        opt.eval()
        assert loss_of(model).item() < 0.9 * start


@C.transform(kept=C.zeros, forgotten=C.zeros)
def forgetful(update, kept, forgotten):
    """Update one state and never the other."""
    return update, kept + update, forgotten


def test_the_suite_sees_a_state_that_is_never_updated():
    opt = C.ChainOpt(parameters((3,)), 0.1, forgetful)
    shots = []
    for seed in range(3):
        train(opt, [seed])
        shots.append(snapshot(opt))
    assert frozen_entries(shots) == ["0.forgetful.forgotten"]


# ---- schedulers and live hyper-parameters

SCHEDULERS = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda t: 0.9),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=2),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.25, total_iters=4),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.8),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=4, power=2.0),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8, cycle_momentum=False),
    "OneCycleLR-momentum": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),
    "CyclicLR": partial(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False
    ),
    "CyclicLR-momentum": partial(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, mode="triangular2"
    ),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.7)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.7)], optimizer=opt
    ),
    "SWALR": partial(torch.optim.swa_utils.SWALR, swa_lr=0.05, anneal_epochs=3),
}
CYCLED = ("lr", "betas", "momentum")


def advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def has_momentum(opt):
    return "betas" in opt.defaults or "momentum" in opt.defaults


def scheduled(case, make_scheduler, steps):
    """Train under a scheduler; also give the values that each step ran with."""
    opt = case(parameters())
    scheduler = make_scheduler(opt)
    history = []
    for seed in range(steps):
        group = opt.param_groups[0]
        history.append({k: group[k] for k in CYCLED if k in group})
        train(opt, [seed])
        advance(scheduler)
    return opt, history


# every scheduler with one preset, every case under one that moves the momentum too, if it has one
SCHEDULED = [(case, name) for case in CASES if case.name == "AdamW" for name in SCHEDULERS]
SCHEDULED += [
    (case, "OneCycleLR-momentum" if has_momentum(case(parameters((1,)))) else "OneCycleLR")
    for case in CASES
    if case.name != "AdamW"
]


@pytest.mark.parametrize(
    ("case", "name"),
    SCHEDULED,
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_a_scheduler_acts_as_the_same_values_set_by_hand(case, name):
    opt, history = scheduled(case, SCHEDULERS[name], 6 if case.name == "AdamW" else 3)
    by_hand = case(parameters())
    for seed, values in enumerate(history):
        by_hand.param_groups[0].update(values)
        train(by_hand, [seed])
    assert not differences(snapshot(opt), snapshot(by_hand))
    assert len({str(values) for values in history}) > 1


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("preset", ["SGD", "AdamW"])
def test_a_scheduler_sees_the_optimizer_that_it_knows(preset, name):
    """The schedule is the one that torch's own optimizer gets."""
    arguments = {"lr": 0.01, **({"momentum": 0.9} if preset == "SGD" else {})}
    ours, theirs = getattr(heavyball, preset), getattr(torch.optim, preset)
    histories = []
    for make in (ours, theirs):

        def case(params, make=make):
            return make(params, **arguments)

        histories.append(scheduled(case, SCHEDULERS[name], 6)[1])
    assert histories[0] == histories[1]


@every_case
def test_cycling_the_momentum_needs_one_and_says_so(case):
    opt = case(parameters((2,)))
    if has_momentum(opt):
        lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8)
    else:
        with pytest.raises(ValueError, match="cycle_momentum"):
            lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8)


@every_kind
def test_a_learning_rate_given_as_a_tensor_is_used_as_it_is(case):
    lr = torch.tensor(2.0**-6)
    opt, plain = case(parameters(), lr=lr), case(parameters(), lr=2.0**-6)
    assert opt.param_groups[0]["lr"] is lr
    train(opt, range(3))
    train(plain, range(3))
    assert not differences(snapshot(opt), snapshot(plain))
    lr.mul_(0.5)
    plain.param_groups[0]["lr"] *= 0.5
    train(opt, range(3, 6), lr_scheduler.ExponentialLR(opt, 0.25))
    train(plain, range(3, 6), lr_scheduler.ExponentialLR(plain, 0.25))
    assert not differences(snapshot(opt), snapshot(plain))
    assert lr.item() == 2.0**-7 * 0.25**3


def live_changes(case):
    """Every number that the group holds, with another value for it."""
    shown = case(parameters((1,)))
    for key in live_keys(shown):
        for label, value in changed_values(key, shown.param_groups[0][key]):
            if label not in (*case.idle, "blend"):  # which acts in evaluation alone
                yield key, label, value


@every_case
def test_a_live_hyper_parameter_changed_in_the_group_acts_at_the_next_step(case):
    opt = case(parameters(dtype=torch.float64))
    train(opt, range(3))
    changes = [*live_changes(case)]
    others = [copy.deepcopy(opt) for _ in changes]
    train(opt, [3])
    ends, same = snapshot(opt), []
    for other, (key, label, value) in zip(others, changes, strict=True):
        other.param_groups[0][key] = value
        train(other, [3])
        same += [] if differences(ends, snapshot(other)) else [label]
    assert not same


@every_case
def test_hyper_parameters_set_by_hand_equal_the_same_given_per_group(case):
    changed = {key: value for key, _, value in live_changes(case)}
    by_hand = case(parameters())
    by_hand.param_groups[0].update(changed)
    given = case([{"params": parameters(), **changed}])
    train(by_hand, range(2))
    train(given, range(2))
    assert_same_optimizers(by_hand, given)


@pytest.mark.parametrize("case", per_parameter, ids=repr)
def test_groups_with_hyper_parameters_of_their_own_equal_separate_optimizers(case):
    first, second = parameters((4, 3), ()), parameters((2, 3, 2), (4,))
    group = case(parameters((1,))).param_groups[0]
    own = {
        key: next(changed_values(key, group[key]))[1] for key in live_keys(case([nn.Parameter()]))
    }
    apart_first, apart_second = copies(first), copies(second)
    together = case([{"params": first}, {"params": second, **own}])
    places = copies(first) if case.noisy else []
    apart = [case(apart_first), case([{"params": places + apart_second, **own}])]
    for seed in range(3):
        fill_gradients(first + second, seed)
        for p, q in zip(first + second, apart_first + apart_second, strict=True):
            q.grad = p.grad.clone()
        together.step()
        for opt in apart:
            opt.step()
    assert_same(first + second, apart_first + apart_second)


# ---- saving and copying


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def cosine(opt):
    return lr_scheduler.CosineAnnealingLR(opt, T_max=8)


averaging = [case for case in CASES if averages(case(parameters((1,))))]
# test_checkpoint goes on in another process, with float32
INTERRUPTED = [
    *((case, torch.bfloat16, "train") for case in CASES if case not in averaging),
    *((case, torch.bfloat16, "eval") for case in averaging),
    *((case, torch.float64, "train") for case in KINDS),
]


@pytest.mark.parametrize(("case", "dtype", "mode"), INTERRUPTED, ids=str)
def test_a_run_interrupted_by_a_checkpoint_equals_the_uninterrupted_one(case, dtype, mode):
    model = Tiny(dtype=dtype)
    opt = case(model.parameters())
    scheduler = cosine(opt)
    for seed in range(2):
        fill_gradients(model.parameters(), seed)
        gradients = [p.grad for p in model.parameters()]
        values = clones(gradients)
        opt.step()
        scheduler.step()
        # they are neither changed nor freed
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
        assert_same(gradients, values)
    if mode == "eval":
        opt.eval()
    saved = through_a_file([model.state_dict(), opt.state_dict(), scheduler.state_dict()])
    evaluated = clones(model.parameters())
    if mode == "eval":
        opt.train()
    train(opt, range(2, 4), scheduler)

    new_model = Tiny(seed=7, dtype=dtype)
    new_opt = case(new_model.parameters(), lr=0.5)
    new_scheduler = cosine(new_opt)
    for target, state in zip((new_model, new_opt, new_scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert_same(new_model.parameters(), evaluated)
    if mode == "eval":
        with pytest.raises(RuntimeError, match="evaluation mode"):
            new_opt.step()
        new_opt.train()
    train(new_opt, range(2, 4), new_scheduler)
    assert_same_optimizers(new_opt, opt)
    if averages(opt):
        assert not differences(snapshot(new_opt.eval()), snapshot(opt.eval()))


@every_case
def test_state_of_bf16_parameters_is_float32_before_and_after_loading(case):
    params = parameters((4, 3), (4,), (2, 3, 2), dtype=torch.bfloat16)
    opt = case(params)
    train(opt, range(2))
    other = case(copies(params))
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_optimizers(opt, other)
    for each in (opt, other):
        for state in each.state.values():
            # numbers, such as the count of steps, are float64
            state = {k: v for k, v in state.items() if not (case.low and k.startswith(case.low))}
            wrong = {
                key: value.dtype
                for key, value in state.items()
                if value.dtype != (torch.float32 if value.ndim else torch.float64)
            }
            # the one state that is narrowed by default: a sum of gradients, rounded stochastically
            assert wrong.keys() <= {"prodigy_plus_d.s"}


@every_case
def test_copies_train_on_as_the_original_and_apart_from_it(case):
    model = Tiny()
    opt = case(model.parameters())
    train(opt, range(2))
    twins = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    before = snapshot(opt)
    for twin_model, twin in twins:
        assert all(a is b for a, b in zip(all_params(twin), twin_model.parameters(), strict=True))
        train(twin, range(2, 4))
    assert not differences(before, snapshot(opt))
    train(opt, range(2, 4))
    for _, twin in twins:
        assert_same_optimizers(opt, twin)
        assert repr(twin) == repr(opt)


@pytest.mark.parametrize("case", averaging, ids=repr)
def test_copies_in_evaluation_mode_return_to_the_same_training_weights(case):
    opt = case(parameters())
    train(opt, range(2))
    twins = [copy.deepcopy(opt.eval()), pickle.loads(pickle.dumps(opt))]
    for each in (opt, *twins):
        train(each.train(), range(2, 3))
    assert_same_optimizers(opt, twins[0])
    assert_same_optimizers(opt, twins[1])


# ---- torch's tools around an optimizer


@every_kind
def test_grad_scaler_skips_a_step_with_an_infinity_and_else_changes_nothing(case):
    model, plain = Tiny(), Tiny()
    opt, reference = case(model.parameters()), case(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        opt.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if seed == 2:
            model.kernel.grad[0, 0, 0] = torch.inf
        before = snapshot(opt)
        scaler.step(opt)
        scaler.update()
        if seed == 2:
            assert not differences(before, snapshot(opt))
            assert scaler.get_scale() == 2.0**9
            continue
        assert differences(before, snapshot(opt))
        reference.zero_grad()
        loss_of(plain, seed).backward()
        reference.step()
    # scaling by powers of two is exact in both directions
    assert_same_optimizers(opt, reference)


@every_kind
def test_step_hooks_run_around_the_step_and_can_be_removed(case):
    params = parameters()
    opt = case(params)
    calls = []

    def before(optimizer, args, kwargs):
        assert optimizer is opt
        calls.append(("before", opt.state.get(params[0], {}).get("step", torch.tensor(0)).item()))

    def after(optimizer, args, kwargs):
        calls.append(("after", opt.state[params[0]]["step"].item()))

    handles = opt.register_step_pre_hook(before), opt.register_step_post_hook(after)
    train(opt, range(2))
    assert calls == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]
    for handle in handles:
        handle.remove()
    train(opt, [2])
    assert len(calls) == 4


def test_hooks_on_all_optimizers_see_ours():
    from torch.optim.optimizer import register_optimizer_step_post_hook as register_after
    from torch.optim.optimizer import register_optimizer_step_pre_hook as register_before

    opt, calls = heavyball.AdamW(parameters((2,))), []
    handles = [
        register_before(lambda *_: calls.append("before")),
        register_after(lambda *_: calls.append("after")),
    ]
    try:
        train(opt, [0])
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["before", "after"]


def test_a_pre_hook_may_give_the_step_another_closure():
    params = parameters((2,))
    opt = heavyball.SGD(params)
    fill_gradients(params, 0)
    handle = opt.register_step_pre_hook(lambda *_: ((opt, lambda: 7.0), {}))
    assert opt.step() == 7.0
    handle.remove()
    assert opt.step() is None


# ---- options that every preset takes

# The chains that the presets stand for, with the authors' defaults (torch's where torch has them):
# learning rate, elements, writer, weight decay of the default decay, and the beta1 that MARS takes.
EXPLICIT = {
    "SGD": (1e-3, lambda: (C.coupled, C.heavyball_momentum(momentum=0.9)), None, 0.0, 0.9),
    "AdamW": (1e-3, lambda: (C.scale_by_adam(betas=(0.9, 0.999), eps=1e-8),), None, 1e-2, 0.9),
    "NAdam": (
        2e-3,
        lambda: (C.coupled, C.scale_by_nadam(betas=(0.9, 0.999), eps=1e-8, momentum_decay=4e-3)),
        None,
        0.0,
        0.9,
    ),
    "RMSprop": (1e-2, lambda: (C.coupled, C.scale_by_rms(alpha=0.99, eps=1e-8)), None, 0.0, 0.95),
    "LaProp": (4e-4, lambda: (C.scale_by_laprop(betas=(0.9, 0.999), eps=1e-15),), None, 0.0, 0.9),
    "ADOPT": (
        1e-3,
        lambda: (C.coupled, C.scale_by_adopt(betas=(0.9, 0.9999), eps=1e-6, clip_exponent=0.25)),
        None,
        0.0,
        0.9,
    ),
    "AdEMAMix": (
        1e-3,
        lambda: (C.scale_by_ademamix(betas=(0.9, 0.999, 0.9999), alpha=2.0, eps=1e-8),),
        None,
        0.0,
        0.9,
    ),
    "Lion": (1e-4, lambda: (C.scale_by_lion(betas=(0.9, 0.99)),), None, 0.0, 0.9),
    "Focus": (1e-2, lambda: (C.focus(betas=(0.9, 0.999), gamma=0.1),), None, 0.0, 0.9),
    "SFAdamW": (
        2.5e-3,
        lambda: (C.scale_by_exp_avg_sq(beta2=0.999, eps=1e-8),),
        C.schedule_free(beta=0.9, r=0.0, weight_lr_power=2.0),
        0.0,
        0.9,
    ),
    "PaLMSFAdamW": (
        2.5e-3,
        lambda: (C.scale_by_exp_avg_sq(beta2=0.999, eps=1e-8),),
        C.schedule_free(beta=0.9, r=0.0, weight_lr_power=2.0),
        0.0,
        0.9,
    ),
    "FactoredAdamW": (
        1e-3,
        lambda: (
            C.factored_rms(beta2=0.999, eps=1e-8, min_dim=2),
            C.clip_update_rms(threshold=1.0),
            C.exp_avg(beta=0.9),
        ),
        None,
        1e-2,
        0.9,
    ),
    "Prodigy": (
        1.0,
        lambda: (C.scale_by_adam(betas=(0.9, 0.999), eps=1e-8, correct_bias=False), C.prodigy_d),
        None,
        0.0,
        0.9,
    ),
    "ProdigyPlusScheduleFree": (
        1.0,
        lambda: (
            C.factored_rms(beta2=0.99, eps=1e-8, min_dim_mode="any", correct_bias=False),
            C.prodigy_plus_d(narrow_sums=True),
            C.clip_update_rms,
            C.separate_decay,
        ),
        C.schedule_free(beta=0.9, weight_at="now"),
        0.0,
        0.9,
    ),
}


def in_basis(rule, **options):
    """A chain in the eigenbasis, with HeavyBall's options; PaLM's schedule stands inside."""
    options = {"shampoo_beta": 0.95, "max_precond_dim": 2048, "merge_dims": True, **options}
    options |= {} if "precond_scheduler" in options else {"precondition_frequency": 2}
    return lambda *palm: (C.soap_precond(*palm, rule, **options),)


RARE = {"precond_scheduler": heavyball.PrecondSchedule()}
BIASED = C.scale_by_adam(betas=(0.9, 0.95), eps=1e-8, eps_placement="biased")
OUTSIDE = C.scale_by_adam(betas=(0.9, 0.95), eps=1e-8)
SQUARE = C.scale_by_exp_avg_sq(beta2=0.95, eps=1e-8)
AVERAGED = C.schedule_free(beta=0.9, r=0.0, weight_lr_power=2.0)
IN_BASIS = {
    "SOAP": (in_basis(BIASED), in_basis(OUTSIDE), None),
    "PaLMSOAP": (in_basis(BIASED), in_basis(OUTSIDE), None),
    "PrecondScheduleSOAP": (in_basis(BIASED, **RARE), in_basis(OUTSIDE, **RARE), None),
    "PrecondSchedulePaLMSOAP": (in_basis(BIASED, **RARE), in_basis(OUTSIDE, **RARE), None),
    "SFPaLMSOAP": (in_basis(SQUARE), in_basis(SQUARE), AVERAGED),
    "PrecondScheduleSFPaLMSOAP": (in_basis(SQUARE, **RARE), in_basis(SQUARE, **RARE), AVERAGED),
}
for _name, _rule in {
    "SOAPNAdam": C.scale_by_nadam(betas=(0.9, 0.95), eps=1e-8, momentum_decay=4e-3),
    "SOAPAdEMAMix": C.scale_by_ademamix(betas=(0.9, 0.95, 0.9999), alpha=2.0, eps=1e-8),
    "SOLP": C.scale_by_laprop(betas=(0.9, 0.95), eps=1e-8),
}.items():
    IN_BASIS[_name] = (in_basis(_rule), in_basis(_rule), None)
for _name, (_chain, _, _writer) in IN_BASIS.items():
    EXPLICIT[_name] = (3e-3, _chain, _writer, 1e-2, 0.9)
_chain = lambda *palm: (  # noqa: E731
    *in_basis(OUTSIDE, **RARE)(*palm),
    C.prodigy_d(betas=(0.9, 0.95)),
)
IN_BASIS["PrecondScheduleProdigySOAP"] = (_chain, _chain, None)
EXPLICIT["PrecondScheduleProdigySOAP"] = (1.0, _chain, None, 0.0, 0.9)
for _name, _psgd in {
    "PSGDKron": C.psgd_kron,
    "DelayedPSGD": C.psgd_kron(delayed=True),
    "CachedPSGDKron": C.psgd_kron(cached=True),
    "CachedDelayedPSGDKron": C.psgd_kron(delayed=True, cached=True),
    "PSGDLRA": C.psgd_lra(rank=10),
    "PSGDPRO": C.psgd_pro,
}.items():
    EXPLICIT[_name] = (1e-3, lambda psgd=_psgd: (C.exp_avg(beta=0.9), psgd), None, 0.0, 0.9)
EXPLICIT["PurePSGD"] = (1e-3, lambda: (C.psgd_kron,), None, 0.0, 0.95)
EXPLICIT["Shampoo"] = (
    1e-2,
    lambda: (
        C.graft(
            (C.exp_avg(beta=0.9), C.shampoo(beta2=1.0, eps=1e-12)),
            C.scale_by_adam(betas=(0.9, 0.999), eps=1e-8),
        ),
    ),
    None,
    0.0,
    0.9,
)
ARGUMENTS = {"SGD": {"momentum": 0.9}, "FactoredAdamW": {"min_dim": 2}}
PSGD = tuple(name for name in heavyball.PRESETS if "PSGD" in name)


def routed(rule):
    """The rule for matrices, AdamW with a lr of its own for the rest, PaLM's schedule with AdamW."""

    def elements(*schedule):
        adam = C.scale_by_adam(betas=(0.9, 0.95), eps=1e-8)
        rest = (*schedule, adam, C.scale_lr(factor=3e-4 / 0.02))
        return (C.route(C.when(rule, min_ndim=2), otherwise=rest),)

    return elements


for _name, _rule in {
    "Muon": C.muon(momentum=0.95, eps=1e-7),
    "NorMuon": C.scale_by_normuon(momentum=0.95, beta2=0.95, eps=1e-7),
}.items():
    IN_BASIS[_name] = (routed(_rule), routed(_rule), None)
    EXPLICIT[_name] = (0.02, None, None, 0.0, 0.95)

BETAS = {"Muon": "adamw_betas", "NorMuon": "adamw_betas"}
NO_SECOND_MOMENT = (
    "SGD",
    "RMSprop",
    "Lion",
    "Focus",
    *PSGD,
)  # RMSprop's has no bias correction to replace


def explicit(name, params, **options):
    """The same optimizer as a chain, the options put where the specification puts them."""
    lr, elements, writer, weight_decay, beta1 = EXPLICIT[name]
    palm = options.get("palm", "PaLM" in name)
    chain = []
    if options.get("mars"):
        gamma = options.get("mars_gamma", 0.0025)
        chain.append(C.mars(gamma=gamma, beta1=beta1, max_norm=None))
    chain += [options["gradient_clipping"]] if "gradient_clipping" in options else []
    schedule = [C.palm_beta2(beta2_scale=options.get("beta2_scale", 0.8))] if palm else []
    if name in IN_BASIS:
        chain += IN_BASIS[name][palm](*schedule)
    else:
        chain += [*schedule, *elements()]
    clipped = [C.clip_by_rms(max_rms=1.1)] if name in PSGD else []
    chain += [options["update_clipping"]] if "update_clipping" in options else clipped
    if options.get("caution") and writer is None:
        chain.append(C.cautious)
    if writer is not None:
        chain.append(writer(caution="cautious") if options.get("caution") else writer)
    return C.ChainOpt(
        params,
        lr,
        *chain,
        weight_decay=weight_decay,
        warmup_steps=options.get("warmup_steps", 0),
        foreach=options.get("foreach"),
    )


def preset(name, params, **options):
    return heavyball.PRESETS[name](params, **ARGUMENTS.get(name, {}), **options)


def doubled(update):
    return 2 * update


COMMON = {
    "nothing": {},
    "warmup": {"warmup_steps": 5},
    "caution": {"caution": True},
    "mars": {"mars": True},
    "mars_gamma": {"mars": True, "mars_gamma": 0.05},
    "foreach-False": {"foreach": False},
    "foreach-True": {"foreach": True},
    "gradient-function": {"gradient_clipping": doubled},
    "update-function": {"update_clipping": doubled},
    "gradient-transform": {"gradient_clipping": C.clip_by_norm(max_norm=0.25)},
    "update-transform": {"update_clipping": C.trust_region(scale=0.5)},
    "palm-False": {"palm": False},
    "all": {
        "warmup_steps": 3,
        "caution": True,
        "mars": True,
        "mars_gamma": 0.02,
        "gradient_clipping": C.clip_by_global_norm(max_norm=0.5),
        "update_clipping": C.clip_by_rms(max_rms=0.5),
        "foreach": False,
    },
}


def as_elements(options):
    """Functions as the elements that they become."""
    return {
        k: C.apply(fn=v) if k.endswith("_clipping") and not isinstance(v, C.Transform) else v
        for k, v in options.items()
    }


def assert_same_training(a, b, steps=3):
    train(a, range(steps))
    train(b, range(steps))
    assert_same(all_params(a), all_params(b))


# every preset that has a chain above without options and with all, since `Preset.build` puts them around
# any chain; each option with one that writes by itself and one that
# does not
OPTIONS = [(name, option) for name in EXPLICIT for option in ("nothing", "all")]
OPTIONS += [
    (name, option)
    for option in COMMON
    for name in ("AdamW", "SFAdamW")
    if option not in ("nothing", "all")
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_a_preset_with_options_is_the_chain_that_it_stands_for(name, option):
    options = COMMON[option]
    ours = preset(name, parameters(), **options)
    assert_same_training(ours, explicit(name, parameters(), **as_elements(options)))


@pytest.mark.parametrize("option", ["gradient_clipping", "update_clipping"])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_clipping_is_found_by_its_name(option, clipping):
    if (option, clipping) == ("update_clipping", "last_norm_clip"):  # it clips gradients alone
        with pytest.raises(ValueError, match="pass it as gradient_clipping"):
            preset("AdamW", parameters(), **{option: clipping})
        return
    ours = preset("AdamW", parameters(), **{option: clipping})
    chain = explicit("AdamW", parameters(), **{option: CLIPPINGS[clipping]})
    assert_same_training(ours, chain, steps=2)


def test_the_clippings_are_those_of_the_specification():
    named = {
        "l2_clip": C.clip_by_norm,
        "rms_clip": C.clip_by_rms,
        "global_norm_clip": C.clip_by_global_norm,
        "agc": C.adaptive_gradient_clip,
        "trust_region": C.trust_region,
        "mu_law": C.mu_law,
        "a_law": C.a_law,
        "softsign": C.softsign,
        "l2_normalize": C.l2_normalize,
        "rms_normalize": C.rms_normalize,
    }
    assert {key: CLIPPINGS.get(key) for key in named} == named


@pytest.mark.parametrize("name", EXPLICIT)
def test_palm_works_where_there_is_a_second_moment_and_raises_elsewhere(name):
    options = {"palm": True, "beta2_scale": 0.6}
    if name in NO_SECOND_MOMENT:
        with pytest.raises(ValueError, match="palm_beta2 has no effect"):
            preset(name, parameters(), **options)
        return
    ours = preset(name, parameters(), **options)
    assert_same_training(ours, explicit(name, parameters(), **options))
    plain = preset(name, parameters(), palm=False)
    train(plain, range(3))
    assert differences(snapshot(ours), snapshot(plain))


def by_turns(values):
    """Presets with one of the values each, and every value with one preset at least."""
    names = [*EXPLICIT]
    count = max(len(names), len(values))
    return [(names[i % len(names)], *values[i % len(values)]) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "option"), by_turns([(o,) for o in ("warmup", "caution", "mars", "update-function")])
)
def test_an_option_changes_the_training(name, option):
    # without a first moment no entry ever disagrees with its gradient
    momentum = {"momentum": 0.9} if name == "RMSprop" else {}
    plain = preset(name, parameters(), **momentum)
    other = preset(name, parameters(), **momentum, **COMMON[option])
    train(plain, range(4))
    train(other, range(4))
    assert differences(snapshot(plain), snapshot(other)), option


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    by_turns(
        [
            ("warmup_step", "warmup_steps"),
            ("cauton", "caution"),
            ("gradient_clip", "gradient_clipping"),
            ("weight_deacy", "weight_decay"),
            ("mars_gama", "mars_gamma"),
        ]
    ),
)
def test_a_misspelt_option_raises_and_names_the_nearest(name, wrong, meant):
    with pytest.raises(TypeError, match=f"{name}.*'{wrong}'.*did you mean '{meant}'"):
        heavyball.PRESETS[name](parameters(), **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    by_turns(
        [
            ({"gradient_clipping": "l2_clp"}, ValueError, "did you mean 'l2_clip'"),
            ({"update_clipping": "trust"}, ValueError, "trust_region"),
            ({"gradient_clipping": 1.0}, TypeError, "gradient_clipping=1.0"),
            ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
            ({"caution": 1}, TypeError, "caution=1"),
            ({"mars": "yes"}, TypeError, "mars='yes'"),
            ({"palm": 0.8}, TypeError, "palm=0.8"),
            ({"mars": True, "mars_gamma": -0.1}, ValueError, "mars_gamma=-0.1"),
            ({"mars_gamma": 0.1}, ValueError, "mars=True"),
            ({"palm": False, "beta2_scale": 0.5}, ValueError, "palm=True"),
            ({"palm": True, "beta2_scale": 1.5}, ValueError, "beta2_scale=1.5"),
            ({"foreach": "yes"}, TypeError, "foreach='yes'"),
            ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
            ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
            ({"lr": float("nan")}, ValueError, "lr=nan"),
            ({"lr": "fast"}, TypeError, "lr='fast'"),
        ]
    ),
    ids=str,
)
def test_a_wrong_value_of_an_option_raises_and_names_it(name, options, error, message):
    with pytest.raises(error, match=message):
        preset(name, parameters(), **options)


OUTSIDE_THE_INTERVAL = ((1.0, 0.9), (-0.1, 0.9), (float("nan"), 0.9), (0.9, 1.0))
# torch takes any positive number for the one average of these
HAVE_BETAS = [name for name in EXPLICIT if name not in ("SGD", "RMSprop")]


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        *((name, OUTSIDE_THE_INTERVAL[i % 3]) for i, name in enumerate(HAVE_BETAS)),
        *(("AdamW", betas) for betas in OUTSIDE_THE_INTERVAL),
    ],
)
def test_betas_outside_the_unit_interval_raise(name, betas):
    betas = (*betas, 0.99) if "AdEMAMix" in name else betas
    key, given = BETAS.get(name, "betas"), betas
    if name in PSGD:
        key, given = "beta", betas[0]
    with pytest.raises(ValueError, match=r"beta.*=.*(1\.0|-0\.1|nan).*(expected|effect) "):
        preset(name, parameters(), **{key: given})


def test_every_preset_takes_the_common_options_and_documents_itself():
    for name, cls in heavyball.PRESETS.items():
        assert getattr(heavyball, name) is cls
        assert name in heavyball.__all__
        assert cls.__name__ == name
        assert cls.__doc__
        kinds = [p.kind for p in inspect.signature(cls.__init__).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds
    assert set(DEFAULTS) >= {
        "warmup_steps",
        "caution",
        "mars",
        "mars_gamma",
        "gradient_clipping",
        "update_clipping",
        "palm",
        "beta2_scale",
        "foreach",
    }


# ---- in place of torch's


def torch_signature(name):
    return inspect.signature(getattr(torch.optim, name).__init__).parameters


# what selects one of torch's implementations, and for RMSprop stands among the positional ones
IMPLEMENTATION = ("capturable", "foreach", "differentiable", "fused")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "RMSprop"])
def test_arguments_of_a_name_that_torch_has_are_torchs(name):
    theirs = {k: p for k, p in torch_signature(name).items() if k not in IMPLEMENTATION}
    ours = inspect.signature(heavyball.PRESETS[name].__init__).parameters
    for key, parameter in theirs.items():
        assert key in ours, key
        # torch gives its learning rates as numbers here and there as tensors; both are numbers
        assert ours[key].default == parameter.default, key
    positional = [k for k, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert (
        positional
        == [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(positional)]
    )
    missing = [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD][len(positional) :]
    assert set(missing) <= {"maximize"}  # behind `capturable, foreach` in RMSprop


def pairs(**values):
    """Few choices of values, in which every pair of two of them stands together once."""
    choices = [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())]

    def combinations(choice):
        return set(itertools.combinations(choice.items(), 2))

    left, chosen = set().union(*map(combinations, choices)), []
    while left:
        chosen.append(max(choices, key=lambda choice: len(combinations(choice) & left)))
        left -= combinations(chosen[-1])
    return chosen


PARITY = [
    *(
        ("SGD", arguments)
        for arguments in pairs(
            lr=[0.1],
            momentum=[0.0, 0.9],
            dampening=[0.0, 0.3],
            weight_decay=[0.0, 0.1],
            nesterov=[False, True],
            maximize=[False, True],
        )
        if not arguments["nesterov"] or (arguments["momentum"] and not arguments["dampening"])
    ),
    *(
        ("AdamW", arguments)
        for arguments in pairs(
            lr=[0.1],
            betas=[(0.9, 0.999), (0.0, 0.5), (0.8, 0.0)],
            eps=[1e-8, 1e-2],
            weight_decay=[0.0, 0.1],
            amsgrad=[False, True],
            maximize=[False, True],
        )
    ),
    *(
        ("NAdam", arguments)
        for arguments in pairs(
            lr=[0.1],
            betas=[(0.9, 0.999), (0.5, 0.9)],
            eps=[1e-8, 1e-2],
            weight_decay=[0.0, 0.1],
            momentum_decay=[4e-3, 0.1],
            decoupled_weight_decay=[False, True],
            maximize=[False, True],
        )
    ),
    *(
        ("RMSprop", arguments)
        for arguments in pairs(
            lr=[0.1],
            alpha=[0.99, 0.5],
            eps=[1e-8, 1e-2],
            weight_decay=[0.0, 0.1],
            momentum=[0.0, 0.9],
            centered=[False, True],
            maximize=[False, True],
        )
    ),
]


def parity_tolerance(arguments, lr, steps):
    """How far two orders of the same float64 arithmetic may drift apart.

    A second moment's bias correction 1 - beta2^t loses 1 / (1 - beta2) of the precision; a centred
    denominator loses as much again. Each step adds lr times that, and momentum sums 1 / (1 - momentum)
    steps. The factor counts the roundings of one step.
    """
    beta2 = arguments.get("betas", (0, arguments.get("alpha", 0.0)))[1]
    inflation = 1 / (1 - beta2) / (1 - arguments.get("momentum", 0.0))
    if arguments.get("centered"):
        inflation /= 1 - beta2
    return 30 * steps * lr * inflation * EPS


@pytest.fixture
def _float64_by_default():
    """torch's NAdam keeps the product of its momenta in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize(
    ("name", "arguments"), PARITY, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_preset_matches_torch_step_by_step(name, arguments):
    ours, theirs = (
        parameters((4, 3), (), dtype=torch.float64),
        parameters((4, 3), (), dtype=torch.float64),
    )
    opt = getattr(heavyball, name)(ours, **arguments)
    reference = getattr(torch.optim, name)(theirs, **arguments, foreach=False)
    for seed in range(5):
        for each in (opt, reference):
            train(each, [seed])
            each.param_groups[0]["lr"] = 0.1 / (1 + seed)
        atol = parity_tolerance(arguments, 0.1, seed + 1)
        assert atol < 1e-8
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", (0.1, 0.9, 0.2, 0.01, False)),
        ("AdamW", (0.1, (0.8, 0.9), 1e-6, 0.1, True)),
        ("NAdam", (0.1, (0.8, 0.9), 1e-6, 0.1, 0.01, True)),
        ("RMSprop", (0.1, 0.9, 1e-6, 0.1, 0.5, True)),
    ],
)
def test_positional_arguments_mean_what_they_mean_in_torch(name, arguments):
    ours, theirs = parameters((4, 3), dtype=torch.float64), parameters((4, 3), dtype=torch.float64)
    opt = getattr(heavyball, name)(ours, *arguments)
    reference = getattr(torch.optim, name)(theirs, *arguments)
    train(opt, range(5))
    train(reference, range(5))
    # betas of 0.9 cost one digit; 5 steps of 0.1
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=30 * 5 * 0.1 * 100 * EPS)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "RMSprop"])
def test_groups_hold_torchs_entries_under_torchs_names(name):
    ours = getattr(heavyball, name)(parameters((2,))).param_groups[0]
    theirs = getattr(torch.optim, name)(parameters((2,))).param_groups[0]
    live = {k: v for k, v in theirs.items() if isinstance(v, (float, tuple)) and k != "params"}
    assert {k: ours.get(k) for k in live} == live


def test_momentum_switched_on_in_mid_training_matches_torch():
    ours, theirs = parameters((4, 3), dtype=torch.float64), parameters((4, 3), dtype=torch.float64)
    opts = [heavyball.SGD(ours, 0.1, dampening=0.5), torch.optim.SGD(theirs, 0.1, dampening=0.5)]
    for opt in opts:
        train(opt, range(2))
        opt.param_groups[0]["momentum"] = 0.9
        train(opt, range(2, 5))
    # the first step of a buffer has no dampening in torch
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=30 * 5 * 0.1 * 10 * EPS)


TORCH_ERRORS = [
    ("SGD", {"lr": -0.5}, "lr"),
    ("SGD", {"momentum": -0.5}, "momentum"),
    ("SGD", {"weight_decay": -0.5}, "weight_decay"),
    ("SGD", {"nesterov": True}, "nesterov"),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov"),
    ("AdamW", {"lr": -0.5}, "lr"),
    ("AdamW", {"betas": (1.0, 0.9)}, "betas"),
    ("AdamW", {"betas": (0.9, -1.0)}, "betas"),
    ("AdamW", {"eps": -1e-8}, "eps"),
    ("AdamW", {"weight_decay": -1.0}, "weight_decay"),
    ("NAdam", {"betas": (1.0, 0.9)}, "betas"),
    ("NAdam", {"momentum_decay": -0.2}, "momentum_decay"),
    ("NAdam", {"eps": -1e-8}, "eps"),
    ("RMSprop", {"momentum": -1.0}, "momentum"),
    ("RMSprop", {"alpha": -0.1}, "alpha"),
    ("RMSprop", {"eps": -0.1}, "eps"),
]


@pytest.mark.parametrize(("name", "arguments", "culprit"), TORCH_ERRORS, ids=str)
def test_what_torch_refuses_is_refused_with_the_culprits_name(name, arguments, culprit):
    with pytest.raises(ValueError):  # noqa: PT011 (the words are torch's)
        getattr(torch.optim, name)(parameters((2,)), **arguments)
    with pytest.raises(ValueError, match=culprit):
        getattr(heavyball, name)(parameters((2,)), **arguments)


def test_no_two_cases_have_one_name():
    assert len({case.name for case in CASES}) == len(CASES)
