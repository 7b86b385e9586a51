"""Named optimizers."""

from typing import Any

from heavyball.errors import no_attribute
from heavyball.presets.base import CLIPPINGS, DEFAULTS, Preset, PresetOptions
from heavyball.presets.first_order import (
    ADOPT,
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
from heavyball.presets.muon import Muon, NorMuon
from heavyball.presets.prodigy import PrecondScheduleProdigySOAP, Prodigy, ProdigyPlusScheduleFree
from heavyball.presets.psgd import (
    PSGDLRA,
    PSGDPRO,
    CachedDelayedPSGDKron,
    CachedPSGDKron,
    DelayedPSGD,
    DelayedPSGDKron,
    PSGDKron,
    PurePSGD,
    Shampoo,
)
from heavyball.presets.soap import (
    SOAP,
    SOLP,
    PaLMSOAP,
    PrecondSchedulePaLMSOAP,
    PrecondScheduleSFPaLMSOAP,
    PrecondScheduleSOAP,
    SFPaLMSOAP,
    SOAPAdEMAMix,
    SOAPNAdam,
)

PRESETS: dict[str, type[Preset]] = {
    cls.__name__: cls
    for cls in (
        SGD,
        AdamW,
        NAdam,
        RMSprop,
        LaProp,
        ADOPT,
        AdEMAMix,
        Lion,
        Focus,
        SFAdamW,
        PaLMSFAdamW,
        FactoredAdamW,
        SOAP,
        PaLMSOAP,
        SFPaLMSOAP,
        PrecondScheduleSOAP,
        PrecondSchedulePaLMSOAP,
        PrecondScheduleSFPaLMSOAP,
        SOAPNAdam,
        SOAPAdEMAMix,
        SOLP,
        PSGDKron,
        PurePSGD,
        DelayedPSGD,
        CachedPSGDKron,
        CachedDelayedPSGDKron,
        PSGDLRA,
        PSGDPRO,
        Shampoo,
        Muon,
        NorMuon,
        Prodigy,
        ProdigyPlusScheduleFree,
        PrecondScheduleProdigySOAP,
    )
}

__all__ = [
    "ADOPT",
    "CLIPPINGS",
    "DEFAULTS",
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
    "LaProp",
    "Lion",
    "Muon",
    "NAdam",
    "NorMuon",
    "PSGDKron",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleProdigySOAP",
    "PrecondScheduleSFPaLMSOAP",
    "PrecondScheduleSOAP",
    "Preset",
    "PresetOptions",
    "Prodigy",
    "ProdigyPlusScheduleFree",
    "PurePSGD",
    "RMSprop",
    "SFAdamW",
    "SFPaLMSOAP",
    "SOAPAdEMAMix",
    "SOAPNAdam",
    "Shampoo",
]


def __getattr__(name: str) -> Any:
    """The error for a name that is not there, with the nearest that is."""
    raise no_attribute(__name__, name, __all__)
