"""What a step is told besides gradients: signals of the model, and its loss."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C


@C.transform()
def scaled_by(update: Tensor, *, fed: Tensor, signal: str = "load") -> Tensor:
    """u' = u x, x what was fed."""
    return update * fed


@C.whole_transform(kind="post")
def capped(update: Tensor, *, fed: Tensor, signal: str = "heads") -> Tensor:
    """Scale each of n blocks of rows by 1 / max(1, x), x one number for each."""
    blocks = update.reshape(len(update), len(fed), -1)
    return (blocks / fed.clamp(min=1).reshape(1, -1, 1).to(update)).reshape(update.shape)


def leaf(*shape):
    return nn.Parameter(torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape))


def stepping(*chain, param, **options):
    param.grad = torch.ones_like(param)
    return C.ChainOpt([param], 0.5, *chain, **{"compile": False, **options})


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_uses_what_was_fed_before_it(compile):
    p = leaf(3)
    opt = stepping(scaled_by, scaled_by(signal="other"), param=p, compile=compile)
    before = p.detach().clone()
    for first, second in ((2.0, 3), (torch.tensor([0.5]), torch.tensor(4.0)), (0, 1.0)):
        opt.feed("load", first)
        opt.feed("other", second)
        opt.step()
        before -= 0.5 * float(first) * float(second)
        torch.testing.assert_close(p.detach(), before)


def test_a_number_is_fed_in_full():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = stepping(scaled_by, param=p)
    opt.feed("load", 0.1)
    opt.step()
    assert p.item() == -0.5 * 0.1


def test_a_signal_may_be_a_number_for_each_head():
    p = leaf(4, 2)
    opt = stepping(capped, param=p)
    opt.feed("heads", torch.tensor([4.0, 0.5]))
    opt.step()
    expected = torch.arange(1.0, 9.0).reshape(4, 2) - 0.5
    expected[:2] /= 4
    torch.testing.assert_close(p.detach(), expected)


def test_a_signal_is_used_once_and_the_last_one_counts():
    p = leaf(3)
    opt = stepping(scaled_by, param=p)
    before = p.detach().clone()
    with pytest.raises(
        ValueError, match=r"reads 'load': call feed\('load', ...\) before every step"
    ):
        opt.step()
    assert torch.equal(p, before)
    opt.feed("load", 7.0)
    signal = torch.tensor(2.0)
    opt.feed("load", signal)
    signal.fill_(9.0)
    opt.step()
    torch.testing.assert_close(p.detach(), before - 1)
    with pytest.raises(ValueError, match="call feed"):
        opt.step()


def test_a_step_that_fails_leaves_what_was_fed():
    p = leaf(3)
    opt = stepping(scaled_by, param=p)
    groups = copy.deepcopy(opt.param_groups)
    opt.feed("load", 2.0)
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert [g.keys() for g in opt.param_groups] == [g.keys() for g in groups]
    p.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.arange(1.0, 4.0) - 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lod", 1.0, "nothing in the chain reads it; known: load; did you mean 'load'"),
        ("load", "1", "'1', expected a number or a tensor"),
        ("load", True, "True, expected a number or a tensor"),
        ("load", 1j, "expected a number or a tensor"),
        ("load", torch.tensor([True]), "a tensor of torch.bool, expected real numbers"),
    ],
)
def test_what_is_no_signal_is_refused_by_name(name, value, message):
    with pytest.raises((TypeError, ValueError), match=rf"ChainOpt.feed\('{name}'\): .*{message}"):
        stepping(scaled_by, param=leaf(3)).feed(name, value)


def test_several_numbers_are_refused_where_one_is_read():
    p = leaf(3)
    opt = stepping(scaled_by, param=p)
    opt.feed("load", torch.ones(3))
    with pytest.raises(ValueError, match=r"feed\('load'\): 3 numbers; scaled_by of .*one number"):
        opt.step()
    torch.testing.assert_close(p.detach(), torch.arange(1.0, 4.0))


def test_a_transform_says_how_its_signal_is_called():
    def nameless(update, *, fed):
        return update

    with pytest.raises(TypeError, match="nameless: `fed` needs an option `signal`"):
        C.transform(nameless)


@C.transform()
def by_loss(update: Tensor, *, loss: Tensor) -> Tensor:
    """u' = u L."""
    return update * loss


