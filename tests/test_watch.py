"""A plan is used again only while everything is where it was: each change against the eager path."""

import copy
import weakref

import pytest
import torch
from helpers import made_plans

import heavyball
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.run import watch

C = heavyball.chainable
SIDE = 6
KEY = "scale_by_adam.exp_avg"


def square(seed: int) -> torch.Tensor:
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the other order of memory."""
    return tensor.t().contiguous().t()


def move(opt, p, q) -> None:
    p.data = p.data.clone()


def turn(opt, p, q) -> None:
    """Another matrix in the same memory."""
    p.data = p.data.t()


def turn_both(opt, p, q) -> None:
    p.data = p.data.t()
    p.grad = p.grad.t()


def relay(opt, p, q) -> None:
    p.data = transposed(p.data)


def other_gradient(opt, p, q) -> None:
    p.grad = square(50)


def gradient_moved(opt, p, q) -> None:
    p.grad.data = square(51)


def gradient_turned(opt, p, q) -> None:
    p.grad = p.grad.t()


def no_gradient(opt, p, q) -> None:
    p.grad = None


def gradient_for_another(opt, p, q) -> None:
    opt.param_groups[0]["params"][0].grad = square(52)


def gradient_shared(opt, p, q) -> None:
    p.grad = q.grad


def state_replaced(opt, p, q) -> None:
    opt.state[p][KEY] = opt.state[p][KEY].clone()


def state_moved(opt, p, q) -> None:
    opt.state[p][KEY].data = opt.state[p][KEY].clone()


def state_turned(opt, p, q) -> None:
    opt.state[p][KEY].t_()


def state_cast(opt, p, q) -> None:
    opt.state[p][KEY].data = opt.state[p][KEY].double()


def states_swapped(opt, p, q) -> None:
    a, b = opt.state[p], opt.state[q]
    a[KEY], b[KEY] = b[KEY], a[KEY]


def dicts_swapped(opt, p, q) -> None:
    opt.state[p], opt.state[q] = opt.state[q], opt.state[p]


def dict_replaced(opt, p, q) -> None:
    opt.state[p] = {key: tensor.clone() for key, tensor in opt.state[p].items()}


def keys_swapped(opt, p, q) -> None:
    (step, first, second), held = opt.state[p], dict(opt.state[p])
    opt.state[p].clear()
    opt.state[p].update({step: held[step], second: held[first].abs(), first: held[second]})


def begun_anew(opt, p, q) -> None:
    del opt.state[p]


def step_replaced(opt, p, q) -> None:
    opt.state[p]["step"] = torch.ones((), dtype=torch.float64)


def learning_rate(opt, p, q) -> None:
    opt.param_groups[0]["lr"] = 0.3


def group_replaced(opt, p, q) -> None:
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.3}


def to_the_next_group(opt, p, q) -> None:
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())


def groups_swapped(opt, p, q) -> None:
    opt.param_groups.reverse()
    opt.param_groups[0]["lr"] = 0.3


def loaded(opt, p, q) -> None:
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state[KEY] *= 2
    opt.load_state_dict(saved)


CHANGES = [
    move,
    turn,
    turn_both,
    relay,
    other_gradient,
    gradient_moved,
    gradient_turned,
    no_gradient,
    gradient_for_another,
    gradient_shared,
    state_replaced,
    state_moved,
    state_turned,
    state_cast,
    states_swapped,
    dicts_swapped,
    dict_replaced,
    keys_swapped,
    begun_anew,
    step_replaced,
    learning_rate,
    group_replaced,
    to_the_next_group,
    groups_swapped,
    loaded,
]


def train(change, compiled: bool | str, new_gradients: bool) -> list[torch.Tensor]:
    """Steps before and after a change; the last gradients stay where `new_gradients` is False."""
    idle, *params = [torch.nn.Parameter(square(i)) for i in range(5)]
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    groups = [{"params": [idle, empty, *params[:2]]}, {"params": params[2:], "lr": 0.01}]
    opt = C.ChainOpt(groups, 0.1, C.scale_by_adam, compile=compiled)
    empty.grad = torch.zeros(0, 3)
    for step in range(9):
        for i, p in enumerate(params):
            if step < 5 or (new_gradients and p.grad is not None):
                p.grad = square(10 * step + i)
        if step == 6:
            change(opt, params[1], params[2])
        opt.step()
    return [t.detach().clone() for p in (idle, *params) for t in (p, *opt.state[p].values())]


@pytest.mark.filterwarnings("ignore:the chain .* runs without a compiled kernel")
@pytest.mark.parametrize("how", ["compiled", "plain"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed(monkeypatch, change, how: str) -> None:
    if how == "plain":
        monkeypatch.setattr(watch, "native", lambda: None)
    else:
        assert watch.native() is not None
    for new_gradients in (False, True):
        expected = train(change, False, new_gradients)
        found = train(change, "auto", new_gradients)
        unchanged = train(lambda *args: None, False, new_gradients)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        # or nothing could be missed; where only memory moves, a miss would write into the old one
        moved = (move, relay, state_replaced, state_moved, state_cast, dict_replaced)
        lost = new_gradients and change in (other_gradient, gradient_moved, gradient_turned)
        if change not in moved and not lost:
            assert any(not torch.equal(a, b) for a, b in zip(expected, unchanged, strict=True))


@pytest.mark.parametrize("how", ["compiled", "plain"])
def test_a_plan_is_used_again_while_nothing_changes(monkeypatch, how: str) -> None:
    if how == "plain":
        monkeypatch.setattr(watch, "native", lambda: None)
    params = [torch.nn.Parameter(square(i)) for i in range(3)]
    idle, empty = torch.nn.Parameter(square(9)), torch.nn.Parameter(torch.zeros(0))
    opt = heavyball.AdamW([*params, idle, empty], compile=True)
    made = made_plans(monkeypatch)
    for step in range(6):
        for p in (*params, empty):
            p.grad = torch.full_like(p, step)
        opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        opt.step()
    assert len(made) == 1


def test_a_sparse_gradient_in_mid_training_is_refused() -> None:
    p = torch.nn.Parameter(square(0))
    opt = heavyball.AdamW([p], compile=True)
    for _ in range(3):
        p.grad = square(1)
        opt.step()
    before = p.detach().clone()
    p.grad = square(2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert torch.equal(p.detach(), before)


def test_without_a_compiler_tensors_are_compared_plainly(monkeypatch) -> None:
    def fail(source: str, name: str) -> None:
        raise toolchain.ToolchainError("none here")

    monkeypatch.setattr(toolchain, "load", fail)
    watch.forget()
    try:
        assert watch.native() is None
    finally:
        watch.forget()


def test_layouts_say_where_the_moving_tensors_are() -> None:
    fixed = [square(0), torch.zeros(()), torch.zeros(0, 2)]
    layouts = watch.Layouts(fixed, [square(1), torch.zeros(3)])
    for _ in range(3):
        moving = [square(2)[:, :], torch.ones(9)[3:6]]
        assert layouts.addresses(moving).tolist() == [t.data_ptr() for t in moving]
    for other in (
        torch.zeros(4),
        torch.zeros(3, 1),
        torch.ones(9)[::3],
        torch.zeros(3).half(),
        None,
    ):
        assert layouts.addresses([square(2), other]) is None
    assert layouts.addresses([square(2), torch.zeros(3)]) is not None
    fixed[1].resize_(1)
    assert layouts.addresses([square(2), torch.zeros(3)]) is None


# What a user may keep, and do with it long after.
def mapping_of(opt, p):
    return opt.state, lambda state: state[p].update({KEY: torch.zeros(SIDE, SIDE)})


def dict_of(opt, p):
    return opt.state[p], lambda held: held.update({KEY: torch.zeros(SIDE, SIDE)})


def dict_in_a_state_dict(opt, p):
    return opt.state_dict(), lambda d: d["state"][0].update({KEY: torch.zeros(SIDE, SIDE)})


def tensor_of(opt, p):
    return opt.state[p][KEY], lambda held: held.set_(torch.zeros(SIDE, SIDE))


def array_of(opt, p):
    return opt.state[p][KEY].numpy(), lambda held: held.base.set_(torch.zeros(SIDE, SIDE))


def weak_reference_to(opt, p):
    return weakref.ref(opt.state[p][KEY]), lambda ref: ref().set_(torch.zeros(SIDE, SIDE))


def memory_of(opt, p):
    return opt.state[p][KEY].untyped_storage(), replace_memory


def view_of(opt, p):
    return opt.state[p][KEY].view(-1), lambda view: replace_memory(view.untyped_storage())


def alias_of(opt, p):
    return opt.state[p][KEY].data, lambda alias: replace_memory(alias.untyped_storage())


def replace_memory(storage) -> None:
    """Leave the old memory, as moving to shared memory does; the new one holds zeros."""
    size = storage.nbytes()
    storage.resize_(0)
    TAKEN.append(torch.empty(size, dtype=torch.uint8))  # so that the new memory is not the old one
    storage.resize_(size)
    storage.fill_(0)


TAKEN: list[torch.Tensor] = []


@pytest.mark.parametrize("early", [True, False], ids=["kept from the start", "kept later"])
@pytest.mark.parametrize(
    "keep",
    [
        mapping_of,
        dict_of,
        dict_in_a_state_dict,
        tensor_of,
        array_of,
        weak_reference_to,
        memory_of,
        view_of,
        alias_of,
    ],
    ids=lambda keep: keep.__name__,
)
def test_state_changed_by_an_old_reference_is_noticed(keep, early: bool) -> None:
    """Without a look at `opt.state` at the time of the change."""
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(square(0))
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, compile=compiled)
        for step in range(120):
            p.grad = square(step)
            opt.step()
            if step == (0 if early else 20):
                kept, change = keep(opt, p)
        change(kept)
        p.grad = square(200)
        opt.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_state_is_looked_at_only_while_somebody_could_change_it(monkeypatch) -> None:
    plans = made_plans(monkeypatch)

    def sealed() -> bool:
        """Whether the next step would not look at the state."""
        return plans[-1].snapshot.sealed

    p = torch.nn.Parameter(square(0))
    opt = heavyball.AdamW([p], compile=True)

    def steps(count: int) -> None:
        for _ in range(count):
            p.grad = square(1)
            opt.step()

    steps(4)
    assert sealed()
    saved = opt.state_dict()
    steps(10)
    assert not sealed()
    del saved
    steps(watch.MOST_WAITING)
    assert sealed()
    opt.state[p]  # the reference is gone at once
    steps(1)
    assert not sealed()
    steps(4)
    assert sealed()
    other = copy.copy(opt)  # it has the same state
    steps(2 * watch.MOST_WAITING)
    assert not sealed()
    assert other.state is opt.state


def test_state_under_another_name_or_in_another_dict_is_noticed() -> None:
    p, q = square(0), square(1)
    state = {p: {"a": torch.ones(1), "b": torch.ones(1)}, q: {"c": torch.ones(1)}}
    attributes = {"state": state}
    kept = watch.Kept([p, q], attributes)
    assert kept.holds(attributes)
    state[p]["d"] = state[p].pop("b")
    assert not kept.holds(attributes)
    state[p]["b"] = state[p].pop("d")
    assert kept.holds(attributes)
    moved, last = state[p].pop("b"), state[q].pop("c")
    state[q].update(b=moved, c=last)  # the same tensors under the same names, in the same order
    assert not kept.holds(attributes)
