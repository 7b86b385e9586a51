"""Checkpoints as older versions wrote them are loaded, and training goes on as it did there.

Each file of `checkpoints/` was written by `python tests/test_old_checkpoints.py FILE` with the package
of that time: `first` when state dicts got a version, `columns` before SOAP kept eigenvectors as rows,
`rows` before version 2, then one for each version.
"""

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heavyball

FOLDER = Path(__file__).parent / "checkpoints"
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SFAdamW": {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.99)},
    "SOAP": {"lr": 0.1},
    "ProdigyPlusScheduleFree": {"d0": 0.01},
}
SAVED_AT, MORE = 7, 3


def fill(params: list[nn.Parameter], step: int) -> None:
    """Gradients of a loss with strongly unequal axes, and a little of something else in each step."""
    for p in params:
        n = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape) + 1
        first = torch.arange(len(p), dtype=torch.float64)
        slopes = (first[:, None] * (first + 1) * 0.7).cos()
        p.grad = slopes @ (p.detach() - n.sin()) + 0.1 * (n * (step + 1.3)).cos()


def begin(name: str) -> tuple[Any, list[nn.Parameter]]:
    params = [nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (15, 4)]
    params[0] = nn.Parameter(params[0].detach().reshape(5, 3))
    return getattr(heavyball, name)(params, compile=False, **OPTIONS[name]), params


def advance(opt: Any, params: list[nn.Parameter], first: int, count: int) -> list[Tensor]:
    for step in range(first, first + count):
        fill(params, step)
        opt.step()
    return [p.detach().clone() for p in params]


def write(path: str) -> None:
    """Write a checkpoint of every optimizer that there is, and how it goes on."""
    found = {}
    for name in (n for n in OPTIONS if hasattr(heavyball, n)):
        opt, params = begin(name)
        weights = advance(opt, params, 0, SAVED_AT)
        saved = copy.deepcopy(opt.state_dict())
        continued = advance(opt, params, SAVED_AT, MORE)
        found[name] = {"saved": saved, "weights": weights, "continued": continued}
    buffer = io.BytesIO()
    torch.save(found, buffer)
    Path(path).write_bytes(buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


FILES = sorted(FOLDER.glob("[!p]*.pt"))  # those of another package, pypi-*, are test_adopt's
KINDS = [(path, name) for path in FILES for name in load(path)]


def test_every_version_has_a_checkpoint():
    versions = {load(p)["AdamW"]["saved"]["heavyball"]["version"] for p in FILES}
    assert versions == set(range(1, heavyball.checkpoint.VERSION + 1))
    assert {p.stem for p in FILES} >= {"first", "columns", "rows"}


@pytest.mark.parametrize(("path", "name"), KINDS, ids=[f"{p.stem}-{n}" for p, n in KINDS])
@pytest.mark.parametrize("strict", [True, False])
def test_an_old_checkpoint_goes_on_as_it_did(path, name, strict):
    known = load(path)[name]
    opt, params = begin(name)
    with torch.no_grad():
        for p, w in zip(params, known["weights"], strict=True):
            p.copy_(w)
    left = opt.load_state_dict(known["saved"], strict=strict)
    # a partial load says which numbers of a group the older version did not have
    assert not left.unexpected_keys
    assert all(key.startswith("param_groups.0.d_") for key in left.missing_keys), left
    for found, expected, before in zip(
        advance(opt, params, SAVED_AT, MORE), known["continued"], known["weights"], strict=True
    ):
        way = (expected - before).abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9 * way)


def test_bases_that_may_be_either_are_refused():
    opt, params = begin("SOAP")
    advance(opt, params, 0, SAVED_AT)
    saved = copy.deepcopy(opt.state_dict())
    saved["heavyball"]["version"] = 1
    for key in [k for k in saved["state"][0] if ".gram." in k]:
        # diagonal in every basis
        saved["state"][0][key] = torch.eye(len(saved["state"][0][key]), dtype=torch.float64)
    before = copy.deepcopy(opt.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"'to_eigenbasis.basis' .* version 1"):
            opt.load_state_dict(saved, strict=strict)
    for key in [k for k in saved["state"][0] if ".basis." in k]:  # either reading is the same
        saved["state"][0][key] = torch.eye(len(saved["state"][0][key]), dtype=torch.float64)
    begin("SOAP")[0].load_state_dict(saved)
    assert str(opt.state_dict()) == str(before)


if __name__ == "__main__":
    write(sys.argv[1])
