"""The sets of parameter shapes that are measured."""

import math
import random
from collections.abc import Callable

Shapes = list[tuple[int, ...]]
QUICK_AXIS = 64


def gpt() -> Shapes:
    """A small language model: 4 blocks of width 512 with biases, but none in its norms."""
    width, vocabulary, length = 512, 8192, 512
    found: Shapes = [(vocabulary, width), (length, width)]
    for _ in range(4):
        found += [(width,), *_linear(width, 3 * width), *_linear(width, width)]
        found += [(width,), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return [*found, (width,)]


def gpt_124m() -> Shapes:
    """GPT-2 small, its output layer tied to the embedding."""
    width, vocabulary, length = 768, 50257, 1024
    found: Shapes = [(vocabulary, width), (length, width)]
    for _ in range(12):
        found += [(width,), (width,), *_linear(width, 3 * width), *_linear(width, width)]
        found += [(width,), (width,), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return [*found, (width,), (width,)]


def many_small() -> Shapes:
    """400 vectors and matrices by turns, of 1,024 to 65,536 elements, log-uniform, always the same."""
    rng = random.Random(22)
    found: Shapes = []
    for index in range(400):
        size = round(math.exp(rng.uniform(math.log(1024), math.log(65536))))
        rows = 2 ** rng.randint(4, 5)
        found.append((rows, size // rows) if index % 2 else (size,))
    return found


def convnet() -> Shapes:
    """ResNet-18 for 1000 classes."""
    found: Shapes = _convolution(3, 64, 7)
    before = 64
    for width in (64, 128, 256, 512):
        found += _convolution(before, width, 3) + _convolution(width, width, 3)
        if before != width:
            found += _convolution(before, width, 1)
        found += _convolution(width, width, 3) + _convolution(width, width, 3)
        before = width
    return [*found, (1000, before), (1000,)]


def _linear(inputs: int, outputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def _convolution(inputs: int, outputs: int, size: int) -> Shapes:
    """A convolution without a bias, and the batch norm behind it."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


SETS: dict[str, Callable[[], Shapes]] = {
    "gpt": gpt,
    "gpt-124M": gpt_124m,
    "many-small": many_small,
    "convnet": convnet,
}


def elements(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


def shrunk(shapes: Shapes) -> Shapes:
    """As many tensors, none of their axes longer than `QUICK_AXIS`."""
    return [tuple(min(n, QUICK_AXIS) for n in shape) for shape in shapes]
