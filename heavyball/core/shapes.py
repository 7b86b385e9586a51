"""The shapes of schedules: functions of n = 1, 2, .., the steps of a parameter group.

x = min(1, (n - 1) / T); with a `floor` f, a schedule s becomes f + (1 - f) s.
torch's schedulers count from 0: their epoch is n - 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, ParamSpec

from heavyball.core.hyper import Interval, Live, check_live, finite, nonnegative, positive
from heavyball.core.schedule import Schedule, plain

_SHARE = Interval(0, 1, high_open=False)
_P = ParamSpec("_P")


def _shape(make: Callable[_P, Live]) -> Callable[_P, Live]:
    """A maker of schedules that makes numbers plain and notes whether a peak was given."""

    @functools.wraps(make)
    def made(*args: _P.args, **options: _P.kwargs) -> Live:
        fn = make(*map(plain, args), **{name: plain(value) for name, value in options.items()})  # type: ignore[arg-type]
        fn.is_peak_given = "peak" in options
        return fn

    return made


def _made(
    make: Callable[..., Any],
    share: Callable[[int], float],
    corners: tuple[float, ...],
    peak: float | None,
    **arguments: Any,
) -> Schedule:
    if peak is not None:
        peak = _checked(make, finite, peak=peak)
    return Schedule(make, arguments, share, corners, peak)


def _checked(make: Callable[..., Any], domain: Interval, **argument: Any) -> float:
    """An argument as a number.

    Errors: TypeError or ValueError naming the schedule and the argument.
    """
    ((name, value),) = argument.items()
    try:
        check_live(name, value, 0.0, domain)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{make.__name__}: {error}") from None
    return value


def _refuse(make: Callable[..., Any], why: str) -> ValueError:
    return ValueError(f"{make.__name__}: {why}")


def _part(n: int, total: float) -> float:
    return min(max((n - 1) / total, 0.0), 1.0)


def _above(floor: float, share: float) -> float:
    return floor + (1 - floor) * share


def _half_wave(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


@_shape
def constant(*, peak: float = 1.0) -> Live:
    """Constant: s(n) = 1."""
    return _made(constant, lambda n: 1.0, (), peak)


@_shape
def linear(T: float, floor: float = 0.0, *, peak: float = 1.0) -> Live:
    """Linear decay: s(n) = 1 - x, the floor from n = T + 1 on.

    Units: T in steps, `floor` as a fraction of the peak.
    """
    _checked(linear, positive, T=T)
    _checked(linear, _SHARE, floor=floor)
    return _made(linear, lambda n: _above(floor, 1 - _part(n, T)), (T + 1,), peak, T=T, floor=floor)


@_shape
def cosine(T: float, floor: float = 0.0, *, peak: float = 1.0) -> Live:
    """Cosine decay: s(n) = (1 + cos(pi x)) / 2; a floor of 0.1 is common.

    Units: T in steps, `floor` as a fraction of the peak.
    Source: Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983.
    """
    _checked(cosine, positive, T=T)
    _checked(cosine, _SHARE, floor=floor)
    fn = lambda n: _above(floor, _half_wave(_part(n, T)))  # noqa: E731
    return _made(cosine, fn, (T + 1,), peak, T=T, floor=floor)


@_shape
def rex(T: float, floor: float = 0.0, *, beta: float = 0.5, peak: float = 1.0) -> Live:
    """REX, a late decay: s(n) = (1 - x) / (1 - b + b (1 - x)), b = `beta`; `linear` for 0.

    Units: T in steps, `floor` as a fraction of the peak.
    Source: Chen, Wolfe and Kyrillidis 2021, https://arxiv.org/abs/2107.04197.
    """
    _checked(rex, positive, T=T)
    _checked(rex, _SHARE, floor=floor)
    _checked(rex, Interval(0, 1), beta=beta)

    def fn(n: int) -> float:
        left = 1 - _part(n, T)
        return _above(floor, left / (1 - beta + beta * left))

    return _made(rex, fn, (T + 1,), peak, T=T, floor=floor, beta=beta)


@_shape
def polynomial(T: float, q: float = 1.0, floor: float = 0.0, *, peak: float = 1.0) -> Live:
    """Polynomial decay: s(n) = (1 - x)^q.

    Units: T in steps, `floor` as a fraction of the peak.
    Source: torch.optim.lr_scheduler.PolynomialLR.
    """
    _checked(polynomial, positive, T=T)
    _checked(polynomial, positive, q=q)
    _checked(polynomial, _SHARE, floor=floor)
    fn = lambda n: _above(floor, (1 - _part(n, T)) ** q)  # noqa: E731
    return _made(polynomial, fn, (T + 1,), peak, T=T, q=q, floor=floor)


_FALLS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda d: 1 - math.sqrt(d),
    "linear": lambda d: 1 - d,
    "cosine": _half_wave,
}


@_shape
def wsd(
    T: float,
    warmup: float,
    decay: float,
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
    floor: float = 0.0,
    *,
    peak: float = 1.0,
) -> Live:
    """Warm-up, stable, decay: cool down over the last `decay` of T steps.

    s(n) = min(1, n / warmup) c(d), d = (n - 1 - (T - decay)) / decay in [0, 1],
    and c is 1 - sqrt(d), 1 - d, or (1 + cos(pi d)) / 2

    The floor is that of the cool-down.

    Units: T, `warmup` and `decay` in steps, `floor` as a fraction of the peak.
    Source: Hu et al. 2024, https://arxiv.org/abs/2404.06395; "sqrt" of Hägele et al. 2024,
        https://arxiv.org/abs/2405.18392.
    """
    _checked(wsd, positive, T=T)
    _checked(wsd, nonnegative, warmup=warmup)
    _checked(wsd, positive, decay=decay)
    _checked(wsd, _SHARE, floor=floor)
    if shape not in _FALLS:
        raise _refuse(wsd, f"shape={shape!r}: expected one of {', '.join(map(repr, _FALLS))}")
    if max(warmup, decay) > T:
        longer = f"decay={decay!r}" if decay > T else f"warmup={warmup!r}"
        raise _refuse(wsd, f"{longer} is more than all of T={T!r} steps")
    fall = _FALLS[shape]

    def fn(n: int) -> float:
        rise = min(1.0, n / warmup) if warmup else 1.0
        return rise * _above(floor, fall(min(max((n - 1 - (T - decay)) / decay, 0.0), 1.0)))

    turns = (warmup, T - decay + 1, T + 1)
    return _made(wsd, fn, turns, peak, T=T, warmup=warmup, decay=decay, shape=shape, floor=floor)


@_shape
def inverse_sqrt(warmup: float, *, peak: float = 1.0) -> Live:
    """Warm-up, then inverse square root: s(n) = min(1, n / w) sqrt(w / max(n, w)).

    Units: w = `warmup` in steps.
    Source: Vaswani et al. 2017, section 5.3, https://arxiv.org/abs/1706.03762.
    """
    _checked(inverse_sqrt, positive, warmup=warmup)
    fn = lambda n: min(1.0, n / warmup) * math.sqrt(warmup / max(n, warmup))  # noqa: E731
    return _made(inverse_sqrt, fn, (warmup,), peak, warmup=warmup)


@_shape
def power(T: float, flat: float, q: float = 1.2, floor: float = 0.0, *, peak: float = 1.0) -> Live:
    """Constant for `flat` steps, then polynomial decay.

    s(n) = min(1, ((T - n + 1) / (T - flat))^q)

    Units: T and `flat` in steps, `floor` as a fraction of the peak.
    Source: PowerCool of modded-nanogpt's track 3, https://github.com/KellerJordan/modded-nanogpt.
    """
    _checked(power, positive, T=T)
    _checked(power, nonnegative, flat=flat)
    _checked(power, positive, q=q)
    _checked(power, _SHARE, floor=floor)
    if flat >= T:
        raise _refuse(power, f"flat={flat!r}: expected fewer than all of T={T!r} steps")
    fn = lambda n: _above(floor, min(1.0, (max(T - n + 1, 0.0) / (T - flat)) ** q))  # noqa: E731
    return _made(power, fn, (flat + 1, T + 1), peak, T=T, flat=flat, q=q, floor=floor)


@_shape
def exponential(k: float, *, peak: float = 1.0) -> Live:
    """Exponential: s(n) = k^(n - 1); above 1 for a learning-rate range test.

    Source: torch.optim.lr_scheduler.ExponentialLR.
    """
    _checked(exponential, positive, k=k)

    def fn(n: int) -> float:
        try:
            return float(k ** (n - 1))
        except OverflowError:
            return math.inf

    return _made(exponential, fn, (), peak, k=k)


@_shape
def step(at: int | tuple[int, ...], factor: float = 0.1, *, peak: float = 1.0) -> Live:
    """Step decay: s(n) = factor^(number of steps in `at` that are below n).

    at: steps after which it applies, one or several.

    Source: torch.optim.lr_scheduler.MultiStepLR.
    """
    places = tuple(at) if isinstance(at, tuple | list) else (at,)
    for place in places:
        _checked(step, nonnegative, at=place)
    if not places:
        raise _refuse(step, "at=(): expected steps after which the factor applies")
    _checked(step, nonnegative, factor=factor)
    fn = lambda n: float(factor ** sum(n > place for place in places))  # noqa: E731
    turns = tuple(place + 1 for place in places)
    return _made(step, fn, turns, peak, at=places, factor=factor)


@_shape
def one_cycle(
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    *,
    peak: float = 1.0,
) -> Live:
    """One-cycle: cosine up to the peak, then cosine down.

    From 1 / div_factor to 1 over the first `pct_start` of the steps, then down to
    1 / (div_factor final_div_factor) in the last one, where it stays.

    Source: torch.optim.lr_scheduler.OneCycleLR with its defaults, `peak` its `max_lr`; Smith and Topin
        2017, https://arxiv.org/abs/1708.07120.
    """
    _checked(one_cycle, positive, total_steps=total_steps)
    _checked(one_cycle, _SHARE, pct_start=pct_start)
    _checked(one_cycle, positive, div_factor=div_factor)
    _checked(one_cycle, positive, final_div_factor=final_div_factor)
    top, last = pct_start * total_steps - 1, total_steps - 1
    low = 1 / div_factor
    end = low / final_div_factor

    def fn(n: int) -> float:
        t = min(n - 1, last)
        if t <= top:
            return 1 + (low - 1) * _half_wave(t / top) if top > 0 else 1.0
        return end + (1 - end) * _half_wave((t - top) / (last - top))

    return _made(
        one_cycle,
        fn,
        (top + 1, total_steps),
        peak,
        total_steps=total_steps,
        pct_start=pct_start,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )


@_shape
def cosine_restarts(T_0: int, T_mult: int = 1, floor: float = 0.0, *, peak: float = 1.0) -> Live:
    """Cosine decay with restarts; each cycle is `T_mult` times as long as the one before.

    Units: T_0 in steps, `floor` as a fraction of the peak.
    Source: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts; https://arxiv.org/abs/1608.03983.
    """
    _checked(cosine_restarts, positive, T_0=T_0)
    _checked(cosine_restarts, Interval(1, math.inf), T_mult=T_mult)
    _checked(cosine_restarts, _SHARE, floor=floor)

    def fn(n: int) -> float:
        t, length = float(n - 1), float(T_0)
        while t >= length and T_mult > 1:
            t, length = t - length, length * T_mult
        return _above(floor, _half_wave(t % length / length))

    return _made(cosine_restarts, fn, (T_0,), peak, T_0=T_0, T_mult=T_mult, floor=floor)


@_shape
def ramp(lo: float, hi: float, up: float, T: float, down: float) -> Live:
    """Ramp from one value to another, and back at the end, as for Muon's momentum.

    s(n) = lo + (hi - lo) (a - b), a = (n - 1) / up and b = (n - 1 - (T - down)) / down in [0, 1]

    Units: `lo` and `hi` are the numbers themselves; `up`, T and `down` in steps, 0 for a jump at the
        first and after the last of them.
    Source: modded-nanogpt, 0.85 to 0.95 over 300 steps and back over the last 50 to 200,
        https://github.com/KellerJordan/modded-nanogpt.
    """
    _checked(ramp, finite, lo=lo)
    _checked(ramp, finite, hi=hi)
    _checked(ramp, nonnegative, up=up)
    _checked(ramp, positive, T=T)
    _checked(ramp, nonnegative, down=down)
    if up + down > T:
        raise _refuse(ramp, f"up={up!r} and down={down!r} are more than all of T={T!r} steps")

    def fn(n: int) -> float:
        rise = min((n - 1) / up, 1.0) if up else 1.0
        past = n - 1 - (T - down)
        fall = min(max(past / down, 0.0), 1.0) if down else float(past >= 0)
        return lo + (hi - lo) * rise - (hi - lo) * fall

    turns = (up + 1, T - down + 1, T + 1)
    return _made(ramp, fn, turns, None, lo=lo, hi=hi, up=up, T=T, down=down)


SHAPES = {
    fn.__name__: fn
    for fn in (
        *(constant, linear, cosine, rex, polynomial, wsd, inverse_sqrt, power, exponential),
        *(step, one_cycle, cosine_restarts, ramp),
    )
}


# ---- numbers for betas


def beta_of_half_life(steps: float) -> float:
    """The beta of a running mean with the given half-life in steps.

    beta = 1 - ln 2 / h

    Units: h = `steps`, a number of steps above ln 2.
    Source: Marek et al. 2025, https://arxiv.org/abs/2507.07101.
    """
    _checked(beta_of_half_life, Interval(math.log(2), math.inf, low_open=True), steps=steps)
    return 1 - math.log(2) / steps


def beta_of_batch(beta: float, ratio: float) -> float:
    """The beta with the same half-life in samples, for a batch that is `ratio` times as large.

    beta' = beta^ratio

    Source: Marek et al. 2025, https://arxiv.org/abs/2507.07101.
    """
    _checked(beta_of_batch, Interval(0, 1), beta=beta)
    _checked(beta_of_batch, positive, ratio=ratio)
    return float(beta**ratio)
