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
