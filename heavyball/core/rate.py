"""Learning-rate estimators: numbers of a group, and the function that updates them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from heavyball.core.hyper import Domain
from heavyball.core.transform import Rules, Transform, checked, signed
from heavyball.state.declare import State


@dataclass(frozen=True)
class Member:
    """One group as `finish` sees it. Its numbers are 0-d tensors, or equivalent host numbers.

    sums: the sums over its parameters; None if none of them had a gradient in this step, or a gate
        skipped it.
    values: the element's numbers (counters after this step), hyper-parameters, `lr` with the group's
        warm-up, and the `loss` if the chain reads it.
    """

    sums: tuple[Tensor, ...] | None
    values: Mapping[str, Any]


Finish = Callable[[Sequence[Member], Mapping[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Estimate:
    """The user-facing side of a rate: its names, and the warnings about its groups.

    name: the estimated number, as users know it. steps_with: the number that multiplies `lr`.
    split: the option that gives each group its own estimate; without this option, each group has
        one. mean: the option that makes all groups step with a mean.
    unlike: `fn(name, one, other, hyper)`, for a hyper-parameter that differs between groups with one
        estimate: the warning, "" for none, or None if it must not differ.
    start: the hyper-parameter with the initial estimate.
    stands: `fn(group, options)`, whether the user asked for a constant estimate.
    early: `fn(options)`, whether the estimate stops changing too early to be found.
    tuned_by: what to tune instead of `lr`. try_instead: what to try if the estimate does not change.
    """

    name: str
    start: str
    steps_with: str = ""
    split: str = ""
    mean: str = ""
    unlike: Callable[[str, Any, Any, Mapping[str, Any]], str | None] | None = None
    stands: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda group, options: False
    early: Callable[[Mapping[str, Any]], bool] = lambda options: False
    tuned_by: str = ""
    try_instead: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Rate(Transform):
    """An element that determines the learning rate from numbers of the parameter group."""

    numbers: dict[str, str | float] = field(default_factory=dict)
    past: dict[str, str] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    gives: tuple[str, ...] = ()
    finish: Finish = lambda members, options: []
    moment_unit: str = ""
    moment_change: str = ""
    hyper_change: dict[str, str] = field(default_factory=dict)
    shared: bool = False
    estimate: Estimate | None = None

    @property
    def results(self) -> tuple[str, ...]:
        """The results of the function after the update and the states."""
        return (*self.provides, *self.gives)

    @property
    def counters(self) -> tuple[str, ...]:
        """The numbers that count the steps of a group."""
        return tuple(n for n, first in self.numbers.items() if isinstance(first, int))

    @property
    def is_shared(self) -> bool:
        """Whether all groups have one estimate."""
        split = self.estimate.split if self.estimate else ""
        return self.shared or not self.options.get(split, True)

    @property
    def is_mean(self) -> bool:
        """Whether groups with estimates of their own step alike."""
        mean = self.estimate.mean if self.estimate else ""
        return not self.is_shared and self.options.get(mean, False)


def rate(
    *,
    numbers: Mapping[str, str | float],
    finish: Finish,
    past: Mapping[str, str] | None = None,
    made_from: Mapping[str, str] | None = None,
    from_sums: Callable[..., tuple[Tensor, ...]] | None = None,
    gives: tuple[str, ...] = (),
    moment_unit: str = "",
    moment_change: str = "",
    hyper_change: Mapping[str, str] | None = None,
    shared: bool = False,
    estimate: Estimate | None = None,
    kind: Literal["rate", "writer"] = "rate",
    provides: tuple[str, ...] = ("lr",),
    domains: Mapping[str, Domain] | None = None,
    excludes: Mapping[str, str] | None = None,
    **states: State,
) -> Callable[[Callable[..., Any]], Rate]:
    """Declare a learning-rate estimator: `@rate(numbers={"d": "d0"}, finish=...)`.

    The function is that of a `transform`. Wherever it is placed in a chain, it runs before every
    element whose state it may have to rescale. The numbers are entries of the parameter group, saved
    with it, and context for every element.

    numbers: their initial values, each a hyper-parameter or a float; an int counts the group's steps.
    finish: `fn(members, options)` receives a `Member` for each group and returns the new numbers of
        each. It computes with torch on 0-d tensors and reads no values, which would synchronize with
        the device.
    past: numbers that keep the value of another before `finish`, by name.
    made_from: numbers that `finish` computes from another in every step, by name.
    from_sums: `fn(update, ...)`, one tensor's shares, a tuple, of sums over all parameters; `finish` is
        called before the step continues, so the function sees the new numbers.
    gives: alternatively, names of additional results after those of `provides`: shares of sums over all
        parameters that are not needed in this step. `finish` is called after it.
    moment_unit: the result of `provides` that is the unit of later moments, if it changes with the rate.
        moment_change: the result by which they are multiplied in this step, and squares by its
            square: the unit of the parameter's last step over that of this one.
    hyper_change: hyper-parameters of later elements, by name, that have this unit too, each with the
        result of `provides` that multiplies it.
    shared: whether all groups have the same numbers, except counters, if there is no `estimate`.
    estimate: the user-facing side, see `Estimate`.
    kind: "writer" is placed like a writer, and returns the new parameter.
    provides, domains, excludes: as in `transform`.

    Errors: TypeError if the signature and the declared state differ, or there are no sums.
    """
    rules = Rules(dict(domains or {}), dict(excludes or {}), "", False, None, False)

    def declare(fn: Callable[..., Any]) -> Rate:
        if bool(from_sums) == bool(gives):
            raise TypeError(f"{fn.__name__}: expected sums from either `from_sums` or `gives`")
        if bool(moment_unit) != bool(moment_change):
            raise TypeError(f"{fn.__name__}: `moment_unit` and `moment_change` go together")
        for name in (moment_unit, moment_change, *(hyper_change or {}).values()):
            if name and name not in provides:
                raise TypeError(f"{fn.__name__}: {name!r} changes a unit, but provides={provides}")
        made = Rate(
            *signed(fn, states),
            provides,
            kind,
            rules,
            from_sums,
            numbers=dict(numbers),
            past=dict(past or {}),
            made_from=dict(made_from or {}),
            gives=gives,
            finish=finish,
            moment_unit=moment_unit,
            moment_change=moment_change,
            hyper_change=dict(hyper_change or {}),
            shared=shared,
            estimate=estimate,
        )
        return checked(made)

    return declare
