"""Checks of what an optimizer is given; each error names the value and what was expected."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heavyball.chain import Program
from heavyball.transform import check_live, nonnegative


def checked_lr(lr: Any) -> float | Tensor:
    """A learning rate: a float, or a tensor of one element, which is used as it is."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr={lr!r}: Tensor lr must be 1-element")  # torch's words
        if not lr.is_floating_point():
            raise ValueError(f"lr={lr!r}: expected a floating-point number")
        if not (torch.isfinite(lr).item() and lr.item() >= 0):
            raise ValueError(f"lr={lr!r}: expected in {nonnegative}")
        return lr
    return check_live("lr", lr, 0.0, nonnegative)


def frozen(value: Any) -> Any:
    """A copy that does not change with a list in the group."""
    return tuple(value) if isinstance(value, list) else value


def checked_seed(seed: Any) -> int:
    """A whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected a whole number")
    return seed


def overlaps(param: Tensor) -> bool:
    """Whether two elements may share memory: an axis that steps into the extent of a finer one."""
    extent = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def describe(name: str | None, group: int, position: int, param: Tensor) -> str:
    """How an error names a parameter."""
    shown = f"{name!r}" if name is not None else f"{position} of group {group}"
    return f"parameter {shown} of shape {tuple(param.shape)}"


def labelled(index: int, group: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The names, where there are some, and the parameters of a group.

    Errors: ValueError if the list of parameters was changed and that of names was not.
    """
    names, params = group.get("param_names") or [None] * len(group["params"]), group["params"]
    if len(names) != len(params):
        raise ValueError(
            f"parameter group {index} has {len(params)} parameters and {len(names)} names: change "
            '"params" and "param_names" together'
        )
    return zip(names, params, strict=True)


def check_shape(label: str, param: Tensor, program: Program) -> None:
    """Refuse a parameter that one of its transforms is not defined for."""
    for node in program.flat:
        t = node.transform
        reason = None if t.requires is None else t.requires(param.shape, t.options)
        if reason:
            raise ValueError(f"{label}: {node.key} {reason}")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter stands: its group, its position there, and its number among all."""

    param: Tensor
    group: dict[str, Any]
    index: int
    position: int
    number: int
    name: str | None

    @property
    def label(self) -> str:
        return describe(self.name, self.index, self.position, self.param)


def check_gradient(label: str, param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that the step could not use."""
    if grad.layout != torch.strided:
        raise ValueError(f"{label} has a sparse gradient ({grad.layout}), expected a dense one")
    if not grad.is_floating_point():
        raise ValueError(f"{label} has a gradient of {grad.dtype}, expected a real floating dtype")
    if grad.dtype == torch.float64 != param.dtype:
        raise ValueError(
            f"{label} is {param.dtype}, its gradient {grad.dtype} is finer than the step"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{label} has a gradient of shape {tuple(grad.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{label} is on {param.device}, its gradient on {grad.device}")


def check_state(label: str, param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Refuse state that stayed behind when its parameter was moved."""
    for key, tensor in state.items():
        if tensor.device != param.device:
            raise ValueError(
                f"{label} is on {param.device}, but its state {key!r} on {tensor.device}; "
                "opt.load_state_dict(opt.state_dict()) moves the state to the parameters"
            )
