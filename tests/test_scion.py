"""Scion and Muon^2-F: which parameter gets which update, golden values, and a formulation in float64."""

import pickle
from typing import Any

import pytest
import torch
from helpers import close, one_step
from test_muon_presets import Small, chains
from torch import Tensor, nn
from transforms.test_more_matrix import inputs, shown

import heavyball
from heavyball import chainable as C
from heavyball.linalg.orthogonalize import newton_schulz
from heavyball.presets.scion import Scion

OTHER = {"use_spectral": lambda name, param: False}
# after step 4, with lr .05, alpha .1 and radius 3
GOLDEN: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "spectral, constrained": (
        {},
        (0.701590629329, -0.613036600373, 0.232287027749, 0.469255784006, 2.88154221872),
    ),
    "spectral": (
        {"constrained": False},
        (0.821544635501, -0.771426568333, 0.269956958616, 0.508866215722, 4.43284680924),
    ),
    "sign": (
        OTHER,
        (0.579199917519, -0.603000980369, 0.250493631338, 0.543217801733, 2.75325269904),
    ),
    "row": (
        {**OTHER, "embedding": "row"},
        (0.597512916897, -0.600060262426, 0.250689589759, 0.207371426864, 2.79788106425),
    ),
    "column": (
        {**OTHER, "embedding": "column"},
        (1.06981272683, -0.173877254211, 0.668638291879, 0.869275877694, 2.89949631758),
    ),
    "vector": ({}, (0.32966184759, 1.16687203693, 0.253687406028, 4.21559503261)),
}
RADII = {"radius": 3.0, "head_radius": 3.0, "embedding_radius": 3.0, "vector_radius": 3.0}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    options, golden = GOLDEN[name]
    begin, grads = inputs(5, 0, 4) if name == "vector" else inputs(3, 4, 4)
    p = nn.Parameter(begin.clone())
    opt = Scion([p], 0.05, alpha=0.1, products="full", **RADII, **options)
    for g in grads:
        p.grad = g
        opt.step()
    found = torch.tensor(shown(p.detach()), dtype=torch.float64)
    # half a unit in the twelfth digit
    close(found, torch.tensor(golden, dtype=torch.float64), rtol=6e-12, atol=2e-14)


def test_a_head_has_its_own_oracle_and_radius() -> None:
    begin, grads = inputs(3, 4, 4)
    p = nn.Parameter(begin.clone())
    opt = Scion([("lm_head.weight", p)], 0.05, head_radius=3.0, head="row")
    for g in grads:
        p.grad = g
        opt.step()
    found = torch.tensor(shown(p.detach()), dtype=torch.float64)
    close(found, torch.tensor(GOLDEN["row"][1], dtype=torch.float64), rtol=6e-12, atol=2e-14)


@pytest.mark.parametrize("given", ["names", "model"])
def test_every_kind_of_parameter_has_its_own_chain(given: str) -> None:
    model = Small()
    found = chains(
        Scion(
            model if given == "model" else model.named_parameters(), head="row", embedding="column"
        )
    )
    expected = {
        **dict.fromkeys(("conv.weight", "block.in_proj_weight", "block.out_proj.weight"), "o"),
        "tok_embed.weight": "c",
        "lm_head.weight": "r",
    }
    texts = {"o": "orthogonalize", "c": "column_normalize", "r": "row_normalize"}
    opt = Scion(model, head="row", embedding="column")
    for name, p in model.named_parameters():
        program = str(opt.chain.program_for(name, p))
        assert texts.get(expected.get(name, ""), "rms_normalize") in program, name
        assert found[name].startswith("exp_avg"), name


def test_what_is_hidden_may_be_said_by_names_or_a_function() -> None:
    named = list(Small().named_parameters())
    opts = (
        Scion(named, other_names=("conv*",)),
        Scion(named, use_spectral=lambda name, p: p.ndim > 1 and not name.startswith("conv")),
    )
    for opt in opts:
        routed = {n for n, p in named if "orthogonalize" in str(opt.chain.program_for(n, p))}
        assert routed == {n for n, p in named if p.ndim > 1 and not n.startswith("conv")}
    with pytest.raises(ValueError, match=r"other_names.* has no effect with use_spectral"):
        Scion(named, other_names=("conv*",), **OTHER)
    with pytest.raises(TypeError, match="other_names"):
        Scion(named, other_names="conv*")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, r"alpha=0.0: expected in \(0, 1\]"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"head": "spectral"}, "head='spectral': expected one of 'sign', 'row', 'column'"),
        ({"embedding": None}, "embedding=None"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scion([torch.zeros(2, 2)], **options)


def test_a_constrained_matrix_stays_in_its_ball_and_an_alpha_of_1_is_the_gradient_alone() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.empty(6, 4, dtype=torch.float64))
    heavyball.scion_init_([p], radius=2.0)
    opt = Scion([p], 0.1, alpha=1.0, radius=2.0, method="newton-schulz", ns_steps=30)
    bound = 2.0 * (6 / 4) ** 0.5
    for _ in range(20):
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        before = p.detach().clone()
        opt.step()
        assert torch.linalg.matrix_norm(p.detach(), 2) <= bound * (1 + 1e-9)
        u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
        torch.testing.assert_close(p.detach(), 0.9 * before - 0.1 * bound * (u @ vh))


def test_it_is_saved_and_copied() -> None:
    opt = Scion(list(Small().named_parameters()), lr=0.01)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    one_step(opt)
    again = pickle.loads(pickle.dumps(opt))
    assert str(again.chain) == str(opt.chain)
    assert str(C.ChainOpt([torch.zeros(2)], 0.1, *C.parse(str(opt.chain))).chain) == str(opt.chain)


# ---- Muon^2-F


def of_means(p: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """Muon of the momentum over the root of an outer product of means."""
    b, row, col = torch.zeros_like(p), torch.zeros(p.shape[0], 1), torch.zeros(1, p.shape[1])
    row, col = row.double(), col.double()
    for g in grads:
        b = 0.95 * b + 0.05 * g
        update = 0.05 * g + 0.95 * b
        row = 0.95 * row + 0.05 * (g * g).mean(1, keepdim=True)
        col = 0.95 * col + 0.05 * (g * g).mean(0, keepdim=True)
        v = row @ col / row.mean()
        o = newton_schulz((update / (v.sqrt() + 1e-10))[None], "quintic", 5)[0]
        p = p - lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * o
    return p


@pytest.mark.parametrize("shape", [(3, 4), (5, 3)])
def test_muon2_may_factor_its_second_moment(shape: tuple[int, int]) -> None:
    begin, grads = inputs(*shape, 4)
    p = nn.Parameter(begin.clone())
    opt = heavyball.Muon2([p], 0.05, factored=True, products="full")
    for g in grads:
        p.grad = g
        opt.step()
    # some ten products of numbers near 1
    torch.testing.assert_close(p.detach(), of_means(begin, grads, 0.05), rtol=1e-11, atol=1e-12)
    held = {k: v.numel() for k, v in opt.state[p].items() if "gradient_rms" in k}
    assert held.keys() == {"scale_by_gradient_rms.row", "scale_by_gradient_rms.col"}
    assert sorted(held.values()) == sorted(shape)
