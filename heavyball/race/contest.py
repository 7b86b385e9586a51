"""Run a race: what is not done yet, then the results, the JSON and the picture."""

import contextlib
import dataclasses
import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

import heavyball
from heavyball.errors import RaceError
from heavyball.race.plan import Plan, Race, Run, open_race
from heavyball.race.plot import draw
from heavyball.race.store import Key, Store
from heavyball.race.summary import results
from heavyball.race.tasks import TASKS
from heavyball.race.training import train


class Watcher(Protocol):
    """Receives the progress of a race."""

    def begin(self, race: Race, done: int) -> None:
        """Called when the race starts, with the number of runs already done."""

    def run(self, label: str, lr: float, seed: int) -> None:
        """A run begins."""

    def step(self, step: int) -> None:
        """The run has come to this step."""

    def end(self, record: dict[str, Any]) -> None:
        """A run has ended."""


def hold(
    plan: Plan, store: Store, watcher: Watcher, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Hold the race and return what `race.json` holds afterwards.

    With `resume` the runs whose records are in the store are not run again; with `overwrite` a race
    that the store holds is replaced, once it is sure that the new one can begin.
    Errors: RaceError for what cannot be raced, and for a directory that holds a race already.
    """
    if not (resume or overwrite) and store.holds_race():
        raise RaceError(
            f"{store.folder} holds a race already: finish it with --resume {store.folder}, "
            "replace it with --overwrite, or give another --out"
        )
    with threads(plan.threads or default_threads(plan.task)):
        race = open_race(plan)
        done = store.finished(race) if resume else {}
        environments = store.saved().get("environments", []) if resume else []
        if len(done) < race.count() or not environments:
            environments = [*environments, environment(race.plan.device)]
        store.prepare()
        if overwrite:
            store.clear()
        header = describe(race, environments)
        store.write({"state": "unfinished", **header})
        watcher.begin(race, len(done))
        done |= dict(_missing_runs(race, race.runs(), store, watcher, done))
        chosen = {result["label"]: result["best_lr"] for result in results(race, done)}
        later = race.runs_at(chosen)
        done |= dict(_missing_runs(race, later, store, watcher, done))
    race = with_target(race, done)
    header = describe(race, environments)
    ordered = [done[c.label, lr, seed] for c, lr, seed in race.runs() + later]
    content = {"state": "finished", **header, "results": results(race, done), "runs": ordered}
    store.write(content)
    draw(race, content["results"], done, store.picture)
    return content


def with_target(race: Race, done: Mapping[Key, Any]) -> Race:
    """The race with the target that a contender has set, if one was to do so.

    It is the mean of its test losses at the end; None if it diverged.
    """
    if race.target is not None:
        return race
    found = next(r for r in results(race, done) if r["label"] == race.plan.target)
    best = found["best"]
    return dataclasses.replace(race, target=best["test_loss"]["mean"] if best else None)


def _missing_runs(
    race: Race, runs: Sequence[Run], store: Store, watcher: Watcher, done: Mapping[Key, Any]
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Run what is not done, and keep each record as soon as there is one."""
    for contender, lr, seed in runs:
        key = (contender.label, lr, seed)
        if key not in done:
            watcher.run(*key)
            record = train(race.task, contender, lr, seed, race.settings, watcher.step)
            store.save(race, record)
            watcher.end(record)
            yield key, record


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads(task: str) -> int | None:
    """The threads that a task asks for; an unknown task is refused when the race is opened."""
    return TASKS[task].threads if task in TASKS else None


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the results depend on besides the arguments."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "heavyball": getattr(heavyball, "__version__", None),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def describe(race: Race, environments: list[dict[str, Any]]) -> dict[str, Any]:
    """All of `race.json` that is known before the first run."""
    task = race.task
    return {
        "command": race.plan.command(),
        "arguments": race.plan.to_json(),
        "environments": environments,
        "task": {
            "name": task.name,
            "summary": task.summary,
            "measure": task.measure,
            "target": race.target,
            "target_on": race.target_on,
            **task.facts(),
        },
        "settings": race.settings.facts(),
        "seeds": race.plan.seeds,
        "contenders": [vars(contender) for contender in race.contenders],
        "left_out": [{"label": label, "reason": reason} for label, reason in race.left_out],
    }
