"""The public namespace, used as `C = heavyball.chainable`: ChainOpt, combinators, transforms."""

from heavyball.combine import graft, parallel, route, when, within
from heavyball.optimizer import ChainOpt
from heavyball.transform import (
    Interval,
    Live,
    State,
    Transform,
    copy_of_param,
    nearest,
    scalar,
    shared,
    squares,
    transform,
    zeros,
)
from heavyball.transforms import TRANSFORMS
from heavyball.transforms.accumulate import accumulate
from heavyball.transforms.adam import scale_by_adam
from heavyball.transforms.ademamix import scale_by_ademamix
from heavyball.transforms.adopt import scale_by_adopt
from heavyball.transforms.apply import apply, maximize
from heavyball.transforms.atan2 import scale_by_adam_atan2
from heavyball.transforms.cautious import cautious, grams
from heavyball.transforms.centralize import centralize
from heavyball.transforms.clip import (
    adaptive_gradient_clip,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_rms,
    l2_normalize,
    rms_normalize,
)
from heavyball.transforms.decay import (
    adamc,
    cautious_decay,
    coupled,
    decay_to_ema,
    decoupled,
    independent,
    l1_decay,
    palm_decay,
    regularized,
    separate_decay,
)
from heavyball.transforms.delayed import delayed_rms
from heavyball.transforms.descend import descend
from heavyball.transforms.exp_avg import exp_avg
from heavyball.transforms.factored import factored_rms
from heavyball.transforms.focus import focus
from heavyball.transforms.laprop import scale_by_laprop
from heavyball.transforms.laws import a_law, mu_law, softsign, trust_region
from heavyball.transforms.lion import scale_by_lion
from heavyball.transforms.mars import mars
from heavyball.transforms.momentum import heavyball_momentum, nesterov_momentum
from heavyball.transforms.muon import muon, muon_momentum, orthogonalize, scale_by_normuon
from heavyball.transforms.muon_pp import adaptive_orthogonalize, scale_by_tensor_rms
from heavyball.transforms.nadam import scale_by_nadam
from heavyball.transforms.orthograd import orthograd
from heavyball.transforms.palm import palm_beta2
from heavyball.transforms.parameter_ema import parameter_ema
from heavyball.transforms.prodigy import in_new_unit, prodigy_d, prodigy_plus_d
from heavyball.transforms.prodigy_progress import prodigy_progress_d
from heavyball.transforms.psgd import psgd_kron
from heavyball.transforms.psgd_lra import psgd_lra
from heavyball.transforms.psgd_pro import psgd_pro
from heavyball.transforms.rms import scale_by_exp_avg_sq, scale_by_rms
from heavyball.transforms.scale_lr import scale_lr
from heavyball.transforms.schedule_free import schedule_free
from heavyball.transforms.shampoo import shampoo
from heavyball.transforms.sign import sign
from heavyball.transforms.skip import skip_not_finite
from heavyball.transforms.soap import from_eigenbasis, soap_precond, to_eigenbasis
from heavyball.transforms.stable import clip_update_rms, stable_adamw


def __getattr__(name: str) -> Transform:
    """A transform that is not in the list above: one that a new file or the user has added."""
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    raise AttributeError(f"heavyball.chainable has no {name!r}; {nearest(name, TRANSFORMS)}")


COMBINATORS = {
    "parallel": parallel,
    "graft": graft,
    "route": route,
    "when": when,
    "soap_precond": soap_precond,
}

__all__ = [
    "COMBINATORS",
    "TRANSFORMS",
    "ChainOpt",
    "Interval",
    "Live",
    "State",
    "Transform",
    "a_law",
    "accumulate",
    "adamc",
    "adaptive_gradient_clip",
    "adaptive_orthogonalize",
    "apply",
    "cautious",
    "cautious_decay",
    "centralize",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_rms",
    "clip_update_rms",
    "copy_of_param",
    "coupled",
    "decay_to_ema",
    "decoupled",
    "delayed_rms",
    "descend",
    "exp_avg",
    "factored_rms",
    "focus",
    "from_eigenbasis",
    "graft",
    "grams",
    "heavyball_momentum",
    "in_new_unit",
    "independent",
    "l1_decay",
    "l2_normalize",
    "mars",
    "maximize",
    "mu_law",
    "muon",
    "muon_momentum",
    "nesterov_momentum",
    "orthogonalize",
    "orthograd",
    "palm_beta2",
    "palm_decay",
    "parallel",
    "parameter_ema",
    "prodigy_d",
    "prodigy_plus_d",
    "prodigy_progress_d",
    "psgd_kron",
    "psgd_lra",
    "psgd_pro",
    "regularized",
    "rms_normalize",
    "route",
    "scalar",
    "scale_by_adam",
    "scale_by_adam_atan2",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_exp_avg_sq",
    "scale_by_laprop",
    "scale_by_lion",
    "scale_by_nadam",
    "scale_by_normuon",
    "scale_by_rms",
    "scale_by_tensor_rms",
    "scale_lr",
    "schedule_free",
    "separate_decay",
    "shampoo",
    "shared",
    "sign",
    "skip_not_finite",
    "soap_precond",
    "softsign",
    "squares",
    "stable_adamw",
    "to_eigenbasis",
    "transform",
    "trust_region",
    "when",
    "within",
    "zeros",
]
