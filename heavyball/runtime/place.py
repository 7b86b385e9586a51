"""The place of a parameter, and its name in errors."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


def describe(name: str | None, group: int, position: int, param: Tensor) -> str:
    """How an error names a parameter."""
    shown = f"{name!r}" if name is not None else f"{position} of group {group}"
    return f"parameter {shown} of shape {tuple(param.shape)}"


@dataclass(frozen=True, eq=False)
class Place:
    """The place of a parameter: its group, its index there, and its number among all."""

    param: Tensor
    group: dict[str, Any]
    index: int
    position: int
    number: int
    name: str | None

    @property
    def label(self) -> str:
        return describe(self.name, self.index, self.position, self.param)
