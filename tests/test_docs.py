"""What the documentation says is what the code says."""

import importlib.util
import os
import re
import signal
from pathlib import Path

import fresh
import pytest
import torch

import heavyball

C = heavyball.chainable
ROOT = Path(__file__).parent.parent


def test_the_generated_pages_are_current() -> None:
    build = str(ROOT / "docs" / "build.py")
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'docs')!r});"
        f"runpy.run_path({build!r}, run_name='__main__')"
    )
    done = fresh.run(program, "--check")
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


# Every page with examples, and what has to be there before they run.
PAGES = {
    page.relative_to(ROOT).as_posix(): ""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if blocks(page)
}
PAGES["docs/measurements.md"] = "import time, statistics\n"  # a function for a GPU, not called
PAGES["docs/writing-a-transform.md"] = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n"
PAGES["docs/distributed.md"] = "def fully_shard(model): pass\n"
PAGES["docs/prodigy.md"] = "def evaluate(model): pass\n"
HEAD = "import torch\nmodel = torch.nn.Linear(64, 10)\nimport heavyball\nC = heavyball.chainable\n"
# Whatever a page leaves in `opt` can step.
TAIL = """
if "opt" in globals():
    opt.zero_grad()
    p = next(model.parameters())
    model(torch.randn(8, 64).to(p.dtype)).square().mean().backward()
    opt.step()
"""


# Runs each script in a process of its own, forked where torch has been imported already.
RUNNER = """
import os, runpy, sys, traceback
import torch._dynamo, heavyball
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.dup2(os.open(script + ".err", os.O_CREAT | os.O_WRONLY), 2)
        code = 1
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    with open(script + ".code", "w") as file:
        file.write(str(os.waitpid(child, 0)[1]))
"""


def script_of(page: str) -> str:
    """A page's examples in order, as a user would type them."""
    lines = []
    for block in blocks(ROOT / page):
        prompts = [line[4:] for line in block.splitlines() if line.startswith((">>> ", "... "))]
        lines.append("\n".join(prompts) if prompts else block)
    tail = TAIL if page not in ("docs/fused_backward.md", "docs/precision.md") else ""
    return HEAD + PAGES[page] + "\n".join(lines) + tail


@pytest.fixture(scope="module")
def run_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    scripts = {page: folder / f"{Path(page).stem.replace('-', '_')}.py" for page in PAGES}
    for page, script in scripts.items():  # a transform can only be declared in a file
        script.write_text(script_of(page))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # torch's own deprecations are not the pages'
    done = fresh.run(
        RUNNER, *scripts.values(), cwd=folder, env=environment, warned=[("error", UserWarning)]
    )
    assert done.returncode == 0, done.stderr
    return scripts


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run_without_a_warning(page: str, run_pages: dict[str, Path]) -> None:
    script = run_pages[page]
    said = script.with_suffix(".py.err").read_text()
    assert script.with_suffix(".py.code").read_text() == "0", said
    assert page == "README.md" or "Warning" not in said


def test_the_first_step_of_the_guides_transform_is_of_the_size_of_a_step(tmp_path: Path) -> None:
    """Its denominator measures the first gradient, as those of the library do."""
    page = tmp_path / "guide.py"
    page.write_text(blocks(ROOT / "docs/writing-a-transform.md")[0])
    spec = importlib.util.spec_from_file_location("guide", page)
    assert spec is not None
    assert spec.loader is not None
    guide = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guide)
    for size in (1e-6, 1.0, 1e6):
        p = torch.nn.Parameter(torch.zeros(3))
        opt = C.ChainOpt([p], 0.5, guide.belief(eps=1e-12), compile=False)
        for _ in range(3):
            p.grad = torch.tensor([1.0, -2.0, 3.0]) * size
            before = p.detach().clone()
            opt.step()
            assert ((p - before).abs() < 1).all()
        torch.testing.assert_close(p.detach().sign(), torch.tensor([-1.0, 1.0, -1.0]))


def test_the_transform_in_ten_lines_is_compiled(tmp_path: Path) -> None:
    (block,) = [text for text in blocks(ROOT / "README.md") if "damp_turns" in text]
    script = tmp_path / "example.py"
    steps = (
        "for _ in range(3):\n    model(torch.ones(2, 64)).sum().backward()\n    opt.step()\n"
        "print(len(opt.kernel_sources()))"
    )
    script.write_text(f"import torch\nmodel = torch.nn.Linear(64, 10)\n{block}\n{steps}")
    program = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = fresh.run(program, cwd=tmp_path, warned=[("error", RuntimeWarning)])
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# Saves twice, then dies while it saves for the third time.
KILLED = """
import os, signal, sys, io
moment = sys.argv[1]

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(thing, file):
    buffer = io.BytesIO()
    real(thing, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    die()

model = torch.nn.Linear(64, 10)
for step in (1, 2, 3):
    with torch.no_grad():
        model.weight.fill_(step)
    if step == 3 and moment == "save":
        real, torch.save = torch.save, half
    elif step == 3:
        setattr(os, moment, die)
    save_checkpoint(Path("kept"), step, model=model)
"""


@pytest.mark.parametrize("moment", ["save", "replace", "never"])
def test_the_checkpoints_of_the_page_survive_a_process_that_is_killed(
    moment: str, tmp_path: Path
) -> None:
    pattern = blocks(ROOT / "docs/checkpoints.md")[0]
    killed = fresh.run(pattern + KILLED, moment, cwd=tmp_path)
    assert killed.returncode == (0 if moment == "never" else -signal.SIGKILL), killed.stderr
    names: dict = {}
    exec(pattern, names)  # the functions as the page has them
    model = torch.nn.Linear(64, 10)
    last = 3 if moment == "never" else 2
    assert names["load_checkpoint"](tmp_path / "kept", model=model) == last
    assert (model.weight == last).all()
    files = sorted(path.name for path in (tmp_path / "kept").glob("step-*"))
    assert files == [f"step-{step:09}.pt" for step in (last - 1, last)]
    # the next one finds nothing in its way, and a damaged one is passed over
    names["save_checkpoint"](tmp_path / "kept", 4, model=model)
    (tmp_path / "kept" / f"step-{4:09}.pt").write_bytes(b"damaged")
    assert names["load_checkpoint"](tmp_path / "kept", model=model) == last
    assert names["load_checkpoint"](tmp_path / "nowhere", model=model) == 0


def test_the_optimizer_that_the_readme_prints_is_the_one_that_is_printed() -> None:
    model = torch.nn.Linear(64, 10)
    opt = C.ChainOpt(
        model.named_parameters(), 1e-3, C.exp_avg(beta=0.95), C.scale_by_adam, C.cautious
    )
    model(torch.randn(8, 64)).square().mean().backward()
    opt.step()
    assert repr(opt) in (ROOT / "README.md").read_text()
