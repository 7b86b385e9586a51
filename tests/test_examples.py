"""The programs in `examples/` run as a user would run them, and say nothing on the error stream."""

import os
import runpy
import sys
import warnings
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parent.parent
RUNS = {
    "train_and_resume.py": (["--steps", "20"], "equal to the bit: True"),
    "custom_transform.py": ([], "step 200"),
    "language_model.py": (["--steps", "20", "--width", "32", "--layers", "1"], "at first: True"),
    "lora.py": (["--steps", "150"], "gone: True"),
    "image_classifier.py": (["--epochs", "2"], "right: True"),
    "ablation.py": (["--steps", "20", "--seeds", "1"], "scale_by_adam | cautious"),
    "fsdp2.py": ([], "equal to rounding: True"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(RUNS)


# these begin processes of their own, or go on in a new one
ALONE = {"train_and_resume.py", "fsdp2.py"}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_the_example_runs_as_a_program(name: str) -> None:
    words, said = RUNS[name]
    path = str(ROOT / "examples" / name)
    program = f"import runpy, sys; runpy.run_path({path!r}, run_name='__main__')"
    done = fresh.run(
        program,
        *words,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        warned=[("error", Warning)],
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("name", sorted(RUNS.keys() - ALONE))
def test_the_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = RUNS[name]
    path = str(ROOT / "examples" / name)
    monkeypatch.setattr(sys, "argv", [path, *words])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(path, run_name="__main__")
    shown = capsys.readouterr()
    assert said in shown.out
    assert not shown.err
