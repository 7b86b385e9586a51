"""Optimizers for PyTorch as chains of composable gradient transforms."""

from typing import Any

from heavyball import chainable, checkpoint, utils
from heavyball import recipes as recipes
from heavyball.diagnostics.versions import check_torch
from heavyball.errors import no_attribute
from heavyball.linalg.schedule import PrecondSchedule
from heavyball.memory import MemoryPlan, memory_plan
from heavyball.optim.fused import FusedBackward, fuse_backward
from heavyball.presets import NAMES, PRESETS
from heavyball.presets.create import create
from heavyball.transforms.scion import scion_init_

__version__ = "0.2.0"

check_torch()

# every preset by its name; `__init__.pyi` lists them for editors and type checkers
globals().update(NAMES)

__all__ = [  # noqa: PLE0604, the keys of NAMES are strings
    "PRESETS",
    "FusedBackward",
    "MemoryPlan",
    "PrecondSchedule",
    "chainable",
    "checkpoint",
    "create",
    "fuse_backward",
    "memory_plan",
    "scion_init_",
    "utils",
    *NAMES,
]


def __getattr__(name: str) -> Any:
    """The error for a name that is not there, with the nearest that is."""
    if name in chainable.__all__:
        raise AttributeError(f"heavyball has no {name!r}; it is heavyball.chainable.{name}")
    raise no_attribute(__name__, name, __all__)
