"""What torch tests of every optimizer of its own, for every preset.

Its tests are TestOptimRenewed of test/test_optim.py over torch.testing._internal.common_optimizers.
Where each of them is here, or in another file (p: test_presets, o: test_optimizer, r: test_runner):

errors                                     here; p, what_torch_refuses_is_refused
forloop_goes_right_direction               here; p, training_lowers_the_loss
param_group_with_lrscheduler...            here; p, a_scheduler_acts_as_the_same_values
tensor_lr, tensor_lr_num_dim               p, a_learning_rate_given_as_a_tensor; here
param_groups_weight_decay, param_groups_lr here; p, groups_with_hyper_parameters_of_their_own
foreach_matches_forloop                    p, foreach_does_not_change_a_bit; here, without gradients
set_default_dtype_works_with_foreach       here
mixed_device_dtype                         here, the dtypes
peak_memory_foreach                        r, foreach_false_holds_the_intermediate_tensors
step_is_noop_when_params_have_no_grad      here
step_is_noop_for_zero_grads                here; test_properties
optimizer_can_be_printed                   here; o, repr_shows
state_dict_deterministic                   here
can_load_older_state_dict                  here; for older versions of this library, migrations
can_load_from_to_named_state_dict          here
save_load_equality_with_weights_only       p, a_run_interrupted_by_a_checkpoint
load_nontensor_step                        here
cpu_load_state_dict                        here, into other dtypes
deepcopy_copies_all_public_attrs           here; p, copies_train_on
step_pre_hook, step_post_hook              p, step_hooks_run_around_the_step
step_all_hooks                             here
state_dict_pre/post_hook, load_state_dict_pre/post_hook, ..._and_prepend
                                           here; o, hooks_of_the_user_see_and_may_replace
non_empty_state                            p, every_state_tensor_keeps_changing
fused_does_not_step_if_foundinf, grad scaling
                                           p, grad_scaler_skips_a_step
test_lrscheduler, SWALR                    p, SCHEDULERS
complex, complex_2d, rosenbrock_sparse     refused by name: o, a_parameter_that_cannot_be_optimized
                                           and a_gradient_that_does_not_fit
foreach_large_tensor, fused_large_tensor   not here: 2^32 elements
state_dict_with_cuda_params, *_multigpu    not here: an accelerator
fused_*, capturable, differentiable, defaults_changed_to_foreach
                                           of torch's own implementations, which ours are not
"""

import copy
import inspect
import itertools
import warnings
import zlib

