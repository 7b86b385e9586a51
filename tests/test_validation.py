"""What `load_state_dict` refuses, and that nothing has been changed then."""

import copy
import functools
import io
import math
from typing import Any

import numpy
import pytest
import torch
from helpers import (
    CASES,
    all_params,
    assert_same_optimizers,
    eager,  # noqa: F401
    parameters,
    snapshot,
    train,
)
from test_interrupted import interruptions
from torch import nn

import heavyball
from heavyball import chainable as C

T = torch.tensor
KEY = "scale_by_adam.exp_avg"
FULL = torch.ones(4)


def put(*path: Any) -> Any:
    """Sets the entry of a state dict that the path ends in."""
    *way, last, value = path

    def edit(saved: dict) -> None:
        place: Any = saved
        for key in way:
            place = place[key]
        place[last] = value

    return edit


GROUP = ("param_groups", 0)
# what cannot be, strict or not: the entry that the error names, and the edit
IMPOSSIBLE: dict[str, tuple[str, Any]] = {
    **{f"state {v!r}": ("state", put("state", v)) for v in (None, [1, 2], 3)},
    **{f"groups {v!r}": ("param_groups", put("param_groups", v)) for v in (None, {}, 7)},
    **{f"group {v!r}": ("param_groups", put(*GROUP, v)) for v in (None, 4)},
    **{
        f"params {v!r}": ("params", put(*GROUP, "params", v))
        for v in (None, [[0], 1], 0, [True, 1])
    },
    **{f"names {v!r}": ("param_names", put(*GROUP, "param_names", v)) for v in (3, ["a"], [1, 2])},
    **{f"entries {v!r}": (r"\[1\]", put("state", 1, v)) for v in (5, None, [1, 2], "text")},
    "a name that is none": (r"\[0\] is 5", put("state", 0, 5, FULL)),
    "state of nobody": ("parameter 7", put("state", 7, {"step": T(1.0)})),
    **{f"description {v!r}": ("version", put("heavyball", v)) for v in ([1], {"version": 1.5})},
    "chain": ("chain", put("heavyball", "chain", 3)),
    **{
        f"step {v!r}": ("step", put("state", 0, "step", v))
        for v in (-1, T(-1.0), T(math.nan), T(math.inf), T(1.5), 10**400, "two", T(1j))
    },
    **{
        f"exp_avg {n}": (KEY, put("state", 1, KEY, v))
        for n, v in {
            "sparse": FULL.to_sparse(),
            "text": "text",
            "complex": FULL + 0j,
            "meta": FULL.to("meta"),
            "1e100": FULL.double() * 1e100,
        }.items()
    },
    **{
        f"square {v}": ("exp_avg_sq", put("state", 1, f"{KEY}_sq", torch.full((4,), v)))
        for v in (-1.0, math.nan, math.inf)
    },
    **{
        f"lr {v!r}": ("lr", put(*GROUP, "lr", v))
        for v in (math.nan, -1.0, math.inf, T(math.nan), T(-1.0), T([1.0, 2.0]), T(1), "text", None)
    },
    **{f"betas {v!r}": ("betas", put(*GROUP, "betas", v)) for v in [(0.9, math.nan)]},
    "seed": ("seed", put(*GROUP, "seed", 1.5)),
    "warmup_steps": ("warmup_steps", put(*GROUP, "warmup_steps", -1.0)),
}
# what another chain may have had
MISFITS: dict[str, tuple[str, Any]] = {
    "another shape": (KEY, put("state", 1, KEY, torch.ones(5))),
    "another dtype": (KEY, put("state", 1, KEY, torch.ones(4, dtype=torch.int8))),
    "betas": ("betas", put(*GROUP, "betas", (0.9, 1.5))),
    "unknown state": ("mean", lambda s: (put("state", 1, "mean", FULL)(s), s.pop("heavyball"))),
}


def trained() -> C.ChainOpt:
    opt = heavyball.AdamW(parameters((4,), (4,)), lr=0.1)
    train(opt, range(2))
    return opt


@pytest.mark.parametrize(
    ("name", "edit", "modes"),
    [
        *((*c, (True, False)) for c in IMPOSSIBLE.values()),
        *((*c, (True,)) for c in MISFITS.values()),
    ],
    ids=[*IMPOSSIBLE, *MISFITS],
)
def test_a_refused_load_names_the_entry_and_changes_nothing(name, edit, modes):
    for strict in modes:
        opt, want = trained(), trained()
        saved = copy.deepcopy(opt.state_dict())
        edit(saved)
        with pytest.raises(ValueError, match=rf"(?s)load_state_dict: .*{name}"):
            opt.load_state_dict(saved, strict=strict)
        assert_same_optimizers(opt, want)
        for each in (opt, want):
            train(each, [2])
        assert_same_optimizers(opt, want)


