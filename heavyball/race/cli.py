"""The command line; the commands themselves are implemented in other modules."""

import datetime
import functools
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from heavyball.errors import RaceError, one_line, shown
from heavyball.race.shapes import ARCHITECTURES
from heavyball.race.tasks import TASKS

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Benchmark optimizers and chains of gradient transforms, and inspect them."""


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self.kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            found = ()
        if not found:
            self.fail(f"{shown(value)}: expected numbers separated by commas", param, ctx)
        return found


class Seeds(Numbers):
    """A number of seeds, or seeds separated by commas."""

    def __init__(self) -> None:
        super().__init__(int, "seeds")

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        found = super().convert(value, param, ctx)
        if isinstance(value, str) and "," not in value:
            if not 1 <= found[0] <= 1000:
                self.fail(f"{value}: expected 1 to 1000 seeds", param, ctx)
            return tuple(range(found[0]))
        return found


class Target(click.ParamType):
    """A number, or the name of a contender."""

    name = "NUMBER|CONTENDER"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return float(value)
        except ValueError:
            return str(value)


class Place(click.Path):
    """A valid path; whether it exists is checked where it matters."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        try:
            place = Path(value).expanduser()
            if os.path.lexists(place):
                place.stat()
            place = Path(super().convert(place, param, ctx))  # type: ignore[arg-type]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RuntimeError) as error:
            self.fail(f"{shown(str(value))}: {one_line(error)}", param, ctx)
        return place


OPTIONS = (
    click.option("--task", help=f"The training task: {', '.join(TASKS)}. [default: digits]"),
    click.option(
        "--lr",
        "lrs",
        type=Numbers(float, "lr,..."),
        multiple=True,
        help="Learning rates to try for every contender without its own lr; the best one is reported. "
        "[default: the optimizer's own, 0.001 for a chain]",
    ),
    click.option(
        "--seeds",
        type=Seeds(),
        help="A number N for the seeds 0 to N-1, or a list such as 0,1,5. [default: 3]",
    ),
    click.option(
        "--grid-seeds",
        type=int,
        help="Try all learning rates with this many seeds, and run the other seeds at the best one. "
        "[default: all]",
    ),
    click.option("--steps", type=int, help="Steps per run. [default: the task's]"),
    click.option(
        "--epochs", type=int, help="Passes over the training data per run, instead of --steps."
    ),
    click.option("--batch-size", type=int, help="Examples per batch. [default: the task's]"),
    click.option(
        "--eval-every",
        type=int,
        help="Steps between evaluations. [default: about 30 evaluations per run]",
    ),
    click.option(
        "--target",
        type=Target(),
        help="Target test accuracy (digits, mnist) or test loss (other tasks), or a contender whose "
        "final test loss is the target.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        help="Weight decay of every contender that has one and does not set its own.",
    ),
    click.option(
        "--data",
        type=Place(),
        help="Folder with the data files, or a .txt file for the task chars.",
    ),
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        help="Also plot this entry of opt.metrics(), such as update_norm, or NAME/rms for "
        "probe(name='NAME'). Repeatable.",
    ),
    click.option("--threads", type=int, help="Number of torch threads. [default: the task's]"),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Device of models and data. [default: cpu]",
    ),
    click.option(
        "--out",
        type=Place(file_okay=False),
        help="Folder for race.json, race.png and the runs. [default: races/TASK-DATE-TIME]",
    ),
    click.option(
        "--resume",
        type=Place(file_okay=False),
        help="Finish the race in this folder, with its original arguments.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the race in --out."),
)


