"""What scripts for torch.optim and frameworks hand over: arguments, group entries, sequences, names."""

import array
import collections
import copy
import io
import pickle
import re
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heavyball
from heavyball.optim.checks import edits

C = heavyball.chainable
DROP_IN = ("AdamW", "SGD", "RMSprop", "NAdam")
TORCH = (
    *("Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD"),
    *("Rprop", "Muon"),
)


def weights(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(shape or (2, 3)))


def run(opt: torch.optim.Optimizer, p: torch.nn.Parameter, steps: int = 3) -> torch.Tensor:
    for t in range(steps):
        p.grad = torch.linspace(1, 2, p.numel()).reshape(p.shape) - t
        opt.step()
    return p.detach()


# ---- arguments


@pytest.mark.parametrize("name", DROP_IN)
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": False, "foreach": True},
        {"fused": None},
        {"capturable": False},
        {"capturable": True},
        {"differentiable": False},
        {"maximize": True, "fused": True},
        {"foreach": False, "capturable": False, "differentiable": False, "maximize": False},
    ],
    ids=str,
)
def test_arguments_of_torch_that_change_no_number_are_taken(name, options):
    p, q = weights(), weights()
    kept = {n: v for n, v in options.items() if n in ("maximize", "foreach")}
    right = run(getattr(torch.optim, name)([q], lr=0.1, **kept), q)
    found = run(getattr(heavyball, name)([p], lr=0.1, compile=False, **options), p)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cls", [*heavyball.PRESETS.values(), None], ids=lambda c: getattr(c, "__name__", "chain")
)
def test_what_torchs_arguments_ask_for_and_is_not_so_is_refused_by_name(cls):
    def make(**options):
        if cls is None:
            return C.ChainOpt([weights()], 0.1, C.scale_by_adam, compile=False, **options)
        return cls([weights()], compile=False, **options)

    with pytest.raises(ValueError, match=r"differentiable=True .*torch\.optim.*leave it out"):
        make(differentiable=True)
    with pytest.raises(ValueError, match="fused=True and foreach=True"):
        make(fused=True, foreach=True)
    for name in ("fused", "capturable", "differentiable"):
        with pytest.raises(TypeError, match=f"{name}='yes'"):
            make(**{name: "yes"})
    opt = make(fused=True, differentiable=False)
    if any(program.has_whole for program in opt.chain.programs):
        with pytest.raises(ValueError, match=r"capturable=True.*CUDA graph"):
            make(capturable=True)
    else:
        make(capturable=True)


# ---- groups

FOREIGN = {
    **{"lr_scale": 0.7, "lr_mult": 2.0, "layer_id": 3, "group_name": "head", "use_muon": True},
    **{"fused": None, "foreach": None, "capturable": True, "amsgrad": False, "maximize": False},
    **{"is_bias": True, "initial_lr": 0.5, "wd_mult": 0.0, "decay": True, "role": "r", "k": 3},
    **{"decoupled_weight_decay": True, "train_mode_of_others": 1, "d_model": 512},
}


@pytest.mark.parametrize("name", ["AdamW", "SGD", "SFAdamW", "SOAP", "Muon", "Prodigy"])
def test_entries_of_others_are_kept_saved_and_loaded(name, tmp_path):
    def make(**more):
        return heavyball.PRESETS[name]([{"params": [weights()], **more}], compile=False)

    for entries in [FOREIGN, *({key: value} for key, value in FOREIGN.items())]:
        opt = make(**entries)
        assert opt.param_groups[0].items() >= entries.items()
        torch.save(opt.state_dict(), tmp_path / "saved.pt")
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        assert saved["param_groups"][0].items() >= entries.items()
        other = make()
        other.load_state_dict(saved)
        assert other.param_groups[0].items() >= entries.items()
        run(other, other.param_groups[0]["params"][0], 1)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("weight_deacy", "weight_decay"),
        ("weigth_decay", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("weight-decay", "weight_decay"),
        ("wieght_deacy", "weight_decay"),
        ("Weight_Decay", "weight_decay"),
        ("beta", "betas"),
        ("beats", "betas"),
        ("esp", "eps"),
        ("LR", "lr"),
        ("warmup_step", "warmup_steps"),
        ("param", "params"),
    ],
)
def test_a_near_miss_of_a_known_entry_is_refused(wrong, meant):
    opt = heavyball.AdamW([weights()])
    for add in (lambda g: heavyball.AdamW([g]), opt.add_param_group):
        with pytest.raises(ValueError, match=f"'{wrong}'.*did you mean '{meant}'"):
            add({"params": [weights()], wrong: 0.5})
    assert len(opt.param_groups) == 1


