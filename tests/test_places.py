"""Other torch releases and other machines: each by taking away what is not there."""

import os
import re
import tomllib
import warnings
from pathlib import Path

import fresh
import pytest
import torch

from heavyball.compiler.cpp import toolchain
from heavyball.diagnostics.versions import TESTED, check_torch

ROOT = Path(__file__).parent.parent
REAL = " ".join(toolchain.compiler())


# ---- releases of torch


@pytest.mark.parametrize("version", ["2.10.2", "2.16.0", "3.0.0+cpu", "9.9", "nightly"])
def test_a_release_that_was_not_tested_warns_with_those_that_were(version):
    with pytest.warns(UserWarning, match=f"{re.escape(version)}.*2.11 to 2.14") as seen:
        check_torch(version)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("version", [torch.__version__, *TESTED, "2.13.1+cu130", "2.14.0a0+git1"])
def test_one_that_was_tested_does_not(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_torch(version)


def test_no_release_of_torch_is_refused_for_being_new():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [text for text in project["dependencies"] if text.startswith("torch")]
    assert needed == f"torch>={TESTED[0]}"


# ---- machines

STEP = """
import warnings
import heavyball

def stepped(compile):
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(float(p.numel())).sin().view_as(p))
    opt = heavyball.AdamW(model.parameters(), lr=0.01, compile=compile)
    for _ in range(2):
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return opt, torch.cat([p.detach().flatten() for p in model.parameters()])

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    opt, ours = stepped("auto")
for p in opt.param_groups[0]["params"]:
    p.grad = torch.ones_like(p)
torch.testing.assert_close(ours, stepped(False)[1])
print(len(opt.plan().kernels) > 0, len(seen))
"""

WITHOUT_POSIX = """
import os, sys
for name in ("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "register_at_fork", "killpg"):
    delattr(os, name)
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
"""


def on_a_machine(before, tmp_path, **environment):
    """What a new process with an empty cache of kernels prints, and what it warns of."""
    home = {"HEAVYBALL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = fresh.run(f"import torch\n{before}{STEP}", env={**os.environ, **home, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_machine_without_forks_and_users_and_with_a_torch_that_was_not_tested(tmp_path):
    newer = 'torch.__version__ = "9.9.1"\n'
    said, warned = on_a_machine(newer + WITHOUT_POSIX, tmp_path, CXX=f"{REAL} -O1")
    assert said == "True 0\n"  # it has kernels, and steps do not warn
    assert re.search(r"<string>:\d+: UserWarning: torch 9.9.1: .* 2.11 to 2.14", warned)
    assert warned.count("UserWarning") == 1
