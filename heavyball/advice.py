"""Warnings about a learning rate that is found while training: what users get wrong, each said once.

Nothing here makes a step wait for the device, but for step `LOOK`: it reads the numbers that were
gathered before it, once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.chain import Chain
from heavyball.warn import warn

# Where an `lr` is that a user has probably meant as a factor.
NEAR_ONE = (0.1, 10.0)
# In these first steps the norm of all gradients is noted.
NORMS = 4
# In this step the norms and d are looked at.
LOOK = 200


class Advice:
    """Watches the first steps of an optimizer whose chain has a rate."""

    def __init__(self, chain: Chain):
        self.active = chain.rate is not None
        self._steps = 0
        self._norms: list[Tensor] = []

    def before(self, groups: list[dict[str, Any]]) -> None:
        """Note what a step is about to use."""
        if not self.active:
            return
        self._steps += 1
        if self._steps == 1:
            for index, group in enumerate(groups):
                _check_lr(index, group)
        if self._steps <= NORMS:
            grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
            grads = [g for g in grads if g.numel() and g.layout == torch.strided]
            if grads:
                device = grads[0].device
                norms = torch._foreach_norm([g.detach() for g in grads])
                squares = torch.stack([n.to(device, torch.float64).square() for n in norms])
                self._norms.append(squares.sum().sqrt())
        if self._steps == LOOK:
            self._look(groups)
            self.active = False

    def _look(self, groups: list[dict[str, Any]]) -> None:
        norms = [float(n) for n in self._norms]
        largest = max(norms, default=0.0)
        same = sum(abs(n - largest) <= 1e-4 * largest for n in norms)
        if largest > 0 and len(norms) == NORMS and same >= NORMS - 1:
            warn(
                f"the norm of all gradients was {largest:.4g} in {same} of the first {NORMS} steps: "
                "something clips them before the optimizer sees them, and that distorts the estimate "
                "of d. Leave the clip out (the preset bounds its updates itself), or clip updates: "
                "update_clipping=...",
            )
        for index, group in enumerate(groups):
            if "d" in group and float(group["d"]) <= group["d0"]:
                warn(
                    f"d of parameter group {index} is still d0={group['d0']:g} after {LOOK} steps: the "
                    "gradients do not agree on a direction, or weights move too little to tell. Try a "
                    "larger d0 (1e-5, 1e-4), d_coef=2, larger batches, no warm-up, or without "
                    "use_bias_correction; see docs/prodigy.md",
                )


def _check_lr(index: int, group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    low, high = NEAR_ONE
    if isinstance(lr, float) and lr and not low <= lr <= high:
        warn(
            f"lr={lr:g} in parameter group {index}: here it multiplies a learning rate that is found "
            "while training, so leave it at 1 (a schedule may lower it) and tune d_coef",
        )