@pytest.mark.parametrize("value", [None, [1], 3, "text"])
def test_what_is_no_dict_is_refused(value):
    with pytest.raises(ValueError, match="the state dict is"):
        trained().load_state_dict(value)


@pytest.mark.parametrize("number", ["weight_sum", "lr_max", "last_beta"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("mode", [True, False])
def test_numbers_of_an_average_that_cannot_be_are_refused(number, value, mode):
    opt, want = (heavyball.SFAdamW(parameters((4,)), 0.1) for _ in range(2))
    for each in (opt, want):
        train(each, range(2))
        each.train(mode)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][f"schedule_free.{number}"] = T(value).double()
    with pytest.raises(ValueError, match=number):
        opt.load_state_dict(saved)
    assert_same_optimizers(opt, want)
    assert_same_optimizers(opt.train(), want.train())


@pytest.mark.parametrize("value", [math.nan, math.inf, T(math.nan), "text", T([1.0, 2.0])])
@pytest.mark.parametrize("key", ["d", "d_steps"])
def test_common_numbers_that_cannot_be_are_refused(key, value):
    opt = heavyball.Prodigy(parameters((4,)), d0=0.1)
    if key not in opt.param_groups[0]:
        pytest.skip("no such entry")
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][key] = value
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"{key}"):
            opt.load_state_dict(saved, strict=strict)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_of_torch_optim_is_called_so(steps):
    source = torch.optim.AdamW(parameters((4,), (4,)))
    train(source, range(steps))
    with pytest.raises(ValueError, match=r"state dict of torch\.optim"):
        trained().load_state_dict(source.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_an_interrupted_load_changes_nothing(strict):
    source, want = trained(), trained()
    train(source, [7])
    saved = source.state_dict()
    base = trained()
    for opt in interruptions(
        lambda: copy.deepcopy(base), lambda o: o.load_state_dict(saved, strict=strict)
    ):
        assert_same_optimizers(opt, want)
        opt.load_state_dict(saved, strict=strict)
        assert not {
            k for k, v in snapshot(opt).items() if "." in k and not v.equal(snapshot(source)[k])
        }


def test_a_hook_that_fails_after_a_load_leaves_the_optimizer_as_it_was():
    opt, want, source = trained(), trained(), trained()
    train(source, [7])

    def fail(_: Any) -> None:
        raise OSError

    opt.register_load_state_dict_post_hook(fail)
    with pytest.raises(OSError):  # noqa: PT011
        opt.load_state_dict(source.state_dict())
    for each in (opt, want):
        train(each, [2])
    assert_same_optimizers(opt, want)


# ---- names


def named(
    order: str, prefix: str = "", **options: Any
) -> tuple[dict[str, nn.Parameter], C.ChainOpt]:
    params = {n: nn.Parameter(torch.zeros(3)) for n in order}
    return params, heavyball.AdamW([(prefix + n, params[n]) for n in order], 0.1, **options)


WRAPPERS = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."]
PREFIXES = ["", *WRAPPERS, "module._orig_mod.", "encoder._orig_mod."]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
@pytest.mark.parametrize("prefix", PREFIXES[:-1])
@pytest.mark.parametrize("swapped", [False, True])
def test_state_goes_by_name(order, strict, prefix, swapped):
    one, opt = named("abc", prefix if swapped else "")
    for i, p in enumerate(one.values()):
        p.grad = torch.full((3,), i + 1.0)
    opt.step()
    two, other = named(order, "" if swapped else prefix)
    assert other.load_state_dict(opt.state_dict(), strict=strict) == ([], [])
    for name in order:
        assert torch.equal(other.state[two[name]][KEY], opt.state[one[name]][KEY])


@pytest.mark.parametrize("order", ["xyz", "abx", "bax"])
def test_other_names_are_refused(order):
    _, opt = named("abc")
    train(opt, [0])
    _, other = named(order)
    with pytest.raises(ValueError, match=r"not saved there: .*x"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("order", ["xyz", "abx", "bax", "xy", "cx"])
def test_what_has_another_name_is_left_and_listed(order):
    one, opt = named("abc")
    train(opt, [0])
    two, other = named(order)
    left = other.load_state_dict(opt.state_dict(), strict=False)
    new, gone = set(order) - set("abc"), set("abc") - set(order)
    for names, keys in ((new, left.missing_keys), (gone, left.unexpected_keys)):
        assert {key.split(".")[0] for key in keys} == names
        assert all(f"{name}.{key}" in keys for name in names for key in ("step", KEY))
    for name in order:
        found = other.state.get(two[name])
        assert torch.equal(found[KEY], opt.state[one[name]][KEY]) if name in one else not found


def test_a_parameter_in_another_group_is_refused_or_found():
    def make(*groups: str) -> tuple[dict[str, nn.Parameter], C.ChainOpt]:
        params = {n: nn.Parameter(torch.zeros(3)) for n in "abcd"}
        return params, heavyball.AdamW(
            [{"params": [(n, params[n]) for n in g], "lr": ord(g[0]) / 1000} for g in groups]
        )

    one, opt = make("ab", "cd")
    train(opt, [0])
    for groups in (("cd", "ab"), ("ac", "bd")):
        two, other = make(*groups)
        with pytest.raises(ValueError, match="group 0 was saved with other parameters"):
            other.load_state_dict(opt.state_dict())
        other.load_state_dict(opt.state_dict(), strict=False)
        for name in "abcd":
            assert torch.equal(other.state[two[name]][KEY], opt.state[one[name]][KEY])
        if groups == ("cd", "ab"):  # hyper-parameters go with the parameters
            assert [g["lr"] for g in other.param_groups] == [0.099, 0.097]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wraps_a_model_is_no_part_of_a_name(prefix):
    plain = functools.reduce(lambda name, wrapper: name.replace(wrapper, ""), WRAPPERS, prefix)
    for pattern in (f"{plain}0.weight", f"{prefix}0.weight", f"{plain}0.*"):
        rules = C.route(C.when(C.sign, name=pattern), otherwise=C.exp_avg)
        params = [(f"{prefix}{n}.weight", nn.Parameter(torch.ones(2))) for n in (0, 1)]
        opt = C.ChainOpt(params, 0.1, rules).init_state()
        assert ["exp_avg" in opt.state[p] for _, p in params] == [False, True]
    rules = C.route(
        C.when(C.sign, predicate=lambda name, _: name == f"{plain}0.weight"), otherwise=C.exp_avg
    )
    opt = C.ChainOpt(params, 0.1, rules).init_state()
    assert ["exp_avg" in opt.state[p] for _, p in params] == [False, True]


def test_names_that_differ_only_in_what_wraps_them_stay_apart():
    def make(order: int) -> C.ChainOpt:
        pairs = [(n, nn.Parameter(torch.zeros(2))) for n in ("w", "module.w")]
        return heavyball.AdamW(pairs[::order])

    opt = make(1)
    train(opt, [0])
    other = make(-1)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(all_params(opt), all_params(other)[::-1], strict=True):
        assert torch.equal(opt.state[p][KEY], other.state[q][KEY])


# ---- entries of others


FOREIGN = {"tensor": torch.full((3,), 7.0), "text": "mine", "list": [1, 2], "number": 2.5}


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("case", CASES[::4], ids=repr)
def test_entries_of_others_change_no_step_and_come_along(case, when):
    runs = []
    for foreign in (False, True):
        opt = case(parameters((4, 3), (4,)))
        for step in range(4):
            if step == when and foreign:
                for p in all_params(opt):
                    opt.state[p].update({f"their {k}": v for k, v in FOREIGN.items()})
            train(opt, [step])
        runs.append(opt)
    for p, q in zip(*map(all_params, runs), strict=True):
        assert torch.equal(p, q)
        assert runs[1].state[q]["their tensor"] is FOREIGN["tensor"]
    buffer = io.BytesIO()
    torch.save(runs[1].state_dict(), buffer)
    buffer.seek(0)
    runs[1].load_state_dict(torch.load(buffer, weights_only=True))
    for opt in runs:
        train(opt, [4])
    for p, q in zip(*map(all_params, runs), strict=True):
        assert torch.equal(p, q)
        found = runs[1].state[q]
        assert torch.equal(found["their tensor"], FOREIGN["tensor"])
        assert [found[f"their {k}"] for k in ("text", "list")] == ["mine", [1, 2]]


# ---- numbers of numpy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", numpy.float64(0.00125)),
        ("betas", (numpy.float64(0.85), 0.95)),
        ("betas", [numpy.float32(0.75), numpy.float64(0.95)]),
        ("weight_decay", numpy.float32(0.25)),
        ("weight_decay", numpy.array(0.25)),
        ("initial_lr", numpy.int64(3)),
    ],
)
def test_a_state_dict_holds_plain_numbers(key, value):
    opt = trained()
    opt.param_groups[0][key] = value
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["param_groups"][0][key] == (tuple(value) if isinstance(value, tuple) else value)
    assert opt.param_groups[0][key] is value
    trained().load_state_dict(saved)
