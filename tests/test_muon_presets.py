"""Muon and NorMuon: who gets Muon, who AdamW, and with what."""

import inspect
import itertools
import pickle

import pytest
import torch
from helpers import one_step
from torch import nn

import heavyball
from heavyball import chainable as C
from heavyball.presets import ALL_PRESETS
from heavyball.presets.muon import IsHidden
from heavyball.runtime import serve

PRESETS = (heavyball.Muon, heavyball.NorMuon)


class Small(nn.Module):
    """A language model in small, and a convolution."""

    def __init__(self):
        super().__init__()
        self.tok_embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.block = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lm_head = nn.Linear(6, 11)

    def forward(self, x):
        h = self.conv(self.tok_embed(x).mT).mT
        h = self.norm(h + self.block(h, h, h, need_weights=False)[0])
        return self.lm_head(h)


def chains(opt):
    rows = [line.split("  ") for line in opt.routing().splitlines()[1:]]
    return {row[0].strip(): row[-1].split("(")[0].strip() for row in rows}


@pytest.mark.parametrize("preset", PRESETS)
def test_embeddings_heads_norms_and_biases_go_to_adamw(preset):
    rule = "muon" if preset is heavyball.Muon else "scale_by_normuon"
    found = chains(preset(Small().named_parameters()))
    assert {name for name, chain in found.items() if chain == rule} == {
        "conv.weight",
        "block.in_proj_weight",
        "block.out_proj.weight",
    }
    assert set(found.values()) == {rule, "scale_by_adam"}


def test_without_names_the_shape_of_a_vocabulary_decides():
    shapes = [(8192, 512), (2048, 512), (4096, 4096), (5000, 600), (4095, 2), (9,), (8192, 8, 8)]
    hidden = [IsHidden()(None, torch.empty(shape, device="meta")) for shape in shapes]
    assert hidden == [False, True, True, False, True, False, True]


def test_names_and_a_predicate_of_the_users_decide():
    named = list(Small().named_parameters())
    found = chains(heavyball.Muon(named, adamw_names=("conv*", "*.bias")))
    assert found["conv.weight"] == "scale_by_adam"
    assert found["tok_embed.weight"] == "muon"
    assert found["norm.weight"] == "scale_by_adam"  # one dimension in any case

    def only_the_block(name, param):
        return name.startswith("block") and param.ndim == 2

    found = chains(heavyball.Muon(named, use_muon=only_the_block))
    assert [n for n, c in found.items() if c == "muon"] == [
        "block.in_proj_weight",
        "block.out_proj.weight",
    ]
    with pytest.raises(ValueError, match=r"conv.bias.*muon needs a matrix"):
        heavyball.Muon(named, use_muon=lambda name, param: True)
    with pytest.raises(ValueError, match=r"adamw_names=.* has no effect with use_muon"):
        heavyball.Muon(named, adamw_names=("x",), use_muon=only_the_block)
    with pytest.raises(TypeError, match="adamw_names='head': expected a tuple"):
        heavyball.Muon(named, adamw_names="head")


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_muon_and_adamw_side_by_side(preset):
    torch.manual_seed(0)
    model, other = Small().double(), Small().double()
    other.load_state_dict(model.state_dict())
    ours = preset(model.named_parameters(), 0.02, adamw_lr=1e-3, weight_decay=0.1)
    rule = C.muon if preset is heavyball.Muon else C.scale_by_normuon
    hidden = [p for n, p in other.named_parameters() if IsHidden()(n, p)]
    rest = [p for n, p in other.named_parameters() if not IsHidden()(n, p)]
    theirs = [
        C.ChainOpt(hidden, 0.02, rule, weight_decay=0.1),
        torch.optim.AdamW(rest, 1e-3, (0.9, 0.95), weight_decay=0.1),
    ]
    for step, rate in itertools.product(range(2), (1.0, 0.5)):
        x = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        for m in (model, other):
            m.zero_grad()
            nn.functional.cross_entropy(m(x).flatten(0, 1), x.flatten()).backward()
        for opt, lr in ((ours, 0.02), (theirs[0], 0.02), (theirs[1], 1e-3)):
            opt.param_groups[0]["lr"] = lr * rate
            opt.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=0, msg=name)


def test_it_can_be_pickled_and_its_default_lr_may_be_zero_or_a_tensor():
    opt = heavyball.Muon(Small().named_parameters(), torch.tensor(0.1), adamw_lr=0.05)
    assert opt.param_groups[0]["adamw_lr_scale"] == pytest.approx(0.5)
    again = pickle.loads(pickle.dumps(opt))
    assert chains(again) == chains(opt)
    assert heavyball.Muon([torch.zeros(2, 2)], 0.0).param_groups[0]["adamw_lr_scale"] == 1.0


def takes_blocks(preset):
    return "blocks" in {*inspect.signature(preset.__init__).parameters, *preset.more_options}


CUT = [name for name, preset in ALL_PRESETS.items() if takes_blocks(preset)]


def test_the_presets_that_take_blocks_are_those_of_transforms_that_do():
    found = set()
    for name, preset in ALL_PRESETS.items():
        chain = preset([torch.ones(4, 4)], lr=0.1, compile=False).chain
        elements = (n.transform for program in chain.programs for n in program.flat)
        found |= {name for t in elements if "blocks" in t.options}
    assert set(CUT) == found


@pytest.mark.parametrize("name", CUT)
def test_blocks_reach_the_transforms_of_a_preset(name):
    """A matrix in blocks steps as its blocks do, and one without a match is whole."""
    made = torch.Generator().manual_seed(0)
    begin, grads = torch.randn(4, 4, generator=made), torch.randn(4, 4, 4, generator=made)
    options = {"compile": False} | ({"rank": 1} if "APOLLO" in name or name == "Dion" else {})

    def ended(named, **more):
        params = [(n, nn.Parameter(begin[rows].clone())) for n, rows in named]
        opt = ALL_PRESETS[name](params, lr=0.1, **options, **more)
        for g in grads:
            for (_, p), (_, rows) in zip(params, named, strict=True):
                p.grad = g[rows].clone()
            one_step(opt)
        return opt, [p.detach() for _, p in params]

    whole, half = slice(None), slice(0, 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            serve.Noise, "__call__", lambda self, shape, salt=0: torch.ones(shape).cumsum(-1)
        )
        _, (cut, plain) = ended([("a", whole), ("b", whole)], blocks={"a": 2})
        _, (first, *_) = ended([("a", half)])
        _, (alone,) = ended([("b", whole)])
    torch.testing.assert_close(plain, alone)
    if name not in ACROSS:
        torch.testing.assert_close(cut[:2], first, rtol=1e-4, atol=1e-5)
    assert not torch.equal(cut, plain)
    chain = ALL_PRESETS[name]([begin], lr=0.1, blocks=2, **options).chain
    assert "blocks=2" in str(chain)
    assert str(C.ChainOpt([begin], 0.1, *C.parse(str(chain))).chain) == str(chain)


# What is of the whole matrix there: sizes of steps and rows, queries of a name, and PSGD's clips.
ACROSS = {"AdaGO", "Muown", "SPlus", "MuonClip", "Shampoo", "AdaMuon"}
ACROSS |= {name for name in CUT if "PSGD" in name or name == "PurePSGD"}
