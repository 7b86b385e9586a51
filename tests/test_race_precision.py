"""The command `heavyball precision`, on runs of a few steps."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from heavyball.errors import RaceError
from heavyball.race import precision
from heavyball.race.cli import cli
from heavyball.race.tasks import open_task

MARKS = f"{precision.BEGIN}\nold\n{precision.END}\n"


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("a rose is a rose is a rose. " * 60)
    return path


def test_the_command_writes_table_page_and_picture(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "precision.png"
    page.write_text(f"before\n{MARKS}after\n")
    arguments = ["--seeds", "2", "--steps", "2", "--data", str(text_file(tmp_path))]
    arguments += ["--page", str(page), "--picture", str(picture)]
    done = CliRunner().invoke(cli, ["precision", *arguments])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    for way in precision.WAYS:
        assert f"| {way.label} | {way.weight_bytes} |" in written
    assert "chars: test loss" in written
    assert "digits: test accuracy" in written
    assert "heavyball precision --seeds 0,1 --steps 2" in written
    assert "text.txt" not in written
    precision.put_into(page, "new")
    assert page.read_text() == f"before\n{precision.BEGIN}\nnew\n{precision.END}\nafter\n"


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    bare = tmp_path / "bare.md"
    bare.write_text("nothing")
    for arguments, message in (
        (["--task", "char"], "chars"),
        (["--task", "digits", "--page", str(bare)], "has no lines"),
    ):
        done = CliRunner().invoke(cli, ["precision", *arguments])
        assert done.exit_code == 2
        assert message in done.output
    with pytest.raises(RaceError, match="has no lines"):
        precision.put_into(tmp_path / "missing.md", "")


def test_all_ways_begin_alike_and_differ_in_how_they_keep_the_weights() -> None:
    task = open_task("digits")
    curves = [precision.run(task, way, seed=0, steps=3, lr=3e-3) for way in precision.WAYS]
    assert len({curve.loss[0] for curve in curves}) == 1
    assert len({curve.loss[-1] for curve in curves}) == len(curves)
    again = precision.run(task, precision.WAYS[2], seed=0, steps=3, lr=3e-3)
    assert again == curves[2]


def test_weights_are_promoted_and_their_gradients_are_not() -> None:
    model = precision.Promoted(torch.nn.Linear(3, 2), torch.bfloat16)
    out = model(torch.ones(4, 3))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
