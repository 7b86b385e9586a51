"""`heavyball.create`, chains as text and as classes, names and routes of models."""

import copy
import inspect
import pickle

import fresh
import pytest
import torch
from torch import nn

import heavyball
from heavyball import chainable as C


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """What is built here need not be compiled."""
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Net(nn.Module):
    """The head is made first, as some models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 10)
        self.tok = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm((2, 4))


def run(opt, steps=4):
    params = [p for g in opt.param_groups for p in g["params"]]
    for step in range(steps):
        made = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=made)
        opt.step()
    return [p.detach().clone() for p in params]


def pair(make, other):
    """Two optimizers over the same weights, each from its own copy of a model."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    return make(model), other(twin)


def same(one, two, tolerance=0.0):
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True)) <= tolerance


# ---- what


@pytest.mark.parametrize("what", ["AdamW", "adamw", "ADAMW", heavyball.AdamW])
def test_a_preset_by_name_or_class_is_that_class(what):
    opt, right = pair(
        lambda m: heavyball.create(m, what, lr=0.01, weight_decay=0.1),
        lambda m: heavyball.AdamW(m.named_parameters(), lr=0.01, weight_decay=0.1),
    )
    assert type(opt) is heavyball.AdamW
    assert opt.param_groups[0]["param_names"] == right.param_groups[0]["param_names"]
    assert same(run(opt), run(right))


@pytest.mark.parametrize("name", heavyball.PRESETS)
def test_every_preset_has_its_own_lr_unless_one_is_given(name):
    params = [nn.Parameter(torch.ones(2, 2))]
    opt = heavyball.create(params, what=name.lower())
    assert type(opt) is heavyball.PRESETS[name]
    assert opt.param_groups[0]["lr"] == heavyball.PRESETS[name](params).param_groups[0]["lr"]


@pytest.mark.parametrize(
    "what",
    [
        "scale_by_adam(betas=(0.9, 0.95)) | cautious",
        (C.scale_by_adam(betas=(0.9, 0.95)), C.cautious),
        ["scale_by_adam(betas=(0.9, 0.95))", C.cautious],
    ],
    ids=str,
)
def test_a_chain_in_any_form_is_that_chain(what):
    def right(model):
        chain = C.scale_by_adam(betas=(0.9, 0.95)), C.cautious
        return C.ChainOpt(model.named_parameters(), 0.01, *chain, weight_decay=0.1)

    for make in (
        lambda m: heavyball.create(m, what, lr=0.01, weight_decay=0.1),
        lambda m: C.ChainOpt(m, 0.01, transforms=what, weight_decay=0.1),
        lambda m: C.ChainOpt(
            m, 0.01, *([what] if isinstance(what, str) else what), weight_decay=0.1
        ),
        lambda m: C.optimizer_class(what, name="Mine")(m, lr=0.01, weight_decay=0.1),
    ):
        opt, other = pair(make, right)
        assert same(run(opt), run(other))
        assert repr(opt.chain) == repr(other.chain)


def test_a_class_of_a_chain_has_the_lr_of_a_chain():
    made = C.optimizer_class("scale_by_adam | cautious", name="Mine")
    opt = heavyball.create(Net(), made)
    assert type(opt) is made
    assert opt.param_groups[0]["lr"] == heavyball.create(Net(), "sign").param_groups[0]["lr"]
    assert heavyball.create(Net(), made, lr=0.5).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("what", "near"),
    [
        ("AdmW", "AdamW"),
        ("scale_by_adm", "scale_by_adam"),
        ("scale_by_adam | cautos", "cautious"),
        ("AdamWW:lr=1.0", "AdamW"),
        ("scale_by_adam(bettas=(0.9, 0.99))", "betas"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(what, near):
    with pytest.raises((ValueError, TypeError), match=near):
        heavyball.create([nn.Parameter(torch.ones(2))], what)


def test_unknown_options_and_what_is_no_optimizer_are_refused():
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="weight_decay"):
        heavyball.create(params, "AdamW", weight_deacy=0.1)
    for wrong, own in (("layer_dcay", "layer_decay"), ("no_deay", "no_decay")):
        with pytest.raises(TypeError, match=f"'{wrong}'; did you mean '{own}'"):
            heavyball.create(params, "AdamW", **{wrong: "auto"})
    for name in ("DelayedPSGDKron", "delayedpsgdkron"):  # a second name
        assert type(heavyball.create(params, name)) is heavyball.DelayedPSGDKron
    with pytest.raises(TypeError, match="warmup_steps"):
        heavyball.create(params, "scale_by_adam", warmup_step=3)
    with pytest.raises(TypeError, match="SGD"):
        heavyball.create(params, torch.optim.SGD)
    with pytest.raises(TypeError, match="twice"):
        C.ChainOpt(params, 0.1, C.sign, transforms=(C.sign,))
    with pytest.raises(ValueError, match="no_decay='all'"):
        heavyball.create(params, "AdamW", no_decay="all")
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="layer_decay="):
            heavyball.create(Net(), "AdamW", layer_decay=wrong)
    with pytest.raises(ValueError, match="names"):
        heavyball.create(params, "AdamW", layer_decay=0.5)
    with pytest.raises(ValueError, match="blocks"):
        heavyball.create(nn.Linear(2, 2), "AdamW", layer_decay=0.5)


