"""Groups and parameters changed by hand: each change works as a fresh look would, or raises."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from helpers import (
    assert_same,
    clones,
    copies,
    differences,
    fill_gradients,
    parameters,
    snapshot,
    train,
)
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C

every_mode = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def adam(params, compiled, lr=0.125, **options):
    return C.ChainOpt(params, lr, C.scale_by_adam, compile=compiled, **options)


def begun(*shapes, compiled=False, steps=3, **options):
    """Parameters and their optimizer, in mid-training."""
    params = parameters(*shapes)
    opt = adam(params, compiled, **options)
    train(opt, range(steps))
    return params, opt


def unchanged_by(opt, step: Callable[[], object], match: str) -> None:
    before = snapshot(opt)
    with pytest.raises(ValueError, match=match):
        step()
    assert not differences(before, snapshot(opt))


# ---- dtype, shape, memory


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("when", ["before the first step", "later"])
def test_a_model_of_another_dtype_trains_on_with_the_state_that_goes_with_it(compiled, dtype, when):
    params, opt = begun((4, 3), (4,), compiled=compiled, steps=3 if when == "later" else 0)
    model = nn.ParameterList(params)
    model.to(dtype)
    # the same point, reached by hand
    twins = copies(params)
    twin = adam(twins, compiled)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(params, twins, strict=True):
        twin.state[q] = {
            k: v.clone() if v.dtype == torch.float64 else v.to(high, copy=True)
            for k, v in opt.state.get(p, {}).items()
        }
    train(opt, range(3, 5))
    train(twin, range(3, 5))
    assert not differences(snapshot(opt), snapshot(twin))
    assert {s["scale_by_adam.exp_avg"].dtype for s in opt.state.values()} == {high}


@every_mode
def test_a_round_trip_of_dtypes_ends_in_the_state_of_the_beginning(compiled):
    params, opt = begun((4, 3), compiled=compiled)
    for dtype in (torch.float64, torch.float32):
        nn.ParameterList(params).to(dtype)
        train(opt, [3])
    assert opt.state[params[0]]["scale_by_adam.exp_avg"].dtype == torch.float32
    assert torch.isfinite(params[0]).all()


@every_mode
def test_a_parameter_turned_complex_is_refused_and_named(compiled):
    params = parameters((3,), (2,))
    opt = adam([("one", params[0]), ("two", params[1])], compiled)
    train(opt, range(2))
    params[1].data = params[1].data.to(torch.complex64)
    params[1].grad = None
    fill_gradients(params[:1], 5)
    with pytest.raises(ValueError, match=r"'two' .*complex64"):
        opt.step()
    assert opt.state[params[0]]["step"] == 2


@every_mode
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (12,), (3, 4), (1, 3)])
def test_a_resized_parameter_with_state_is_refused_and_named(compiled, named, shape):
    params = parameters((2, 2), (4, 3))
    given = [("one", params[0]), ("two", params[1])] if named else params
    opt = adam(given, compiled)
    train(opt, range(2))
    params[1].grad = None
    params[1].data = torch.ones(shape)
    fill_gradients(params, 5)
    label = "'two'" if named else "1 of group 0"
    unchanged_by(opt, opt.step, rf"parameter {label} .*resized")
    unchanged_by(opt, opt.step, rf"parameter {label} .*resized")  # and the next time as well
    del opt.state[params[1]]
    opt.step()
    assert opt.state[params[1]]["step"] == 1
    assert opt.state[params[1]]["scale_by_adam.exp_avg"].shape == shape


@every_mode
def test_a_parameter_resized_with_its_state_trains_on(compiled):
    params, opt = begun((4, 3), compiled=compiled)
    rows = copies([params[0][:2]])
    half = adam(rows, compiled)
    half.state[rows[0]] = {
        k: v[:2].clone() if v.ndim else v.clone() for k, v in opt.state[params[0]].items()
    }
    params[0].grad = None
    params[0].data = params[0].data[:2].clone()
    opt.state[params[0]] = {k: v.clone() for k, v in half.state[rows[0]].items()}
    for each in (opt, half):
        train(each, range(3, 5))
    assert not differences(snapshot(opt), snapshot(half))
    assert opt.state[params[0]]["step"] == 5


@every_mode
def test_a_parameter_resized_before_its_first_step_is_as_one_built_so(compiled):
    params = parameters((4, 3))
    chain = C.route(C.when(C.exp_avg, ndim=2), otherwise=C.scale_by_lion)
    opt = C.ChainOpt(params, 0.125, chain, compile=compiled)
    params[0].data = params[0].data[0].clone()
    train(opt, range(2))
    assert set(opt.state[params[0]]) == {"step", "scale_by_lion.exp_avg"}


@every_mode
@pytest.mark.filterwarnings("ignore:the chain")
@pytest.mark.parametrize("change", ["transposed", "strided", "reshaped and back"])
def test_the_same_memory_in_another_order_is_noticed(compiled, change):
    # what does not fill its memory has no kernel
    params, opt = begun((4, 4), compiled="auto" if compiled else False)
    twins, twin = begun((4, 4), compiled=False)
    for p in (params[0], twins[0]):
        grad, p.grad = p.grad, None
        if change == "transposed":
            p.data = p.data.T
        elif change == "strided":
            p.data = torch.zeros(4, 8)[:, ::2].copy_(p.data)
        else:
            p.data = p.data.reshape(16)
            p.data = p.data.reshape(4, 4)
        p.grad = grad
    train(opt, [3])
    train(twin, [3])
    torch.testing.assert_close(params[0], twins[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(snapshot(opt), snapshot(twin), rtol=1e-6, atol=1e-6)


# ---- replaced


def replaced(opt, index=0, position=1):
    """Put a copy of a parameter in its place, and return both."""
    old = opt.param_groups[index]["params"][position]
    new = nn.Parameter(old.detach().clone())
    opt.param_groups[index]["params"][position] = new
    return old, new


@every_mode
def test_a_parameter_put_in_the_place_of_one_with_state_is_refused(compiled):
    params, opt = begun((4, 3), (4,), (2,), compiled=compiled)
    old, new = replaced(opt)
    fill_gradients([params[0], new, params[2]], 3)
    for _ in range(2):
        unchanged_by(
            opt, opt.step, r"parameter 1 of group 0 of shape \(4,\) .*replaced a parameter"
        )
    assert opt.state[params[0]]["step"] == 3
    with pytest.raises(ValueError, match="replaced a parameter in its group"):
        opt.init_state()
    with pytest.raises(ValueError, match="replaced a parameter in its group"):
        opt.routing()
    opt.param_groups[0]["params"][1] = old  # taking it back mends it
    train(opt, [3])
    assert opt.state[old]["step"] == 4


@every_mode
@pytest.mark.parametrize("way", ["state moved", "state dropped"])
def test_a_replaced_parameter_trains_on_with_what_was_said_of_its_state(compiled, way):
    params, opt = begun((4, 3), (4,), compiled=compiled)
    _, unreplaced = begun((4, 3), (4,), compiled=compiled)
    old, new = replaced(opt)
    if way == "state moved":
        opt.state[new] = opt.state.pop(old)
    else:
        del opt.state[old]
        del unreplaced.state[unreplaced.param_groups[0]["params"][1]]
    before = clones([old])
    train(opt, range(3, 5))
    train(unreplaced, range(3, 5))
    assert not differences(snapshot(opt), snapshot(unreplaced))
    assert_same([old], before)
    assert set(opt.state) == {params[0], new}


@every_mode
def test_state_that_does_not_fit_a_replaced_parameter_is_refused(compiled):
    params, opt = begun((4, 3), (4,), compiled=compiled)
    new = nn.Parameter(torch.zeros(5))
    opt.param_groups[0]["params"][1] = new
    opt.state[new] = opt.state.pop(params[1])
    fill_gradients([params[0], new], 3)
    unchanged_by(opt, opt.step, r"1 of group 0 of shape \(5,\) .*exp_avg' has the shape \(4,\)")
    del opt.state[new]["scale_by_adam.exp_avg"]
    unchanged_by(opt, opt.step, "missing: scale_by_adam")


@every_mode
def test_a_parameter_without_state_may_be_replaced(compiled):
    params = parameters((4, 3), (4,))
    opt = adam(params, compiled)
    fill_gradients(params[:1], 0)
    opt.step()
    old, new = replaced(opt)
    train(opt, range(1, 3))
    assert opt.state[new]["step"] == 2
    assert old not in opt.state


@every_mode
def test_names_that_do_not_go_with_the_parameters_are_refused(compiled):
    params = parameters((4, 3), (4,))
    opt = adam([("one", params[0]), ("two", params[1])], compiled)
    train(opt, [0])
    del opt.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=r"group 0 has 1 parameters and 2 names"):
        opt.step()


def test_a_parameter_appended_by_hand_is_as_one_that_was_given():
    params, opt = begun((4, 3))
    late, alone = parameters((3, 2)), parameters((3, 2))
    opt.param_groups[0]["params"].append(late[0])
    fresh = adam(alone, False)
    for seed in range(3):
        fill_gradients([*params, *late], seed)
        alone[0].grad = late[0].grad.clone()
        opt.step()
        fresh.step()
    assert_same(late, alone)


def test_what_cannot_be_optimized_is_refused_when_it_is_appended_by_hand_too():
    params, opt = begun((4, 3))
    opt.param_groups[0]["params"].append(torch.zeros(3, dtype=torch.int64))
    fill_gradients(params, 3)
    unchanged_by(opt, opt.step, r"parameter 1 of group 0 .*int64")


# ---- groups


def two_groups(compiled):
    params = parameters((4, 3), (4,), (2, 2))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    opt = adam(groups, compiled)
    train(opt, range(3))
    return params, opt


@every_mode
@pytest.mark.parametrize("way", ["deleted", "emptied", "first deleted"])
def test_a_removed_group_stands_still_and_the_others_train_on(compiled, way):
    params, opt = two_groups(compiled)
    index = 0 if way == "first deleted" else 1
    removed = list(opt.param_groups[index]["params"])
    rest = [p for p in params if not any(p is q for q in removed)]
    twins, twin = two_groups(compiled)
    before = clones(removed)
    if way == "emptied":
        opt.param_groups[index]["params"].clear()
    else:
        del opt.param_groups[index]
    for seed in range(3, 6):
        fill_gradients(params, seed)
        fill_gradients(twins, seed)
        opt.step()
        twin.step()
    assert_same(removed, before)
    kept = [q for q, p in zip(twins, params, strict=True) if any(p is r for r in rest)]
    assert_same(rest, kept)


@every_mode
def test_a_removed_group_that_comes_back_trains_on_where_it_stopped(compiled):
    params, opt = two_groups(compiled)
    group = opt.param_groups.pop(1)
    fill_gradients(params, 3)
    opt.step()
    opt.param_groups.append(group)
    train(opt, [4])
    assert [opt.state[p]["step"].item() for p in params] == [5, 4, 4]
    group = opt.param_groups.pop(1)
    opt.add_param_group(group)
    train(opt, [5])
    assert [opt.state[p]["step"].item() for p in params] == [6, 5, 5]


@every_mode
def test_a_checkpoint_after_removing_a_group_holds_the_groups_that_are_left(compiled):
    params, opt = two_groups(compiled)
    del opt.param_groups[0]
    for stepped in (False, True):
        if stepped:
            train(opt, [3])
        saved = opt.state_dict()
        assert set(saved["state"]) == {0, 1}
        assert opt.state[params[0]]
        new = copies(params[1:])
        loaded = adam([{"params": new}], compiled)
        loaded.load_state_dict(saved)
        assert not differences(snapshot(loaded), snapshot(opt))


@every_mode
def test_removing_a_group_and_adding_another_is_no_replacement(compiled):
    params, opt = two_groups(compiled)
    del opt.param_groups[1]
    late = parameters((3, 3))
    opt.add_param_group({"params": late})
    train(opt, [3])
    assert opt.state[late[0]]["step"] == 1
    assert opt.state[params[0]]["step"] == 4


@every_mode
@pytest.mark.parametrize("way", ["another dict", "moved to the other group", "swapped"])
def test_the_group_that_a_parameter_is_in_now_decides(compiled, way):
    params, opt = two_groups(compiled)
    train(opt, [3])  # in the fast path, where there is one
    before = clones(params)
    if way == "another dict":
        opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.0}
        still = params[:1]
    elif way == "moved to the other group":
        opt.param_groups[0]["lr"] = 0.0
        opt.param_groups[0]["params"].append(opt.param_groups[1]["params"].pop(0))
        still = params[:2]
    else:
        opt.param_groups[0]["lr"] = 0.0
        first, second = (group["params"] for group in opt.param_groups)
        opt.param_groups[0]["params"], opt.param_groups[1]["params"] = second, first
        still = params[1:]
    fill_gradients(params, 4)
    opt.step()
    same = [torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert same == [any(p is s for s in still) for p in params]


# ---- together with other things


def test_a_copy_of_an_optimizer_notices_too():
    params, opt = begun((4, 3), (4,))
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        replaced(twin)
        with pytest.raises(ValueError, match="replaced a parameter in its group"):
            train(twin, [3])
    train(opt, [3])
    assert opt.state[params[0]]["step"] == 4


def test_evaluation_and_changes():
    params = parameters((4, 3), (4,))
    opt = heavyball.SFAdamW(params, 0.1, compile=False)
    train(opt, range(3))
    replaced(opt)
    with pytest.raises(ValueError, match="replaced a parameter in its group"):
        opt.eval()


def test_many_steps_notice_nothing_and_cost_no_new_programs(monkeypatch):
    params, opt = begun((4, 3), (4,))
    calls: list[Tensor] = []
    real = opt.chain.program_for
    monkeypatch.setattr(
        opt.chain, "program_for", lambda name, param: calls.append(param) or real(name, param)
    )
    train(opt, range(3, 6))
    assert calls == []
    assert params[0] in opt.state


# ---- one after the other, as it comes


class Edited:
    """An optimizer whose groups and parameters are changed by hand, at random but repeatably."""

    def __init__(self, seed, compiled):
        self.draw = random.Random(seed)
        self.params = parameters((4, 4), (4,), (2, 3), ())
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.25}]
        self.opt = heavyball.SFAdamW(groups, 0.125, weight_decay=0.1, compile=compiled)
        self.removed: list[dict] = []

    def edit(self):
        """One change; which one, the draw decides."""
        names = sorted(name for name in vars(Edited) if name.startswith("do_"))
        name = self.draw.choice(names)
        getattr(self, name)(self.draw.choice(self.opt.param_groups), self.opt)
        return name

    def any_param(self, group):
        return self.draw.randrange(len(group["params"])) if group["params"] else None

    def do_nothing(self, group, opt):
        pass

    def do_other_memory(self, group, opt):
        for p in group["params"]:
            p.data = p.data.clone()

    def do_other_order(self, group, opt):
        for p in group["params"]:
            if p.ndim == 2:
                grad, p.grad = p.grad, None
                p.data = p.data.T.contiguous().T
                p.grad = grad

    def do_other_dtype(self, group, opt):
        to = self.draw.choice([torch.float32, torch.float64, torch.bfloat16])
        for p in group["params"]:
            p.grad = None
            p.data = p.data.to(to)

    def do_other_rate(self, group, opt):
        group["lr"] = self.draw.choice([0.0, 0.0625, 0.5])

    def do_other_dict(self, group, opt):
        place = next(i for i, g in enumerate(opt.param_groups) if g is group)
        opt.param_groups[place] = {**group, "params": list(group["params"])}
        group["lr"] = -1.0  # whoever still looks at it will notice

    def do_move(self, group, opt):
        place = self.any_param(group)
        if place is not None:
            param = group["params"].pop(place)
            self.draw.choice(opt.param_groups)["params"].append(param)

    def do_remove(self, group, opt):
        if len(opt.param_groups) > 1:
            self.removed.append(group)
            opt.param_groups[:] = [g for g in opt.param_groups if g is not group]

    def do_return(self, group, opt):
        if self.removed:
            opt.param_groups.append(self.removed.pop())

    def do_add(self, group, opt):
        opt.add_param_group({"params": [nn.Parameter(torch.full((3, 2), 0.5))]})

    def do_append(self, group, opt):
        group["params"].append(nn.Parameter(torch.full((5,), 0.5)))

    def do_replace(self, group, opt):
        place = self.any_param(group)
        if place is not None:
            old, new = group["params"][place], nn.Parameter(group["params"][place].detach().clone())
            group["params"][place] = new
            if old in opt.state:
                state = opt.state.pop(old)
                if self.draw.random() < 0.5:
                    opt.state[new] = state

    def do_average(self, group, opt):
        with opt.averaged():
            pass

    def do_save(self, group, opt):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    def do_init(self, group, opt):
        opt.init_state()


@pytest.mark.filterwarnings("ignore:the chain", "ignore:.*other weights were written")
@pytest.mark.parametrize("seed", range(12))
def test_kernels_follow_every_change_that_plain_steps_follow(seed):
    plain, kernels = Edited(seed, False), Edited(seed, "auto")
    done = []
    for step in range(24):
        done.append(plain.edit())
        assert kernels.edit() == done[-1]
        for each in (plain, kernels):
            params = [p for group in each.opt.param_groups for p in group["params"]]
            fill_gradients(params, step)
            for p in params[step % 5 :: 5]:
                p.grad = None
            each.opt.step()
        found, expected = snapshot(kernels.opt), snapshot(plain.opt)
        assert found.keys() == expected.keys(), done
        for key, value in expected.items():
            # bfloat16 is rounded at random, and a last bit may decide otherwise
            bound = 0.04 if value.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(
                found[key],
                value,
                rtol=bound,
                atol=bound,
                msg=lambda m, key=key: f"{done} {key} {m}",
            )
            place, _, name = key.partition(".")
            targets = [
                [p for g in each.opt.param_groups for p in g["params"]][int(place)]
                for each in (plain, kernels)
            ]
            if name:
                kernels.opt.state[targets[1]][name].data.copy_(value)
            elif value.dtype == torch.bfloat16 and not torch.equal(found[key], value):
                # weights that are written count as others, where an average begins anew: for both
                with torch.no_grad():
                    for target in targets:
                        target.copy_(value)


# ---- state put in by hand, and parameters of inference mode


COUNTS = {
    "replaced": lambda state, step: state.update(step=torch.tensor(step, dtype=torch.float64)),
    "written": lambda state, step: state["step"].fill_(step),
    "a number": lambda state, step: state.update(step=step),
}


@every_mode
@pytest.mark.parametrize("way", COUNTS)
@pytest.mark.parametrize("step", [-3.0, -1.0, float("nan")])
def test_a_count_of_steps_that_is_none_is_refused_by_name(compiled, way, step):
    params, opt = begun((3, 2), (4,), compiled=compiled)
    weights = clones(params)
    COUNTS[way](opt.state[params[1]], step)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*'step' is"):
        train(opt, [3])
    assert_same(params, weights)


@every_mode
def test_a_state_made_in_inference_mode_is_taken_as_its_values(compiled):
    opt = begun((3, 2), (4,), compiled=compiled)[1]
    want = begun((3, 2), (4,), compiled=compiled)[1]
    with torch.inference_mode():
        for state in opt.state.values():
            for key, tensor in state.items():
                state[key] = tensor.clone()
    train(opt, [3, 4])
    train(want, [3, 4])
    assert not differences(snapshot(opt), snapshot(want))


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "SOAP", "Prodigy"])
def test_parameters_of_inference_mode_are_stepped_or_refused_by_name(name):
    with torch.inference_mode():
        params = parameters((3, 2), (4,))
    for compiled in (False, "auto"):
        opt = heavyball.PRESETS[name](params, lr=0.1, compile=compiled)
        before = clones(params)
        if not compiled:
            with pytest.raises(RuntimeError, match=r"shape \(3, 2\).*inference_mode"):
                train(opt, [0])
            assert_same(params, before)
        with torch.inference_mode():
            train(opt, [1, 2])  # SOAP's first step moves nothing
        assert not torch.equal(params[0], before[0])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_stands_twice_counts_once():
    params = parameters((3, 2), (4,))
    once = heavyball.AdamW(params)
    twice = heavyball.AdamW([*params, params[1]])
    for opt in (once, twice):
        train(opt, [0])
    assert "2 parameters, 10 elements" in repr(twice)
    assert repr(twice).splitlines()[-4:] == repr(once).splitlines()[-4:]
    plan = heavyball.memory_plan([*params, params[1]], "AdamW")
    assert plan.state_bytes == twice.state_bytes() == once.state_bytes()
    assert plan.elements == 10
