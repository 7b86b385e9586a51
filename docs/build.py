"""Writes the generated parts of the documentation; `--check` only reports whether they are current."""

import ast
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import stubs
import torch

import heavyball
from heavyball.core.program import HiddenNode

ROOT = Path(__file__).parent.parent
CHECKS = tomllib.loads((ROOT / "docs" / "checks.toml").read_text())

COMMON = "by the property tests of all transforms."


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines
    )


def presets() -> str:
    """One row per preset: what it is, its chain, its defaults."""
    rows = []
    for name, cls in heavyball.presets.ALL_PRESETS.items():
        opt = cls([torch.zeros(2, 2)])
        summary = (cls.__doc__ or "").split("\n\n")[0].split(";")[0].rstrip(".")
        nodes = [n for n in opt.chain.programs[0].flat if not isinstance(n, HiddenNode)]
        names = " → ".join(f"`{node.transform.name}`" for node in nodes)
        rows.append((f"`{name}`", summary, names))
    return table(("preset", "what it is", "chain"), rows)


def transforms() -> str:
    """One row per transform."""
    rows = [
        (f"[`{name}`](transforms.md#{name})", t.summary.rstrip("."))
        for name, t in heavyball.chainable.TRANSFORMS.items()
    ]
    return table(("transform", "what it does"), rows)


def with_blocks() -> str:
    """Transforms, combinators and presets that take `blocks`."""
    known = heavyball.chainable.TRANSFORMS.items()
    combinators = [
        name
        for name in ("galore", "fira")
        if "blocks" in getattr(heavyball.chainable, name)().enter.options
    ]
    found = sorted([*(name for name, t in known if "blocks" in t.options), *combinators])
    classes = heavyball.presets.ALL_PRESETS.items()
    taking = [
        name
        for name, cls in classes
        if "blocks" in {*inspect.signature(cls.__init__).parameters, *cls.more_options}
    ]
    lines = [f"Transforms: {', '.join(f'`{n}`' for n in found)}.\n"]
    return "\n".join([*lines, f"Presets: {', '.join(f'`{n}`' for n in sorted(taking))}."])


def details() -> Iterator[str]:
    """A section per transform: docstring, hyper-parameters, state, and how it was tested."""
    for name, t in heavyball.chainable.TRANSFORMS.items():
        yield f"### {name}\n\n{t.summary}\n"
        rest = t.doc.split("\n\n", 1)[1:]
        if rest:
            yield f"```text\n{rest[0].strip()}\n```\n"
        if t.hyper:
            yield f"Live hyper-parameters: {_values(t.hyper)}.\n"
        if t.options:
            yield f"Options: {_values(t.options)}.\n"
        if t.all_states:
            yield "State: " + ", ".join(f"`{n}` ({s})" for n, s in t.all_states.items()) + ".\n"
        yield f"Checked: {CHECKS.get(name, COMMON)}\n"


def _values(values: dict) -> str:
    return ", ".join(f"`{n}={_plain(v)}`" for n, v in values.items())


def _plain(value: object) -> str:
    return getattr(value, "__name__", None) or repr(value)


def schedule() -> str:
    """The preconditioner schedule compared with constant intervals."""
    default, constants = heavyball.PrecondSchedule(), (2, 16)
    header = ["steps", "interval", "refreshes"]
    for n in constants:
        header += [f"every {n}", "ratio"]
    rows = []
    for power in range(1, 7):
        steps = 10**power
        total = default.total(steps)
        row = [f"{steps:,}", _interval(default.interval(steps)), f"{total:,}"]
        for n in constants:
            row += [f"{steps // n:,}", f"{steps // n / total:.2f}"]
        rows.append(tuple(row))
    return table(tuple(header), rows)


def _interval(value: float) -> str:
    """Enough digits to show that it is not a whole number; one for small values."""
    if value >= 500:
        return f"{value:.0f}"
    return f"{value:.{5 if value < 1.01 else 3 if value < 1.1 else 1}f}"


def draw_schedule(path: Path) -> None:
    """Cumulative refreshes over steps, for the schedule and for constant intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = sorted({round(10 ** (k / 20)) for k in range(121)})
    default = heavyball.PrecondSchedule()
    axes.plot(steps, [default.total(n) for n in steps], color="#0072B2", lw=2.2, label="schedule")
    for frequency, color, dash in ((2, "#D55E00", (6, 2)), (16, "#009E73", (2, 1.5))):
        shown = [n for n in steps if n >= frequency]
        counts = [n // frequency for n in shown]
        label = f"every {frequency} steps"
        axes.plot(shown, counts, color=color, lw=1.8, ls=(0, dash), label=label)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="refreshes so far")
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # no date in the file, so that the same picture is the same bytes
    figure.savefig(path, dpi=130, metadata={"Software": None})


def fill(text: str, name: str, content: str) -> str:
    """Replace the text between the marks `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def imports_of(path: Path) -> list[str]:
    """The import statements of a module."""
    tree = ast.parse(path.read_text())
    return [ast.unparse(n) for n in tree.body if isinstance(n, ast.ImportFrom)]


def build() -> dict[Path, str]:
    """Every generated file with its text."""
    names, page = ROOT / "docs" / "presets.md", ROOT / "docs" / "transforms.md"
    precond, package = ROOT / "docs" / "precond_schedule.md", ROOT / "heavyball"
    text = fill(names.read_text(), "presets", presets())
    return {
        names: fill(fill(text, "transforms", transforms()), "blocks", with_blocks()),
        page: fill(page.read_text(), "details", "\n".join(details())),
        precond: fill(precond.read_text(), "schedule", schedule()),
        package / "chainable.pyi": stubs.chainable(imports_of(package / "chainable.py")),
        package / "__init__.pyi": stubs.package(imports_of(package / "__init__.py")),
    }


def main() -> int:
    stale = [
        path for path, text in build().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: run make docs")
        return bool(stale)
    picture = ROOT / "assets" / "precond_schedule.png"
    # another release of matplotlib draws other bytes, so the figure is drawn only with its table
    if not picture.exists() or ROOT / "docs" / "precond_schedule.md" in stale:
        draw_schedule(picture)
    for path, text in build().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
