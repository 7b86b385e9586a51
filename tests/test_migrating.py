"""Every row of docs/migrating.md: its right side can be built, and gives the numbers that it says."""

import re
from pathlib import Path

import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from helpers import eager  # noqa: F401, no kernel is the point here

import heavyball
from heavyball import chainable as C

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|(.*)\|$", PAGE, re.MULTILINE)
SAME = [(there, here) for there, here, note in ROWS if note.strip() == "same numbers"]
STEPS = 6


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((4, 3), (5,))]


def built(text, params):
    model = torch.nn.Linear(3, 2)
    names = {"params": params, "model": model, "torch": torch, "heavyball": heavyball, "C": C}
    others = (prodigyopt, pytorch_optimizer, schedulefree)
    return eval(text, names | {module.__name__: module for module in others})


def trained(text):
    params = parameters()
    start = [p.detach().clone() for p in params]
    opt = built(text, params)
    if hasattr(opt, "train"):
        opt.train()
    made = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for p in params:
            p.grad = 0.1 * p.detach() + torch.randn(p.shape, generator=made, dtype=p.dtype)
        opt.step()
    return torch.cat([(p.detach() - s).flatten() for p, s in zip(params, start, strict=True)])


# How far release 3.2.1 of the PyPI package goes with its defaults in the steps of the test, and 2.3.1
# to 3e-8. It has this library's import name, so it cannot run here.
PYPI = {
    "AdamW": (-0.00617516, 0.00684952, -0.00648407, -0.00709845, -0.00679832, 0.00617516),
    "LaProp": (-0.00890290, 0.00918352, -0.00902444, -0.00929240, -0.00916093, 0.00890290),
    "SFAdamW": (-0.00364363, 0.00388312, -0.00374954, -0.00397734, -0.00386399, 0.00364363),
    "AdEMAMix": (-0.00247192, 0.00274306, -0.00259684, -0.00284531, -0.00272238, 0.00247192),
    "NAdam": (-0.00388550, 0.00423866, -0.00404530, -0.00437441, -0.00421124, 0.00388550),
}  # fmt: skip


@pytest.mark.parametrize("name", PYPI)
def test_what_has_its_numbers(name):
    rows = {there: here for there, here, note in ROWS if note.strip() == "its defaults and numbers"}
    assert len(rows) == len(PYPI)
    start = torch.linspace(-1, 1, 6).reshape(2, 3)
    p = torch.nn.Parameter(start.clone())
    opt = built(rows[f"Foreach{name}(params)"], [p])
    slope = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
    for t in range(8):
        p.grad = 0.1 * p.detach() + slope * (-1.0) ** (t // 3) * (1 + 0.5 * t)
        opt.step()
    # eight additions to numbers of up to 1 in float32, on both sides
    torch.testing.assert_close(
        (p.detach() - start).flatten(), torch.tensor(PYPI[name]), rtol=0, atol=16 * 2**-24
    )


def test_the_page_has_rows_of_all_it_names():
    assert len(ROWS) >= 50
    assert len(SAME) >= 14


@pytest.mark.parametrize("here", sorted({here for _, here, _ in ROWS}))
def test_what_stands_here_can_be_built_and_steps(here):
    params = parameters()
    made = built(here, params)
    opt = made if isinstance(made, torch.optim.Optimizer) else C.ChainOpt(params, 1e-3, made)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    if "fuse_backward" not in here:
        opt.step()


@pytest.mark.parametrize(("there", "here"), SAME)
def test_what_is_said_to_be_the_same_is(there, here):
    theirs, ours = trained(there), trained(here)
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
