"""The flight recorder: what it writes, when, and that its file computes the step again."""

import contextlib
import os
import warnings

import pytest
import torch
from click.testing import CliRunner
from helpers import eager  # noqa: F401, no kernel is the point here

import heavyball
from heavyball import chainable as C
from heavyball.optim.flight import read, replayed
from heavyball.race.cli import cli

NOTHING = contextlib.nullcontext()
CHAINS = {
    "adam": lambda r: (C.scale_by_adam, r),
    "rate": lambda r: (C.prodigy_d, C.scale_by_adam, r),
    "matrix": lambda r: (r, C.soap_precond()),
    "routed": lambda r: (
        C.route(C.when(C.muon, min_ndim=2), otherwise=(C.scale_by_adam, r)),
        C.cautious,
    ),
    "gated": lambda r: (C.accumulate(2), C.scale_by_adam, r),
}


def parameters():
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=made)) for s in ((4, 3), (3,))]


def step(opt, params, number, size=1.0):
    made = torch.Generator().manual_seed(100 + number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=made) * size
    opt.step()


def flown(tmp_path, chain, steps=5, wrong=float("nan"), keep=3, **options):
    """The file of a step that goes wrong after some that do not; and the optimizer."""
    params = parameters()
    named = [("weight", params[0]), ("bias", params[1])]
    recorder = C.flight_recorder(tmp_path / "flights", keep=keep)
    opt = C.ChainOpt(named, 0.01, *chain(recorder), **options)
    for number in range(steps):
        step(opt, params, number)
    assert not list(tmp_path.rglob("*.pt"))
    with pytest.warns(RuntimeWarning, match="heavyball replay"):
        step(opt, params, steps, wrong)  # the sixth, which two that are accumulated end with
    (path,) = tmp_path.rglob("*.pt")
    return path, opt, params


@pytest.mark.parametrize("name", CHAINS)
def test_every_elements_output_is_computed_again_to_the_bit(name, tmp_path):
    path, opt, _ = flown(tmp_path, CHAINS[name])
    flight = read(path)
    assert flight.names == {0: "weight", 1: "bias"}
    assert set(flight.wrong) == {"weight", "bias"}
    assert len(flight.steps) == 3
    for kept in flight.steps:
        again = replayed(C.ChainOpt, C.parse(flight.chain), kept, flight.options)
        assert [(n, key) for n, key, _ in again] == [(n, key) for n, key, _ in kept["outputs"]]
        for (*_, ours), (*_, theirs) in zip(again, kept["outputs"], strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    # the last output of a step is the weights that the next one begins with
    for before, after in zip(flight.steps, flight.steps[1:], strict=False):
        for number in (0, 1):
            last = [t for n, _, t in before["outputs"] if n == number][-1]
            torch.testing.assert_close(last, after["params"][number])
    assert f"{opt.chain!r}" == flight.chain


@C.transform()
def scaled_by(update, *, fed, signal="load"):
    """u' = u x, x what was fed.

    Shapes: all (*).
    """
    return update * fed


# Chains whose steps are given more than gradients: the elements, the learning rate, how it is stepped.
GIVEN = {
    "lr": (lambda r: (C.scale_by_adam, r), C.cosine(20, peak=0.01), "plain"),
    "number": (lambda r: (C.scale_by_adam(eps=C.linear(10, peak=1e-3)), r), 0.01, "plain"),
    "lambda": (lambda r: (C.schedule("weight_decay", lambda n: 0.1 / n), r), 0.01, "plain"),
    "sam": (lambda r: (C.sam, C.scale_by_adam, r), C.linear(10, peak=0.1), "closure"),
    "looksam": (lambda r: (C.looksam(k=2), r), 0.01, "closure"),
    "polyak": (lambda r: (C.polyak_rate, r), 0.5, "loss"),
    "momo": (lambda r: (r, C.momo), 0.5, "loss"),
    "fed": (lambda r: (scaled_by, r), 0.5, "feed"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_steps_that_are_given_more_than_gradients_are_computed_again_to_the_bit(name, tmp_path):
    chain, lr, how = GIVEN[name]
    params = parameters()
    opt = C.ChainOpt(
        [{"params": params, "owner": object(), "many": {1: iter(())}}],
        lr,
        *chain(C.flight_recorder(tmp_path)),
    )
    for number in range(5):
        ended = float("nan") if number == 4 else 1.0

        def closure(size=ended + number):
            for p in params:
                p.grad = p.detach() * size
            return size

        expected = pytest.warns(RuntimeWarning, match="replay") if number == 4 else NOTHING
        with expected:
            if how == "closure":
                opt.step(closure)
                continue
            loss = closure()
            if how == "feed":
                opt.feed("load", torch.tensor(loss))
            # a loss that is none would leave the step out
            opt.step(**({"loss": 1.0 + number} if how == "loss" else {}))
    (path,) = tmp_path.glob("*.pt")
    flight = read(path)
    # no text says what a user's own transform does
    elements = opt.chain.elements if name == "fed" else C.parse(flight.elements)
    for kept in flight.steps:
        assert kept["outputs"]
        again = replayed(C.ChainOpt, elements, kept, flight.options)
        assert [each[:2] for each in again] == [tuple(each[:2]) for each in kept["outputs"]]
        for (*_, ours), (*_, theirs) in zip(again, kept["outputs"], strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    # what was computed again ends in the weights that the step itself has ended in
    for before, after in zip(flight.steps, flight.steps[1:], strict=False):
        last = {number: tensor for number, _, tensor in before["outputs"]}
        for number in (0, 1):
            torch.testing.assert_close(last[number], after["params"][number])
            assert not torch.equal(last[number], before["params"][number])


def test_a_preview_is_not_recorded(tmp_path):
    params = parameters()
    opt = C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path))
    step(opt, params, 0)
    params[0].grad.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.updates()
    assert not list(tmp_path.iterdir())
    with pytest.warns(RuntimeWarning, match="replay"):
        opt.step()
    (path,) = tmp_path.iterdir()
    assert read(path).count == 2


def test_a_refused_step_is_not_recorded(tmp_path):
    params = parameters()
    opt = C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path))
    step(opt, params, 0)
    opt.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        step(opt, params, 1)
    opt.param_groups[0]["lr"] = 0.01
    with pytest.warns(RuntimeWarning, match="replay"):
        step(opt, params, 2, float("nan"))
    (path,) = tmp_path.iterdir()
    assert (read(path).count, len(read(path).steps)) == (2, 2)


