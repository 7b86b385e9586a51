"""Notices clips outside of a fused backward, which find no gradients.

`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` can be noticed only when they are called, and
other modules hold references to them. So what their wrapper calls is replaced, once, when a first
optimizer steps inside `backward()`.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from heavyball.errors import warn

# Told of a parameter without a gradient that something clips; says whether its optimizer is fused.
Notice = Callable[[Tensor, str], bool]
_CLIPS = {"clip_grad_norm_": "max_norm", "clip_grad_value_": "clip_value"}
_watched = False


def watch(notice: Notice) -> None:
    """Have `notice` called with each parameter that has no gradient when something clips it."""
    global _watched
    if _watched:
        return
    _watched = True
    for name, bound in _CLIPS.items():
        _wrap(name, bound, notice)


def _wrap(name: str, bound: str, notice: Notice) -> None:
    outer = getattr(clip_grad, name)
    cells = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
    inner = cells["func"].cell_contents if "func" in cells else outer

    @functools.wraps(inner)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        several = parameters
        if isinstance(parameters, types.GeneratorType):
            several = list(parameters)
            parameters = several or parameters
        value = args[0] if args else kwargs.get(bound)
        params = [several] if isinstance(several, Tensor) else list(several)
        bare = [p for p in params if isinstance(p, Tensor) and p.grad is None]
        what = f"{name}({bound}={value})" if _is_finite(value) else ""
        fused = [notice(param, what) for param in bare]
        if any(fused) and len(bare) == len(params) and name == "clip_grad_value_":
            return None  # torch raises where there is nothing to clip
        return inner(parameters, *args, **kwargs)

    if "func" in cells:  # whoever has imported the function calls this one too
        cells["func"].cell_contents = clip
    else:
        for module in (clip_grad, torch.nn.utils):
            setattr(module, name, clip)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def warn_of_clip(owner: str, what: str) -> None:
    """Say that a clip has no effect; owner: the name of the optimizer's class."""
    warn(
        f"{what} has no effect on {owner} with fuse_backward: its gradients were used and freed inside "
        "backward(), before anything could clip them. Put the clip into the chain "
        "(gradient_clipping='last_norm_clip' for all parameters by the norm of the last step, or "
        "'l2_clip' for each), leave the outer one out "
        "(max_grad_norm=0 in a Trainer, gradient_clip_val=None in Lightning), or leave out fuse_backward"
    )
