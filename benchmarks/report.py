"""Shows results as tables, in the terminal and in a section of a Markdown file."""

import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cases import COLD_GOAL, FLOOR_GOALS, TEMPORARY_GOAL, WARM_GOAL
from benchmarks.measure import Result, spread
from benchmarks.shapes import Shapes, elements

STEP_COLUMNS = (
    "optimizer",
    "steps",
    "step ms",
    "reference ms",
    "ratio",
    "ratio of middle means",
    "goal",
    "MB once",
    "MB in passes",
    "x floor once",
    "x floor in passes",
    "goal of floor",
)
START_COLUMNS = (
    "chain",
    "shapes",
    "temporary MB",
    "goal of memory",
    "eager first step s",
    "cold, beyond it",
    "goal of cold",
    "warm, beyond it",
    "goal of warm",
)
# quartiles further apart than this mean that something else was running
UNSTEADY = 1.5
EXPLANATION = """\
Each row is one process in which the reference, `torch.optim.AdamW(fused=True)` on parameters of the \
same shapes and dtype, and the optimizer alternate, without garbage collection, after a few untimed \
steps. Times are medians; "ratio" is the ratio of the medians, "ratio of middle means" the ratio of the \
means between the quartiles.

The bandwidth is that of torch's `a.add_(b, alpha=s)` on two long float32 vectors, which reads two \
streams and writes one: the median of repeats before and after the steps. "MB once" is the traffic if \
every byte moves once: the parameter and every state tensor read and written, the gradient read. "MB \
in passes" adds what must be read again because a reduction over a tensor (over all tensors, for a \
global clip) precedes the write, for tensors of more than 65,536 elements. "x floor" is the step's \
time relative to moving these bytes; it can be below 1 if tensors stay in the cache between steps."""
STARTS = """\
"Temporary" is the peak of memory during a later step, minus what was resident before it (the \
process's high-water mark, to about 0.1 MB). Each first step is measured in a new process: eager, \
compiled with an empty kernel cache, and compiled with a filled one. The latter two are given relative \
to the eager first step."""


def verdict(value: float, goal: float | None) -> str:
    """The goal, and whether it was reached."""
    if goal is None:
        return "-"
    return f"<= {goal:.2f} " + ("reached" if value <= goal else f"missed by {value / goal - 1:.1%}")


def label(result: Result) -> str:
    """The case, with the library where it is not this one."""
    case = result.case
    if case.library == "heavyball":
        return case.label
    return f"{case.library} {result.library} {case.label}".replace("  ", " ")


def steps_table(results: Sequence[Result], style: box.Box) -> Table:
    """What a step costs, one row per optimizer."""
    table = Table(*STEP_COLUMNS, box=style)
    for result in results:
        # the reason stands below the tables, where there is room for it
        cells = ("failed",) if result.failure else _step_cells(result)
        table.add_row(label(result), *cells)
    return table


def _step_cells(result: Result) -> Iterator[str]:
    yield str(len(result.times))
    for times in (result.times, result.reference):
        yield f"{1e3 * statistics.median(times):.2f}"
    yield f"{result.ratio:.3f}"
    yield f"{result.middle_ratio:.3f}"
    yield verdict(result.ratio, result.case.goals.get(result.name))
    if result.once is None or result.passes is None:
        return
    moved = (result.once, result.passes)
    yield from (f"{number / 1e6:.1f}" for number in moved)
    yield from (f"{result.over_floor(number):.2f}" for number in moved)
    goal = FLOOR_GOALS.get(result.name) if result.case.goals else None
    yield verdict(result.over_floor(result.passes), goal)


def starts_table(results: Sequence[Result], style: box.Box) -> Table:
    """First steps and temporary memory, one row per chain and shape set."""
    table = Table(*START_COLUMNS, box=style)
    for result in results:
        table.add_row(result.case.label, result.name, *_start_cells(result))
    return table


