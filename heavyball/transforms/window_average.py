"""The mean of the last few snapshots of the parameters."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import positive
from heavyball.core.transform import Transform, transform
from heavyball.state.declare import copy_of_param, scalar

SNAPSHOTS = 5


def averaged_snapshots(param: Tensor, *states: Tensor) -> Tensor:
    """The mean of the snapshots that were taken; the parameter before the first."""
    *snapshots, taken = states
    there = [torch.where(taken > place, x, 0.0) for place, x in enumerate(snapshots)]
    mean = torch.stack(there).sum(0) / taken.clamp(1, len(snapshots))
    return torch.where(taken > 0, mean, param)


@functools.lru_cache(maxsize=64)
def _declared(k: int) -> Transform:
    """The transform that has k snapshots."""

    def window_average(
        update: Tensor,
        *states: Tensor,
        step: Tensor,
        param: Tensor,
        k: int = SNAPSHOTS,
        every: int = 1,
    ) -> tuple[Tensor, ...]:
        """Average the last k snapshots, taken after every `every`-th step, for evaluation.

        a_t = mean of p_(n every), p_((n-1) every), .., k of them or all available, n = floor(t / every)

        Evaluation uses a, or p before the first snapshot. Each snapshot is a separate state, which
        every step reads and writes.

        Shapes: all (*).
        Source: Kaddour 2022, LAWA, https://arxiv.org/abs/2209.14981.
        """
        *snapshots, taken = states
        now, place = step % every == 0, taken % k
        kept = [torch.where(now & (place == i), param, x) for i, x in enumerate(snapshots)]
        return update, *kept, torch.where(now, taken + 1, taken)

    states: dict[str, Any] = {f"snapshot_{place}": copy_of_param for place in range(k)}
    window_average.__qualname__ = window_average.__name__  # where pickle finds the transform
    window_average.__signature__ = _signature(window_average, (*states, "taken"))  # type: ignore[attr-defined]
    return transform(
        kind="observer",
        evaluate=averaged_snapshots,
        domains={"k": positive, "every": positive},
        instead=lambda options: None if options["k"] == k else _declared(options["k"]),
        **states,
        taken=scalar(0.0, low=0.0),
    )(window_average)


def _signature(fn: Any, states: tuple[str, ...]) -> inspect.Signature:
    """That of a function of any number of states, with these in their place."""
    said = inspect.signature(fn, eval_str=True)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensors = [inspect.Parameter(n, kind, annotation=Tensor) for n in ("update", *states)]
    keywords = [p for p in said.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return said.replace(parameters=[*tensors, *keywords])


window_average = _declared(SNAPSHOTS)
