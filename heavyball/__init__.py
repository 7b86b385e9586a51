"""Optimizers for PyTorch as chains of composable gradient transforms."""

from typing import Any

from heavyball import chainable, utils
from heavyball.errors import no_attribute
from heavyball.linalg.schedule import PrecondSchedule
from heavyball.memory import MemoryPlan, memory_plan
from heavyball.optim import checkpoint
from heavyball.optim.fused import FusedBackward, fuse_backward
from heavyball.presets import (
    ADOPT,
    PRESETS,
    PSGDLRA,
    PSGDPRO,
    SGD,
    SOAP,
    SOLP,
    AdamW,
    AdEMAMix,
    CachedDelayedPSGDKron,
    CachedPSGDKron,
    DelayedPSGD,
    DelayedPSGDKron,
    FactoredAdamW,
    Focus,
    LaProp,
    Lion,
    Muon,
    NAdam,
    NorMuon,
    PaLMSFAdamW,
    PaLMSOAP,
    PrecondSchedulePaLMSOAP,
    PrecondScheduleProdigySOAP,
    PrecondScheduleSFPaLMSOAP,
    PrecondScheduleSOAP,
    Prodigy,
    ProdigyPlusScheduleFree,
    PSGDKron,
    PurePSGD,
    RMSprop,
    SFAdamW,
    SFPaLMSOAP,
    Shampoo,
    SOAPAdEMAMix,
    SOAPNAdam,
)

__version__ = "0.2.0"

__all__ = [
    "ADOPT",
    "PRESETS",
    "PSGDLRA",
    "PSGDPRO",
    "SGD",
    "SOAP",
    "SOLP",
    "AdEMAMix",
    "AdamW",
    "CachedDelayedPSGDKron",
    "CachedPSGDKron",
    "DelayedPSGD",
    "DelayedPSGDKron",
    "FactoredAdamW",
    "Focus",
    "FusedBackward",
    "LaProp",
    "Lion",
    "MemoryPlan",
    "Muon",
    "NAdam",
    "NorMuon",
    "PSGDKron",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondSchedule",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleProdigySOAP",
    "PrecondScheduleSFPaLMSOAP",
    "PrecondScheduleSOAP",
    "Prodigy",
    "ProdigyPlusScheduleFree",
    "PurePSGD",
    "RMSprop",
    "SFAdamW",
    "SFPaLMSOAP",
    "SOAPAdEMAMix",
    "SOAPNAdam",
    "Shampoo",
    "chainable",
    "checkpoint",
    "fuse_backward",
    "memory_plan",
    "utils",
]


def __getattr__(name: str) -> Any:
    """The error for a name that is not there, with the nearest that is."""
    if name in chainable.__all__:
        raise AttributeError(f"heavyball has no {name!r}; it is heavyball.chainable.{name}")
    raise no_attribute(__name__, name, __all__)
