"""State declarations: how a state is initialized, and what it holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

# What a state tensor holds, which decides how it may be stored: a mean of gradients or updates, a mean
# of squares (never negative), weights or an average of them, or anything else.
Holds = Literal["moment", "square", "weights", "values"]


@dataclass(frozen=True)
class State:
    """Declaration of one state: `init(param, options)` returns a tensor, or None if there is none.

    holds: what the state contains, which determines its storage formats; a "moment" and a "square" also
        rotate with their basis, see `within`, and have the unit of the gradient and its square, see
        `unit_change` in the runner.
    several: for transforms of whole tensors: `init` returns a tuple of tensors (or None), stored as
        `<key>.0`, `<key>.1`, ... It also runs on meta tensors.
    slice_by: the option k of a state with an entry for every k-th element, see `numerics.every`.
    low: the smallest valid value of a number, checked when it is loaded.
    until: (option, counter): the state is freed one step before the group's counter reaches the
        option; 0 keeps it.
    passing: a measurement of the last step that changes nothing: it is written even if a gate is
        closed, and is not saved in checkpoints.
    """

    init: Callable[[Tensor, Mapping[str, Any]], Any]
    rule: str
    needed_by: str | None = None
    is_number: bool = False
    holds: Holds = "values"
    several: bool = False
    slice_by: str | None = None
    until: tuple[str, str] | None = None
    low: float = -math.inf
    passing: bool = False

    def needs(self, name: str) -> "State":
        """The same state, present only while the option or hyper-parameter `name` is nonzero."""
        return replace(self, needed_by=name, rule=f"{self.rule}, if {name}")

    def holding(self, what: Holds) -> "State":
        """The same state with a different content."""
        return replace(self, holds=what)

    def gone_at(self, option: str, counter: str) -> "State":
        """The same state, freed one step before the group's `counter` reaches the option."""
        return replace(self, until=(option, counter), rule=f"{self.rule}, until {option}")

    def given_up(self, options: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
        """Whether this group has reached the step from which the state is not needed."""
        if self.until is None:
            return False
        option, counter = self.until
        return bool(options[option]) and group.get(counter, 0) + 1 >= options[option]

    def __str__(self) -> str:
        return self.rule


zeros = State(
    lambda param, options: torch.zeros_like(param), "zeros like the parameter", holds="moment"
)
# for a mean of squares, which is never negative
squares = zeros.holding("square")
copy_of_param = State(
    lambda param, options: param.clone(), "a copy of the parameter", holds="weights"
)


def scalar(value: float, low: float = -math.inf) -> State:
    """A float64 number per parameter, never below `low`."""

    def init(param: Tensor, options: Mapping[str, Any]) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=param.device)

    return State(init, f"a number, initially {value:g}", is_number=True, low=low)


def measured(
    init: Callable[[Tensor], Tensor] = lambda param: torch.zeros((), device=param.device),
) -> State:
    """A number of the last step, `passing`; `init` gives what it is before the first."""
    return State(
        lambda param, options: init(param).to(torch.float64),
        "a number of the last step",
        is_number=True,
        passing=True,
    )
