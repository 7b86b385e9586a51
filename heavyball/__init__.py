"""Optimizers for PyTorch as chains of composable gradient transforms."""

from heavyball import chainable, checkpoint, utils
from heavyball.fused import FusedBackward, fuse_backward
from heavyball.memory import MemoryPlan, memory_plan
from heavyball.presets import (
    ADOPT,
    PRESETS,
    SGD,
    SOAP,
    SOLP,
    AdamW,
    AdEMAMix,
    FactoredAdamW,
    Focus,
    LaProp,
    Lion,
    NAdam,
    PaLMSFAdamW,
    PaLMSOAP,
    PrecondSchedulePaLMSOAP,
    PrecondScheduleSFPaLMSOAP,
    PrecondScheduleSOAP,
    RMSprop,
    SFAdamW,
    SFPaLMSOAP,
    SOAPAdEMAMix,
    SOAPNAdam,
)
from heavyball.schedule import PrecondSchedule

__version__ = "0.1.0"

__all__ = [
    "ADOPT",
    "PRESETS",
    "SGD",
    "SOAP",
    "SOLP",
    "AdEMAMix",
    "AdamW",
    "FactoredAdamW",
    "Focus",
    "FusedBackward",
    "LaProp",
    "Lion",
    "MemoryPlan",
    "NAdam",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondSchedule",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleSFPaLMSOAP",
    "PrecondScheduleSOAP",
    "RMSprop",
    "SFAdamW",
    "SFPaLMSOAP",
    "SOAPAdEMAMix",
    "SOAPNAdam",
    "chainable",
    "checkpoint",
    "fuse_backward",
    "memory_plan",
    "utils",
]
