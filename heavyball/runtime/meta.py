"""What operations give of meta tensors, remembered by the shapes and dtypes of their arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heavyball.runtime.recent import Recent

# torch infers most results in Python, which takes up to a millisecond an operation; chains make few
# different ones, again and again.
results: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = Recent(2**14)


class Remembering(TorchDispatchMode):
    """While it is entered, operations on meta tensors are not inferred twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return result_of(func, args, kwargs or {})


def result_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func` returns for these arguments: a new meta tensor where the result is known.

    A result that is known shares no memory with an argument, which without data makes no difference.
    An operation that writes to an argument is run.
    """
    key = None if func._schema.is_mutable else _key(func, args, kwargs)
    if key is not None and (known := results.get(key)) is not None:
        shape, strides, dtype = known
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    result = func(*args, **kwargs)
    if key is not None and type(result) is Tensor and result.is_meta:
        results[key] = result.shape, result.stride(), result.dtype
    return result


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Everything that the shape, the strides and the dtype of the result depend on; None if unknown."""
    words = tuple((name, _word(value)) for name, value in kwargs.items())
    key = func, torch.get_default_dtype(), tuple(map(_word, args)), words
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _word(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_word, value))
    return type(value), value  # 1, 1.0 and True are equal, and promote otherwise
