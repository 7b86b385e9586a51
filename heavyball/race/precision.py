"""What bfloat16 weights cost: the same training with four ways of keeping the weights."""

import io
import math
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import heavyball
from heavyball.errors import RaceError, one_line, unknown
from heavyball.race.plan import LARGEST, check_seeds
from heavyball.race.plot import COLORS, DASHES, STYLE
from heavyball.race.tasks import Task, open_task
from heavyball.race.tasks.files import check_folder, write_atomically
from heavyball.race.training import seeded

# Steps and learning rate for each task.
LENGTHS = {"chars": (500, 2e-3), "digits": (440, 3e-3)}
BEGIN, END = "<!-- precision: begin -->", "<!-- precision: end -->"
EVALUATIONS = 20
WARMUP = 0.05


@dataclass(frozen=True)
class Way:
    """One way to keep the weights: their dtype, options of the optimizer, bytes for each weight."""

    label: str
    dtype: torch.dtype
    options: dict[str, Any]
    weight_bytes: int


WAYS = (
    Way("float32", torch.float32, {}, 4),
    Way("bfloat16, to nearest", torch.bfloat16, {"stochastic_rounding": False}, 2),
    Way("bfloat16, stochastic", torch.bfloat16, {}, 2),
    Way("bfloat16 and 8-bit correction", torch.bfloat16, {"param_ecc": "bf16+8"}, 3),
)


@dataclass
class Curve:
    """One run: test loss and accuracy at some steps."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


class Promoted(nn.Module):
    """A model that keeps its weights in fewer bits and computes in float32.

    Processors without bfloat16 units are slow at it, and rounded activations would blur what the
    weights alone cost.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model.to(dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, inputs)


def run(task: Task, way: Way, seed: int, steps: int, lr: float) -> Curve:
    """Train one model with AdamW, whose learning rate falls linearly to 0 after a short warm-up."""
    with seeded(seed):
        # all ways begin at the same weights, those that bfloat16 has
        model = Promoted(task.model(seed).bfloat16(), way.dtype)
        warmup = max(1, round(WARMUP * steps))
        params, options = list(model.parameters()), {**way.options, "warmup_steps": warmup}
        optimizer = heavyball.AdamW(params, lr=lr, seed=seed, **options)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        curve, batches = Curve(), task.batches(seed, task.batch_size)
        for step in range(steps + 1):
            if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
                _evaluate(task, model, step, curve)
            if step < steps:
                optimizer.zero_grad()
                task.loss(model, next(batches)).backward()
                optimizer.step()
                decay.step()
        return curve


def _evaluate(task: Task, model: nn.Module, step: int, curve: Curve) -> None:
    model.eval()
    with torch.no_grad():
        loss, accuracy = task.evaluate(model)
    model.train()
    curve.steps.append(step)
    curve.loss.append(loss if math.isfinite(loss) else math.nan)
    curve.accuracy.append(accuracy)


Runs = dict[tuple[str, str], list[Curve]]


