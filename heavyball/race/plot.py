"""The picture of a race: curves over steps, and the final loss over the learning rate."""

import io
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from heavyball.race.plan import Race
from heavyball.race.store import Key
from heavyball.race.tasks.files import write_atomically

# Okabe and Ito's colours, told apart with every common colour blindness; grey for their yellow,
# which is too faint on white. Dashes and markers tell the lines apart without any colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
DASHES = ((0, ()), (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 2, 2, 2, 2, 2)))
MARKERS = "osD^vPX*"
LEGEND_WIDTH = 62
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}
# The share of the steps after which a curve decides how far the axis of the losses, and of the
# accuracies, reaches: the start may run out of the picture, so that the end can be told apart.
LOSS_TRANSIENT, ACCURACY_TRANSIENT = 0.08, 0.2


Point = tuple[float, float, float]


@dataclass(frozen=True)
class Line:
    """One contender at its best learning rate: per evaluation the mean over seeds and both ends."""

    label: str
    order: int
    lr: float
    steps: list[int]
    loss: list[Point]
    measure: list[Point]
    metrics: dict[str, list[Point]]

    @property
    def style(self) -> dict[str, Any]:
        return {
            "color": COLORS[self.order % len(COLORS)],
            "linestyle": DASHES[self.order % len(DASHES)],
        }


def draw(
    race: Race, results: Sequence[Mapping[str, Any]], records: Mapping[Key, Any], path: Path
) -> None:
    """Write the picture: test loss and measure over steps, and the loss at each learning rate."""
    lines = _lines(race, results, records)
    grid = any(len(result["by_lr"]) > 1 for result in results)
    panels = (3 if grid else 2) + len(race.plan.metrics)
    with matplotlib.rc_context(STYLE):
        handles = _handles(lines, results, with_markers=grid)
        columns = min(panels - 1, len(handles))
        height = max(str(h.get_label()).count("\n") + 1 for h in handles)
        rows = -(-len(handles) // columns) * height
        figure = Figure(figsize=(5.4 * panels, 4.8 + 0.22 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels)
        _loss_panel(axes[0], race, lines)
        _measure_panel(axes[1], race, lines)
        if grid:
            _grid_panel(axes[2], results)
        for place, name in zip(axes[3 if grid else 2 :], race.plan.metrics, strict=True):
            _metric_panel(place, lines, name)
        figure.suptitle(_title(race), fontsize=13)
        where: Any = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles=handles, handlelength=3.2, columnspacing=4, **where)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())


def _lines(
    race: Race, results: Sequence[Mapping[str, Any]], records: Mapping[Key, Any]
) -> list[Line]:
    """The contenders that did not diverge, the lowest final loss first."""
    lines = []
    for order, result in enumerate(results):
        if result["best"] is None:
            continue
        keys = [(result["label"], result["best_lr"], seed) for seed in race.plan.seeds]
        curves = [records[key]["curve"] for key in keys]
        metrics = [records[key].get("metrics", {}) for key in keys]
        loss, measure = (_band([c[n] for c in curves]) for n in ("test_loss", "measure"))
        lines.append(
            Line(
                result["label"],
                order,
                result["best_lr"],
                curves[0]["step"],
                loss,
                measure,
                {name: _known([m[name] for m in metrics]) for name in race.plan.metrics},
            )
        )
    return sorted(lines, key=lambda line: line.loss[-1][0])


def _band(curves: Sequence[Sequence[float]]) -> list[Point]:
    return [(statistics.fmean(at), min(at), max(at)) for at in zip(*curves, strict=True)]


def _known(curves: Sequence[Sequence[float | None]]) -> list[Point]:
    """The band of the measurements, NaN if a seed has none."""
    return _band([[math.nan if v is None else v for v in curve] for curve in curves])


