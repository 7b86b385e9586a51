"""A race that is given what cannot be: edited files, damaged records, impossible paths and numbers.

Each is answered in one line with exit code 2, before anything is run or changed.
"""

import gzip
import json
import os
import stat
import struct
import threading

import pytest
import torch
from click.testing import CliRunner

from benchmarks.cli import bench
from heavyball.errors import RaceError
from heavyball.race import contest
from heavyball.race.cli import cli
from heavyball.race.plan import LARGEST, TYPES, Plan, open_race
from heavyball.race.store import Store
from heavyball.race.tasks import open_task
from heavyball.race.tasks.files import LARGEST as LARGEST_FILE
from heavyball.race.tasks.files import content, idx, write_atomically

SURFACE = ("race", "--task", "rosenbrock", "-o", "AdamW", "--steps", "2", "--seeds", "2")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """No test starts threads, and none asks for many."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(contest, "draw", lambda *args: None)  # pictures take a second each
    yield
    assert max(asked, default=1) <= LARGEST["threads"]


def command(*words, of=cli):
    return CliRunner().invoke(of, list(map(str, words)))


def is_refused(result, *parts):
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert len(line) < 1000
    assert all(part in line for part in parts), line
    return True


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A finished race, as the texts of its files."""
    folder = tmp_path_factory.mktemp("race") / "held"
    assert command(*SURFACE, "--out", folder).exit_code == 0
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(held, tmp_path):
    for name, raw in held.items():
        (tmp_path / "held" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "held" / name).write_bytes(raw)
    return tmp_path / "held"


WRONG = (
    *(None, True, 5, -1, 0, 1.5, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "abc", "2"),
    *(
        "a\0b",
        "\ud800",
        "x" * 5000,
        [],
        [[]],
        ["a"],
        [1.5],
        [True],
        [None],
        [10**400],
        ["0"],
        {},
        {"a": 1},
    ),
)


def fits(name, value):
    """What a race could be held with, as the command line could have asked for."""
    saved = tuple(value) if isinstance(value, list) else value
    default = Plan.__dataclass_fields__[name].default
    return (value is None and default is None) or TYPES[name][1](saved)


LISTS = {"optimizers", "chains", "recipes", "metrics"}


@pytest.mark.parametrize("name", Plan.__dataclass_fields__)
def test_an_argument_of_another_type_is_refused_and_the_file_left_as_it_was(name, folder):
    summary = folder / "race.json"
    good = json.loads(summary.read_text())
    tried = 0
    for value in WRONG:
        if not fits(name, value):
            text = json.dumps({**good, "arguments": {**good["arguments"], name: value}})
            summary.write_text(text)
            flag = "lr" if name == "lrs" else name.removesuffix("s") if name in LISTS else name
            assert is_refused(command("race", "--resume", folder), flag.replace("_", "-"))
            assert summary.read_text() == text
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("entry", ["arguments", "environments", "format"])
def test_the_other_entries_of_a_race_are_checked_too(entry, folder):
    summary = folder / "race.json"
    good = json.loads(summary.read_text())
    values = [v for v in WRONG if not (entry == "environments" and v == [])]
    values += [[1], [{"torch": [1]}], [{"torch": {}}]]
    for value in values:
        if value is True and entry == "format":
            continue  # equal to 1
        text = json.dumps({**good, entry: value})
        summary.write_text(text)
        assert is_refused(command("race", "--resume", folder))
        assert summary.read_text() == text
    for text in ("", "[]", "[" * 200_000, "1" * 5000, "\0", '{"format": 1}'):
        summary.write_text(text)
        assert is_refused(command("race", "--resume", folder))


def test_a_record_with_any_damage_is_not_done(folder):
    store = Store(folder)
    race = open_race(store.plan())
    path = min((folder / "runs").iterdir())
    raw = path.read_bytes()
    whole = json.loads(raw)
    others = store.finished(race).keys() - {("AdamW", whole["lr"], whole["seed"])}
    assert len(others) == 1
    edits = [{k: v for k, v in whole.items() if k != key} for key in whole]
    for key, value in whole.items():
        edits += [{**whole, key: v} for v in ([1], "x", None, 7, {}) if v != value]
    edits += [{**whole, "more": 1}]
    curve = whole["curve"]
    edits += [{**whole, "curve": {k: v for k, v in curve.items() if k != key}} for key in curve]
    edits += [{**whole, "curve": {**curve, key: v[:-1]}} for key, v in curve.items()]
    texts = [json.dumps(edit).encode() for edit in edits]
    texts += [b"[" * 200_000, b"[]", b"", b"\xff", b"null", raw[:-10], raw.replace(b"1", b"2", 1)]
    for text in texts:
        path.write_bytes(text)
        assert store.finished(race).keys() == others, text[:100]
    assert command("race", "--resume", folder).exit_code == 0  # it is done again
    assert json.loads(path.read_text())["test_loss"] == whole["test_loss"]
    path.with_name("copy.json").mkdir()
    os.mkfifo(path.with_name("pipe.json"))
    assert len(store.finished(race)) == 2


# ---- command lines


