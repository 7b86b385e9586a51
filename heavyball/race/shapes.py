"""The parameters of well-known architectures, by name and shape, for `heavyball plan`."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from heavyball.errors import RaceError, unknown

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _both(name: str, *weight: int, bias: int) -> Shapes:
    """A weight with its bias."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias,)


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2 as its authors published it; the output layer is the embedding."""
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (context, width)
    for layer in range(layers):
        place = f"h.{layer}"
        yield from _both(f"{place}.ln_1", width, bias=width)
        yield from _both(f"{place}.attn.c_attn", width, 3 * width, bias=3 * width)
        yield from _both(f"{place}.attn.c_proj", width, width, bias=width)
        yield from _both(f"{place}.ln_2", width, bias=width)
        yield from _both(f"{place}.mlp.c_fc", width, 4 * width, bias=4 * width)
        yield from _both(f"{place}.mlp.c_proj", 4 * width, width, bias=width)
    yield from _both("ln_f", width, bias=width)


def llama(layers: int, width: int, inner: int, heads: int, shared_heads: int) -> Shapes:
    """Llama 2: gated linear units, no biases, an output layer of its own."""
    keys = width // heads * shared_heads
    yield "embed_tokens.weight", (32000, width)
    for layer in range(layers):
        place = f"layers.{layer}"
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{place}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{place}.mlp.gate_proj.weight", (inner, width)
        yield f"{place}.mlp.up_proj.weight", (inner, width)
        yield f"{place}.mlp.down_proj.weight", (width, inner)
        yield f"{place}.input_layernorm.weight", (width,)
        yield f"{place}.post_attention_layernorm.weight", (width,)
    yield "norm.weight", (width,)
    yield "lm_head.weight", (32000, width)


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Shapes:
    """ResNet for ImageNet as torchvision has it."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from _both("bn1", 64, bias=64)
    before = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        after = 4 * width if bottleneck else width
        for block in range(count):
            place = f"layer{stage + 1}.{block}"
            yield from _resnet_block(place, before, width, after, bottleneck)
            if block == 0 and (before != after or stage):
                yield f"{place}.downsample.0.weight", (after, before, 1, 1)
                yield from _both(f"{place}.downsample.1", after, bias=after)
            before = after
    yield from _both("fc", 1000, before, bias=1000)


def _resnet_block(place: str, before: int, width: int, after: int, bottleneck: bool) -> Shapes:
    convolutions = [(width, before, 3, 3), (after, width, 3, 3)]
    if bottleneck:
        convolutions = [(width, before, 1, 1), (width, width, 3, 3), (after, width, 1, 1)]
    for number, shape in enumerate(convolutions, start=1):
        yield f"{place}.conv{number}.weight", shape
        yield from _both(f"{place}.bn{number}", shape[0], bias=shape[0])


def vit(layers: int, width: int, patch: int, image: int = 224) -> Shapes:
    """A vision transformer for ImageNet as torchvision has it."""
    yield "class_token", (1, 1, width)
    yield "pos_embedding", (1, (image // patch) ** 2 + 1, width)
    yield from _both("conv_proj", width, 3, patch, patch, bias=width)
    for layer in range(layers):
        place = f"encoder.{layer}"
        yield from _both(f"{place}.ln_1", width, bias=width)
        yield from _both(f"{place}.self_attention.in_proj", 3 * width, width, bias=3 * width)
        yield from _both(f"{place}.self_attention.out_proj", width, width, bias=width)
        yield from _both(f"{place}.ln_2", width, bias=width)
        yield from _both(f"{place}.mlp.0", 4 * width, width, bias=4 * width)
        yield from _both(f"{place}.mlp.3", width, 4 * width, bias=width)
    yield from _both("encoder.ln", width, bias=width)
    yield from _both("head", 1000, width, bias=1000)


ARCHITECTURES: dict[str, Callable[[], Iterable[tuple[str, tuple[int, ...]]]]] = {
    "gpt2-124m": lambda: gpt2(12, 768),
    "gpt2-1.5b": lambda: gpt2(48, 1600),
    "llama-7b": lambda: llama(32, 4096, 11008, 32, 32),
    "llama-70b": lambda: llama(80, 8192, 28672, 64, 8),
    "resnet-18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "resnet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "vit-b-16": lambda: vit(12, 768, 16),
}


def architecture(name: str, dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an architecture, without memory.

    Errors: RaceError with the nearest names.
    """
    if name not in ARCHITECTURES:
        raise RaceError(unknown("architecture", name, ARCHITECTURES))
    return [
        (place, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        for place, shape in ARCHITECTURES[name]()
    ]
