"""Small numerical building blocks that several transforms share."""

from heavyball.numerics.averages import (
    EpsPlacement,
    debiased_weight,
    ema,
    lerp,
    root,
    second_moment,
    second_weight,
)
from heavyball.numerics.measures import dot, norm, rms, saturate

__all__ = [
    "EpsPlacement",
    "debiased_weight",
    "dot",
    "ema",
    "lerp",
    "norm",
    "rms",
    "root",
    "saturate",
    "second_moment",
    "second_weight",
]
