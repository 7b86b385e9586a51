"""The command line: options are read here, everything else is elsewhere."""

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
    """Race optimizers that are chains of gradient transforms, and take chains apart."""


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
    """A path that can be one; whether something is there is asked where it matters."""

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
    click.option("--task", help=f"What is trained: {', '.join(TASKS)}. [default: digits]"),
    click.option(
        "--lr",
        "lrs",
        type=Numbers(float, "lr,..."),
        multiple=True,
        help="Learning rates to try for every contender that has none of its own; the best counts. "
        "[default: the optimizer's own, 0.001 for a chain]",
    ),
    click.option(
        "--seeds",
        type=Seeds(),
        help="A number N for the seeds 0 to N-1, or seeds as 0,1,5. [default: 3]",
    ),
    click.option(
        "--grid-seeds",
        type=int,
        help="Try all learning rates with so many seeds, and run the others at the best one only. "
        "[default: all]",
    ),
    click.option("--steps", type=int, help="Steps of a run. [default: the task's]"),
    click.option("--epochs", type=int, help="The same, in passes over the training data."),
    click.option("--batch-size", type=int, help="Examples in a batch. [default: the task's]"),
    click.option(
        "--eval-every", type=int, help="Steps between evaluations. [default: about 30 a run]"
    ),
    click.option(
        "--target",
        type=Target(),
        help="Test accuracy (digits, mnist) or test loss (the others) that counts as there, or a "
        "contender whose test loss at the end does.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        help="For every contender that has a decay and does not set its own.",
    ),
    click.option(
        "--data", type=Place(), help="Folder of the data files, or a .txt file for the task chars."
    ),
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        help="Draw this of opt.metrics() too, as update_norm or NAME/rms of a probe(name='NAME'). "
        "Repeatable.",
    ),
    click.option("--threads", type=int, help="Threads of torch. [default: the task's]"),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Where models and data are. [default: cpu]",
    ),
    click.option(
        "--out",
        type=Place(file_okay=False),
        help="Folder for race.json, race.png and the runs. [default: races/TASK-DATE-TIME]",
    ),
    click.option(
        "--resume",
        type=Place(file_okay=False),
        help="Finish the race in this folder, with the arguments it was begun with.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the race that --out holds."),
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
    help="A preset or torch.NAME, as AdamW:betas=(0.9,0.95); lr=(0.001,0.01) is its own grid, "
    "lr=cosine(1000,peak=0.01) a schedule. "
    "Repeatable.",
)
@click.option(
    "--chain",
    "-c",
    "chains",
    multiple=True,
    metavar="CHAIN",
    help="Transforms joined by |, as 'exp_avg | scale_by_adam(betas=(0.9, 0.95))'. Repeatable.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME",
    help="A chain as published, see `heavyball list --recipes`. Repeatable.",
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
    """Show the presets, transforms, combinators and tasks, one line each."""
    from heavyball.race.catalog import listing, recipe_listing
    from heavyball.race.report import console

    with clean_errors():
        for table in recipe_listing() if recipes else listing():
            console().print(table)


@cli.command()
@click.argument("chain")
@click.option("--source", is_flag=True, help="Print the kernel that it is compiled to instead.")
def show(chain: str, source: bool) -> None:
    """Show what CHAIN, or the preset of that name, does: its state and its hyper-parameters."""
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
    "--storage-dtype", help="How state is kept: float32, bfloat16, float16, 8bit, 4bit or rank1."
)
@click.option("--ecc", help="State as a value and a correction: bf16+8, bf16+16, fp16+8, fp16+16.")
@click.option("--param-ecc", help="The same for parameters of that 16-bit dtype.")
def plan_memory(optimizers: tuple[str, ...], model: str, dtype: str, **options: str | None) -> None:
    """Show how much state presets or chains take for a well-known architecture; all presets if
    none is named. Nothing is allocated."""
    from heavyball.race.planning import plans, tables
    from heavyball.race.report import console

    given = {name: value for name, value in options.items() if value is not None}
    with clean_errors():
        for table in tables(plans(optimizers, model, dtype, given), model, dtype):
            console().print(table)


@cli.command()
@click.option(
    "--seeds", type=Seeds(), default="3", help="A number N, or seeds as 0,1,5. [default: 3]"
)
@click.option("--steps", type=click.IntRange(1), help="Steps of every run.")
@click.option("--data", type=Place(), help="As for a race on chars.")
@click.option("--task", "names", multiple=True, help="chars or digits. [default: both]")
@click.option(
    "--page",
    type=Place(dir_okay=False),
    help="A page with the marks of docs/precision.md, into which the table is put.",
)
@click.option(
    "--picture",
    type=Place(dir_okay=False),
    help="Where the picture goes. [default: precision.png]",
)
def precision(
    seeds: tuple[int, ...],
    steps: int | None,
    data: Path | None,
    names: tuple[str, ...],
    page: Path | None,
    picture: Path | None,
) -> None:
    """Train with float32 weights, and with bfloat16 ones in three ways.

    500 steps at 0.002 on chars, 440 (20 epochs) at 0.003 on digits; under ten
    minutes on two cores.
    """
    from heavyball.race.precision import measure

    with clean_errors():
        where = picture or Path("precision.png")
        click.echo(measure(names, seeds, steps, data, page, where, _tell))


@cli.command()
@click.argument("file", type=Place(dir_okay=False))
@click.option("--parameter", "-p", "wanted", multiple=True, help="Show this one. Repeatable.")
def replay(file: Path, wanted: tuple[str, ...]) -> None:
    """Compute the steps in a FILE of C.flight_recorder again, element by element."""
    from heavyball.race.replay import tables
    from heavyball.race.report import console

    with clean_errors():
        for part in tables(file, wanted):
            console().print(part)


def _tell(line: str) -> None:
    click.echo(line, err=True)


class Refusal(click.ClickException):
    """An error that the user can mend."""

    exit_code = 2


@contextmanager
def clean_errors() -> Iterator[None]:
    """Show what the user can mend as one paragraph and exit with code 2; warnings as notes."""
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
                raise RaceError("--resume says where the race is, without --out or --overwrite")
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
    """Refuse an option that differs from what a race was begun with.

    Errors: RaceError naming the option and both values.
    """
    from heavyball.race.plan import flag

    for name, value in _settled(given).items():
        saved = getattr(plan, name)
        if saved != value:
            raise RaceError(f"{flag(name)} {value!r} conflicts with the saved {saved!r}")


def default_folder(task: str) -> Path:
    """A folder that is named for the task and the moment."""
    return Path("races") / f"{task}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    data = given.get("data")
    return given if data is None else {**given, "data": str(Path(data).resolve())}