@pytest.mark.parametrize("element", [scaled_by, by_loss], ids=str)
def test_steps_of_one_parameter_cannot_have_what_step_is_given(element):
    p = leaf(3)
    opt = stepping(element, param=p)
    for act in (lambda: opt.step_parameter(p), opt.fuse_backward):
        with pytest.raises(ValueError, match=rf"{element.name} reads what step\(\) is given"):
            act()


@C.whole_transform(kind="post")
def perhaps_scaled_by(update: Tensor, *, fed: Tensor | None = None, signal: str = "load") -> Tensor:
    """p x, or p where nothing was fed."""
    return update if fed is None else update * fed.to(update)


def test_what_may_be_fed_may_be_fed_before_backward():
    p = leaf(3)
    opt = C.ChainOpt([p], 0.5, perhaps_scaled_by, compile=False, fuse_backward=True)
    before = p.detach().clone()
    for x in (2.0, None, 0.5):
        if x is not None:
            opt.feed("load", x)
        p.sum().backward()
        opt.step()
        before = (before - 0.5) * (x or 1)
        torch.testing.assert_close(p.detach(), before)


@pytest.mark.parametrize("compile", [False, True])
def test_plans_sources_and_previews_of_a_step_that_is_told_something(compile):
    p = leaf(3)
    opt = stepping(scaled_by, param=p, compile=compile)
    groups = copy.deepcopy(opt.param_groups)
    assert bool(opt.plan().kernels) is compile
    assert "fed" not in str(opt.plan())
    assert len(opt.kernel_sources()) == 1
    assert [g.keys() for g in opt.param_groups] == [g.keys() for g in groups]
    opt.feed("load", 3.0)
    (change,) = opt.updates().values()
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p.detach() - before, change)


def test_a_preview_is_told_the_loss():
    p = leaf(3)
    opt = C.ChainOpt([p], 1.0, C.momo, compile=False)
    p.grad = torch.ones(3)
    (change,) = opt.updates(loss=2.0).values()
    before = p.detach().clone()
    opt.step(loss=2.0)
    assert torch.equal(p.detach() - before, change)


@pytest.mark.parametrize("element", [C.momo, C.polyak_rate, by_loss], ids=str)
def test_the_loss_is_given_for_a_step_and_an_entry_of_that_name_is_the_users(element):
    ours, theirs = leaf(3), leaf(3)
    groups = [{"params": [ours], "loss": "theirs"}], [{"params": [theirs]}]
    opt, other = (C.ChainOpt(g, 0.1, element, compile=False) for g in groups)
    for number in (2.0, 1.5):
        for p, each in ((ours, opt), (theirs, other)):
            p.grad = p.detach().clone()
            each.step(loss=number)
            each.updates(loss=torch.tensor(0.5))
        assert torch.equal(ours, theirs)
    assert opt.param_groups[0]["loss"] == "theirs"
    assert not {"loss", "_loss"} & {*other.state_dict()["param_groups"][0]}
    assert not other.load_state_dict(other.state_dict(), strict=False).unexpected_keys
    entries = {*opt.param_groups[0]}
    opt.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        opt.step(loss=7.0)
    assert {*opt.param_groups[0]} == entries


def test_nothing_of_it_is_saved():
    p = leaf(3)
    opt = stepping(scaled_by, param=p)
    keys = set(opt.state_dict()["param_groups"][0])
    opt.feed("load", 2.0)
    assert set(opt.state_dict()["param_groups"][0]) == keys
    opt.step()
    assert set(opt.state_dict()["param_groups"][0]) == keys
    opt.feed("load", 2.0)
    with pytest.raises(ValueError, match="call feed"):
        pickle.loads(pickle.dumps(opt)).step()


def test_a_signal_that_no_parameter_reads_is_refused():
    model = nn.Linear(4, 6)  # neither queries nor keys, by its names
    opt = heavyball.MuonClip(model.named_parameters(), lr=0.1, compile=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.feed("max_logits", 400.0)
    weight = model.weight.detach().clone()
    with pytest.raises(ValueError, match="no parameter has an element that reads it"):
        opt.step()
    assert torch.equal(model.weight, weight)


def test_asking_for_measures_keeps_what_was_fed():
    p = leaf(3)
    opt = stepping(scaled_by, param=p)
    before = p.detach().clone()
    opt.feed("load", 2.0)
    opt.metrics()
    opt.step()
    torch.testing.assert_close(p.detach(), before - 1.0)
