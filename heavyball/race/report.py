"""What the user sees: a progress bar during the race, and a table after it."""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from heavyball.race.plan import Race

# Wide enough for the table where the output is no terminal.
PLAIN_WIDTH = 160


def console(stderr: bool = False) -> Console:
    """A console on the output streams of this moment."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


class Bar:
    """A progress bar on a terminal, one line for each run elsewhere."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self.all = self.progress.add_task("runs", total=None)
        self.one = self.progress.add_task("steps", total=None)
        self.count, self.total, self.measure = 0, 0, ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def begin(self, race: Race, done: int) -> None:
        self.count, self.total, self.measure = done, race.count(), race.task.measure
        if done:
            self.out.print(f"{done} of {self.total} runs were done before")
        self.progress.update(self.all, total=self.total, completed=done)
        self.progress.update(self.one, total=race.settings.steps)

    def run(self, label: str, lr: float, seed: int) -> None:
        short = label if len(label) <= 40 else label[:39] + "…"
        name = f"{short}  lr {lr:g}  seed {seed}"
        self.progress.update(self.one, completed=0, description=Text(name).markup)

    def step(self, step: int) -> None:
        self.progress.update(self.one, completed=step)

    def end(self, record: dict[str, Any]) -> None:
        self.count += 1
        self.progress.update(self.all, completed=self.count)
        if not self.out.is_terminal:
            result = f"diverged at step {record['stopped_at_step']}"
            if record["status"] == "finished":
                measure = f"{self.measure} {record['measure']:.4g}"
                result = f"test loss {record['test_loss']:.4g}, {measure}"
            name = f"{record['contender']}, lr {record['lr']:g}, seed {record['seed']}"
            line = f"[{self.count}/{self.total}] {name}: {result} ({record['seconds']:.1f} s)"
            self.out.print(Text(line), soft_wrap=True)


def result_table(content: Mapping[str, Any]) -> Table:
    """The results, best first: those that did not diverge by their mean test loss."""
    task, seeds = content["task"], len(content["seeds"])
    plural = "seeds" if seeds > 1 else "seed"
    sign = "≥" if task["target_on"] == "accuracy" else "≤"
    target = f"target: test {task['target_on']} {sign} {number(task['target'], 6)}"
    if isinstance(content["arguments"]["target"], str):
        target += f", {content['arguments']['target']}'s at the end"
    title = f"{task['name']}, {content['settings']['steps']} steps, {seeds} {plural}; {target}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("optimizer", overflow="fold", min_width=16)
    for head in (
        "best lr",
        "test loss",
        task["measure"],
        "steps to\ntarget",
        "seconds to\ntarget",
        "ms per\nstep",
        "state bytes\nper parameter",
    ):
        table.add_column(head, justify="right")
    ordered = sorted(content["results"], key=_rank)
    for result in ordered:
        table.add_row(*_row(result, task["measure"], seeds))
    return table


def _rank(result: Mapping[str, Any]) -> float:
    return float("inf") if result["best"] is None else result["best"]["test_loss"]["mean"]


def _row(result: Mapping[str, Any], measure: str, seeds: int) -> list[Text]:
    best = result["best"]
    if best is None:
        any_lr = result["by_lr"][0]
        cells = ["-", "diverged", "-", "-", "-", number(any_lr["step_ms"], 3)]
        return [Text(c) for c in (result["label"], *cells, _bytes(any_lr))]
    reached = best["reached_target"]
    partly = f" ({reached} of {seeds})" if 0 < reached < seeds else ""
    steps, seconds = best["steps_to_target"], best["seconds_to_target"]
    cells = [
        f"{best['lr']:g}",
        spread(best["test_loss"], seeds),
        spread(best[measure], seeds),
        f"{steps['mean']:.0f}{partly}" if steps else "-",
        f"{seconds['mean']:.2f}{partly}" if seconds else "-",
        number(best["step_ms"], 3),
    ]
    return [Text(c) for c in (result["label"], *cells, _bytes(best))]


def _bytes(entry: Mapping[str, Any]) -> str:
    return f"{entry['state_bytes_per_parameter']:.2f}"


def spread(value: Mapping[str, float], seeds: int) -> str:
    """Mean and sample standard deviation, to the second digit of the deviation."""
    mean, deviation = value["mean"], value["std"]
    if seeds == 1 or not deviation:
        return number(mean, 4)
    decimals = 1 - math.floor(math.log10(deviation))
    if not 0 <= decimals <= 5:
        return f"{mean:.3e} ± {deviation:.1e}"
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def number(value: float | None, digits: int) -> str:
    """A number with so many significant digits."""
    return "-" if value is None else f"{value:.{digits}g}"


def notes(content: Mapping[str, Any]) -> list[str]:
    """Notes below the table: diverged runs, grids that are too narrow, missing runs."""
    found = [f"{entry['label']}: left out, {entry['reason']}" for entry in content["left_out"]]
    if content["arguments"]["kind"] == "ablate":
        found.insert(0, f"the full chain: {content['arguments']['chains'][0]}")
    for result in content["results"]:
        for entry in result["by_lr"]:
            if entry["diverged"]:
                runs = f"{entry['diverged']} of {entry['runs']} runs diverged"
                found.append(f"{result['label']}: at lr {entry['lr']:g} {runs}")
        grid = [entry["lr"] for entry in result["by_lr"]]
        if len(grid) > 1 and result["best_lr"] in (min(grid), max(grid)):
            end = "smallest" if result["best_lr"] == min(grid) else "largest"
            found.append(f"{result['label']}: the best lr is the {end} of its grid")
    return found + _environment_notes(content["environments"])


def _environment_notes(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("heavyball", "torch", "python", "platform", "threads", "device")
    differing = [n for n in names if len({e.get(n) for e in environments}) > 1]
    if not differing:
        return []
    return [f"the race was resumed under another {', '.join(differing)}: numbers may differ"]
