"""Checkpoints: versions of this library's format, and state dicts of other optimizers."""

from heavyball.checkpoint.adopt import AdoptionReport, adopt
from heavyball.checkpoint.foreign import to_torch
from heavyball.optim.checkpoint import (
    VERSION,
    LoadResult,
    migrate,
    migration,
    rename_transform,
)

__all__ = [
    "VERSION",
    "AdoptionReport",
    "LoadResult",
    "adopt",
    "migrate",
    "migration",
    "rename_transform",
    "to_torch",
]
