"""Warnings about learning-rate estimates: common mistakes, each reported once.

Nothing here makes a step wait for the device, but for step `LOOK`: it reads the numbers that were
gathered before it, once.
"""

import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.schedule import BASE_LR
from heavyball.errors import warn

# Where an `lr` is that a user has probably meant as a factor.
NEAR_ONE = (0.1, 10.0)
# A start that is no first guess of a distance: lr is meant so.
PLAIN = 0.1
# The norm of all gradients is noted in so many first steps, and in some later ones.
NORMS = 4
LATER = (16, 50, 100, 150)
# In this step the norms and d are looked at.
LOOK = 200
# Norms that are the same, and gradients that are.
SAME_NORM, SAME = 1e-4, 1e-2
# So many elements of each gradient are kept to compare it with others.
KEPT = 64


class Advice:
    """Watches the first steps of an optimizer whose chain has a rate."""

    def __init__(self, chain: Chain):
        t = None if chain.rate is None else chain.rate.transform
        self._options = {} if t is None else t.options
        self._counters = () if t is None else t.counters
        self._estimate = None if t is None else t.estimate
        self.active = self._estimate is not None
        self._steps = 0
        self._seen: list[dict[Tensor, tuple[Tensor, Tensor]]] = []

    def before(
        self, groups: list[dict[str, Any]], begun: bool, params: Iterable[Tensor] | None = None
    ) -> None:
        """Note what is about to be stepped: all that has a gradient, or these parameters.

        begun: others have been stepped in the same step.
        """
        begun = begun and self._steps > 0  # a copy may go on in the middle of a step
        noted = self._steps < NORMS if not begun else self._steps <= NORMS
        if not begun:
            self._steps += 1
            noted |= self._steps in LATER
            if noted:
                self._seen.append({})
            if self._steps == 1:
                self._check_lr(groups)
            if self._steps == LOOK:
                self.active = False
                self._look(groups)
        if noted or self._steps in LATER:
            self._note((p for g in groups for p in g["params"]) if params is None else params)

    def _note(self, params: Iterable[Tensor]) -> None:
        found = {p: p.grad.detach() for p in params if p.grad is not None}
        found = {p: g for p, g in found.items() if g.numel() and g.layout == torch.strided}
        if found:
            norms = torch._foreach_norm(list(found.values()))
            for (param, grad), norm in zip(found.items(), norms, strict=True):
                step = max(1, grad.numel() // KEPT)
                self._seen[-1][param] = norm.double(), grad.flatten()[::step][:KEPT].double()

    def _look(self, groups: list[dict[str, Any]]) -> None:
        estimate, clipped = self._estimate, self._clipped()
        assert estimate is not None
        if clipped:
            norm, same = clipped
            warn(
                f"the norm of all gradients was {norm:.4g} in {same} of the first {NORMS} steps, "
                "although the gradients differ: something clips them before the optimizer, which "
                f"distorts the estimate of {estimate.name}. Remove the clipping (the preset bounds "
                "its updates itself), or clip updates: update_clipping=..."
            )
        for index, group in enumerate(groups):
            start = group.get(estimate.start, 0.0)
            if self._should_move(group) and float(group[estimate.name]) <= start:
                warn(
                    f"{estimate.name} of parameter group {index} is still {estimate.start}={start:g} "
                    f"after {LOOK} steps: the gradients have no consistent direction, or the weights "
                    f"move too little. Try {estimate.try_instead}"
                )

    def _clipped(self) -> tuple[float, int] | None:
        """The norm at which gradients are clipped, and in how many of the first steps it was seen.

        Equal norms alone say nothing: where neither the weights nor the batches differ, the gradients
        are the same.
        """
        seen = [
            (sum(float(norm) ** 2 for norm, _ in each.values()) ** 0.5, each) for each in self._seen
        ]
        self._seen = []
        largest = max((norm for norm, _ in seen[:NORMS]), default=0.0)
        equal = [abs(norm - largest) <= SAME_NORM * largest for norm, _ in seen]
        same = sum(equal[:NORMS])
        if largest <= 0 or len(seen) < NORMS or same < NORMS - 1:
            return None
        first, *others = (each for (_, each), is_equal in zip(seen, equal, strict=True) if is_equal)
        return (largest, same) if any(_differ(first, other) for other in others) else None

    def _should_move(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's estimate has had enough steps and was not asked to stay constant."""
        estimate = self._estimate
        if estimate is None or estimate.name not in group:
            return False
        steps = min((int(group[name]) for name in self._counters), default=0)
        trains = any(p.requires_grad for p in group["params"]) and float(group["lr"]) != 0
        return steps >= LOOK - 1 and trains and not estimate.stands(group, self._options)

    def _check_lr(self, groups: list[dict[str, Any]]) -> None:
        estimate = self._estimate
        if estimate is None or estimate.early(self._options):
            return
        low, high = NEAR_ONE
        # groups keep the ratio of their lr, so one that is near 1 explains the others
        if any(low <= lr <= high for group in groups for lr in _rates(group) if group["params"]):
            return
        for index, group in enumerate(groups):
            lr = max(_rates(group), default=0.0)
            if lr and group["params"] and group.get(estimate.start, 0.0) < PLAIN:
                warn(
                    f"lr={lr:g} in parameter group {index}: it multiplies the estimated learning "
                    "rate, so leave it at 1 (a schedule may lower it)"
                    + (f" and tune {estimate.tuned_by}" if estimate.tuned_by else "")
                )


def _rates(group: Mapping[str, Any]) -> Iterator[float]:
    """A group's lr, and the base and peak values stored by schedulers."""
    for name in ("lr", "initial_lr", "max_lr", BASE_LR):
        value = group.get(name)
        # a tensor elsewhere would have to be waited for
        known = isinstance(value, Tensor) and value.device.type == "cpu"
        if known or isinstance(value, numbers.Real):
            yield float(value)  # type: ignore[arg-type]


def _differ(
    one: Mapping[Tensor, tuple[Tensor, Tensor]], other: Mapping[Tensor, tuple[Tensor, Tensor]]
) -> bool:
    """Whether gradients were not the same: of other parameters, of other sizes, or other elements."""
    if one.keys() != other.keys():
        return True
    for param, (norm, elements) in one.items():
        other_norm, others = other[param]
        if abs(float(norm - other_norm)) > SAME * float(norm):
            return True
        if float((elements - others).norm()) > SAME * float(elements.norm()):
            return True
    return False
