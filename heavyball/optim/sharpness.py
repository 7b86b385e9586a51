"""A second gradient in a step, at weights that are moved for it and put back."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.program import Node
from heavyball.numerics import norm, working
from heavyball.optim.registry import Registry

TINY = 1e-12


class Perturbation:
    """What moves the weights of a chain for its second gradient."""

    def __init__(self, chain: Chain, owner: str):
        self._owner = owner
        self.needed = chain.perturbs

    def refuse(self, what: str) -> None:
        """Refuse a way of stepping that has no second gradient.

        Errors: ValueError saying what was called and what is expected.
        """
        if self.needed:
            raise ValueError(
                f"{self._owner}: {what} has no second gradient, which the chain takes at perturbed "
                "weights; call step(closure), with a closure that computes the gradients"
            )

    @contextlib.contextmanager
    def moved(self, registry: Registry) -> Iterator[None]:
        """Move every parameter that has a gradient uphill, and put it back to the bit."""
        found = list(_found(registry))
        directions = []
        for param, group, node in found:
            values = {name: _value(group, node, name) for name in node.transform.hyper}
            weight = node.transform.perturb(working(param), **values)  # type: ignore[misc]
            directions.append(weight * working(cast(Tensor, param.grad)))
        total = sum((float(norm(d)) ** 2 for d in directions), 0.0) ** 0.5
        kept = [param.detach().clone() for param, _, _ in found]
        try:
            for (param, group, node), direction in zip(found, directions, strict=True):
                values = {name: _value(group, node, name) for name in node.transform.hyper}
                weight = node.transform.perturb(working(param), **values)  # type: ignore[misc]
                way = values["rho"] / (total + TINY) * weight * direction
                param.copy_((working(param) + way).reshape(param.shape))
            yield
        finally:
            for (param, _, _), old in zip(found, kept, strict=True):
                param.copy_(old)


def _found(registry: Registry) -> Iterator[tuple[Tensor, Any, Node]]:
    programs, ahead = registry.programs(), registry.schedules.ahead
    for place in registry.places():
        for node in programs[place.param].flat:
            if node.transform.perturb is not None and place.param.grad is not None:
                yield place.param, ahead(place.group), node


def _value(group: Any, node: Node, name: str) -> float:
    key, index = node.hyper[name]
    return float(group[key] if index is None else group[key][index])
