"""Small numerical building blocks that several transforms share."""

from heavyball.numerics.averages import (
    EpsPlacement,
    debiased_weight,
    ema,
    lerp,
    quotient,
    root,
    second_moment,
    second_weight,
)
from heavyball.numerics.dtypes import SCALAR, compute_dtype, lasting, version_of, working
from heavyball.numerics.host import Number
from heavyball.numerics.measures import (
    count,
    dot,
    every,
    is_single,
    mean_like,
    norm,
    rms,
    saturate,
    shape_of,
)
from heavyball.numerics.random import (
    Origin,
    generator,
    host_uniform,
    normals,
    random_bits,
    round_stochastically,
    stream,
)

__all__ = [
    "SCALAR",
    "EpsPlacement",
    "Number",
    "Origin",
    "compute_dtype",
    "count",
    "debiased_weight",
    "dot",
    "ema",
    "every",
    "generator",
    "host_uniform",
    "is_single",
    "lasting",
    "lerp",
    "mean_like",
    "norm",
    "normals",
    "quotient",
    "random_bits",
    "rms",
    "root",
    "round_stochastically",
    "saturate",
    "second_moment",
    "second_weight",
    "shape_of",
    "stream",
    "version_of",
    "working",
]
