"""Sums of the shares of a schedule from a late step on, to more digits than float64 has.

The sum of a smooth function over whole numbers is its integral and a little that its ends decide
(Euler and Maclaurin). So a sum over 2^50 steps takes as long as one over some thousand.
"""

import functools
import math
from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

# A number that is too large becomes infinite and one that is too small 0: such shares are 0 and 1.
DIGITS = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
# Of the rule that integrates a piece.
NODES = 24


def sum_between(a: float, b: float, low: int, high: int) -> Decimal:
    """1 / (1 + (a log10 n)^b), added up over the steps n = low + 1 .. high.

    It is exact to more digits than float64 has where the shares change little between two steps.
    """
    with localcontext(DIGITS):
        doublings = (high // low).bit_length() - 1
        integral = _doubled(a, b, low, doublings) + _integral(a, b, low << doublings, high)
        return integral + _end(a, b, high) - _end(a, b, low)


def _share(a: float, b: float, log: Decimal) -> Decimal:
    return 1 / (1 + (Decimal(a) * log / Decimal(10).ln()) ** Decimal(b))


def _end(a: float, b: float, step: int) -> Decimal:
    """What an end adds to the integral: half of its share, and a twelfth of the derivative."""
    log = Decimal(step).ln()
    share = _share(a, b, log)
    return share / 2 - share * (1 - share) * Decimal(b) / (12 * step * log)


@functools.lru_cache(maxsize=1024)
def _doubled(a: float, b: float, low: int, doublings: int) -> Decimal:
    """The integral from `low` to `low` doubled so many times."""
    if doublings == 0:
        return Decimal(0)
    start = low << (doublings - 1)
    return _doubled(a, b, low, doublings - 1) + _integral(a, b, start, 2 * start)


def _integral(a: float, b: float, low: int, high: int) -> Decimal:
    """Over the logarithm of the step, in which a share changes about equally fast everywhere."""
    first, last = Decimal(low).ln(), Decimal(high).ln()
    found = Decimal(0)
    for left, right in _pieces(0.0, 1.0, float(first), float(last), a, b):
        middle = first + (last - first) * (Decimal(left) + Decimal(right)) / 2
        half = (last - first) * (Decimal(right) - Decimal(left)) / 2
        for node, weight in _gauss_legendre():
            log = middle + half * node
            found += half * weight * _share(a, b, log) * log.exp()
    return found


def _pieces(
    left: float, right: float, first: float, last: float, a: float, b: float
) -> Iterator[tuple[float, float]]:
    """Parts of the way from `first` to `last` that are short beside the distance to a pole.

    Those of the share, as a function of complex numbers, are where its power is -1.
    """
    middle = first + (last - first) * (left + right) / 2
    half = (last - first) * (right - left) / 2
    turn, angle = math.log(10) / a, min(math.pi, math.pi / b)
    pole = complex(turn * math.cos(angle), turn * math.sin(angle))
    # no piece need be shorter than a step
    if half > 0.4 or (half > math.exp(-middle) and abs(pole - middle) < 2 * half):
        yield from _pieces(left, (left + right) / 2, first, last, a, b)
        yield from _pieces((left + right) / 2, right, first, last, a, b)
    else:
        yield left, right


@functools.cache
def _gauss_legendre() -> tuple[tuple[Decimal, Decimal], ...]:
    """The nodes and weights of Gauss and Legendre on [-1, 1]."""
    found = []
    for k in range(NODES):
        x = Decimal(math.cos(math.pi * (k + 0.75) / (NODES + 0.5)))
        for _ in range(6):  # each doubles the digits
            value, before = x, Decimal(1)
            for n in range(2, NODES + 1):
                value, before = ((2 * n - 1) * x * value - (n - 1) * before) / n, value
            slope = NODES * (x * value - before) / (x * x - 1)
            x -= value / slope
        found.append((x, 2 / ((1 - x * x) * slope * slope)))
    return tuple(found)
