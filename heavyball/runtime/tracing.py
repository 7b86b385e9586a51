"""torch.compile takes a step as it is, between two graphs, and looks into nothing of it.

Tracing would gain nothing: kernels are compiled already, and transforms of whole tensors decide on
the host. It would take minutes, since every function of the eager step is traced for every state.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch._C._dynamo import eval_frame

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_SKIP = eval_frame._FrameAction.SKIP
# neither this function nor what it calls; `torch.compiler.disable` would take 1.5 us in every call
_UNSEEN = eval_frame._FrameExecStrategy(_SKIP, _SKIP)


def opaque(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have torch.compile call a function as it is, as `torch.compiler.disable` does."""
    if hasattr(fn, "_torchdynamo_disable"):
        return fn

    @functools.wraps(fn)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return fn(*args, **kwargs)

    hidden: Any = call
    for each in (
        hidden,
        inspect.unwrap(fn),
    ):  # a generator's frames are entered from elsewhere, too
        eval_frame.set_code_exec_strategy(each.__code__, _UNSEEN)
    hidden._torchdynamo_disable = True
    hidden._torchdynamo_disable_msg = "an optimizer's step is no part of a graph"
    hidden._torchdynamo_disable_recursive = True
    return call


def hide_step(cls: Any) -> None:
    """Hide the `step` of an optimizer's class, with the hooks that torch has put around it."""
    if not hasattr(cls.step, "_torchdynamo_disable"):
        cls.step = opaque(cls.step)
