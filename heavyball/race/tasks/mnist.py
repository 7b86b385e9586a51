"""MNIST with the model and the settings of the schedule-free project's example."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heavyball.errors import RaceError
from heavyball.race.tasks.base import Classification
from heavyball.race.tasks.files import Remote, fetch, idx

BASES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Of the uncompressed files: archives of the same content differ in their gzip headers.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FOLDERS = (".", "mnist", "MNIST/raw")
MEAN, DEVIATION = 0.1307, 0.3081


class Mnist(Classification):
    """The CNN of the schedule-free example: two convolutions, two dropouts, two linear layers.

    Source: https://github.com/facebookresearch/schedule_free, examples/mnist: batch 64, 14 epochs,
        pixels normalised by their mean and deviation, shuffled. Departure: no BatchNorm variant.
    """

    name = "mnist"
    summary = "the schedule-free project's CNN on MNIST (60000 train, 10000 test)"
    needs_data = True
    target_on = "accuracy"
    target = 0.99
    batch_size = 64
    epochs = 14
    evaluations = 14

    def __init__(self, data: Path | None) -> None:
        files = {name: _file(name, data) for name in SHA256}
        digest = hashlib.sha256()
        self.train_images, self.train_labels = _pair(files, "train", digest)
        self.test_images, self.test_labels = _pair(files, "t10k", digest)
        self.sha256 = digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "sha256": self.sha256}

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(9216, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
            nn.LogSoftmax(dim=1),
        )


def _file(name: str, data: Path | None) -> Path:
    if data is None:
        remote = Remote(name + ".gz", tuple(base + name + ".gz" for base in BASES), SHA256[name])
        return fetch(remote)
    for folder in FOLDERS:
        for written in (name + ".gz", name):
            if (data / folder / written).is_file():
                return data / folder / written
    raise RaceError(f"{name}.gz is neither in {data} nor in its folders mnist and MNIST/raw")


def _pair(files: dict[str, Path], part: str, digest: Any) -> tuple[Tensor, Tensor]:
    images = idx(files[f"{part}-images-idx3-ubyte"], dimensions=3)
    labels = idx(files[f"{part}-labels-idx1-ubyte"], dimensions=1)
    if len(images) != len(labels) or not len(labels):
        raise RaceError(f"the {part} files hold {len(images)} images and {len(labels)} labels")
    if images.shape[1:] != (28, 28) or labels.max() > 9:
        shape = tuple(images.shape[1:])
        raise RaceError(f"the {part} files: images {shape}, labels to {int(labels.max())}")
    digest.update(images.numpy())
    digest.update(labels.numpy())
    return images[:, None].float().div_(255).sub_(MEAN).div_(DEVIATION), labels.to(torch.int64)