def test_the_distance_of_names():
    found = [
        edits(a, b)
        for a, b in [("", "ab"), ("abc", "abc"), ("abcd", "acbd"), ("kitten", "sitting")]
    ]
    assert found == [2, 0, 1, 3]


@pytest.mark.parametrize("name", [*TORCH, *heavyball.PRESETS])
def test_groups_of_another_optimizer_are_taken_over(name):
    source = getattr(torch.optim, name) if name in TORCH else heavyball.PRESETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = source([("w", weights())], lr=0.1).param_groups
    if name in heavyball.PRESETS:
        groups[0]["train_mode"] = False  # of its own mode, not of the next one's
    for cls in (
        heavyball.SGD,
        heavyball.SFAdamW,
        heavyball.PSGDKron,
        heavyball.ProdigyPlusScheduleFree,
    ):
        # as many numbers as another method has are none of its own
        pairs = {
            k for k, v in groups[0].items() if isinstance(v, tuple) and cls is not heavyball.SGD
        }
        taken = {k: v for k, v in groups[0].items() if k not in pairs}
        taken.pop("nesterov", None)
        opt = cls([taken], lr=0.5)
        assert opt.param_groups[0]["lr"] == 0.1
        assert opt.param_groups[0]["param_names"] == ["w"]
        assert opt.param_groups[0].get("train_mode", True)
        run(opt, opt.param_groups[0]["params"][0], 1)


@pytest.mark.parametrize(
    ("cls", "entry"),
    [
        (heavyball.AdamW, "amsgrad"),
        (heavyball.AdamW, "maximize"),
        (heavyball.SOAP, "maximize"),
        (heavyball.SGD, "nesterov"),
        (heavyball.RMSprop, "centered"),
        (heavyball.Lion, "differentiable"),
    ],
)
def test_an_entry_that_asks_for_another_chain_is_refused(cls, entry):
    with pytest.raises(ValueError, match=f"{entry}=True has no effect"):
        cls([{"params": [weights()], entry: True}])
    options = {"maximize": True} if entry == "maximize" else {entry: True, "momentum": 0.9}
    if cls in (heavyball.SGD, heavyball.RMSprop):
        cls([{"params": [weights()], entry: True}], **options)  # where the chain does it


@pytest.mark.parametrize(
    "name", ["Prodigy", "ProdigyPlusScheduleFree", "PrecondScheduleProdigySOAP"]
)
def test_what_is_found_while_training_cannot_be_given(name):
    with pytest.raises(ValueError, match=r"d cannot be set here.*set d0"):
        heavyball.PRESETS[name]([{"params": [weights()], "d": 1e-3}])


@pytest.mark.parametrize("of", [torch.optim.AdamW, heavyball.SFAdamW])
def test_a_group_of_another_optimizer_is_checked_for_mistyped_names_too(of):
    group = of([weights()]).param_groups[0]
    heavyball.AdamW([group])
    with pytest.raises(ValueError, match=r"'weight_deacy'.*did you mean 'weight_decay'"):
        heavyball.AdamW([{**group, "weight_deacy": 0.1}])


@pytest.mark.parametrize("name", heavyball.PRESETS)
def test_a_users_own_entry_is_no_mistyped_name_of_any_preset(name):
    own = dict.fromkeys(("tag", "is_bias", "role", "rank", "no_weight_decay"), 1)
    opt = heavyball.PRESETS[name]([{"params": [weights()], **own}], compile=False)
    assert own.items() <= opt.param_groups[0].items()


def test_names_are_as_many_as_parameters():
    for names in ([], ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=f"2 parameters and {len(names)} names"):
            heavyball.AdamW([{"params": [weights(), weights()], "param_names": names}])
    assert "param_names" not in heavyball.AdamW([weights()]).param_groups[0]


# ---- sequences and numbers


