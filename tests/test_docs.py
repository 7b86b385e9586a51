"""What the documentation says is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import heavyball

C = heavyball.chainable
ROOT = Path(__file__).parent.parent


def test_the_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_transform_and_preset_is_documented() -> None:
    for thing in (*C.TRANSFORMS.values(), *heavyball.PRESETS.values()):
        doc = thing.doc if isinstance(thing, C.Transform) else thing.__doc__
        assert doc, thing
        assert len(doc.split("\n\n")[0]) < 200, thing


def test_the_public_namespace_names_every_transform() -> None:
    assert set(C.TRANSFORMS) <= set(C.__all__)
    assert all(hasattr(C, name) for name in C.__all__)


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/writing-a-transform.md",
        "docs/precond_schedule.md",
        "docs/fused_backward.md",
    ],
)
def test_the_examples_run(page: str, tmp_path: Path) -> None:
    """Each page's examples in order, as a user would type them."""
    lines = []
    for block in blocks(ROOT / page):
        prompts = [line[4:] for line in block.splitlines() if line.startswith((">>> ", "... "))]
        lines.append("\n".join(prompts) if prompts else block)
    assert lines
    script = tmp_path / "example.py"  # a transform can only be declared in a file
    head = (
        "import torch\nmodel = torch.nn.Linear(64, 10)\nimport heavyball\nC = heavyball.chainable\n"
    )
    script.write_text(head + "\n".join(lines))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_optimizer_that_the_readme_prints_is_the_one_that_is_printed() -> None:
    model = torch.nn.Linear(64, 10)
    opt = C.ChainOpt(
        model.named_parameters(), 1e-3, C.exp_avg(beta=0.95), C.scale_by_adam, C.cautious
    )
    model(torch.randn(8, 64)).square().mean().backward()
    opt.step()
    assert repr(opt) in (ROOT / "README.md").read_text()