def compare(
    tasks: Sequence[tuple[Task, int, float]],
    seeds: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> Runs:
    """Every way on every task (with its steps and learning rate) from every seed."""
    found: Runs = {}
    for task, steps, lr in tasks:
        for way in WAYS:
            curves = found[task.name, way.label] = [run(task, way, s, steps, lr) for s in seeds]
            ends = ", ".join(f"{curve.loss[-1]:.4f}" for curve in curves)
            say(f"{task.name}, {way.label}: test loss {ends}")
    return found


def table(tasks: Sequence[tuple[Task, int, float]], runs: Runs) -> str:
    """The ends of all runs as a table in markdown: mean and sample standard deviation."""
    names = [task.name for task, _, _ in tasks]
    head = ["weights", "bytes each", *(f"{n}: test {what}" for n in names for what in MEASURES)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for way in WAYS:
        cells = [way.label, str(way.weight_bytes)]
        for name in names:
            curves = runs[name, way.label]
            cells.append(_spread([c.loss[-1] for c in curves], "{:.4f}"))
            cells.append(_spread([100 * c.accuracy[-1] for c in curves], "{:.2f}") + " %")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


MEASURES = ("loss", "accuracy")


def _spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def draw(tasks: Sequence[tuple[Task, int, float]], runs: Runs, path: Path) -> None:
    """Test loss over steps, a panel for each task: the mean, and a band over the seeds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8 * len(tasks), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (task, steps, lr) in zip(
            figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True
        ):
            _panel(axes, task.name, runs)
            axes.set_title(f"{task.name}: test loss, {steps} steps, lr {lr:g} falling to 0")
        handles, labels = axes.get_legend_handles_labels()
        where: Any = {"loc": "outside lower center", "ncols": len(WAYS)}
        figure.legend(handles, labels, handlelength=3, **where)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _panel(axes: Any, name: str, runs: Runs) -> None:
    settled = []
    for order, way in enumerate(WAYS):
        curves = runs[name, way.label]
        steps = curves[0].steps
        at = list(zip(*(c.loss for c in curves), strict=True))
        style: Any = {"color": COLORS[order], "linestyle": DASHES[order]}
        low, high = [min(v) for v in at], [max(v) for v in at]
        axes.fill_between(steps, low, high, color=COLORS[order], alpha=0.13, linewidth=0)
        axes.plot(steps, [statistics.fmean(v) for v in at], linewidth=2, label=way.label, **style)
        settled += low[len(low) // 3 :] + high[len(high) // 3 :]
    # the steep beginning may leave the picture, so that the ends can be told apart
    finite = [value for value in settled if math.isfinite(value)]
    room = 0.05 * (max(finite) - min(finite)) + 1e-6
    axes.set_ylim(min(finite) - room, max(finite) + room)
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("step")


def measure(
    names: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    data: Path | None,
    page: Path | None,
    picture: Path,
    say: Callable[[str], None],
) -> str:
    """Everything that the command `precision` does; returns the table.

    Errors: RaceError for an unknown task, missing data, or a page without the marks.
    """
    for name in names:
        if name not in LENGTHS:
            raise RaceError(unknown("task", name, LENGTHS))
    check_seeds(tuple(seeds))
    if steps is not None and steps > LARGEST["steps"]:
        raise RaceError(f"--steps {steps}: expected at most {LARGEST['steps']}")
    if page is not None:
        _marked(page)
        check_folder(page.parent)
    check_folder(picture.parent)
    tasks = []
    for name in names or LENGTHS:
        length, lr = LENGTHS[name]
        tasks.append((open_task(name, data if name == "chars" else None), steps or length, lr))
    runs = compare(tasks, seeds, say)
    text = table(tasks, runs)
    draw(tasks, runs, picture)
    if page is not None:
        # without --data, which is a matter of the machine
        parts = ["heavyball", "precision", "--seeds", ",".join(map(str, seeds))]
        parts += [part for name in names for part in ("--task", name)]
        parts += ["--steps", str(steps)] if steps else []
        parts += ["--page", str(page), "--picture", str(picture)]
        note = (
            f"`{shlex.join(parts)}` made this table and the picture: mean ± sample standard deviation "
            f"over {len(seeds)} seeds, torch {torch.__version__}, {torch.get_num_threads()} threads."
        )
        put_into(page, f"{text}\n\n{note}")
    return text


def _marked(page: Path) -> re.Match:
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    try:
        found = pattern.search(page.read_text("utf-8") if page.is_file() else "")
    except (OSError, ValueError) as error:
        raise RaceError(f"{page} cannot be read: {one_line(error)}") from None
    if found is None:
        raise RaceError(f"{page} has no lines {BEGIN} and {END}")
    return found


def put_into(page: Path, text: str) -> None:
    """Replace the text between the marks of a page.

    Errors: RaceError if the page has no such marks.
    """
    found = _marked(page)
    new = found.string[: found.start()] + f"{BEGIN}\n{text}\n{END}" + found.string[found.end() :]
    write_atomically(page, new.encode("utf-8"))