def _start_cells(result: Result) -> Iterator[str]:
    if result.temporary is None:
        yield from ("not known", "-")
    else:
        yield f"{result.temporary / 2**20:.2f}"
        yield verdict(result.temporary / 2**20, TEMPORARY_GOAL / 2**20)
    if result.eager is not None and result.cold is not None and result.warm is not None:
        yield f"{result.eager:.2f}"
        for seconds, goal in ((result.cold, COLD_GOAL), (result.warm, WARM_GOAL)):
            yield f"{seconds:+.2f}"
            yield verdict(seconds, goal)


def remarks(results: Sequence[Result]) -> Iterator[str]:
    """Sentences on goals that were not reached, chains that were not compiled, and unsteady times."""
    for result in results:
        where = f"{label(result)} on {result.name}"
        if result.notes:
            more = f" (and {len(result.notes) - 1} more)" if result.notes[1:] else ""
            yield f"{where}: {result.notes[0]}{more}"
        if result.failure:
            yield f"{where}: failed, {result.failure}"
            continue
        if max(spread(result.reference), spread(result.times)) > UNSTEADY:
            yield (
                f"{where}: unsteady, the upper quartile is {spread(result.reference):.1f} times the "
                f"lower for the reference, {spread(result.times):.1f} for the optimizer"
            )
        goal = result.case.goals.get(result.name)
        if goal is not None and result.ratio > goal:
            yield f"{where}: ratio {result.ratio:.3f}, {verdict(result.ratio, goal)}"
        floor = FLOOR_GOALS.get(result.name) if result.case.goals else None
        if floor is not None and result.passes and result.over_floor(result.passes) > floor:
            times = result.over_floor(result.passes)
            yield f"{where}: {times:.2f} times the floor, {verdict(times, floor)}"
        yield from _missed_starts(result, where)


def _missed_starts(result: Result, where: str) -> Iterator[str]:
    if result.temporary is not None and result.temporary > TEMPORARY_GOAL:
        yield f"{where}: {result.temporary / 2**20:.2f} MB of temporary memory, <= 1.00"
    for kind, seconds, goal in (
        ("cold", result.cold, COLD_GOAL),
        ("warm", result.warm, WARM_GOAL),
    ):
        if seconds is not None and seconds > goal:
            yield f"{where}: {kind} first step {seconds:+.2f} s, <= {goal:.2f}"


def title(name: str, shapes: Shapes, results: Sequence[Result]) -> str:
    """What a shape set holds, and the bandwidth while it was measured."""
    text = f"{name}: {len(shapes)} tensors, {elements(shapes):,} elements"
    speeds = [r.bandwidth for r in results if r.stream]
    return f"{text}, {statistics.median(speeds) / 1e9:.1f} GB/s" if speeds else text


def rendered(table: Table) -> str:
    """A table as Markdown."""
    # wide enough for every cell, since a line break would end the row
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.strip() for line in lines if line.strip())


def section(
    heading: str, facts: Sequence[str], sets: dict[str, Shapes], results: Sequence[Result]
) -> str:
    """The section of a document for a run."""
    parts = [f"## {heading}", "\n".join(f"- {fact}" for fact in facts), EXPLANATION]
    for name, shapes in sets.items():
        found = [r for r in results if r.name == name]
        parts.append(f"### {title(name, shapes, found)}")
        parts.append(rendered(steps_table(found, box.MARKDOWN)))
    started = [r for r in results if r.eager is not None]
    if started:
        parts += ["### First steps and memory", STARTS]
        parts.append(rendered(starts_table(started, box.MARKDOWN)))
    left = list(remarks(results))
    parts.append("### Not reached, and remarks")
    parts.append(
        "\n".join(f"- {line}" for line in left) or "Every goal was reached, in steady times."
    )
    return "\n\n".join(parts)


def write_section(path: Path, mark: str, text: str) -> None:
    """Put a text between the marks `<!-- mark -->` and `<!-- /mark -->`, in place of what is there.

    A file without them gets them at its end; one that does not exist gets a title.

    Errors: ValueError if only one of the marks is there; the file is as it was.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before = path.read_text() if path.exists() else "# Measurements\n"
    if before.count(start) != before.count(end) or before.count(start) > 1:
        raise ValueError(f"{path}: expected one {start} and one {end}, or neither")
    if start not in before:
        before = f"{before.rstrip()}\n\n{start}\n{end}\n"
    head, rest = before.split(start)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}")
