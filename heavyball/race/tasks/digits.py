"""Handwritten digits that scikit-learn carries with it: 1797 real images of 8x8 pixels."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heavyball.errors import RaceError
from heavyball.race.tasks.base import Classification

TEST_EXAMPLES = 450


class Digits(Classification):
    """A small convolutional network on the bundled digits.

    Split: of a fixed random order of the 1797 images the last 450 are the test set.
    Source: Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80, its test part.
    """

    name = "digits"
    summary = "small CNN on scikit-learn's handwritten digits (8x8, 1347 train, 450 test)"
    target_on = "accuracy"
    target = 0.97
    batch_size = 64
    epochs = 12
    # Two threads gain a fifth on idle cores, and lose twenty times that where others use them too.
    threads = 1

    def __init__(self, data: Path | None) -> None:
        if data is not None:
            raise RaceError("the task digits carries its own data, --data has no use")
        from sklearn.datasets import load_digits

        loaded = load_digits()
        images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(loaded.target, dtype=torch.int64)
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, test = order[:-TEST_EXAMPLES], order[-TEST_EXAMPLES:]
        self.train_images, self.train_labels = images[train], labels[train]
        self.test_images, self.test_labels = images[test], labels[test]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "sha256": self.sha256}

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
            nn.LogSoftmax(dim=1),
        )
