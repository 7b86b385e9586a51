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
    )
}

__all__ = [
    "ADOPT",
    "CLIPPINGS",
    "DEFAULTS",
    "PRESETS",
    "SGD",
    "AdEMAMix",
    "AdamW",
    "FactoredAdamW",
    "Focus",
    "LaProp",
    "Lion",
    "NAdam",
    "PaLMSFAdamW",
    "Preset",
    "PresetOptions",
    "RMSprop",
    "SFAdamW",
]
