"""When something happens, decided from the step alone."""

import itertools
import math
import random
import re
from fractions import Fraction

import pytest

from heavyball.linalg.decisions import LATE, Occasions, annealed, occasions


def never() -> float:
    raise AssertionError("nothing is drawn for this decision")


def test_default_probability_is_flat_up_to_500() -> None:
    assert [annealed(n) for n in (0, 1, 499, 500)] == [1.0] * 4
    assert annealed(501) < 1
    for n, expected in ((1000, 0.6065), (2000, 0.2231), (4000, 0.0302)):
        assert annealed(n) == pytest.approx(math.exp(-0.001 * (n - 500)), rel=1e-12)
        assert annealed(n) == pytest.approx(expected, abs=5e-5)
    assert annealed(4006) > 0.03
    assert [annealed(n) for n in (4007, 10**7)] == [0.03] * 2


def test_cumulative_happens_where_the_whole_part_of_the_sum_grows() -> None:
    for probability in (0.1, 0.03, 1.0, 0.7, 0.0, 1 / 3):
        exact = Fraction(probability).limit_denominator(1000)
        happens = Occasions(probability, "cumulative")
        found = [happens.at(n, never) for n in range(400)]
        expected = [math.floor(exact * (n + 1)) > math.floor(exact * n) for n in range(400)]
        assert found == expected


def test_cumulative_follows_a_function() -> None:
    values = [random.Random(n).random() for n in range(300)]
    happens = Occasions(lambda n: values[n], "cumulative")
    sums = [math.fsum(values[:n]) for n in range(301)]
    assert [happens.at(n, never) for n in range(300)] == [
        math.floor(b) > math.floor(a) for a, b in itertools.pairwise(sums)
    ]


def test_deterministic_waits_for_the_interval() -> None:
    happens = Occasions(0.03, "deterministic")
    assert [n for n in range(110) if happens.at(n, never)] == [33, 67, 101]
    happens = Occasions(0.1, "deterministic")
    assert [n for n in range(40) if happens.at(n, never)] == [9, 19, 29, 39]
    assert not any(Occasions(0, "deterministic").at(n, never) for n in range(20))


def test_deterministic_is_the_counter_of_the_original() -> None:
    happens, waited, expected = Occasions(None, "deterministic"), 0, []
    for n in range(5000):
        waited += 1
        expected.append(waited >= 1 / annealed(n))
        waited = 0 if expected[-1] else waited
    assert [happens.at(n, never) for n in range(5000)] == expected
    assert sum(expected) < 5000 / 2


@pytest.mark.parametrize("decision", ["cumulative", "deterministic"])
def test_the_answer_depends_on_the_step_alone(decision: str) -> None:
    one, other = Occasions(0.37, decision), Occasions(0.37, decision)
    order = list(range(200))
    expected = [one.at(n, never) for n in order]
    random.Random(0).shuffle(order)
    found = {n: other.at(n, never) for n in order}
    assert [found[n] for n in range(200)] == expected


def test_stochastic_compares_with_what_is_drawn() -> None:
    happens = Occasions(0.25, "stochastic")
    assert [happens.at(7, lambda value=value: value) for value in (0.0, 0.2499, 0.25, 0.9)] == [
        *(True, True, False, False)
    ]
    assert not Occasions(0.0).at(0, lambda: 0.0)


@pytest.mark.parametrize("wrong", [-0.1, 1.01, math.nan])
def test_a_probability_outside_of_the_unit_interval_raises(wrong: float) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        Occasions(wrong)
    with pytest.raises(ValueError, match=f"step 3=.*{re.escape(repr(wrong))}"):
        Occasions(lambda n: wrong).at(3, lambda: 0.5)


def test_equal_values_share_their_sums() -> None:
    assert occasions(0.3, "cumulative") is occasions(0.3, "cumulative")
    assert occasions(0.3, "cumulative") is not occasions(0.3, "deterministic")


@pytest.mark.parametrize("decision", ["cumulative", "deterministic"])
@pytest.mark.parametrize("probability", [None, 0.03, 0.1, 1 / 3, 1.0, 0.0, 1e-12])
def test_a_late_step_adds_nothing_up_and_happens_as_often(probability, decision) -> None:
    happens = Occasions(probability, decision)
    wanted = 0.03 if probability is None else probability
    if decision == "deterministic" and wanted:
        wanted = 1 / math.ceil((1 - 1e-9) / wanted)
    for start in (LATE, 2**31, 2**52):
        found = [happens.at(n, never) for n in range(start, start + 1020)]
        assert abs(sum(found) - wanted * 1020) <= 1
    if probability not in (
        None,
        1 / 3,
    ):  # what the sums say in the end is what is said from there on
        one = [Occasions(probability, decision).at(n, never) for n in range(300)]
        period = 900 if decision == "cumulative" or not wanted else round(1 / wanted) * 900
        start = LATE + -LATE % period
        assert [happens.at(start + n, never) for n in range(300)] == one