def _plot(axes: Axes, lines: Sequence[Line], name: str, floor: float = -math.inf) -> None:
    # The best is drawn last, on top.
    for line in reversed(lines):
        mean, low, high = (
            [max(value, floor) for value in values]
            for values in zip(*(line.metrics.get(name) or getattr(line, name)), strict=True)
        )
        color = line.style["color"]
        axes.fill_between(line.steps, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(line.steps, mean, linewidth=2, **line.style)
    axes.set_xlabel("step")
    axes.set_xlim(0, max((line.steps[-1] for line in lines), default=1))


def _settled(lines: Sequence[Line], name: str, transient: float) -> list[float]:
    """The means after the first, steep part of each curve."""
    return [
        point[0]
        for line in lines
        for step, point in zip(line.steps, getattr(line, name), strict=True)
        if step >= transient * line.steps[-1]
    ]


def _loss_panel(axes: Axes, race: Race, lines: Sequence[Line]) -> None:
    axes.set_title(f"{'surface height' if _is_surface(race) else 'test loss'} (lower is better)")
    _lower_is_better(axes, lines, "loss")
    if race.target_on == "loss" and race.target is not None:
        _target(axes, race.target)


def _measure_panel(axes: Axes, race: Race, lines: Sequence[Line]) -> None:
    if _is_surface(race):
        axes.set_title("distance to the minimum (lower is better)")
        _lower_is_better(axes, lines, "measure")
        return
    axes.set_title("test accuracy (higher is better)")
    _plot(axes, lines, "measure")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    settled = _settled(lines, "measure", ACCURACY_TRANSIENT)
    if settled:
        highest = max(high for line in lines for _, _, high in line.measure)
        room = max(highest - min(settled), 0.01) * 0.06
        axes.set_ylim(min(settled) - room, min(highest + room, 1 + room / 2))
    if race.target_on == "accuracy" and race.target is not None:
        _target(axes, race.target)


def _metric_panel(axes: Axes, lines: Sequence[Line], name: str) -> None:
    axes.set_title(name)
    _plot(axes, lines, name)
    means = [mean for line in lines for mean, _, _ in line.metrics[name] if not math.isnan(mean)]
    if means and max(means) > 30 * min(means) > 0:
        axes.set_yscale("log")
        _label_decades(axes, max(means) / min(means))


def _lower_is_better(axes: Axes, lines: Sequence[Line], name: str) -> None:
    """A panel with a log axis where the curves span enough of it; the start may run off the top."""
    settled = _settled(lines, name, LOSS_TRANSIENT)
    points = [point for line in lines for point in getattr(line, name)]
    lowest = min((mean for mean, _, _ in points), default=1.0)
    # A single seed that passes close by the minimum must not stretch a log axis.
    floor = max(min((low for _, low, _ in points), default=1.0), lowest / 3, 1e-16)
    log = bool(settled) and max(settled) > 3 * floor
    _plot(axes, lines, name, floor if log else -math.inf)
    if not settled:
        return
    top, bottom = max(settled), floor if log else lowest
    if log:
        axes.set_yscale("log")
        room = (top / bottom) ** 0.05
        axes.set_ylim(bottom / room, top * room)
        _label_decades(axes, top / bottom)
    else:
        room = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
        axes.set_ylim(bottom - room, top + room)


def _label_decades(axes: Axes, ratio: float) -> None:
    """Plain numbers, and between the decades too where there are few of them."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if ratio > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _target(axes: Axes, value: float) -> None:
    low, high = axes.get_ylim()
    if low <= value <= high:
        axes.axhline(value, color="#555555", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        # On the axis itself, where no curve can run through it.
        place: Any = {"xy": (1, value), "xycoords": axes.get_yaxis_transform(), "va": "center"}
        text: Any = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"target\n{value:g}", color="#555555", **place, **text)


def _grid_panel(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """The mean final loss at every learning rate; the chosen one filled, diverged ones on top."""
    axes.set_title("final loss by learning rate")
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    for order, result in enumerate(results):
        _one_grid(
            axes, result, Line("", order, 0.0, [], [], [], {}).style, MARKERS[order % len(MARKERS)]
        )
    means = [e["test_loss"]["mean"] for r in results for e in r["by_lr"] if not e["diverged"]]
    if means and max(means) > 3 * min(means) > 0:
        axes.set_yscale("log")
        # A rate that was far too high must not squeeze the others together.
        best = [r["best"]["test_loss"]["mean"] for r in results if r["best"]]
        top = min(max(means), 100 * max(best))
        axes.set_ylim(min(means) / 1.25, top * 1.25)
        _label_decades(axes, top / min(means))
    lrs = sorted({entry["lr"] for result in results for entry in result["by_lr"]})
    if len(lrs) <= 6:
        axes.xaxis.set_major_locator(FixedLocator(lrs))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{lr:g}" for lr in lrs]))
        axes.xaxis.set_minor_locator(NullLocator())


def _one_grid(axes: Axes, result: Mapping[str, Any], style: dict[str, Any], marker: str) -> None:
    entries = sorted(result["by_lr"], key=lambda entry: entry["lr"])
    sound = [entry for entry in entries if not entry["diverged"]]
    lrs = [entry["lr"] for entry in sound]
    means = [entry["test_loss"]["mean"] for entry in sound]
    axes.plot(lrs, means, linewidth=1.2, alpha=0.8, **style)
    for lr, mean in zip(lrs, means, strict=True):
        face = style["color"] if lr == result["best_lr"] else "white"
        axes.plot(lr, mean, marker, color=style["color"], markerfacecolor=face, markersize=8)
    for entry in entries:
        if entry["diverged"]:
            at_top: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(entry["lr"], 1.0, "x", color=style["color"], markersize=9, **at_top)


def _handles(
    lines: Sequence[Line], results: Sequence[Mapping[str, Any]], with_markers: bool
) -> list[Line2D]:
    """The order of the legend: lowest final loss first, diverged ones last."""
    handles = []
    for line in lines:
        text = f"{line.label}, lr {line.lr:g}: loss {line.loss[-1][0]:.3g}"
        shape = MARKERS[line.order % len(MARKERS)] if with_markers else ""
        marker: Any = {"marker": shape, "markersize": 7}
        handles.append(Line2D([], [], label=_wrapped(text), linewidth=2, **marker, **line.style))
    for order, result in enumerate(results):
        if result["best"] is None:
            color = COLORS[order % len(COLORS)]
            text = _wrapped(f"{result['label']}, diverged")
            handles.append(Line2D([], [], label=text, linestyle="", marker="x", color=color))
    return handles


def _wrapped(text: str, width: int = LEGEND_WIDTH) -> str:
    # A dollar sign would begin mathematics.
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width))


def _title(race: Race) -> str:
    seeds = len(race.plan.seeds)
    band = (
        f"mean of {seeds} seeds, band from the lowest to the highest" if seeds > 1 else "one seed"
    )
    title = f"{race.task.name}: {race.task.summary}\n{race.settings.steps} steps; {band}"
    if race.plan.kind == "ablate":
        title += f"\nthe full chain: {race.contenders[0].text}"
    return "\n".join(_wrapped(line, 120) for line in title.splitlines())


def _is_surface(race: Race) -> bool:
    return race.task.measure == "distance"