class Config(collections.abc.Sequence):
    """As configuration libraries have: neither a tuple nor a list."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, place):
        return self.values[place]


KINDS = {
    "list": list,
    "config": lambda values: Config(*values),
    "user list": collections.UserList,
    "deque": collections.deque,
    "numpy": np.array,
    "numpy float32": lambda values: np.array(values, dtype=np.float32),
    "numpy numbers": lambda values: tuple(map(np.float64, values)),
    "array": lambda values: array.array("d", values),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["constructor", "group", "later", "later, in place"])
@pytest.mark.parametrize("options", [{}, {"compile": False}, {"fuse_backward": True}], ids=str)
def test_any_sequence_of_numbers_is_taken_everywhere(kind, where, options):
    wanted = (0.75, 0.9375)  # which float32 has too
    made = KINDS[kind](wanted)

    def train(given, value, changed):
        p = weights()
        first = {"betas": given} if where == "constructor" else {}
        group = {"betas": given} if where == "group" else {}
        opt = heavyball.AdamW([{"params": [p], **group}], lr=0.1, **first, **options)
        for step in range(5):
            if step == 2 and where.startswith("later"):
                opt.param_groups[0]["betas"] = value
            if step == 3 and where.endswith("in place") and hasattr(made, "__setitem__"):
                changed(opt)
            loss = (p * (torch.linspace(1, 2, 6).reshape(2, 3) - step)).sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
        saved = io.BytesIO()
        torch.save(opt.state_dict(), saved)
        saved.seek(0)
        read = torch.load(saved, weights_only=True)["param_groups"][0]["betas"]
        assert tuple(read) == tuple(opt.param_groups[0]["betas"])
        return p.detach()

    found = train(made, made, lambda opt: made.__setitem__(0, 0.5))
    right = train(wanted, wanted, lambda opt: opt.param_groups[0].update(betas=(0.5, wanted[1])))
    assert torch.equal(found, right)


@pytest.mark.parametrize(
    "wrong",
    ["ab", b"ab", {0.9, 0.99}, {0.9: 1, 0.99: 2}, 0.9, np.array(0.9), ("0.9", "0.99"), (True, 0.9)],
    ids=repr,
)
def test_what_is_no_sequence_of_numbers_is_refused(wrong):
    with pytest.raises(TypeError, match="betas"):
        heavyball.AdamW([weights()], betas=wrong)
    with pytest.raises(TypeError, match="betas"):
        heavyball.AdamW([{"params": [weights()], "betas": wrong}])
    opt = heavyball.AdamW([weights()])
    opt.param_groups[0]["betas"] = wrong
    with pytest.raises(TypeError, match="betas"):
        run(opt, opt.param_groups[0]["params"][0], 1)


# Options that are tuples, nested too, and elements: as Python has them, and configurations.
OPTIONS = {
    "blocks": (heavyball.Muon, {"blocks": {"*": (1, 1)}}),
    "interleaved": (heavyball.Muon, {"blocks": {"*": ("interleaved", 1, (1, 1))}}),
    "table": (heavyball.Muon, {"method": ((3.4, -4.7, 2.0), (3.0, -4.0, 2.0))}),
    "pair": (heavyball.PrecondScheduleSOAP, {"precond_scheduler": (0.3, 9)}),
    "elements": (C.ChainOpt, {"transforms": ("exp_avg", C.scale_by_adam), "lr": 0.1}),
    "element with a chain": (
        lambda p, chain: C.ChainOpt(p, 0.1, C.graft(C.sign, chain)),
        {"chain": (C.exp_avg, C.scale_by_adam)},
    ),
    "rotated chain": (
        lambda p, chain: C.ChainOpt(p, 0.1, C.soap_precond(chain)),
        {"chain": (C.exp_avg, C.scale_by_adam)},
    ),
    "routed chain": (
        lambda p, chain: C.ChainOpt(p, 0.1, C.route(C.when(chain, min_ndim=2))),
        {"chain": (C.exp_avg, C.scale_by_adam)},
    ),
    "projected chain": (
        lambda p, chain: C.ChainOpt(p, 0.1, C.galore(chain, rank=1)),
        {"chain": (C.exp_avg, C.scale_by_adam)},
    ),
    "created": (heavyball.create, {"what": ("exp_avg", "scale_by_adam")}),
    "class": (
        lambda p, what: C.optimizer_class(what, name="Mine")(p, 0.1),
        {"what": ("exp_avg", "scale_by_adam")},
    ),
}


@pytest.mark.parametrize("kind", ["list", "config", "user list"])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_sequence_is_taken_for_an_option_and_for_elements(name, kind):
    make, options = OPTIONS[name]

    def remade(value):
        if isinstance(value, dict):
            return {key: remade(part) for key, part in value.items()}
        return KINDS[kind](list(map(remade, value))) if isinstance(value, tuple) else value

    def trained(given):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(2, 6))
        opt = make([("layer.weight", p)], **given)
        run(opt, p, 3)
        return p.detach(), repr(opt.chain)

    (found, text), (right, wanted) = trained(remade(options)), trained(options)
    assert torch.equal(found, right)
    assert text == wanted


def test_numbers_of_numpy_are_numbers():
    opt = heavyball.PSGDLRA([weights()], lr=np.float32(0.5), rank=np.int64(2), seed=np.int32(3))
    group = opt.param_groups[0]
    assert type(group["lr"]) is float
    assert type(group["seed"]) is int
    opt = heavyball.SOAP([weights()], precondition_frequency=np.int16(3), eps=np.float16(0.5))
    assert type(opt.param_groups[0]["eps"]) is float
    pair = heavyball.SOAP([weights()], precond_scheduler=np.array([0.5, 4.0]))
    assert repr(pair.chain) == repr(heavyball.SOAP([weights()], precond_scheduler=(0.5, 4.0)).chain)


# ---- names


@pytest.mark.parametrize(
    "module", [heavyball, C, heavyball.presets, heavyball.utils], ids=lambda m: m.__name__
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(module: types.ModuleType):
    names = [n for n in getattr(module, "__all__", dir(module)) if len(n) > 4 and n[0] != "_"]
    assert names
    for name in names:
        swapped = name[:2] + name[3] + name[2] + name[4:]
        for wrong in {swapped, name[:-1], name + "s", name.swapcase()} - {*names, *dir(module)}:
            with pytest.raises(AttributeError, match=r"did you mean|it is heavyball") as caught:
                getattr(module, wrong)
            assert wrong in str(caught.value)
    with pytest.raises(AttributeError, match="did you mean 'AdamW'"):
        heavyball.AdmaW  # noqa: B018
    with pytest.raises(AttributeError, match=r"it is heavyball\.chainable\.scale_by_adam"):
        heavyball.scale_by_adam  # noqa: B018
    assert not hasattr(module, "__path_that_nobody_has__")


@pytest.mark.parametrize("strict", [True, False])
def test_groups_that_differ_are_told_with_their_numbers(strict):
    def make(*sizes):
        groups = [{"params": [weights() for _ in range(size)]} for size in sizes]
        return heavyball.AdamW(groups, compile=False)

    with pytest.raises(ValueError, match=r"different number of parameter groups.*3.*1"):
        make(3).load_state_dict(make(1, 1, 1).state_dict(), strict)
    with pytest.raises(ValueError, match=r"\b5\b.*\b2\b"):
        make(1, 2).load_state_dict(make(1, 5).state_dict(), strict)


# What a group of torch.optim says of how its optimizer was built, and the option that says so here.
BUILT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "Adam",
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True},
    ),
    (
        "RAdam",
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True},
    ),
    (
        "NAdam",
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True},
    ),
    ("Adagrad", {"initial_accumulator_value": 0.5}, {"initial_accumulator_value": 0.5}),
    ("ASGD", {"t0": 1}, {"t0": 1}),
    ("Muon", {"nesterov": False}, {"nesterov": False}),
    ("Muon", {"ns_steps": 3}, {"ns_steps": 3}),
    ("Muon", {"adjust_lr_fn": "match_rms_adamw"}, {"scale": "match_rms_adamw"}),
    ("Muon", {"ns_coefficients": (2.0, -1.5, 0.5)}, {"method": ((2.0, -1.5, 0.5),)}),
]


def _beside_torch(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    """How far the weights are apart after steps with torch's groups, in units of their movement."""
    torch.manual_seed(0)
    start = torch.randn(6, 4, dtype=torch.float64)
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    groups = getattr(torch.optim, name)([one], lr=0.01, **theirs).param_groups
    opts = (
        getattr(heavyball, name)(groups, **ours),
        getattr(torch.optim, name)([other], lr=0.01, **theirs),
    )
    for _ in range(5):
        gradient = torch.randn(6, 4, dtype=torch.float64)
        for p, opt in zip((one, other), opts, strict=True):
            p.grad = gradient.clone()
            opt.step()
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / (other - start).abs().max())