# ---- decay and depth


def by_name(opt, key):
    return {n: g[key] for g in opt.param_groups for n in g["param_names"]}


def test_auto_takes_decay_from_norms_embeddings_and_vectors_of_a_model():
    opt = heavyball.create(Net(), "AdamW", no_decay="auto", weight_decay=0.3)
    decay = by_name(opt, "weight_decay")
    decayed = {"head.weight", *(f"blocks.{i}.fc.weight" for i in range(3))}
    assert {n for n, value in decay.items() if value} == decayed
    assert set(decay.values()) == {0.0, 0.3}


@pytest.mark.parametrize("wrap", [None, "compile", "DataParallel"])
def test_auto_takes_decay_from_what_a_model_names(wrap):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 2, 3))
            self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
            self.table = nn.Parameter(torch.zeros(3, 3))

        def no_weight_decay(self):
            return {"token", "*.1.weight"}

    model = Named()
    if wrap is not None:
        model = torch.compile(model) if wrap == "compile" else nn.DataParallel(model)
    opt = heavyball.create(model, "AdamW", no_decay="auto", weight_decay=0.1)
    bare = {
        name.rpartition("module.")[2].removeprefix("_orig_mod.")
        for group in opt.param_groups
        for name in group["param_names"]
        if group["weight_decay"] == 0
    }
    assert bare == {"token", "blocks.0.bias", "blocks.1.bias", "blocks.1.weight"}


@pytest.mark.parametrize("named", [True, False])
def test_auto_goes_by_shape_without_a_model(named):
    model = Net()
    given = model.named_parameters() if named else model.parameters()
    opt = heavyball.create(given, "SGD", no_decay="auto", weight_decay=0.3)
    for group in opt.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim > 1 else 0.0)
    assert sum(len(g["params"]) for g in opt.param_groups) == len(list(model.parameters()))


def test_auto_takes_every_decay_of_a_chain():
    chain = C.coupled(weight_decay=0.1), C.scale_by_adam, C.decoupled(weight_decay=0.2)
    opt = heavyball.create(Net(), chain, lr=0.1, no_decay="auto")
    keys = [k for k in opt.param_groups[0] if k.endswith("weight_decay")]
    assert len(keys) == 2
    for key in keys:
        assert by_name(opt, key)["norm.weight"] == 0.0 != by_name(opt, key)["head.weight"]


@pytest.mark.parametrize("what", ["AdamW", "Muon", "scale_by_adam"])
def test_layer_decay_is_a_power_of_the_layers_behind(what):
    d = 0.75
    opt = heavyball.create(Net(), what, lr=0.1, layer_decay=d, no_decay="auto")
    factors = {
        "tok.weight": d**4,
        "head.weight": 1,
        "head.bias": 1,
        "norm.weight": 1,
        "norm.bias": 1,
    }
    for i in range(3):
        for end in ("fc.weight", "fc.bias", "norm.weight", "norm.bias"):
            factors[f"blocks.{i}.{end}"] = d ** (3 - i)
    for scale in (1.0, 0.5):
        if scale != 1:
            schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
            assert schedule.get_last_lr() == [g["lr"] for g in opt.param_groups]
        assert by_name(opt, "lr") == pytest.approx({n: 0.1 * scale * f for n, f in factors.items()})
    assert {n for n, v in by_name(opt, "weight_decay").items() if v == 0} >= {"tok.weight"}


def test_groups_that_were_given_keep_what_they_say():
    model = Net()
    groups = [
        {"params": model.blocks.named_parameters(prefix="blocks"), "lr": 0.2, "tag": "body"},
        {"params": model.head.named_parameters(prefix="head"), "weight_decay": 0.7},
    ]
    opt = heavyball.create(groups, "AdamW", lr=0.1, layer_decay=0.5, no_decay="auto")
    lr, decay = by_name(opt, "lr"), by_name(opt, "weight_decay")
    assert lr["blocks.1.fc.weight"] == 0.2 * 0.25
    assert (lr["head.weight"], decay["head.weight"], decay["head.bias"]) == (0.1, 0.7, 0.0)
    assert all(g["tag"] == "body" for g in opt.param_groups if g["param_names"][0][0] == "b")


