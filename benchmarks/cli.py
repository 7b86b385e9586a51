"""The command line of the measurements."""

import dataclasses
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console

import heavyball
from benchmarks import duels, report
from benchmarks.cases import CHAINS, PEERS
from benchmarks.duels import DUELS
from benchmarks.measure import Result, Settings, measure
from benchmarks.shapes import SETS, Shapes
from heavyball.compiler.cpp import toolchain
from heavyball.race.cli import Place, clean_errors
from heavyball.race.plan import LARGEST
from heavyball.race.tasks.files import check_folder

PEERS_PYTHON = Path(".venv-peers/bin/python")
TERMINAL_WIDTH = 190


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--set", "sets", multiple=True, type=click.Choice(list(SETS)), help="[default: all]")
@click.option(
    "--chain", "chains", multiple=True, type=click.Choice(list(CHAINS)), help="[default: all]"
)
@click.option(
    "--steps",
    type=click.IntRange(1, LARGEST["steps"]),
    help="Timed steps of each; else by the shape set.",
)
@click.option(
    "--threads", type=click.IntRange(1, LARGEST["threads"]), help="[default: torch's number]"
)
@click.option(
    "--starts",
    type=click.IntRange(0, 1000),
    default=1,
    show_default=True,
    help="Processes for each kind of first step; 0 leaves first steps and memory out.",
)
@click.option(
    "--duel",
    "chosen_duels",
    multiple=True,
    type=click.Choice(["all", *DUELS]),
    help="Only this: our optimizer by turns with that of another library.",
)
@click.option("--peers", is_flag=True, help="Measure other libraries too, without first steps.")
@click.option(
    "--peers-python",
    type=Place(),
    default=PEERS_PYTHON,
    show_default=True,
    help="The Python that has the libraries of benchmarks/peers.txt.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the tensors are. The goals are those of the CPU.",
)
@click.option("--out", type=Place(dir_okay=False), help="Document to update.")
@click.option("--quick", is_flag=True, help="Small tensors, few steps: tries the command only.")
def bench(
    sets: tuple[str, ...],
    chains: tuple[str, ...],
    steps: int | None,
    threads: int | None,
    starts: int,
    chosen_duels: tuple[str, ...],
    peers: bool,
    peers_python: Path,
    device: str,
    out: Path | None,
    quick: bool,
) -> None:
    """Measure optimizer steps, by turns with torch's fused AdamW on the same shapes."""
    if (peers or chosen_duels) and not peers_python.exists():
        raise click.UsageError(f"there is no {peers_python}; make bench-peers installs it")
    if out is not None:
        with clean_errors():
            check_folder(out.parent)
    cases = [CHAINS[name] for name in chains or CHAINS] + (PEERS if peers else [])
    if device == "cuda":
        cases = [dataclasses.replace(case, goals={}) for case in cases]
    settings = Settings(
        threads=threads or torch.get_num_threads(),
        steps=steps,
        quick=quick,
        starts=0 if peers else starts,
        # not resolved: the link is what makes it the Python of its environment
        peers_python=str(peers_python.absolute()),
        device=device,
    )
    chosen = sets or tuple(SETS)
    load = os.getloadavg()[0]
    if chosen_duels:
        _hold_duels(chosen_duels, chosen, settings, load, out)
        return
    results = measure(cases, chosen, settings, _say)
    shapes = {name: settings.shapes(name) for name in chosen}
    heading = _heading(peers, settings)
    _show(heading, shapes, results)
    if out is not None:
        text = report.section(heading, facts(settings, load), shapes, results)
        _write(out, _mark("bench-peers" if peers else "bench", settings), text)
    if any(r.failure for r in results):
        raise SystemExit(1)


def _hold_duels(
    names: Sequence[str], sets: Sequence[str], settings: Settings, load: float, out: Path | None
) -> None:
    picked = [DUELS[name] for name in (DUELS if "all" in names else names)]
    if settings.device == "cuda":
        picked = [dataclasses.replace(d, goals=dict.fromkeys(d.goals)) for d in picked]
    outcomes = duels.hold(picked, sets, settings, _say_outcome)
    heading = "Beside other libraries" + (" on CUDA" if settings.device == "cuda" else "")
    heading += " (a quick run)" if settings.quick else ""
    text = duels.section(heading, facts(settings, load), outcomes)
    click.echo(text)
    if out is not None:
        report.write_section(out, _mark("bench-duels", settings), text)
    if any(o.failure for o in outcomes):
        raise SystemExit(1)


def _say_outcome(outcome: duels.Outcome) -> None:
    found = f"failed: {outcome.failure}" if outcome.failure else f"{outcome.ratio:.3f}"
    click.echo(f"{outcome.name}: {outcome.duel.name}: {found}", err=True)


def _show(heading: str, sets: dict[str, Shapes], results: Sequence[Result]) -> None:
    console = Console()
    # a table that does not fit is cut, so a pipe gets what a terminal may be too narrow for
    console.width = max(console.width, TERMINAL_WIDTH)
    console.print(heading, highlight=False)
    for name, shapes in sets.items():
        found = [r for r in results if r.name == name]
        console.print(report.title(name, shapes, found), highlight=False)
        console.print(report.steps_table(found, box.SIMPLE))
    started = [r for r in results if r.eager is not None]
    if started:
        console.print(report.starts_table(started, box.SIMPLE))
    for line in report.remarks(results):
        console.print(line, markup=False, highlight=False)


def _say(result: Result) -> None:
    outcome = f"failed: {result.failure}" if result.failure else f"{result.ratio:.2f}"
    click.echo(f"{result.name}: {report.label(result)}: {outcome}", err=True)


def _heading(peers: bool, settings: Settings) -> str:
    text = "Steps of other libraries" if peers else "Steps"
    text += " on CUDA" if settings.device == "cuda" else ""
    return f"{text} (a quick run on small tensors: not a measurement)" if settings.quick else text


def _mark(name: str, settings: Settings) -> str:
    return name if settings.device == "cpu" else f"{name}-{settings.device}"


def _write(out: Path, mark: str, text: str) -> None:
    try:
        report.write_section(out, mark, text)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def facts(settings: Settings, load: float) -> list[str]:
    """What a run was: the command, the machine, the versions, the day."""
    return [
        f"command: `{shlex.join(['python', '-m', 'benchmarks', *sys.argv[1:]])}`",
        f"machine: {_device(settings)}{_processor()}, {os.cpu_count()} cores, "
        f"{settings.threads} threads used, "
        f"load {load:.1f} before the run",
        f"versions: heavyball {heavyball.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {_compiler()}",
        f"date: {datetime.date.today()}",
    ]


def _device(settings: Settings) -> str:
    return f"{torch.cuda.get_device_name()}, " if settings.device == "cuda" else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _compiler() -> str:
    try:
        command = [*toolchain.compiler(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]
    except (toolchain.ToolchainError, OSError, subprocess.CalledProcessError):
        return "no compiler"