import pytest
import torch
from helpers import (
    CASES,
    KINDS,
    PRESETS,
    QUICK,
    Tiny,
    all_params,
    assert_same,
    assert_same_optimizers,
    clones,
    copies,
    differences,
    fill_gradients,
    loss_of,
    parameters,
    plain_group,
    snapshot,
    train,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import heavyball

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_kind = pytest.mark.parametrize("case", KINDS, ids=repr)
every_preset = pytest.mark.parametrize("case", PRESETS, ids=repr)
some_presets = pytest.mark.parametrize("case", [c for c in KINDS if c in PRESETS], ids=repr)

pytestmark = pytest.mark.filterwarnings("ignore:.*runs without a compiled kernel:RuntimeWarning")


# ---- errors


def matrix():
    return nn.Parameter(torch.zeros(1, 1))


def twice_in_a_group():
    p = matrix()
    return {"params": [p, p]}


def twice_in_two_groups():
    p = matrix()
    return {"params": [{"params": p}, {"params": p}]}


# What torch refuses of each of its optimizers, and in which words.
ERRORS = {
    "a tensor": (
        lambda: {"params": matrix()},
        TypeError,
        "params argument given to the optimizer should be an iterable of Tensors or dicts",
    ),
    "twice in a group": (
        twice_in_a_group,
        UserWarning,
        "a parameter group with duplicate parameters",
    ),
    "twice in two groups": (
        twice_in_two_groups,
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    "two learning rates": (
        lambda: {"params": [matrix()], "lr": torch.tensor([1e-3, 1e-3])},
        ValueError,
        "Tensor lr must be 1-element",
    ),
    "some names": (
        lambda: {"params": [("weight", matrix()), matrix()]},
        ValueError,
        "all optimizer params should be with/without names. Some param names are missing",
    ),
    "a group with names": (
        lambda: {"params": [{"params": [matrix()]}, {"params": [("weight", matrix())]}]},
        ValueError,
        "all optimizer param groups should be with/without names. cannot add param group with names",
    ),
    "nothing": (lambda: {"params": []}, ValueError, "optimizer got an empty parameter list"),
    "not a tensor": (lambda: {"params": [5.0]}, TypeError, "optimizer can only optimize Tensors"),
    "not a leaf": (
        lambda: {"params": [matrix() * 2]},
        ValueError,
        "can't optimize a non-leaf Tensor",
    ),
}


ADAM = next(case for case in PRESETS if case.name == "AdamW")
REFUSED = [(ADAM, name) for name in ERRORS]
REFUSED += zip(PRESETS, itertools.cycle(ERRORS), strict=False)


@pytest.mark.parametrize(("case", "name"), REFUSED, ids=str)
def test_what_torch_refuses_of_every_optimizer_is_refused_in_its_words(case, name):
    make, error, words = ERRORS[name]
    for optimizer in (case, torch.optim.AdamW):
        if issubclass(error, Warning):
            with pytest.warns(error, match=words):
                optimizer(**make())
        else:
            with pytest.raises(error, match=words):
                optimizer(**make())


# ---- the direction


def quadratic(layout="contiguous"):
    """A weight and a bias, and the loss that torch's tests use."""
    made = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(10, 5, 2, generator=made), torch.randn(10, 2, generator=made)
    weight, bias = weight[..., 0], bias[..., 0]
    if layout == "contiguous":
        weight, bias = weight.contiguous(), bias.contiguous()
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    x = torch.randn(5, generator=made)

    def loss():
        return (weight.mv(x) + bias).square().sum()

    return weight, bias, loss


def descend(opt, loss, steps=10):
    """The loss before and after some steps."""
    start = loss().item()
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
    return start, loss().item()


STEPPED = [(case, "strided", None) for case in PRESETS]
STEPPED += [(case, "contiguous", foreach) for case in KINDS for foreach in (False, True)]


@pytest.mark.parametrize(("case", "layout", "foreach"), STEPPED, ids=str)
def test_steps_go_down_with_the_defaults(case, foreach, layout):
    weight, bias, loss = quadratic(layout)
    assert weight.is_contiguous() == (layout == "contiguous")
    start, end = descend(case([weight, bias], foreach=foreach, compile=False), loss)
    assert end < start


@every_preset
def test_steps_go_up_with_maximize(case):
    if "maximize" not in inspect.signature(heavyball.PRESETS[case.name].__init__).parameters:
        with pytest.raises(TypeError, match="maximize"):
            case(parameters((2,)), maximize=True)
        return
    weight, bias, loss = quadratic()
    start, end = descend(case([weight, bias], maximize=True, compile=False), loss)
    assert end > start


@some_presets
def test_groups_go_down_under_two_schedulers(case):
    weight, bias, loss = quadratic()
    opt = case([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=1e-3)
    schedulers = [lr_scheduler.StepLR(opt, 10, 0.9), lr_scheduler.ReduceLROnPlateau(opt)]
    start = loss().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(20):
            opt.zero_grad()
            value = loss()
            value.backward()
            opt.step()
            schedulers[0].step()
            schedulers[1].step(value.item())
    assert loss().item() < start
    torch.testing.assert_close(
        [g["lr"] for g in opt.param_groups], [8.1e-4, 8.1e-3], rtol=1e-12, atol=0
    )


@some_presets
def test_a_group_without_decay_goes_down_beside_one_with(case):
    weight, bias, loss = quadratic()
    opt = case([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}])
    start, end = descend(opt, loss)
    assert end < start


@some_presets
def test_a_group_with_hardly_any_learning_rate_stands_still(case):
    weight, bias, loss = quadratic()
    irrelevant = nn.Parameter(torch.randn(2, 2))
    before = irrelevant.detach().clone()
    # a decay is in units of lr, so it stands still too
    opt = case([{"params": [weight, bias]}, {"params": [irrelevant], "lr": 1e-28}], lr=1e-3)

    def both():
        return loss() + irrelevant.sum()

    start = loss().item()
    descend(opt, both)
    assert loss().item() < start
    assert torch.equal(irrelevant, before)


# ---- learning rates that are tensors


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@some_presets
def test_a_learning_rate_of_one_element_may_have_dimensions(case, shape):
    opt, plain = case(parameters(), lr=torch.full(shape, 2.0**-6)), case(parameters(), lr=2.0**-6)
    train(opt, range(2))
    train(plain, range(2))
    assert not differences(snapshot(opt), snapshot(plain))
    assert opt.param_groups[0]["lr"].shape == shape


# ---- steps that change nothing


@pytest.mark.parametrize("foreach", [False, True])
@every_kind
def test_a_step_without_any_gradient_is_none(case, foreach):
    params = parameters()
    opt = case(params, foreach=foreach)
    before = clones(params)
    assert opt.step(lambda: torch.tensor([1.0])) == 1
    assert_same(params, before)
    assert not any(opt.state.values())
    train(opt, range(2))
    shot = snapshot(opt)
    opt.zero_grad()
    opt.step()
    assert not differences(shot, snapshot(opt))


DECAYS = "weight_decay", "lambd"  # ASGD's


@every_case
def test_a_zero_gradient_without_decay_moves_nothing(case):
    params = parameters()
    opt = case(params, compile=False)
    for group in opt.param_groups:
        group.update({key: 0.0 for key in group if key.split(".")[-1] in DECAYS})
    before = clones(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert_same(params, before)


# ---- dtypes


@pytest.mark.parametrize("compile", ["auto", False])
@every_kind
def test_the_default_dtype_does_not_matter(case, compile):
    """Nor float64 and bfloat16, in test_surroundings."""
    plain, other = case(parameters(), compile=compile), case(parameters(), compile=compile)
    train(plain, range(2))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        train(other, range(2))
    finally:
        torch.set_default_dtype(before)
    assert_same_optimizers(plain, other)


@pytest.mark.parametrize("case", [case for case in KINDS if case.per_parameter], ids=repr)
def test_dtypes_may_be_mixed(case):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if QUICK:
        # two of them for a case, the other two for the next
        dtypes = dtypes[zlib.crc32(case.name.encode()) % 2 :: 2]
    params = [parameters((3, 2), dtype=dtype)[0] for dtype in dtypes]
    # the others stand beside it without a gradient, since random bits depend on the place
    apart = [copies(params) for _ in dtypes]
    together, opts = case(params), [case(each) for each in apart]
    for seed in range(3):
        fill_gradients(params, seed)
        for place, (opt, each) in enumerate(zip(opts, apart, strict=True)):
            each[place].grad = params[place].grad.clone()
            opt.step()
        together.step()
    assert_same(params, [each[place] for place, each in enumerate(apart)])


# ---- saving and loading


@every_kind
def test_equal_training_gives_equal_state_dicts(case):
    source = case(Tiny().parameters())
    train(source, range(3))
    model = Tiny()
    with torch.no_grad():
        for p, q in zip(model.parameters(), all_params(source), strict=True):
            p.copy_(q)
    target = case(model.parameters())
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for opt in (source, target):
        train(opt, range(3, 6))
    one, other = source.state_dict(), target.state_dict()
    assert one.keys() == other.keys()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    assert_same_optimizers(source, target)
    # a parameter that stands in two groups has one number
    target.param_groups.extend(target.param_groups)
    assert target.state_dict()["param_groups"][-1] == one["param_groups"][-1]


@every_case
def test_a_state_dict_whose_groups_lack_entries_loads_with_the_optimizers_own(case):
    source = case(parameters(), compile=False)
    train(source, range(1))
    values = plain_group(source.param_groups[0])
    # what a group has learnt, such as Prodigy's d, is no option that could be filled in
    options = sorted(values.keys() & source.defaults.keys())
    for lost in (options[::2], options[1::2]):
        saved = copy.deepcopy(source.state_dict())
        for name in lost:
            del saved["param_groups"][0][name]
        target = case(copies(all_params(source)), compile=False)
        target.load_state_dict(saved)
        assert plain_group(target.param_groups[0]) == values, lost
    train(target, [1])


@every_kind
def test_named_state_loads_into_unnamed_parameters_and_the_other_way(case):
    for named in (True, False):
        model, other = Tiny(), Tiny()
        source = case(model.named_parameters() if named else model.parameters())
        train(source, range(2))
        target = case(other.parameters() if named else other.named_parameters())
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        target.load_state_dict(source.state_dict())
        train(source, [2])
        train(target, [2])
        assert not differences(snapshot(source), snapshot(target))
        # a loaded group brings its names along, as in torch
        names = [name for name, _ in other.named_parameters()]
        assert target.param_groups[0]["param_names"] == names


@every_kind
def test_a_count_of_steps_saved_as_a_plain_number_loads(case):
    source = case(parameters())
    train(source, range(3))
    saved = copy.deepcopy(source.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    kept = copy.deepcopy(saved)
    target = case(copies(all_params(source)))
    target.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    assert all(s["step"] == 3.0 and isinstance(s["step"], float) for s in saved["state"].values())
    train(source, [3])
    train(target, [3])
    assert_same_optimizers(source, target)


OTHER_DTYPES = [*zip(CASES, itertools.cycle([torch.bfloat16, torch.float64]), strict=False)]


@pytest.mark.parametrize(("case", "dtype"), OTHER_DTYPES, ids=str)
def test_state_loads_into_parameters_of_another_dtype(case, dtype):
    source = case(parameters((4, 3), (4,), (2, 3, 2)), compile=False)
    train(source, range(2))
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    target = case(parameters((4, 3), (4,), (2, 3, 2), dtype=dtype), compile=False)
    target.load_state_dict(saved)
    train(target, [2])
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in all_params(target))
    steps = [target.state[p]["step"].item() for p in all_params(target)]
    assert steps == [3.0] * 3
    for number, state in kept["state"].items():
        assert_same(saved["state"][number].values(), state.values())


@every_kind
def test_a_copy_has_the_public_attributes_of_the_original(case):
    opt = case(parameters())
    train(opt, range(2))

    def public(thing):
        return {name for name in vars(thing) if not name.startswith("_")}

    assert public(copy.deepcopy(opt)) == public(opt)
    assert str(opt)
    assert str(case(parameters()))


# ---- hooks


@some_presets
def test_hooks_of_all_optimizers_run_around_those_of_one(case):
    model, calls = Tiny(), []
    opt = case(model.parameters())

    def note(name):
        return lambda *_: calls.append(name)

    handles = [
        opt.register_step_pre_hook(note("own before")),
        register_optimizer_step_pre_hook(note("all before")),
        opt.register_step_post_hook(note("own after")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    try:
        loss_of(model).backward()
        opt.step(lambda: calls.append("step"))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["all before", "own before", "step", "own after", "all after"]


@some_presets
def test_hooks_of_saving_and_loading_run_in_the_order_asked_for(case):
    opt, calls = case(parameters()), []
    train(opt, range(2))

    def note(name):
        return lambda *_: calls.append(name)

    handles = [
        opt.register_state_dict_pre_hook(note("save 2")),
        opt.register_state_dict_pre_hook(note("save 1"), prepend=True),
        opt.register_state_dict_post_hook(note("saved 2")),
        opt.register_state_dict_post_hook(note("saved 1"), prepend=True),
        opt.register_load_state_dict_pre_hook(note("load 2")),
        opt.register_load_state_dict_pre_hook(note("load 1"), prepend=True),
        opt.register_load_state_dict_post_hook(note("loaded 2")),
        opt.register_load_state_dict_post_hook(note("loaded 1"), prepend=True),
    ]
    opt.load_state_dict(opt.state_dict())
    order = ["save 1", "save 2", "saved 1", "saved 2", "load 1", "load 2", "loaded 1", "loaded 2"]
    assert calls == order
    for handle in handles:
        handle.remove()
    opt.load_state_dict(opt.state_dict())
    assert calls == order


@some_presets
def test_a_hook_of_saving_sees_the_dict_and_may_give_another(case):
    opt = case(parameters())
    train(opt, range(2))
    seen = []

    def keep_less(optimizer, saved):
        assert optimizer is opt
        seen.append(set(saved))
        return {**saved, "param_groups": [{**g, "note": 1} for g in saved["param_groups"]]}

    opt.register_state_dict_post_hook(keep_less)
    saved = opt.state_dict()
    assert seen[0] >= {"state", "param_groups"}
    assert saved["param_groups"][0]["note"] == 1