@pytest.mark.parametrize(
    "words",
    [
        *(["--threads", n] for n in (0, -1, 1025, 10**6, 2**31, 2**63, 10**30)),
        *(["--batch-size", n] for n in (0, 2**16 + 1, 10**30)),
        *(["--epochs", n] for n in (0, 2**31, 10**30)),
        *(["--eval-every", n] for n in (0, 2**31, 10**30)),
        *(["--grid-seeds", n] for n in (0, 3, 10**30)),
        *(["--seeds", n] for n in ("-1,", "1,1", f"{2**31},", f"{10**30},", "9" * 5000, "1001")),
        *(["--lr", v] for v in ("nan", "inf", "1,nan", "9" * 5000)),
        *(["--weight-decay", v] for v in ("nan", "inf", "-1")),
        *(["--target", v] for v in ("nan", "inf", "nobody")),
        *(["--data", v] for v in ("a\0b", "a" * 300, "a" * 5000, "~no-such-user/x")),
        *(
            [option, v]
            for option in ("--out", "--resume")
            for v in ("a\0b", "a" * 300, "~no-such-user/x")
        ),
        ["-o", "PSGDLRA:rank=99999999999"],
        ["-c", "psgd_lra(rank=99999999999)"],
        ["-c", "soap_precond(zeroth_power_mode='newtonschulz999999')"],
    ],
    ids=lambda words: " ".join(map(str, words))[:40].replace("\0", "NUL"),
)
def test_numbers_and_paths_that_cannot_be_are_refused_before_anything_is_run(
    words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    base = ["race", "--task", "chars" if "--data" in words else "rosenbrock", "-o", "AdamW"]
    base += [] if "--epochs" in words else ["--steps", 1]
    base += [] if "--seeds" in words else ["--seeds", 2]
    assert is_refused(command(*base, *words))
    assert not list(tmp_path.iterdir())


def test_what_is_written_last_is_checked_first(tmp_path):
    out = tmp_path / "out"
    (out / "race.png").mkdir(parents=True)
    assert is_refused(command(*SURFACE, "--out", out), "race.png")
    (out / "race.png").rmdir()
    (out / "runs").write_text("")
    assert is_refused(command(*SURFACE, "--out", out), "runs")
    assert not (out / "race.json").exists()
    (tmp_path / "page.md").write_bytes(b"\xff\xfe")
    digits = ("precision", "--task", "digits", "--steps", 1, "--seeds", 1)
    for words in (
        ("--picture", tmp_path / "x\0" / "y.png"),
        ("--picture", tmp_path / "page.md" / "y.png"),
        ("--picture", tmp_path / ("a" * 300) / "y.png"),
        ("--picture", tmp_path),
        ("--page", tmp_path / "page.md"),
        ("--page", tmp_path / "none.md"),
        ("--seeds", f"{10**30},"),
        ("--seeds", "1,1"),
        ("--steps", 10**30),
        ("--data", "a\0b"),
    ):
        assert is_refused(command(*digits, *words))
    for words in (
        ("--out", tmp_path / "page.md" / "x"),
        ("--out", "a\0b"),
        ("--threads", 10**6),
        ("--peers", "--peers-python", "a\0b"),
    ):
        assert is_refused(command("--quick", *words, of=bench))


@pytest.mark.parametrize("words", [("show",), ("plan",), ("ablate",)], ids=" ".join)
@pytest.mark.parametrize(
    "text", ["", "a\0b", "\ud800", "(" * 5000, "exp_avg(beta=1e999)", "|", "9" * 5000]
)
def test_texts_that_are_no_chains(words, text, tmp_path):
    more = ("--task", "rosenbrock", "--out", tmp_path / "out") if words == ("ablate",) else ()
    assert is_refused(command(*words, text, *more))


# ---- files


@pytest.mark.parametrize(
    "shape",
    [(0, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 3, (1, 1, 2**32 - 1), (2**16, 2**16, 1)],
    ids=str,
)
def test_sizes_that_overflow_are_refused(shape, tmp_path):
    path = tmp_path / "idx"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape))
    with pytest.raises(RaceError, match="header says"):
        idx(path, 3)


def bomb(path, begin, size):
    with gzip.open(path, "wb", 1) as file:
        file.write(begin)
        for _ in range(size // 2**20):
            file.write(bytes(2**20))


def test_no_more_is_unpacked_than_the_header_says(tmp_path, monkeypatch):
    path = tmp_path / "idx.gz"
    bomb(path, bytes([0, 0, 8, 1]) + struct.pack(">I", 100), 2**22)
    read = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: read.append(n) or real(self, n))
    with pytest.raises(RaceError, match="more than the 108 bytes"):
        idx(path, 1)
    assert max(read) == 109
    assert min(read) > 0


def test_an_archive_that_fills_the_memory_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    bomb(path, b"", LARGEST_FILE + 2**20)
    with pytest.raises(RaceError, match="more than the 67,108,864 bytes"):
        content(path)
    assert is_refused(
        command("race", "--task", "chars", "-o", "SGD", "--data", path, "--out", tmp_path / "o")
    )
    assert not (tmp_path / "o").exists()


def test_the_least_text_is_what_the_message_says(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 325)
    task = open_task("chars", path)
    assert task.test.shape == (1, 65)
    path.write_text("ab" * 324 + "a")
    with pytest.raises(RaceError, match="649 characters, at least 650"):
        open_task("chars", path)


def test_files_get_the_rights_that_the_umask_leaves_and_it_is_left_alone(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was asked for"))
        write_atomically(tmp_path / "file", b"1")
        monkeypatch.undo()
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    threads = [
        threading.Thread(target=write_atomically, args=(tmp_path / "file", bytes([n]) * 1000))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
