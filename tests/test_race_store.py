"""A race's files when the process dies while one of them is being written."""

import json
import os
import signal
from pathlib import Path

import fresh
import pytest

from heavyball.race.store import Store

ROOT = Path(__file__).parent.parent

# Writes one record, then dies in the middle of writing the next.
KILLED = """
import os, signal, sys
from pathlib import Path
from heavyball.race.store import Store

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

class Dying:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *args):
        pass
    def write(self, raw):
        self.file.write(raw[: len(raw) // 2])
        self.file.flush()
        die()

store, moment = Store(Path(sys.argv[1])), sys.argv[2]
store.write({"runs": 1})
if moment == "write":
    opened = os.fdopen
    os.fdopen = lambda *args: Dying(opened(*args))
else:
    setattr(os, moment, die)
store.write({"runs": 2, "text": "x" * 100_000})
"""


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_file_of_before(tmp_path, moment):
    done = fresh.run(KILLED, tmp_path, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = Store(tmp_path)
    assert store.saved()["runs"] == 1
    assert len(list(tmp_path.iterdir())) == 2  # with what was begun
    store.write({"runs": 3})
    assert json.loads(store.summary.read_text())["runs"] == 3
    (tmp_path / "runs").mkdir()
    for name in ("note.txt", ".hidden", "runs/.other", "runs/.a.json.b", "runs/a.json"):
        (tmp_path / name).write_text("")
    store.clear()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"note.txt", ".hidden", "runs/.other"}


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write({"runs": 1})

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="no space left"):
        store.write({"runs": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["race.json"]
    assert store.saved()["runs"] == 1
