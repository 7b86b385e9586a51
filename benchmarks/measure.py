"""Asks fresh processes for measurements, and computes from their answers."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import heavyball
from benchmarks.cases import Case
from benchmarks.shapes import SETS, Shapes, shrunk

WORKER = Path(__file__).parent / "worker.py"
STEPS = {"gpt": 100, "gpt-124M": 30, "many-small": 300, "convnet": 150}
TIMEOUT = 3600
# freed memory goes back to the system at once, so that a step's own is seen
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class MeasureError(Exception):
    """A measurement failed; the message is the last line that the process said."""


@dataclass(frozen=True)
class Settings:
    """How to measure. `steps=None` takes the number that suits the shape set."""

    threads: int
    steps: int | None = None
    quick: bool = False
    starts: int = 1
    peers_python: str = ""
    device: str = "cpu"

    def shapes(self, name: str) -> Shapes:
        """The shapes of a set, small ones in a quick run."""
        return shrunk(SETS[name]()) if self.quick else SETS[name]()

    def steps_of(self, name: str) -> int:
        """How many steps of each optimizer are timed."""
        return self.steps or (3 if self.quick else STEPS[name])


@dataclass
class Result:
    """What was found for one case on one shape set; seconds and bytes."""

    case: Case
    name: str
    times: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    stream: list[float] = field(default_factory=list)
    once: int | None = None
    passes: int | None = None
    notes: list[str] = field(default_factory=list)
    library: str = ""
    temporary: int | None = None
    eager: float | None = None
    cold: float | None = None
    warm: float | None = None
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Median time over the reference's."""
        return statistics.median(self.times) / statistics.median(self.reference)

    @property
    def middle_ratio(self) -> float:
        """The same of the means of the middle halves."""
        return middle_mean(self.times) / middle_mean(self.reference)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the machine, measured around the steps."""
        return statistics.median(self.stream)

    def over_floor(self, moved: int) -> float:
        """Median time over that of moving so many bytes."""
        return statistics.median(self.times) * self.bandwidth / moved


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return statistics.fmean(ordered[quarter : len(ordered) - quarter])


def spread(values: Sequence[float]) -> float:
    """The upper quartile over the lower."""
    if len(values) < 2:
        return 1.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high / low


def measure(
    cases: Sequence[Case], sets: Sequence[str], settings: Settings, say: Callable[[Result], None]
) -> list[Result]:
    """Every case on every shape set; `say` hears of each result. A failure is part of its result."""
    found = []
    for name in sets:
        for case in cases:
            result = Result(case, name)
            try:
                _steps(result, settings)
                if case.library == "heavyball" and settings.starts:
                    measure_starts(result, settings)
            except MeasureError as error:
                result.failure = str(error)
            say(result)
            found.append(result)
    return found


def _steps(result: Result, settings: Settings) -> None:
    case, ours = result.case, result.case.library == "heavyball"
    request = {
        **_request(result, settings, "pace"),
        "steps": settings.steps_of(result.name),
        "warmup": 1 if settings.quick else 5,
        "stream_size": 2**20 if settings.quick else 2**25,
        # what the others keep in their state is not described anywhere, so neither are their bytes
        "again": case.again if ours else None,
        "over_all": case.over_all,
    }
    answer = ask(request, "" if ours else settings.peers_python)
    result.times, result.reference = answer["times"], answer["reference"]
    result.stream, result.notes = answer["stream"], answer["notes"]
    result.library = answer["library"]
    moved = answer.get("traffic", {})
    result.once, result.passes = moved.get("once"), moved.get("passes")


def measure_starts(result: Result, settings: Settings) -> None:
    """First steps, each in a process of its own: eager, with an empty cache, with a filled one."""
    request = _request(result, settings, "first")
    found: dict[str, list[float]] = {"eager": [], "cold": [], "warm": []}
    for _ in range(settings.starts):
        found["eager"].append(ask({**request, "eager": True})["seconds"])
        with tempfile.TemporaryDirectory(prefix="heavyball-bench-") as folder:
            for kind in ("cold", "warm"):
                found[kind].append(ask(request, env={"HEAVYBALL_CACHE": folder})["seconds"])
    middle = {kind: statistics.median(times) for kind, times in found.items()}
    result.eager = middle["eager"]
    result.cold, result.warm = middle["cold"] - result.eager, middle["warm"] - result.eager
    result.temporary = ask(_request(result, settings, "memory"), env=RETURNING)["bytes"]


def _request(result: Result, settings: Settings, task: str) -> dict[str, Any]:
    case = result.case
    return {
        "task": task,
        "target": case.target,
        "arguments": dict(case.arguments),
        "library": case.library,
        "shapes": settings.shapes(result.name),
        "dtype": case.dtype,
        "threads": settings.threads,
        "device": settings.device,
    }


def ask(request: Mapping[str, Any], python: str = "", env: Mapping[str, str] | None = None) -> Any:
    """Send a request to a new process of this Python with this library, or of another one.

    Errors: MeasureError with the last line of what it complained about.
    """
    # -P: not from the folder of the worker, nor from the one it is started in
    command = [python or sys.executable, "-P", str(WORKER)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=dict(environment(python, env or {})),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasureError(str(error)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MeasureError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(python: str, changes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The environment of a worker: this library for this Python, its own for another."""
    yield from ((k, v) for k, v in os.environ.items() if k != "PYTHONPATH")
    if not python:
        yield "PYTHONPATH", str(Path(heavyball.__file__).parent.parent)
    yield from changes.items()
