"""The public namespace, used as `C = heavyball.chainable`: ChainOpt, combinators, transforms."""

from heavyball.core.combine import graft, parallel, route, when, within
from heavyball.core.hyper import Interval, Live, shared
from heavyball.core.rate import Member, Rate, rate
from heavyball.core.schedule import schedule
from heavyball.core.shapes import (
    beta_of_batch,
    beta_of_half_life,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    power,
    ramp,
    rex,
    step,
    wsd,
)
from heavyball.core.text import parse_chain as parse
from heavyball.core.transform import Transform, transform
from heavyball.core.whole import Whole, whole_transform
from heavyball.errors import no_attribute
from heavyball.optim.classes import optimizer_class
from heavyball.optim.optimizer import ChainOpt
from heavyball.state.declare import State, copy_of_param, scalar, squares, zeros
from heavyball.transforms import TRANSFORMS
from heavyball.transforms.galore import fira, galore
from heavyball.transforms.lather import lather_precond
from heavyball.transforms.soap import soap_precond

# every transform by its name; `chainable.pyi` lists them for editors and type checkers
globals().update(TRANSFORMS)


def __getattr__(name: str) -> Transform:
    """A transform that was added to `TRANSFORMS` after the import."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    raise no_attribute(__name__, name, [*__all__, *TRANSFORMS])


COMBINATORS = {
    "parallel": parallel,
    "graft": graft,
    "route": route,
    "when": when,
    "schedule": schedule,
    "soap_precond": soap_precond,
    "lather_precond": lather_precond,
    "galore": galore,
    "fira": fira,
}

__all__ = [  # noqa: PLE0604, the keys of TRANSFORMS are strings
    "COMBINATORS",
    "TRANSFORMS",
    "ChainOpt",
    "Interval",
    "Live",
    "Member",
    "Rate",
    "State",
    "Transform",
    "Whole",
    "beta_of_batch",
    "beta_of_half_life",
    "constant",
    "copy_of_param",
    "cosine",
    "cosine_restarts",
    "exponential",
    "fira",
    "galore",
    "graft",
    "inverse_sqrt",
    "lather_precond",
    "linear",
    "one_cycle",
    "optimizer_class",
    "parallel",
    "parse",
    "polynomial",
    "power",
    "ramp",
    "rate",
    "rex",
    "route",
    "scalar",
    "schedule",
    "shared",
    "soap_precond",
    "squares",
    "step",
    "transform",
    "when",
    "whole_transform",
    "within",
    "wsd",
    "zeros",
    *TRANSFORMS,
]