def test_a_step_that_is_far_too_large_is_written_and_measured_by_the_usual_ones(tmp_path):
    path, _, _ = flown(tmp_path, lambda r: (r,), steps=2, wrong=1000.0)
    flight = read(path)
    assert len(flight.steps) == 3
    sizes = [torch.cat([g.flatten() for g in s["grads"].values()]).norm() for s in flight.steps]
    assert sizes[-1] > 100 * sizes[0]
    params = parameters()
    opt = C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path / "none"))
    for number, size in enumerate((1.0, 1.0, 20.0, 1.0, 0.0, 30.0)):
        step(opt, params, number, size)
    assert not (tmp_path / "none").exists()


def test_of_steps_in_a_row_the_first_is_written_and_no_more_than_keep_files(tmp_path):
    params = parameters()
    opt = C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path, keep=2))
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(12):
            step(opt, params, number, 1e4 if number % 4 >= 2 else 1.0)
            counts.append(len(list(tmp_path.glob("*.pt"))))
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_recording_changes_no_step(tmp_path):
    ours, theirs = parameters(), parameters()
    opt = C.ChainOpt(ours, 0.01, C.scale_by_adam, C.flight_recorder(tmp_path))
    other = C.ChainOpt(theirs, 0.01, C.scale_by_adam)
    for number in range(4):
        step(opt, ours, number)
        step(other, theirs, number)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("kind", ["a file", "full", "no right"])
def test_a_disk_that_refuses_ends_no_step(kind, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    if kind == "a file":
        folder.touch()
    elif kind == "full":

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    params = parameters()
    opt = C.ChainOpt(params, 0.01, C.flight_recorder(folder))
    step(opt, params, 0)
    with pytest.warns(RuntimeWarning, match="flight_recorder: .* has no file of this step"):
        step(opt, params, 1, float("nan"))
    step(opt, params, 2)
    assert not list(tmp_path.rglob("*.p*t"))


def test_what_has_no_moment_with_all_gradients_is_refused(tmp_path):
    params = parameters()
    with pytest.raises(ValueError, match="flight_recorder with fuse_backward"):
        C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path), fuse_backward=True)
    with pytest.raises(ValueError, match="flight_recorder with step_parameter"):
        C.ChainOpt(params, 0.01, C.flight_recorder(tmp_path)).step_parameter(params[0])


def test_the_command_shows_where_it_began(tmp_path):
    path, _, _ = flown(tmp_path, CHAINS["adam"], storage_dtype="bfloat16")
    done = CliRunner().invoke(cli, ["replay", str(path), "-p", "bias"])
    assert done.exit_code == 0, done.output
    rows = [
        line.split() for line in done.output.splitlines() if line.strip().startswith(("4", "6"))
    ]
    assert ["4", "grad"] in [row[:2] for row in rows]
    elements = {row[1]: row for row in rows if row[0] == "6"}
    assert elements["grad"][4] == elements["scale_by_adam"][4] == "3"  # all are not finite
    assert elements["descend"][-2:] == ["the", "same"]
    refused = CliRunner().invoke(cli, ["replay", str(path), "-p", "bais"])
    assert refused.exit_code == 2
    assert "nearest: bias" in refused.output


@C.transform
def of_a_user(update):
    """Nothing.

    Shapes: all (*).
    """
    return update * 1


def test_a_users_transform_is_shown_and_not_computed_again(tmp_path):
    path, _, _ = flown(tmp_path, lambda r: (of_a_user, r))
    done = CliRunner().invoke(cli, ["replay", str(path)])
    assert done.exit_code == 0, done.output
    assert "not computed again" in done.output
    assert "of_a_user" in done.output


@pytest.mark.parametrize("text", [None, b"", b"no", "dict"])
def test_what_is_no_such_file_is_refused(text, tmp_path):
    path = tmp_path / "x.pt"
    if text == "dict":
        torch.save({"flight": 99}, path)
    elif text is not None:
        path.write_bytes(text)
    done = CliRunner().invoke(cli, ["replay", str(path)])
    assert done.exit_code == 2
    assert "x.pt" in done.output


def test_presets_take_it(tmp_path):
    params = parameters()
    recorder = C.flight_recorder(tmp_path)
    opt = heavyball.AdamW(params, lr=0.01, gradient_clipping=recorder)
    step(opt, params, 0)
    with pytest.warns(RuntimeWarning, match="replay"):
        step(opt, params, 1, float("nan"))
