"""A transform of whole tensors: linear algebra in plain torch, on a batch of parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Domain
from heavyball.core.transform import Rules, Transform, checked, keyword_names, signed
from heavyball.state.declare import State

KINDS = ("transform", "writer", "post")


@dataclass(frozen=True, eq=False, repr=False)
class Whole(Transform):
    """A transform whose function gets the update and states of B parameters of one shape."""

    opaque: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    after: Callable[..., Any] | None = None
    due: Callable[..., bool] | None = None
    lead: Transform | None = None
    noise_every: str | None = None
    inner_shape: Callable[..., tuple[int, ...]] | None = None
    fed_numbers: Callable[..., int] | None = None
    rounds: Callable[..., tuple[torch.dtype | None, torch.dtype | None]] | None = None

    whole: ClassVar[bool] = True

    @property
    def results(self) -> tuple[str, ...]:
        """The results of the function after the update and the states."""
        return (*self.provides, *self.opaque)

    def refused_fed(self, shape: torch.Size, count: int) -> str:
        """The expected number of `fed` values for this shape, if `count` is wrong, else ""."""
        if self.fed_numbers is None:
            return ""
        number = self.fed_numbers(shape, self.options)
        return "" if count and count % number == 0 else f"{number} numbers, or a multiple of it"

    @property
    def all_states(self) -> dict[str, State]:
        """Its states and those of the transform that runs right before it."""
        return {**(self.lead.states if self.lead else {}), **self.states}

    def asks_for(self, name: str) -> bool:
        """Whether the function or its `after` has an argument of this name."""
        return name in self.context or name in keyword_names(self.after)


def whole_transform(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    kind: Literal["transform", "writer", "post"] = "transform",
    provides: tuple[str, ...] = (),
    opaque: tuple[str, ...] = (),
    host: tuple[str, ...] = (),
    after: Callable[..., Any] | None = None,
    due: Callable[..., bool] | None = None,
    lead: Transform | None = None,
    domains: Mapping[str, Domain] | None = None,
    excludes: Mapping[str, str] | None = None,
    before_state: str = "",
    requires: Callable[[torch.Size, Mapping[str, Any]], str | None] | None = None,
    opens_once: bool = False,
    instead: Callable[[Mapping[str, Any]], Transform | None] | None = None,
    noise_every: str | None = None,
    inner_shape: Callable[..., tuple[int, ...]] | None = None,
    fed_numbers: Callable[..., int] | None = None,
    rounds: Callable[..., tuple[torch.dtype | None, torch.dtype | None]] | None = None,
    perturb: Callable[..., Tensor] | None = None,
    perturb_every: str = "",
    **states: State,
) -> Any:
    """Declare a transform of whole tensors: `@whole_transform(gram=State(...))` above a function.

    The function receives and returns the update and the states of B parameters of the same shape,
    stacked to (B, *shape). It is plain torch code, may make host decisions based on `count`, and
    does not run while an earlier `gate` is false. Its arguments are those of a `transform`, and
    `count`, `places`, `noise` and `chance`.

    kind: "writer" returns the new parameter instead of an update; "post" runs after the writer, with the
        parameter as update and as result.
    provides: names of numbers for later elements: a Python number or B values; a `gate` that is the
        Python value False ends the step of these parameters.
    opaque: names of results after those of `provides`, passed unchanged to later whole transforms:
        tensors with a leading dimension of B, tuples of such tensors, or Python values.
    host: hyper-parameters that arrive as Python numbers.
    after: `fn(*states, *, vectors, squares, ...)`, run after the write with the new states; returns
        (*states, vectors, squares). `vectors` and `squares` are the rotating states of the
        elements inside this one in `within`. Other keywords are options, hyper-parameters, `count`,
        `step`, `noise`, `chance`.
    due: `fn(count, **options)`, whether `after` has anything to do at this count.
    lead: an ordinary transform that runs right before this one and is configured as part of it, so
        that the elementwise part is compiled.
    noise_every: the option with the number of steps for which `noise` stays the same.
    inner_shape: `fn(shape, options)`, the shape of the update and states of the inner chain in `within`.
    fed_numbers: `fn(shape, options)`, a divisor of the number of values that can be `fed`; else any
        tensor.
    rounds: `fn(shape, options, dtype, device)`, the lower-precision dtypes to which the function
        rounds the update before anything else, and in which its result is exact, or None for each.
        They are used for communication between processes.
    perturb: as in `transform`. The function may use `first_grad`, the gradient at the unperturbed
        weights, which is None in steps without a second gradient.
    perturb_every: the option k for steps with a second gradient: 1, k + 1, 2k + 1, ..
    domains, excludes, before_state, requires, opens_once, instead: as in `transform`.

    Errors: TypeError if the signature and the declared state differ.
    """
    if kind not in KINDS:
        raise TypeError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}")
    known = {**(lead.rules.domains if lead else {}), **(domains or {})}
    rules = Rules(known, dict(excludes or {}), before_state, False, requires, opens_once)

    def declare(fn: Callable[..., Any]) -> Whole:
        made = Whole(
            *signed(fn, states, lead),
            provides,
            kind,
            rules,
            opaque=opaque,
            host=host,
            after=after,
            due=due,
            lead=lead,
            instead=instead,
            noise_every=noise_every,
            inner_shape=inner_shape,
            fed_numbers=fed_numbers,
            rounds=rounds,
            perturb=perturb,
            perturb_every=perturb_every,
        )
        return checked(made)

    return declare if fn is None else declare(fn)