def race_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `race` and `ablate` have in common."""
    return functools.reduce(lambda made, option: option(made), reversed(OPTIONS), command)


@cli.command()
@click.option(
    "--optimizer",
    "-o",
    "optimizers",
    multiple=True,
    metavar="NAME[:ARG=VALUE,...]",
    help="A preset or torch.NAME, such as AdamW:betas=(0.9,0.95); lr=(0.001,0.01) sets its own grid, "
    "lr=cosine(1000,peak=0.01) a schedule. Repeatable.",
)
@click.option(
    "--chain",
    "-c",
    "chains",
    multiple=True,
    metavar="CHAIN",
    help="Transforms separated by |, such as 'exp_avg | scale_by_adam(betas=(0.9, 0.95))'. Repeatable.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME",
    help="A published configuration, see `heavyball list --recipes`. Repeatable.",
)
@race_options
@click.pass_context
def race(context: click.Context, **options: Any) -> None:
    """Train the same model from the same seeds with several optimizers and compare them."""
    _race(context, "race", options)


@cli.command()
@click.argument("chain", required=False)
@race_options
@click.pass_context
def ablate(context: click.Context, chain: str | None, **options: Any) -> None:
    """Race CHAIN against itself with each of its elements removed."""
    _race(context, "ablate", {**options, "chains": () if chain is None else (chain,)})


@cli.command("list")
@click.option("--recipes", is_flag=True, help="Show the recipes, with their sources, instead.")
def list_names(recipes: bool) -> None:
    """Show the presets, transforms, combinators, schedules and tasks, one line each."""
    from heavyball.race.catalog import listing, recipe_listing
    from heavyball.race.report import console

    with clean_errors():
        for table in recipe_listing() if recipes else listing():
            console().print(table)


@cli.command()
@click.argument("chain")
@click.option("--source", is_flag=True, help="Print the source of its kernel instead.")
def show(chain: str, source: bool) -> None:
    """Explain CHAIN, or the preset of that name: elements, state and hyper-parameters."""
    from heavyball.race.catalog import explanation, kernels
    from heavyball.race.report import console

    with clean_errors():
        if source:
            for text in kernels(chain):
                click.echo(text)
        else:
            console().print(explanation(chain))


@cli.command("plan")
@click.argument("optimizers", nargs=-1, metavar="[OPTIMIZER|CHAIN]...")
@click.option(
    "--model",
    "-m",
    default="gpt2-124m",
    show_default=True,
    help=f"An architecture: {', '.join(ARCHITECTURES)}.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    show_default=True,
    help="The dtype of the parameters.",
)
@click.option(
    "--storage-dtype", help="Format of state: float32, bfloat16, float16, 8bit, 4bit or rank1."
)
@click.option(
    "--ecc", help="State as a 16-bit value and a correction: bf16+8, bf16+16, fp16+8, fp16+16."
)
@click.option("--param-ecc", help="The same for parameters, which need that 16-bit dtype.")
def plan_memory(optimizers: tuple[str, ...], model: str, dtype: str, **options: str | None) -> None:
    """Show the bytes of state of presets or chains for a well-known architecture, without allocating
    them; by default for all presets."""
    from heavyball.race.planning import plans, tables
    from heavyball.race.report import console

    given = {name: value for name, value in options.items() if value is not None}
    with clean_errors():
        for table in tables(plans(optimizers, model, dtype, given), model, dtype):
            console().print(table)


@cli.command()
@click.option(
    "--seeds", type=Seeds(), default="3", help="A number N, or a list such as 0,1,5. [default: 3]"
)
@click.option("--steps", type=click.IntRange(1), help="Steps per run.")
@click.option("--data", type=Place(), help="As for the task chars of a race.")
@click.option("--task", "names", multiple=True, help="chars or digits. [default: both]")
@click.option(
    "--page",
    type=Place(dir_okay=False),
    help="Write the table into this page, between the marks as in docs/precision.md.",
)
@click.option(
    "--picture",
    type=Place(dir_okay=False),
    help="File of the figure. [default: precision.png]",
)
def precision(
    seeds: tuple[int, ...],
    steps: int | None,
    data: Path | None,
    names: tuple[str, ...],
    page: Path | None,
    picture: Path | None,
) -> None:
    """Compare training with float32 weights and three kinds of bfloat16 weights.

    500 steps at 0.002 on chars, 440 (20 epochs) at 0.003 on digits; under ten
    minutes on two cores.
    """
    from heavyball.race.precision import measure

    with clean_errors():
        where = picture or Path("precision.png")
        click.echo(measure(names, seeds, steps, data, page, where, _tell))


@cli.command()
@click.argument("file", type=Place(dir_okay=False))
@click.option(
    "--parameter", "-p", "wanted", multiple=True, help="Show only this parameter. Repeatable."
)
def replay(file: Path, wanted: tuple[str, ...]) -> None:
    """Recompute the steps in a FILE written by C.flight_recorder, element by element."""
    from heavyball.race.replay import tables
    from heavyball.race.report import console

    with clean_errors():
        for part in tables(file, wanted):
            console().print(part)


def _tell(line: str) -> None:
    click.echo(line, err=True)


class Refusal(click.ClickException):
    """An error that the user can fix."""

    exit_code = 2


@contextmanager
def clean_errors() -> Iterator[None]:
    """Show user errors as one paragraph and exit with code 2; show warnings as notes."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            yield
    except RaceError as error:
        text = one_line(error)
        # a text that was refused may be part of it, however long it is
        raise Refusal(text if len(text) < 1000 else f"{text[:450]} ... {text[-450:]}") from None


def _note(message: Warning | str, *place: Any, **more: Any) -> None:
    click.echo(f"note: {one_line(str(message))}", err=True)


def _race(context: click.Context, kind: str, options: dict[str, Any]) -> None:
    from heavyball.race.contest import hold
    from heavyball.race.report import Bar, console, notes, result_table
    from heavyball.race.store import Store

    with clean_errors():
        out, resume, overwrite = (options.pop(n) for n in ("out", "resume", "overwrite"))
        options["lrs"] = tuple(lr for part in options["lrs"] for lr in part)
        given = {name: value for name, value in options.items() if value not in (None, ())}
        if resume is not None:
            if overwrite or out not in (None, resume):
                raise RaceError("--resume names the folder of the race; omit --out and --overwrite")
            store = Store(resume)
            plan = store.plan()
            refuse_conflicts(plan, given)
        else:
            plan = make_plan(kind, given)
            store = Store(out or default_folder(plan.task))
        try:
            with Bar(console(stderr=True)) as bar:
                content = hold(plan, store, bar, resume is not None, overwrite)
        except KeyboardInterrupt:
            again = shlex.join(["heavyball", "race", "--resume", str(store.folder)])
            hint = f"; finish the race with: {again}" if store.holds_race() else ""
            click.echo(f"interrupted{hint}", err=True)
            context.exit(INTERRUPTED)
    screen = console()
    screen.print(result_table(content))
    for note in notes(content):
        screen.print(f"- {note}", markup=False)
    screen.print(
        f"\nresults: {store.summary}\npicture: {store.picture}", markup=False, soft_wrap=True
    )


def make_plan(kind: Any, given: dict[str, Any]) -> Any:
    """The plan of a new race."""
    from heavyball.race.plan import Plan

    return Plan(kind=kind, **_settled(given))


def refuse_conflicts(plan: Any, given: dict[str, Any]) -> None:
    """Refuse an option that differs from the original arguments of a race.

    Errors: RaceError naming the option and both values.
    """
    from heavyball.race.plan import flag

    for name, value in _settled(given).items():
        saved = getattr(plan, name)
        if saved != value:
            raise RaceError(f"{flag(name)} {value!r} conflicts with the saved {saved!r}")


def default_folder(task: str) -> Path:
    """A folder named after the task and the time."""
    return Path("races") / f"{task}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    data = given.get("data")
    return given if data is None else {**given, "data": str(Path(data).resolve())}
