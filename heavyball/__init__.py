"""Optimizers for PyTorch as chains of composable gradient transforms."""

from heavyball import chainable, utils
from heavyball.fused import FusedBackward, fuse_backward
from heavyball.presets import (
    ADOPT,
    PRESETS,
    SGD,
    AdamW,
    AdEMAMix,
    FactoredAdamW,
    Focus,
    LaProp,
    Lion,
    NAdam,
    PaLMSFAdamW,
    RMSprop,
    SFAdamW,
)
from heavyball.schedule import PrecondSchedule

__version__ = "0.1.0"

__all__ = [
    "ADOPT",
    "PRESETS",
    "SGD",
    "AdEMAMix",
    "AdamW",
    "FactoredAdamW",
    "Focus",
    "FusedBackward",
    "LaProp",
    "Lion",
    "NAdam",
    "PaLMSFAdamW",
    "PrecondSchedule",
    "RMSprop",
    "SFAdamW",
    "chainable",
    "fuse_backward",
    "utils",
]
