"""The programs in `examples/` run as a user would run them, and say nothing on the error stream."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNS = {
    "train_and_resume.py": (["--steps", "20"], "equal to the bit: True"),
    "own_recipe.py": ([], "step 200"),
    "fsdp2.py": ([], "equal to rounding: True"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name: str) -> None:
    words, said = RUNS[name]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert not done.stderr
