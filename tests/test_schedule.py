"""When a preconditioner is refreshed: counted out, and against the published table."""

import copy
import decimal
import itertools
import math
import pickle
import re
from pathlib import Path

import pytest
import torch

import heavyball
from heavyball.linalg.schedule import BLOCK, Every, PrecondSchedule, Schedule, as_schedule

# steps, interval as printed, refreshes so far: the table in HeavyBall's documentation
PUBLISHED = [
    (10, "1.00005", 10),
    (100, "1.026", 99),
    (1_000, "2.0", 738),
    (10_000, "14.3", 2_168),
    (100_000, "100.2", 4_049),
    (1_000_000, "513", 7_245),
]


@pytest.mark.parametrize(("steps", "interval", "total"), PUBLISHED)
def test_the_default_schedule_reproduces_the_published_table(
    steps: int, interval: str, total: int
) -> None:
    schedule = heavyball.PrecondSchedule()
    digits = len(interval.partition(".")[2])
    assert f"{schedule.interval(steps):.{digits}f}" == interval
    assert schedule.total(steps) == total


def test_the_totals_count_the_steps_that_fire() -> None:
    schedule = PrecondSchedule()
    fired = 0
    for step in range(1, 3 * BLOCK + 10):
        fired += schedule.fires(step)
        assert schedule.total(step) == fired
    assert fired == schedule.total(3 * BLOCK + 9)


@pytest.mark.parametrize(
    "schedule", [PrecondSchedule(), PrecondSchedule(0.5, 2), PrecondSchedule(2, 1)]
)
def test_the_count_is_the_rounded_sum_of_the_probabilities(schedule: PrecondSchedule) -> None:
    shares = [1 / (1 + (schedule.a * math.log10(n)) ** schedule.b) for n in range(1, 10_001)]
    for step in (1, 2, 7, 999, BLOCK, BLOCK + 1, 2 * BLOCK, 10_000):
        assert schedule.total(step) == math.floor(math.fsum(shares[:step]) + 0.25)
        assert schedule.interval(step) == pytest.approx(1 / shares[step - 1], rel=1e-14)


# Ordinary ones, and one each whose shares are all 1/2, fall at once, are 0 from the start, stay at 1.
UNLIKE = [(1 / 3, 9), (0.5, 2), (2, 1), (0.3, 1e-300), (0.18, 2000), (1e300, 50), (1e-300, 9)]


@pytest.mark.parametrize(("a", "b"), UNLIKE)
def test_a_late_count_is_the_sum_of_the_probabilities(a: float, b: float) -> None:
    schedule, steps = PrecondSchedule(a, b), torch.arange(1, 2**20 + 1, dtype=torch.float64)
    shares = 1 / (1 + (a * steps.log10()) ** b)
    # block by block, each added up by itself, so that rounding does not grow with the steps
    sums = [0.0, *itertools.accumulate(shares.view(-1, BLOCK).sum(1).tolist())]
    for block in range(0, len(sums), 5):
        for place in (1, 1000, BLOCK - 1):
            if (step := block * BLOCK + place) <= len(steps):
                total = sums[block] + shares[block * BLOCK : step].sum().item()
                assert schedule.total(step) == math.floor(total + 0.25), step


@pytest.mark.parametrize(("a", "b"), UNLIKE)
def test_decisions_at_any_step_agree_with_the_counts(a: float, b: float) -> None:
    schedule = PrecondSchedule(a, b)
    for around in (64 * BLOCK, 2**24, 2**31 + 5 * BLOCK, 2**52, 2**53 - BLOCK):
        # across the border of two blocks, which are added up apart
        fired = [schedule.fires(n) for n in range(around - 60, around + 60)]
        assert sum(fired) == schedule.total(around + 59) - schedule.total(around - 61)
        assert schedule.total(around) <= around


def test_late_counts_are_those_of_the_integral() -> None:
    # a = 1, b = 1: the integral of 1 / (1 + log10 x) is ln(10) / 10 (Ei(ln(10 x)) - Ei(ln(10 x_0)))
    def integral(x: float) -> float:
        log = math.log(10 * x)
        terms = (math.exp(k * math.log(log) - math.lgamma(k + 1)) / k for k in range(1, 250))
        return math.log(10) / 10 * (0.5772156649015329 + math.log(log) + math.fsum(terms))

    schedule, first = PrecondSchedule(1, 1), 10_000
    for step in (2**31, 2**40, 2**53 - 1):
        found = schedule.total(step) - schedule.total(first)
        assert found == pytest.approx(integral(step) - integral(first), rel=1e-10, abs=2)


