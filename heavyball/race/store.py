"""The directory of a race: arguments, a record of every finished run, and results."""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from heavyball.errors import RaceError, one_line
from heavyball.race.plan import Plan, Race
from heavyball.race.tasks.files import check_folder, write_atomically

FORMAT = 1
SUMMARY, CURVES, RUNS = "race.json", "race.png", "runs"
DIGEST = "sha256"  # the entry of a record for that of all others

Key = tuple[str, float, int]


class Store:
    """Reads and writes one directory. Every file is either whole or as it was before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def summary(self) -> Path:
        return self.folder / SUMMARY

    @property
    def picture(self) -> Path:
        return self.folder / CURVES

    def holds_race(self) -> bool:
        """Whether a race was begun here."""
        try:
            return os.path.lexists(self.summary)
        except (OSError, ValueError) as error:
            raise RaceError(f"{self.folder}: {one_line(error)}") from None

    def saved(self) -> dict[str, Any]:
        """What `race.json` holds.

        Errors: RaceError if there is none, or it is not one of a race.
        """
        try:
            saved = json.loads(self.summary.read_text("utf-8"))
        except FileNotFoundError:
            raise RaceError(f"{self.folder} holds no race to resume, it has no {SUMMARY}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RaceError(f"{self.summary} cannot be read: {one_line(error)}") from None
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise RaceError(f"{self.summary} is not the record of a race in format {FORMAT}")
        if not _are_environments(saved.get("environments", [])):
            raise RaceError(f"{self.summary}: environments is damaged, expected a list of facts")
        return saved

    def plan(self) -> Plan:
        """The arguments that the race here was begun with."""
        try:
            return Plan.from_json(self.saved().get("arguments"))
        except RaceError as error:
            raise RaceError(f"{self.summary}: {error}") from None

    def prepare(self) -> None:
        """Make the folders, and see that everything can be written that is to be written at the end.

        Errors: RaceError naming what stands in the way.
        """
        for path in (self.summary, self.picture):
            if os.path.lexists(path) and not path.is_file():
                raise RaceError(f"{path} cannot be written: it exists and is not a file")
        for path in (self.folder, self.folder / RUNS):
            check_folder(path)

    def clear(self) -> None:
        """Remove what a race wrote, files that it was killed in the middle of too, and nothing else."""
        runs = self.folder / RUNS
        begun = [f for name in (SUMMARY, CURVES) for f in self.folder.glob(f".{name}.*")]
        for path in [
            self.summary,
            self.picture,
            *runs.glob("*.json"),
            *runs.glob(".*.json.*"),
            *begun,
        ]:
            path.unlink(missing_ok=True)

    def write(self, content: dict[str, Any]) -> None:
        """Write `race.json`."""
        self._dump(self.summary, {"format": FORMAT, **content})

    def finished(self, race: Race) -> dict[Key, dict[str, Any]]:
        """The records of the runs of this race that are done; a damaged one counts as not done."""
        wanted = {
            (c.label, lr, seed) for c in race.contenders for lr in c.lrs for seed in race.plan.seeds
        }
        found, expected = {}, fingerprint(race)
        for path in sorted((self.folder / RUNS).glob("*.json")):
            record = _intact(path)
            if record is not None and record.pop("race", None) == expected:
                key = (record["contender"], record["lr"], record["seed"])
                if key in wanted:
                    found[key] = record
        return found

    def save(self, race: Race, record: dict[str, Any]) -> None:
        """Keep the record of a run that has ended."""
        place = [c.label for c in race.contenders].index(record["contender"])
        slug = re.sub(r"[^A-Za-z0-9]+", "-", record["contender"]).strip("-")[:40]
        name = f"{place:02d}-{slug}-lr{record['lr']!r}-seed{record['seed']}.json"
        content = finite({**record, "race": fingerprint(race)})
        self._dump(self.folder / RUNS / name, {**content, DIGEST: digest(content)})

    def _dump(self, path: Path, content: dict[str, Any]) -> None:
        text = json.dumps(finite(content), indent=1, allow_nan=False, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode("utf-8"))


def digest(content: dict[str, Any]) -> str:
    """A hash of plain values, by which a damaged record is known."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _intact(path: Path) -> dict[str, Any] | None:
    """A record as it was written, or None if it is damaged."""
    try:
        if not path.is_file():
            return None
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict) or record.pop(DIGEST, None) != digest(record):
            return None
    except (OSError, ValueError, RecursionError):
        return None
    return record


def _are_environments(value: Any) -> bool:
    plain = (str, int, float, type(None))
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(fact, plain) for fact in entry.values())
        for entry in value
    )


def fingerprint(race: Race) -> str:
    """What two runs of the same race have in common: arguments, data and settings."""
    parts = [race.plan.to_json(), race.task.facts(), race.settings.facts()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def finite(value: Any) -> Any:
    """The value with null for every number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
