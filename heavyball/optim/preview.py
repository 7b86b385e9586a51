"""What a step would do, without doing it."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heavyball.optim.flight import unrecorded

if TYPE_CHECKING:
    from heavyball.optim.optimizer import ChainOpt


def updates(
    opt: "ChainOpt", fed: Mapping[str, Tensor], loss: float | Tensor | None
) -> dict[str, Tensor]:
    """The change of each parameter that has a gradient, by name or number, as of `ChainOpt.updates`.

    fed: what the step was told by `feed`.
    """
    twin = copy.deepcopy(opt)
    pairs = list(zip(opt.registry.places(), twin.registry.places(), strict=True))
    before = {}
    for place, other in pairs:
        if place.param.grad is not None:
            other.param.grad = place.param.grad.detach()
            before[other.param] = place.name or str(place.number), other.param.detach().clone()
    for name, value in fed.items():
        twin.feed(name, value)
    with unrecorded(twin):
        twin.step(loss=loss)
    with torch.no_grad():
        return {name: param.detach() - was for param, (name, was) in before.items()}