# ---- text


@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("name", heavyball.PRESETS)
def test_the_text_of_every_presets_chain_trains_as_the_preset(name, decay):
    def other(model):
        group = preset.param_groups[0]
        decay = group.get("weight_decay", 0.0)
        chain = C.parse(repr(preset.chain))
        opt = C.ChainOpt(model.named_parameters(), group["lr"], *chain, weight_decay=decay)
        assert opt.param_groups[0].keys() == group.keys()
        assert repr(opt.chain) == repr(preset.chain)
        return opt

    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    make = heavyball.PRESETS[name]
    takes = decay is not None and "weight_decay" in inspect.signature(make).parameters
    preset = make(model.named_parameters(), **({"weight_decay": decay} if takes else {}))
    assert same(run(preset), run(other(twin)), 1e-6)


def test_the_text_of_a_chain_has_each_element_once():
    p = [nn.Parameter(torch.ones(2, 2))]
    text = "exp_avg | muon | soap_precond(sign) | exp_avg | decoupled | descend"
    assert repr(C.ChainOpt(p, 0.1, text).chain) == text


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sign | shared('a', 0.5)", "shared"),
        ("exp_avg(beta=shared('b', 1.5))", "1.5"),
        ("exp_avg(beta=shared('b'))", "shared"),
        ("prodigy_d(growth_rate=nan)", "nan"),
        ("exp_avg(beta=IsHidden())", "beta"),
    ],
)
def test_what_is_no_value_is_refused(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        C.parse(text)


def test_values_of_text():
    (d, avg) = C.parse("prodigy_d(growth_rate=inf) | exp_avg(beta=shared('b', (0.5, 0.6), 1))")
    assert d.hyper["growth_rate"] == float("inf")
    opt = C.ChainOpt([nn.Parameter(torch.ones(2))], 1.0, d, avg)
    assert opt.param_groups[0]["b"] == (0.5, 0.6)


# ---- classes


def test_a_class_of_a_chain_pickles_into_a_process_that_cannot_import_it(tmp_path):
    cls = C.optimizer_class("scale_by_adam | cautious", name="Mine")
    assert cls.__name__ == "Mine"
    assert issubclass(cls, C.ChainOpt)
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert list(inspect.signature(cls).parameters) == ["params", "lr", "options"]
    opt = cls([nn.Parameter(torch.ones(3))], lr=0.1)
    run(opt)
    assert type(copy.deepcopy(opt)) is cls
    elements = C.optimizer_class((C.scale_by_adam(eps=1e-3), C.cautious), name="Other")
    saved = tmp_path / "saved.pkl"
    saved.write_bytes(pickle.dumps((cls, opt, elements)))
    code = f"""
import pickle
cls, opt, other = pickle.loads(open({str(saved)!r}, "rb").read())
assert cls.__name__ == "Mine" and type(opt) is cls and other.__name__ == "Other"
for p in opt.param_groups[0]["params"]:
    p.grad = p.detach().clone()
opt.step()
print(opt.param_groups[0]["params"][0].tolist())
"""
    found = fresh.run(code)
    assert found.returncode == 0, found.stderr
    p = opt.param_groups[0]["params"][0]
    p.grad = p.detach().clone()
    opt.step()
    assert eval(found.stdout) == p.tolist()


@pytest.mark.parametrize("wrong", ["", "two words", 3, None])
def test_a_name_that_no_class_can_have_is_refused(wrong):
    with pytest.raises(TypeError, match="name="):
        C.optimizer_class("sign", name=wrong)


@pytest.mark.parametrize("t", [*C.TRANSFORMS.values()], ids=lambda t: t.name)
def test_a_transforms_signature_has_its_options(t):
    assert list(inspect.signature(t).parameters) == list(t.defaults)


def test_a_users_transform_has_a_signature():
    @C.transform
    def doubled(update, *, by=2.0, times: int = 1):
        return update * by

    assert str(inspect.signature(doubled)).startswith("(by=2.0, times=1)")
    assert inspect.signature(doubled(by=3.0)).parameters["by"].default == 3.0


# ---- names


def routed(names, shape=(8, 8)):
    opt = heavyball.Muon([(n, nn.Parameter(torch.ones(shape))) for n in names])
    return {n: "muon(" in opt.routing().splitlines()[i + 1] for i, n in enumerate(names)}


def test_muon_knows_the_names_of_embeddings_and_heads():
    adamw = [
        *("output.weight", "to_logits.weight", "lm_head.weight", "shared.weight", "fc.weight"),
        *(
            "pos_emb",
            "cls_token",
            "model.embed_tokens.weight",
            "tok_embeddings.weight",
            "model.fc.weight",
        ),
        *(
            "transformer.wte.weight",
            "classifier.weight",
            "encoder.pos_emb",
            "mask_token",
            "score.weight",
        ),
    ]
    hidden = [
        *("blocks.0.fc.weight", "layers.1.attention.wq.weight", "h.0.mlp.c_fc.weight"),
        *("encoder.layer.0.output.dense.weight", "layer1.0.conv1.weight", "blocks.2.output.weight"),
    ]
    for change in (str, str.upper, str.title):
        names = [change(n) for n in (*adamw, *hidden)]
        assert routed(names) == {n: i >= len(adamw) for i, n in enumerate(names)}


class Tied(nn.Module):
    """Words under another name, also the weights of the last layer."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(12, 8), nn.Linear(8, 8, bias=False)
        self.scales, self.last = nn.LayerNorm((2, 8)), nn.Linear(8, 12, bias=False)
        self.last.weight = self.words.weight


@pytest.mark.parametrize(
    "make", [heavyball.Muon, lambda m: heavyball.create(m, "muon", no_decay="auto")]
)
def test_a_model_tells_by_the_types_of_its_modules(make):
    opt = make(Tied())
    lines = {line.split()[0]: line for line in opt.routing().splitlines()[1:]}
    assert {n for n, line in lines.items() if "muon(" in line} == {"inner.weight"}
    assert "Embedding" in lines["words.weight"]
    assert "LayerNorm" in lines["scales.weight"]
    again = pickle.loads(pickle.dumps(opt))
    assert again.routing() == opt.routing()
    C.ChainOpt(Tied(), 0.1, *C.parse(repr(opt.chain)))
    named = heavyball.Muon(Tied().named_parameters(), adamw_names=("words.*", "*scales*"))
    names = heavyball.Muon(Tied(), adamw_names=("words.*", "*scales*"))
    names.load_state_dict(named.state_dict())  # types or names: the same chain


def test_the_table_of_routes_says_why():
    params = [(n, nn.Parameter(torch.ones(s))) for n, s in (("a.weight", (2, 2)), ("b", (2,)))]
    rules = C.when(C.sign, name="a.*"), C.when(C.exp_avg, ndim=1)
    table = C.ChainOpt(params, 0.1, C.route(*rules, otherwise=C.scale_by_adam)).routing()
    assert "name='a.*'" in table.splitlines()[1]
    assert "ndim=1" in table.splitlines()[2]
    table = C.ChainOpt(params, 0.1, C.route(rules[0], otherwise=C.scale_by_adam)).routing()
    assert "no rule matches" in table.splitlines()[2]
    assert ":" not in C.ChainOpt(params, 0.1, C.sign).routing()


NAMES = ("module.x.weight", "y.weight")


def test_a_submodule_called_module_is_part_of_a_name():
    chain = C.route(C.when(C.sign, name="x.weight"), otherwise=C.exp_avg)
    opt = C.ChainOpt([(n, nn.Parameter(torch.ones(2))) for n in NAMES], 0.1, chain)
    assert "sign" not in opt.routing()
    wrapped = [
        (f"module._orig_mod.{n}", nn.Parameter(torch.ones(2))) for n in ("x.weight", "y.weight")
    ]
    assert "sign" in C.ChainOpt(wrapped, 0.1, chain).routing().splitlines()[1]


def test_names_of_a_wrapped_model_load_into_the_plain_one_and_back():
    def make(*names):
        return heavyball.AdamW([(n, nn.Parameter(torch.ones(2))) for n in names])

    plain, wrapped = make("a", "b"), make("module.b", "module._orig_mod.a")
    for step in range(2):
        for i, g in enumerate(plain.param_groups[0]["params"]):
            g.grad = torch.full((2,), step + i + 1.0)
        plain.step()
    wrapped.load_state_dict(plain.state_dict())
    a, b = plain.param_groups[0]["params"]
    key = "scale_by_adam.exp_avg"
    theirs = [wrapped.state[p][key] for p in wrapped.param_groups[0]["params"]]
    assert torch.equal(theirs[0], plain.state[b][key])
    assert torch.equal(theirs[1], plain.state[a][key])
    with pytest.raises(ValueError, match=r"module\.x"):
        make("x", "y").load_state_dict(make("module.x", "y").state_dict())
