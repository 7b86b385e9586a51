"""The interface of a task: a model, batches, a loss and an evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Activations of this many images still fit a cache.
EVALUATED_AT_ONCE = 100


class Task(ABC):
    """One problem that optimizers are compared on.

    A task holds its data and nothing that training changes, so that every run starts from the same.
    `target` is a test accuracy to reach from below or a test loss to reach from above, as
    `target_on` says. `measure` names the second number that `evaluate` gives. `threads` is how many
    of torch's are used if the user does not say; None leaves the choice to torch.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_data: ClassVar[bool] = False
    measure: ClassVar[Literal["accuracy", "distance"]] = "accuracy"
    target_on: ClassVar[Literal["accuracy", "loss"]]
    target: ClassVar[float]
    batch_size: ClassVar[int]
    steps: ClassVar[int | None] = None
    epochs: ClassVar[int] = 1
    evaluations: ClassVar[int] = 30
    threads: ClassVar[int | None] = None
    device = torch.device("cpu")

    def move(self, device: torch.device) -> None:
        """Keep the data on this device, where the models are then to be."""
        self.device = device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @abstractmethod
    def __init__(self, data: Path | None) -> None:
        """Read the data.

        Errors: RaceError saying what is missing or damaged, and what to do about it.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What identifies the data: sizes, split and a checksum."""

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A new model, on the CPU; the same for the same seed (torch's generator is seeded with it)."""

    @abstractmethod
    def batches(self, seed: int, batch_size: int) -> Iterator[Any]:
        """Batches without end; the same ones for the same seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """The test loss and the `measure`, of a model in eval mode."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches show every training example once."""
        return 1


def order_generator(seed: int) -> torch.Generator:
    """The generator of the data's order; its stream is not the one that the weights come from."""
    return torch.Generator().manual_seed(2**62 + seed)


class Classification(Task):
    """Labelled images; the loss is the mean negative log-likelihood of the label.

    A subclass fills the four tensors. Shapes: images (N, 1, H, W) float32, labels (N) int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every epoch in a new order; the last batch of an epoch holds what is left."""
        generator = order_generator(seed)
        while True:
            order = torch.randperm(len(self.train_labels), generator=generator)
            for chosen in order.split(batch_size):
                yield self.train_images[chosen], self.train_labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.nll_loss(model(images), labels)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss, correct = 0.0, 0
        parts = zip(
            self.test_images.split(EVALUATED_AT_ONCE),
            self.test_labels.split(EVALUATED_AT_ONCE),
            strict=True,
        )
        for images, labels in parts:
            output = model(images)
            loss += F.nll_loss(output, labels, reduction="sum").item()
            correct += int((output.argmax(1) == labels).sum())
        return loss / len(self.test_labels), correct / len(self.test_labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.train_labels) // batch_size)

    def facts(self) -> dict[str, Any]:
        return {"train_examples": len(self.train_labels), "test_examples": len(self.test_labels)}
