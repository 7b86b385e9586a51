"""Memory for large temporary tensors that the next of their kind uses again, within one step.

The C library gives freed blocks of many megabytes back to the system, and getting their pages again
costs more than the arithmetic on what lies in them. Kept between steps they would lie beside the
activations.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class _Blocks(threading.local):
    found: dict[Any, Any] | None = None


blocks = _Blocks()


@contextmanager
def reused() -> Iterator[None]:
    """A context or decorator in which `scratch` hands out the memory of a place again and again."""
    outer = blocks.found
    blocks.found = {} if outer is None else outer
    try:
        yield
    finally:
        blocks.found = outer


def borrowed() -> Callable[[], AbstractContextManager[None]]:
    """What other threads enter, so that their memory is used again for as long as the caller's."""
    outer = blocks.found
    if outer is None:
        return nullcontext

    @contextmanager
    def enter() -> Iterator[None]:
        before = blocks.found
        blocks.found = outer.setdefault(threading.get_ident(), {})
        try:
            yield
        finally:
            blocks.found = before

    return enter


def scratch(place: str, like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Uninitialised tensors, good until the next ones of the same place are asked for."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = _block(place, like, sum(sizes)).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _block(place: str, like: Tensor, size: int) -> Tensor:
    if blocks.found is None or like.device.type != "cpu":
        return like.new_empty(size)
    key = place, like.dtype
    block = blocks.found.get(key)
    if block is None or block.numel() < size:
        blocks.found.pop(key, None)  # freed before the larger one is there
        block = blocks.found[key] = like.new_empty(size)
    return block[:size]
