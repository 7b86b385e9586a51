"""Stochastic rounding to bfloat16, with bits hashed from (seed, parameter, step, element).

The bits are the optimizer's own: they leave torch's generators alone, are the same on every replica
and in compiled kernels, and need no state besides the step.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
PART = 2**15
ODD = 0x9E3779B1  # 2^32 over the golden ratio, which spreads consecutive numbers


Word = TypeVar("Word", int, Tensor)


def mix(x: Word) -> Word:
    """Scramble 32-bit words, held in int64 or in a Python int (the finalizer of MurmurHash3)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def stream(seed: int, number: int) -> int:
    """The word from which the bits of one parameter come: `number` is its place in the optimizer."""
    return mix((mix(seed & WORD) + number * ODD) & WORD)


@dataclass(frozen=True)
class Origin:
    """Where a part of a tensor lies in it: its first element along each axis, and the sizes of both."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, int, int] | None:
        """Numbers p, w and g by which element i of the part is element p + i + i // w * g of the whole.

        None where the part is cut along two axes or more besides the first.
        """
        cut = [k for k, n in enumerate(self.sizes) if k and n != self.whole[k]]
        if len(cut) > 1:
            return None
        strides = [math.prod(self.whole[k + 1 :]) for k in range(len(self.whole))]
        first = sum(o * s for o, s in zip(self.offset, strides, strict=True))
        if not cut:
            return first, max(math.prod(self.sizes), 1), 0
        (k,) = cut
        width = max(math.prod(self.sizes[k:]), 1)
        return first, width, (self.whole[k] - self.sizes[k]) * strides[k]

    def places(self, index: Tensor) -> Tensor:
        """The numbers in the whole tensor of elements that are numbered in the part."""
        found, stride = torch.zeros_like(index), 1
        for offset, size, whole in reversed(
            [*zip(self.offset, self.sizes, self.whole, strict=True)]
        ):
            found += (index % size + offset) * stride
            index, stride = index // size, stride * whole
        return found


def element_bits(index: Any, key: Any) -> Any:
    """Sixteen random bits for elements with these numbers; of words as `mix` takes them."""
    return mix(((index * ODD) & WORD) ^ key) & 0xFFFF


def random_bits(like: Tensor, stream: int, step: Tensor, origin: Origin | None = None) -> Tensor:
    """Sixteen random bits for every element of `like`, as int32, counted in the order of memory.

    origin: `like` is a part of a tensor, and its elements are counted in the order of that.
    """
    key = mix((stream + step.to(torch.int64) * ODD) & WORD)
    size, device = like.numel(), like.device
    bits = torch.empty(size, dtype=torch.int32, device=device)
    # in parts that stay in the cache: words of 64 bits would be the most memory that a step needs
    part = PART if device.type == "cpu" else 64 * PART
    for low in range(0, size, part):
        index = torch.arange(low, min(low + part, size), dtype=torch.int64, device=device)
        index = index if origin is None else origin.places(index)
        bits[low : low + part] = element_bits(index, key)
    if origin is not None:
        return bits.reshape(like.shape)
    order = sorted(range(like.ndim), key=lambda axis: -like.stride()[axis])
    back = sorted(range(like.ndim), key=lambda axis: order[axis])
    return bits.reshape([like.shape[axis] for axis in order]).permute(back)


def _key(stream: int, count: int, salt: int, number: int = 0) -> int:
    """32 random bits from a parameter's stream, its step, a salt and a number."""
    key = stream + count * ODD
    for part in (salt, salt >> 32, number):  # mixed again: none of the keys that rounding uses
        key = mix((key ^ ((part * 0x85EBCA6B + 0x27D4EB2F) & WORD)) & WORD)
    return key


def generator(stream: int, count: int, salt: int, device: torch.device) -> torch.Generator:
    """A generator of its own for a parameter's stream, its step and a salt.

    For random numbers whose exact values matter to no other implementation: torch draws a normal in
    8 ns on a CPU, where hashing its bits takes 100 ns with torch's operations.
    """
    seed = _key(stream, count, salt) << 32 | _key(stream, count, salt, 1)
    return torch.Generator(device).manual_seed(seed & (2**63 - 1))


def normals(
    size: int,
    stream: int,
    count: int,
    salt: int,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Standard normals from a parameter's stream, its step and a salt."""
    drawn = generator(stream, count, salt, device)
    return torch.randn(size, dtype=dtype, device=device, generator=drawn)


def host_uniform(seed: int, count: int, salt: int) -> float:
    """A Python number in [0, 1), hashed from the seed, a count and a salt."""
    return mix(_key(stream(seed, -1), count, salt)) / 2**32


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16 so that the mean over the bits is x.

    The upper neighbour in magnitude is taken with the probability (low 16 bits of x) / 2^16. Values
    that bfloat16 holds exactly do not change; NaN and infinity are kept; beyond the largest finite
    value the upper neighbour is infinity.

    Source: section 3 of Zamirai et al. 2020, https://arxiv.org/abs/2010.06192.
    """
    word = x.contiguous().view(torch.int32)
    kept = torch.where(torch.isnan(x), 0x7FC00000, word)
    top = torch.where(torch.isfinite(x), word + bits, kept) >> 16
    return top.to(torch.uint16).view(torch.bfloat16)
