"""The state of parameters in parts: created, looked at, and averaged to evaluate with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Node
from heavyball.distributed.exchange import Move, back, moved
from heavyball.distributed.parts import Part, is_owned, whole_state
from heavyball.distributed.plan import Plan
from heavyball.numerics import version_of
from heavyball.runtime.job import Scalars
from heavyball.runtime.step import average


class States:
    """What this process has of the state of each parameter."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._fresh: dict[Tensor, list[tuple[Tensor, int | None]]] = {}

    def init(self) -> None:
        """Create the state of every parameter that requires a gradient and has none."""
        for part in self._plan.current().values():
            if part.param.requires_grad and part.shape.numel() and "step" not in part.held:
                part.begin(_zeros(part))
                self._fresh[part.param] = [(t, version_of(t)) for t in part.held.values()]

    def drop_untouched(self, part: Part) -> None:
        """Drop untouched state of `init`: weights may have been loaded since it was made."""
        made = self._fresh.pop(part.param, None)
        if made is None:
            return
        found = list(part.held.values())
        if len(made) == len(found) and all(
            tensor is own and version_of(tensor) == version
            for own, (tensor, version) in zip(found, made, strict=True)
        ):
            part.held.clear()

    def begin(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what a state lacks, of the values that the parameter has now."""
        part = self._plan.current()[param]
        part.begin(_zeros(part), state)

    def held(self, param: Tensor) -> dict[str, Tensor]:
        """What this process has of a parameter's state."""
        return self._plan.current()[param].held

    def expected(
        self, param: Tensor, group: Mapping[str, Any], all_lazy: bool
    ) -> dict[str, Tensor]:
        """What this process should have of a parameter's state, without memory."""
        part = self._plan.current()[param]
        whole = whole_state(part.program, part.shape, part.here.dtype, group, all_lazy)
        return {
            key: torch.empty(where.sizes, dtype=tensor.dtype, device="meta")
            for key, tensor in whole.items()
            if not (where := part.kept[key]).at_owner or part.is_mine
        }

    def value_shapes(self, param: Tensor) -> Callable[[str], torch.Size]:
        """Gives the shape of the values that this process should have of each state, by key."""
        part = self._plan.current()[param]

        def shape(key: str) -> torch.Size:
            where = part.kept[key]
            if where.values is None:
                return torch.Size(where.sizes)
            return torch.Size(where.values if where.at_owner else part.here.shape)

        return shape

    def average(self, node: Node, param: Tensor, trained: Tensor) -> Tensor:
        """The weights to evaluate with, of what is here; all processes ask for the same parameter."""
        part = self._plan.current()[param]
        group = part.place.group
        if not any(is_owned(part, node.state_key(name)) for name in node.transform.states):
            return average(node, trained.detach(), part.held, group, Scalars())
        there = part.layout.at(part.owner)
        kind = trained.dtype, trained.device
        (whole,) = moved([Move(part.layout, there, trained.detach(), *kind)])
        if part.is_mine:
            whole = average(node, whole, part.held, group, Scalars()).to(trained.dtype)
        (here,) = moved([back(part.layout, part.owner, whole if part.is_mine else None, *kind)])
        return here.reshape(trained.shape)


def _zeros(part: Part) -> Tensor | None:
    """Stands in for the whole parameter where this process owns it and its values are not here."""
    if part.is_mine and any(where.at_owner for where in part.kept.values()):
        return torch.zeros(part.shape, dtype=part.here.dtype, device=part.here.device)
    return None
