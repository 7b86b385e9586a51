"""A second gradient in a step, at weights that are moved for it and put back."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.program import Node
from heavyball.core.transform import FIRST, keyword_names
from heavyball.distributed import local
from heavyball.numerics import (
    Origin,
    norm,
    random_bits,
    round_stochastically,
    saturate,
    stream,
    working,
)
from heavyball.optim.evaluation import Evaluation
from heavyball.optim.registry import Registry
from heavyball.runtime.job import FIRST_KEY
from heavyball.runtime.place import Place

TINY = 1e-12
SALT = 0x5A4D
# A parameter, what moves it, and with which numbers.
Found = tuple[Place, Node, dict[str, float]]


class Perturbation:
    """What moves the weights of a chain for its second gradient."""

    def __init__(self, chain: Chain, owner: str, rounds: bool):
        self._owner, self._rounds = owner, rounds
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
    def second(
        self, registry: Registry, closure: Callable[[], Any], evaluation: Evaluation
    ) -> Iterator[None]:
        """Take the second gradient, if this step has one; the body is the step."""
        asked = _asked(registry)
        found = [each for each in asked if each[0].param.grad is not None]
        directions = [_direction(each) for each in found]
        total = _length(registry, asked, found, directions)
        if not found:
            yield
            return
        keeping = [place for place, node, _ in found if _keeps(node)]
        first = _first(registry, keeping)
        moved = self._moved(registry, found, directions, total)
        del directions
        with evaluation.unwatched(), moved, torch.enable_grad():
            closure()
        for place, gradient in zip(keeping, first, strict=True):
            place.group.setdefault(FIRST_KEY, {})[_counted(registry, place)[0]] = gradient
        try:
            yield
        finally:
            for place, *_ in found:
                place.group.pop(FIRST_KEY, None)

    @contextlib.contextmanager
    def _moved(
        self, registry: Registry, found: list[Found], directions: list[Tensor], total: float
    ) -> Iterator[None]:
        """Move parameters uphill, and put them back to the bit."""
        kept = [local(place.param).detach().clone() for place, *_ in found]
        try:
            for each, direction in zip(found, directions, strict=True):
                param, rho = each[0].param, each[2]["rho"]
                way = rho / (total + TINY) * _metric(each) * direction
                moved = local((working(param) + way).reshape(param.shape))
                if self._rounds and param.dtype == torch.bfloat16:
                    moved = _rounded(registry, each[0], moved)  # else a short way is lost
                local(param).copy_(moved)
            yield
        finally:
            for (place, *_), old in zip(found, kept, strict=True):
                local(place.param).copy_(old)


def _asked(registry: Registry) -> list[Found]:
    """The parameters that take a second gradient in this step if they have a first; their numbers."""
    programs, states = registry.programs(), registry.attributes["state"]
    return [
        (place, node, _values(registry.schedules.ahead(place.index, place.group), node))
        for place in registry.places()
        for node in programs[place.param].flat
        if node.transform.perturb is not None
        and (place.param.requires_grad or place.param.grad is not None)
        and _is_due(node, states.get(place.param, {}))
    ]


def _direction(found: Found) -> Tensor:
    gradient = saturate(working(cast(Tensor, found[0].param.grad)))
    return _metric(found) * gradient


def _length(
    registry: Registry, asked: list[Found], found: list[Found], directions: list[Tensor]
) -> float:
    """The norm of all directions together, of all processes."""
    if registry.parts is None:
        return math.hypot(*(float(norm(d)) for d in directions))
    known = {each[0].param: d for each, d in zip(found, directions, strict=True)}
    return registry.parts.steps.totals.norm([place.param for place, *_ in asked], known)


def _first(registry: Registry, places: list[Place]) -> list[Tensor]:
    """Copies of the first gradients, each where the second is worked on."""
    gradients = [cast(Tensor, place.param.grad).detach() for place in places]
    if registry.parts is None:
        return [gradient.clone() for gradient in gradients]
    return registry.parts.plan.at_owners([place.param for place in places], gradients)


def _counted(registry: Registry, place: Place) -> tuple[int, Origin | None]:
    """The number by which a step knows a parameter, and where what is here of it begins."""
    return (place.number, None) if registry.parts is None else registry.parts.plan.counted(place)


def _rounded(registry: Registry, place: Place, moved: Tensor) -> Tensor:
    """Perturbed weights in bfloat16, without bias; other bits than the step rounds with."""
    seed, state = place.group["seed"] ^ SALT, registry.attributes["state"].get(place.param, {})
    step = torch.as_tensor(state.get("step", 0.0), device=moved.device)
    number, origin = _counted(registry, place)
    bits = random_bits(moved, stream(seed, number), step, origin)
    return round_stochastically(moved, bits)


def _is_due(node: Node, state: Mapping[str, Tensor]) -> bool:
    every = node.transform.options.get(node.transform.perturb_every, 1)
    return every == 1 or int(state.get("step", 0)) % every == 0


def _keeps(node: Node) -> bool:
    return FIRST in node.transform.optional


def _metric(found: Found) -> Tensor:
    place, node, values = found
    assert node.transform.perturb is not None
    asked = {name: values[name] for name in keyword_names(node.transform.perturb)}
    return node.transform.perturb(working(place.param), **asked)


def _values(group: Mapping[str, Any], node: Node) -> dict[str, float]:
    return {name: _value(group, node, name) for name in node.transform.hyper}


def _value(group: Any, node: Node, name: str) -> float:
    key, index = node.hyper[name]
    return float(group[key] if index is None else group[key][index])
