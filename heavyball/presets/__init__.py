"""Named optimizers."""

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
    )
}

__all__ = [
    "ADOPT",
    "CLIPPINGS",
    "DEFAULTS",
    "PRESETS",
    "SGD",
    "SOAP",
    "SOLP",
    "AdEMAMix",
    "AdamW",
    "FactoredAdamW",
    "Focus",
    "LaProp",
    "Lion",
    "NAdam",
    "PaLMSFAdamW",
    "PaLMSOAP",
    "PrecondSchedulePaLMSOAP",
    "PrecondScheduleSFPaLMSOAP",
    "PrecondScheduleSOAP",
    "Preset",
    "PresetOptions",
    "RMSprop",
    "SFAdamW",
    "SFPaLMSOAP",
    "SOAPAdEMAMix",
    "SOAPNAdam",
]