@pytest.mark.parametrize(("name", "theirs", "ours"), BUILT, ids=lambda v: str(v))
def test_how_a_group_of_torch_was_built_is_followed_or_refused(
    name: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    key = next(iter(theirs))
    with pytest.raises(ValueError, match=rf"{key}=.*pass {next(iter(ours))} to {name}"):
        _beside_torch(name, theirs, {})
    # torch multiplies Muon's matrices in bfloat16, and keeps a number of NAdam and ASGD in float32
    bound = {"Muon": 0.1, "NAdam": 5 * 2.0**-24, "ASGD": 5 * 2.0**-24}.get(name, 1e-12)
    assert _beside_torch(name, theirs, ours) < bound


def test_a_copy_refuses_what_its_original_does() -> None:
    opt = copy.deepcopy(heavyball.Muon([torch.nn.Parameter(torch.ones(3, 2))]))
    group = {"params": [torch.nn.Parameter(torch.ones(3, 2))], "ns_steps": 3}
    with pytest.raises(ValueError, match="ns_steps=3"):
        opt.add_param_group(group)


def test_groups_of_torchs_adafactor_mean_the_same() -> None:
    settings = {"beta2_decay": -0.5, "eps": (None, 1e-2), "d": 2.0, "weight_decay": 0.1}
    assert _beside_torch("Adafactor", settings, {}) < 1e-12
    both = {**settings, "eps": (1e-6, 1e-2)}
    assert _beside_torch("Adafactor", both, {"eps": (1e-8, 1e-3)}) < 1e-12
    with pytest.raises(ValueError, match="pass eps to Adafactor"):
        _beside_torch("Adafactor", both, {})


def changed(**theirs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that torch and this library call the same."""
    return theirs, theirs


DECAY = {"weight_decay": 0.1, "decoupled_weight_decay": True}
BETAS = {"betas": (0.8, 0.95), "eps": 1e-6}
MUON = {"lr": 0.01, "weight_decay": 0.1, "nesterov": False, "ns_steps": 4}
# Settings in torch's words and in ours.
EXCHANGED: list[tuple[str, tuple[dict[str, Any], dict[str, Any]]]] = [
    ("SGD", changed(lr=0.1, weight_decay=0.1)),
    ("SGD", changed(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    ("SGD", changed(lr=0.1, momentum=0.9, dampening=0.3)),
    ("Adam", changed(lr=0.01)),
    ("Adam", changed(lr=0.01, **BETAS, **DECAY, amsgrad=True)),
    ("Adam", changed(lr=0.01, **BETAS, weight_decay=0.1, maximize=True)),
    ("AdamW", changed(lr=0.01)),
    ("AdamW", changed(lr=0.01, **BETAS, weight_decay=0.2, amsgrad=True)),
    ("NAdam", changed(lr=0.01, weight_decay=0.1)),
    ("NAdam", changed(lr=0.01, **BETAS, **DECAY, momentum_decay=0.01)),
    ("RAdam", changed(lr=0.01, weight_decay=0.1)),
    ("RAdam", changed(lr=0.01, **BETAS, **DECAY)),
    ("Adagrad", changed(lr=0.1, lr_decay=0.1, weight_decay=0.1, eps=1e-6)),
    ("Adagrad", changed(lr=0.1, initial_accumulator_value=0.3)),
    ("Adadelta", changed(lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1)),
    ("Adamax", changed(lr=0.01, **BETAS, weight_decay=0.1)),
    ("ASGD", changed(lr=0.1, lambd=0.01, alpha=0.6, t0=2, weight_decay=0.1)),
    ("Rprop", changed(lr=0.01, etas=(0.4, 1.3), step_sizes=(1e-4, 1.0))),
    ("RMSprop", changed(lr=0.01, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1)),
    ("RMSprop", changed(lr=0.01, eps=1e-6)),
    ("Muon", changed(lr=0.01, weight_decay=0.1)),
    (
        "Muon",
        (
            {**MUON, "adjust_lr_fn": "match_rms_adamw"},
            {**MUON, "scale": "match_rms_adamw"},
        ),
    ),
]
# What torch takes from its constructor alone, whatever a group says.
OF_THE_CONSTRUCTOR = ("initial_accumulator_value",)


def _trained(opt: torch.optim.Optimizer) -> tuple[torch.Tensor, float]:
    """The weights of one matrix after some steps, and how far they have gone."""
    (p,) = opt.param_groups[0]["params"]
    start, drawn = p.detach().clone(), torch.Generator().manual_seed(5)
    for _ in range(5):
        p.grad = torch.randn(p.shape, generator=drawn, dtype=p.dtype)
        opt.step()
    return p.detach(), float((p.detach() - start).abs().max())


def _matrix() -> list[torch.nn.Parameter]:
    drawn = torch.Generator().manual_seed(4)
    return [torch.nn.Parameter(torch.randn(6, 4, generator=drawn, dtype=torch.float64))]


@pytest.mark.parametrize(("name", "settings"), EXCHANGED, ids=lambda v: str(v))
def test_groups_go_to_torch_and_come_from_it(name: str, settings: tuple) -> None:
    """An optimizer that is given the groups of its namesake steps as the namesake does."""
    theirs, ours = settings
    torchs, own = getattr(torch.optim, name), getattr(heavyball, name)
    expected, moved = _trained(torchs(_matrix(), **theirs))
    asked = {key: value for key, value in theirs.items() if key in OF_THE_CONSTRUCTOR}
    groups = own(_matrix(), **ours).param_groups
    found, _ = _trained(torchs(groups, **asked))
    assert torch.equal(found, expected)
    # what a group cannot say is refused, see above, and given to the constructor
    of_groups = {"lr", "weight_decay", "betas", "eps", "etas", "step_sizes", "alpha", "rho"}
    built = {key: value for key, value in ours.items() if key not in of_groups}
    found, _ = _trained(own(torchs(_matrix(), **theirs).param_groups, **built))
    # torch multiplies Muon's matrices in bfloat16; the others are 1e-6 apart at most, NAdam and ASGD for
    # a number that torch keeps in float32
    bound = 0.1 if name == "Muon" else 1e-6
    assert float((found - expected).abs().max()) <= bound * moved


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ASGD", {"t0": np.float64(2)}),
        ("Adagrad", {"initial_accumulator_value": np.float32(0.5)}),
        ("Muon", {"method": collections.UserList([[3.4, -4.7, 2], [3, -4, 2]])}),
        ("Muon", {"ns_steps": np.int64(3)}),
    ],
    ids=str,
)
def test_what_groups_say_of_their_chain_is_plain(name: str, options: dict[str, Any]) -> None:
    """Wherever it was read from: a saved dict loads, a pickled one needs no configuration's class."""
    opt = getattr(heavyball, name)(_matrix(), **options)
    _trained(opt)
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True)["param_groups"][0].keys() >= {"lr"}
    assert b"UserList" not in pickle.dumps(opt)
    listed = {key: list(v) for key, v in opt.param_groups[0].items() if isinstance(v, tuple)}
    again = getattr(heavyball, name)([{**opt.param_groups[0], **listed}], **options)
    assert again.param_groups[0].keys() == opt.param_groups[0].keys()


def test_every_namesake_of_torch_is_exchanged() -> None:
    both = {name for name in heavyball.PRESETS if hasattr(torch.optim, name)}
    assert both == {name for name, _ in EXCHANGED} | {"Adafactor"}


def test_groups_of_adafactor_go_to_torch_in_its_words() -> None:
    """There `eps` is a pair, whose None no live number can be: as they are they cannot be stepped."""
    settings = {"lr": 0.05, "beta2_decay": -0.7, "eps": (None, 1e-2), "d": 1.5, "weight_decay": 0.1}
    expected, _ = _trained(torch.optim.Adafactor(_matrix(), **settings))
    opt = heavyball.Adafactor(_matrix(), **settings)
    with pytest.raises(TypeError):
        _trained(torch.optim.Adafactor(opt.param_groups))
    page = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
    recipe: dict[str, Any] = {}
    exec(re.search(r"^def torchs_groups.*?(?=^```)", page, re.M | re.S).group(), recipe)
    opt = heavyball.Adafactor(_matrix(), **settings)
    found, _ = _trained(torch.optim.Adafactor(recipe["torchs_groups"](opt)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
