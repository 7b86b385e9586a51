"""The tasks of the race, one file for each kind."""

from pathlib import Path

from heavyball.errors import RaceError, one_line, unknown
from heavyball.race.tasks.base import Task
from heavyball.race.tasks.chars import Chars
from heavyball.race.tasks.digits import Digits
from heavyball.race.tasks.mnist import Mnist
from heavyball.race.tasks.surfaces import Beale, Rosenbrock

TASKS: dict[str, type[Task]] = {t.name: t for t in (Digits, Mnist, Chars, Rosenbrock, Beale)}


def open_task(name: str, data: Path | None = None) -> Task:
    """The task with its data read.

    Errors: RaceError for an unknown name, with the nearest ones, and for missing data.
    """
    if name not in TASKS:
        raise RaceError(unknown("task", name, TASKS))
    try:
        return TASKS[name](data)
    except OSError as error:
        raise RaceError(f"--data {data}: {one_line(error)}") from None


__all__ = ["TASKS", "Task", "open_task"]
