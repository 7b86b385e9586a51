"""Surfaces over two numbers whose minimum is known."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heavyball.errors import RaceError
from heavyball.race.tasks.base import Task


class Point(nn.Module):
    """A model that is one point of the plane."""

    def __init__(self, at: Tensor) -> None:
        super().__init__()
        self.at = nn.Parameter(at)


class Surface(Task):
    """Walk down a surface from a point near `start`; nothing is random after that.

    Seed 0 starts at `start`, every other one at a point drawn around it (normal, deviation 0.1).
    The test loss is the height, the second number the distance to the lowest point.
    """

    measure = "distance"
    target_on = "loss"
    batch_size = 1
    steps = 2000
    evaluations = 200
    threads = 1
    start: ClassVar[tuple[float, float]]
    minimum: ClassVar[tuple[float, float]]

    def __init__(self, data: Path | None) -> None:
        if data is not None:
            raise RaceError(f"the task {self.name} needs no data, --data has no use")

    def facts(self) -> dict[str, Any]:
        return {"start": list(self.start), "minimum": list(self.minimum)}

    def model(self, seed: int) -> nn.Module:
        start = torch.tensor(self.start)
        return Point(start + 0.1 * torch.randn(2) if seed else start)

    def batches(self, seed: int, batch_size: int) -> Iterator[None]:
        return itertools.repeat(None)

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        x, y = model.get_parameter("at").unbind()
        return self.height(x, y)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        # float64, as the float32 height has rounded to nothing long before the minimum.
        x, y = model.get_parameter("at").double().unbind()
        distance = math.dist((x.item(), y.item()), self.minimum)
        return self.height(x, y).item(), distance

    @staticmethod
    @abstractmethod
    def height(x: Tensor, y: Tensor) -> Tensor:
        """The surface."""


class Rosenbrock(Surface):
    """A curved valley: f = (1 - x)^2 + 100 (y - x^2)^2, lowest at (1, 1) with f = 0.

    Source: Rosenbrock 1960, https://doi.org/10.1093/comjnl/3.3.175, with its start (-1.2, 1).
    """

    name = "rosenbrock"
    summary = "Rosenbrock's curved valley in two dimensions, lowest at (1, 1)"
    target = 1e-3
    start = (-1.2, 1.0)
    minimum = (1.0, 1.0)

    @staticmethod
    def height(x: Tensor, y: Tensor) -> Tensor:
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2


class Beale(Surface):
    """A plateau with steep rims: f = sum over i=1..3 of (c_i - x (1 - y^i))^2, c = 1.5, 2.25, 2.625.

    Lowest at (3, 0.5) with f = 0. Source: Beale 1958; start (1, 1) as in More, Garbow and Hillstrom
    1981, https://doi.org/10.1145/355934.355936, problem 5.
    """

    name = "beale"
    summary = "Beale's plateau with steep rims in two dimensions, lowest at (3, 0.5)"
    target = 1e-3
    start = (1.0, 1.0)
    minimum = (3.0, 0.5)

    @staticmethod
    def height(x: Tensor, y: Tensor) -> Tensor:
        first = (1.5 - x * (1 - y)) ** 2
        return first + (2.25 - x * (1 - y**2)) ** 2 + (2.625 - x * (1 - y**3)) ** 2
