"""Steps compute the same inside `torch.autocast` as outside: it is meant for a model's operations."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# for all kinds of devices at once; a step cannot afford to ask for each
_is_on = torch._C._is_any_autocast_enabled
_off = torch._C._DisableAutocast


def without_autocast(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Switch the caller's autocast off while `fn` runs.

    What autocast remembers of the weights is forgotten then: it is of before the step.
    """

    @functools.wraps(fn)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not _is_on():
            return fn(*args, **kwargs)
        try:
            with _off():
                return fn(*args, **kwargs)
        finally:
            torch.clear_autocast_cache()

    return run
