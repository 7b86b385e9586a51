"""Decisions about occasional work, made from the step alone, so that nothing needs to be saved."""

import functools
import math
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from torch.utils.weak import WeakIdKeyDictionary

Decision = Literal["stochastic", "cumulative", "deterministic"]
# A probability, a function of the number of steps before this one, or None for `annealed`.
Probability = float | int | Callable[[int], float] | None

# From this step on nothing is added up any more, so that a late step costs as much as an early one.
LATE = 2**20
# So much a sum of probabilities may lack of a whole number: ten times 0.1 is below 1 in floats.
ROUNDING = 1e-9


def annealed(
    n: int, highest: float = 1.0, lowest: float = 0.03, decay: float = 1e-3, flat: int = 500
) -> float:
    """The probability after n steps: `clamp(highest exp(-decay (n - flat)), lowest, highest)`.

    With the defaults 1 up to n = 500, 0.6065 at 1000, 0.2231 at 2000 and 0.03 from 4007 on.

    Source: `precond_update_prob_schedule` of kron_torch.
    """
    return min(highest, max(lowest, highest * math.exp(-decay * max(n - flat, 0))))


class Occasions:
    """The steps in which something happens, given its probability in every step.

    stochastic     where a number drawn for the step from [0, 1) is below the probability
    cumulative     where the whole part of the sum of the probabilities grows
    deterministic  where at least 1 / probability steps have passed since the last time

    "deterministic" happens less often than the others if 1 / probability is not an integer. Steps are
    counted from 0. From LATE on, the current probability is used for all earlier steps. Everything
    follows from the step, so there is nothing to save.

    Errors: ValueError where a probability is not in [0, 1].
    Source: stochastic and cumulative of HeavyBall, deterministic of kron_torch.
    """

    def __init__(self, probability: Probability = None, decision: Decision = "stochastic"):
        self._function = probability if callable(probability) else None
        self._value = None if callable(probability) or probability is None else probability
        self._decision = decision
        self._found = bytearray()
        self._sum, self._waited = 0.0, 0
        if self._value is not None:
            checked_probability(self._value, "preconditioner_update_probability")

    def probability(self, n: int) -> float:
        """The probability after n steps."""
        if self._function is not None:
            return checked_probability(float(self._function(n)), f"the probability at step {n}")
        return annealed(n) if self._value is None else float(self._value)

    def at(self, n: int, chance: Callable[[], float]) -> bool:
        """Whether it happens after n steps; `chance` draws from [0, 1)."""
        if self._decision == "stochastic":
            return chance() < self.probability(n)
        if n >= LATE:
            # the number as it is written, since its products have more digits than float64
            return self._late(n, Fraction(str(self.probability(n))))
        while len(self._found) <= n:
            self._found.append(self._next(self.probability(len(self._found))))
        return bool(self._found[n])

    def _late(self, n: int, probability: Fraction) -> bool:
        if self._decision == "cumulative" or not probability:
            return math.floor((n + 1) * probability) > math.floor(n * probability)
        return (n + 1) % math.ceil((1 - Fraction(ROUNDING)) / probability) == 0

    def _next(self, probability: float) -> bool:
        before = math.floor(self._sum + ROUNDING)
        self._sum += probability
        self._waited += 1
        if self._decision == "cumulative":
            return math.floor(self._sum + ROUNDING) > before
        happens = self._waited * probability >= 1 - ROUNDING
        if happens:
            self._waited = 0
        return happens


def checked_probability(value: float, name: str) -> float:
    """The value, or ValueError if it is not a probability."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected in [0, 1]")
    return value


# By function, which is not kept alive: it may be a user's and hold much.
_of_functions = WeakIdKeyDictionary()
_of_values = functools.lru_cache(maxsize=256)(Occasions)


def occasions(probability: Probability, decision: Decision) -> Occasions:
    """The one `Occasions` of these values, so that its sums are not made again at every step."""
    if not callable(probability):
        return _of_values(probability, decision)
    try:
        known = _of_functions.setdefault(probability, {})
    except TypeError:  # there are callables that cannot be referred to weakly
        return _of_values(probability, decision)
    if decision not in known:
        ref = weakref.ref(probability)
        known[decision] = Occasions(lambda n: ref()(n), decision)  # type: ignore[misc]
    return known[decision]
