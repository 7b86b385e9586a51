"""What an element that finds the learning rate sees of a group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One group as `finish` sees it.

    sums: what its parameters gave, added up; None if none of them had a gradient in this step, or a
        gate has left it out.
    values: the element's common numbers (after this step, for its count) and hyper-parameters.
    """

    sums: tuple[Tensor, ...] | None
    values: Mapping[str, Any]
