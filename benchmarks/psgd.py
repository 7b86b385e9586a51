"""What the ways to keep PSGD's factors take in memory and time: writes docs/psgd_efficiency.md."""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import heavyball
from benchmarks.report import write_section

MARK = "psgd-efficiency"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Way:
    """Options of PSGDKron under a name."""

    label: str
    options: dict[str, Any]


WAYS = (
    Way("square matrices", {"store_triu_as_line": False}),
    Way("lines (default)", {}),
    Way("lines, bfloat16", {"q_dtype": "bfloat16"}),
    Way("square matrices, cached", {"store_triu_as_line": False, "cached": True}),
    Way("lines, cached", {"cached": True}),
    Way("all diagonal", {"memory_save_mode": "all_diag"}),
)


@dataclass(frozen=True)
class Found:
    """One way on one n x n matrix: bytes of state beyond the momentum, seconds of a step."""

    way: Way
    size: int
    state: int
    fitted: float
    plain: float


class Run:
    """One matrix under one way, fitted at the steps that `fits` says."""

    def __init__(self, way: Way, size: int):
        made = torch.Generator().manual_seed(0)
        self.param = torch.nn.Parameter(0.02 * torch.randn(size, size, generator=made))
        self.param.grad = torch.randn(size, size, generator=made)
        self.fits = True
        self.optimizer = heavyball.PSGDKron(
            [self.param],
            preconditioner_update_probability=lambda n: float(self.fits),
            **way.options,
        )

    def step(self, fits: bool) -> float:
        """Seconds of one step."""
        self.fits = fits
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def state_bytes(self) -> int:
        """Of the factors, and of what is cached of them."""
        state = self.optimizer.state[self.param]
        kept = [t for key, t in state.items() if key.startswith("psgd_kron.")]
        return sum(t.numel() * t.element_size() for t in kept)


def measure(size: int, steps: int) -> list[Found]:
    """All variants on one size, alternating, so that other load on the machine affects all of them."""
    runs = [Run(way, size) for way in WAYS]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]
    for round_ in range(steps + 1):
        for run, (fitted, plain) in zip(runs, times, strict=True):
            for fits, found in ((True, fitted), (False, plain)):
                seconds = run.step(fits)
                if round_:
                    found.append(seconds)
    return [
        Found(way, size, run.state_bytes(), *map(statistics.median, found))
        for way, run, found in zip(WAYS, runs, times, strict=True)
    ]


def table(found: Sequence[Found]) -> str:
    """A row for every way and size; ratios to square matrices of the same size."""
    lines = [
        "| n | factors | MB | of square | step with a fit, ms | of square | without, ms | of square |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in found:
        first = next(g for g in found if g.size == f.size)
        lines.append(
            f"| {f.size} | {f.way.label} | {f.state / 1e6:.3g} | {f.state / first.state:.3f} "
            f"| {1e3 * f.fitted:.3g} | {f.fitted / first.fitted:.2f} "
            f"| {1e3 * f.plain:.3g} | {f.plain / first.plain:.2f} |"
        )
    return "\n".join(lines)


def draw(found: Sequence[Found], folder: Path) -> None:
    """Pictures of memory, and of time with and without a fit, over the size."""
    from matplotlib.figure import Figure

    panels = (
        ("psgd_memory.png", "state of the factors, MB", (("", lambda f: f.state / 1e6),)),
        (
            "psgd_time.png",
            "time of a step, ms",
            (
                ("with a fit", lambda f: 1e3 * f.fitted),
                ("without a fit", lambda f: 1e3 * f.plain),
            ),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, label, parts in panels:
        figure = Figure(figsize=(4.6 * len(parts) + 1.4, 4.2), layout="constrained")
        all_axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (title, value) in zip(all_axes, parts, strict=True):
            for way, color in zip(WAYS, COLORS, strict=True):
                own = [f for f in found if f.way is way]
                sizes = [f.size for f in own]
                style = "--" if "cached" in way.label else "-"
                axes.plot(
                    sizes, [value(f) for f in own], style, color=color, lw=1.8, label=way.label
                )
            axes.set(xscale="log", yscale="log", xlabel="n (an n x n matrix)", title=title)
            ticks = sorted({f.size for f in found})
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.minorticks_off()
            axes.grid(color="#E3E3E3", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_ylabel(label)
        all_axes[-1].legend(frameon=False, fontsize="small")
        figure.savefig(folder / name, dpi=130, metadata={"Software": None})


def facts(threads: int, load: float) -> str:
    """What a run was."""
    command = shlex.join(["python", "-m", "benchmarks.psgd", *sys.argv[1:]])
    return (
        f"Command: `{command}`, on {os.cpu_count()} cores ({platform.machine()}), {threads} thread(s), "
        f"load {load:.1f} before the run, torch {torch.__version__}. Medians; all variants alternate."
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", "sizes", multiple=True, type=click.IntRange(2), help="Of the matrices.")
@click.option("--steps", type=click.IntRange(1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: torch's number]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Page to update.")
@click.option(
    "--assets",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("assets"),
    show_default=True,
    help="Where the pictures go, if a page is written.",
)
def main(
    sizes: tuple[int, ...], steps: int, threads: int | None, out: Path | None, assets: Path
) -> None:
    """Measure the ways to keep the factors of PSGDKron on square matrices."""
    if threads is not None:
        torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    found = []
    for size in sizes or (256, 512, 1024, 2048):
        found += measure(size, steps)
        click.echo(f"{size} x {size} measured", err=True)
    text = f"{table(found)}\n\n{facts(torch.get_num_threads(), load)}"
    click.echo(text)
    if out is not None:
        write_section(out, MARK, text)
        draw(found, assets)


if __name__ == "__main__":
    main()
