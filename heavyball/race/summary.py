"""What the runs of a race say: per contender the best learning rate and the numbers at it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from heavyball.race.contenders import Contender
from heavyball.race.plan import Race
from heavyball.race.store import Key

Record = Mapping[str, Any]


def results(race: Race, records: Mapping[Key, Record]) -> list[dict[str, Any]]:
    """One entry per contender: every learning rate of its grid, and which is best.

    The best has the lowest mean test loss at the end, over the seeds that choose; one that diverged
    with any of them loses to all that did not, and where all did, none is best.
    """
    return [_contender(race, contender, records) for contender in race.contenders]


def _contender(race: Race, contender: Contender, records: Mapping[Key, Record]) -> dict[str, Any]:
    by_lr, choosing = [], []
    for lr in contender.lrs:
        keys = [(contender.label, lr, seed) for seed in race.plan.seeds]
        runs = [(key[-1], records[key]) for key in keys if key in records]
        if runs:
            by_lr.append({"lr": lr, **_at_one_lr(race, [run for _, run in runs])})
            ends = [run["test_loss"] for seed, run in runs if seed in race.grid_seeds]
            choosing.append(math.inf if None in ends else statistics.fmean(ends))
    place = min(range(len(by_lr)), key=choosing.__getitem__, default=None)
    best = None if place is None or by_lr[place]["diverged"] else by_lr[place]
    return {
        "label": contender.label,
        "kind": contender.kind,
        "text": contender.text,
        "best_lr": None if best is None else best["lr"],
        "best": best,
        "by_lr": by_lr,
    }


def _at_one_lr(race: Race, runs: Sequence[Record]) -> dict[str, Any]:
    finished = [run for run in runs if run["status"] == "finished"]
    arrivals = [found for run in finished if (found := arrival(race, run)) is not None]
    timed = [run["step_ms"] for run in runs if run["step_ms"] is not None]
    return {
        "runs": len(runs),
        "diverged": len(runs) - len(finished),
        "test_loss": spread([run["test_loss"] for run in finished]),
        race.task.measure: spread([run["measure"] for run in finished]),
        "reached_target": len(arrivals),
        "steps_to_target": spread([steps for steps, _ in arrivals]),
        "seconds_to_target": spread([seconds for _, seconds in arrivals]),
        "step_ms": statistics.median(timed) if timed else None,
        "state_bytes_per_parameter": runs[0]["state_bytes"] / runs[0]["parameters"],
    }


def arrival(race: Race, run: Record) -> tuple[int, float] | None:
    """Steps and seconds of training to the first evaluation that met the target."""
    curve = run["curve"]
    if race.target is None:
        return None
    if race.target_on == "accuracy":
        met = [value >= race.target for value in curve["measure"]]
    else:
        met = [value <= race.target for value in curve["test_loss"]]
    if not any(met):
        return None
    first = met.index(True)
    return curve["step"][first], curve["seconds"][first]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, sample standard deviation (0 for one value), smallest and largest; None for no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": statistics.fmean(values),
        "std": deviation,
        "min": min(values),
        "max": max(values),
    }