def test_a_late_step_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    running = heavyball.linalg.schedule.running_sums
    monkeypatch.setattr(
        "heavyball.linalg.schedule.running_sums", lambda *a: made.append(a) or running(*a)
    )
    schedule = PrecondSchedule(b=7.25)
    with decimal.localcontext(decimal.Context(prec=2)):  # that of the caller is nobody's business
        schedule.fires(2**52)
    assert len(made) < 100
    made.clear()
    other = [schedule.fires(n) for n in range(2**52, 2**52 + 200)]
    assert len(made) <= 1
    assert other == [PrecondSchedule(b=7.25).fires(n) for n in range(2**52, 2**52 + 200)]


def test_an_interval_that_is_no_number_never_ends() -> None:
    assert PrecondSchedule(1e300, 50).interval(100) == math.inf


def test_a_decision_does_not_depend_on_what_was_asked_before() -> None:
    schedule = PrecondSchedule(b=8.5)
    late = [schedule.fires(n) for n in range(50_000, 50_200)]
    early = [schedule.fires(n) for n in range(1, 200)]
    assert late == [PrecondSchedule(b=8.5).fires(n) for n in range(50_000, 50_200)]
    assert early == [schedule.fires(n) for n in range(1, 200)]
    assert 0 < sum(late) < sum(early)


def test_nothing_fires_before_the_first_step() -> None:
    for schedule in (PrecondSchedule(), Every(3)):
        assert not schedule.fires(0)
        assert schedule.total(0) == 0
        assert schedule.interval(0) >= 1


def test_equal_intervals() -> None:
    schedule = Every(3)
    assert [n for n in range(13) if schedule.fires(n)] == [3, 6, 9, 12]
    assert [schedule.total(n) for n in (0, 2, 3, 8, 9)] == [0, 0, 1, 2, 3]
    assert schedule.interval(7) == 3


@pytest.mark.parametrize("schedule", [Every(8), PrecondSchedule()])
def test_phases_spread_the_steps_and_keep_their_number(schedule: Schedule) -> None:
    first, last = 30_000, 40_000
    phases = [k / 8 for k in range(8)]
    fired = {p: [n for n in range(first, last) if schedule.fires(n, p)] for p in phases}
    assert fired[0.0] == [n for n in range(first, last) if schedule.fires(n)]
    for phase, steps in fired.items():
        assert abs(len(steps) - len(fired[0.0])) <= 1
        # early by the phase's share of the interval
        early = [n - max(s for s in steps if s <= n) for n in fired[0.0][2:]]
        expected = phase * schedule.interval(35_000)
        assert abs(sum(early) / len(early) - expected) < 0.1 * schedule.interval(35_000) + 0.5
    assert len({n for steps in fired.values() for n in steps}) == sum(map(len, fired.values()))


def test_a_schedule_is_a_value() -> None:
    schedule = PrecondSchedule(0.4, 7)
    assert schedule == pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule)
    assert hash(schedule) == hash(PrecondSchedule(0.4, 7.0))
    assert schedule != PrecondSchedule()
    assert isinstance(schedule, Schedule)


def test_a_pair_of_options_makes_a_schedule() -> None:
    assert as_schedule(7, None) == Every(7)
    assert as_schedule(7, (1 / 3, 9)) == PrecondSchedule()
    assert as_schedule(None, Every(2)) == Every(2)
    with pytest.raises(ValueError, match="neither a frequency nor a refresh schedule"):
        as_schedule(None, None)
    with pytest.raises(TypeError, match=r"precond_scheduler=\(1, 2, 3\): expected two numbers"):
        as_schedule(2, (1, 2, 3))


def test_what_cannot_be_a_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a=0.0: expected in \(0, inf\)"):
        PrecondSchedule(a=0.0)
    with pytest.raises(TypeError, match="b='9': expected a number"):
        PrecondSchedule(b="9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frequency=0: expected at least 1"):
        Every(0)
    with pytest.raises(TypeError, match=r"frequency=2\.0: expected a whole number"):
        Every(2.0)  # type: ignore[arg-type]
    for step in (-1, 2**53, 1.0, True):
        with pytest.raises(ValueError, match="expected a whole number from 0"):
            PrecondSchedule().fires(step)  # type: ignore[arg-type]


def test_the_page_prints_the_published_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "precond_schedule.md").read_text()
    for steps, interval, total in PUBLISHED:
        row = next(line for line in page.splitlines() if line.startswith(f"| {steps:,} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == [interval, f"{total:,}"]
        assert cells[3] == f"{steps // 2:,}"
        assert cells[5] == f"{steps // 16:,}"
    assert re.search(r"!\[[^]]+\]\(\.\./assets/precond_schedule\.png\)", page)
