"""What is measured: chains of this library with their goals, and optimizers of others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heavyball import chainable as C

Goals = dict[str, float]


@dataclass(frozen=True)
class Case:
    """An optimizer, how it is built, and what is known about it before it is measured.

    target: "module:function", called with the parameters and `arguments`.
    goals: by shape set, the time of a step over that of the reference.
    again: what a tensor's elements need once more, because a number over the whole tensor stands
        before the write; tensors that stay in a core's cache are not read again.
    over_all: the same where the number is one over all tensors, so that none stays in the cache.
    """

    label: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    goals: Goals = field(default_factory=dict)
    again: tuple[str, ...] = ()
    over_all: tuple[str, ...] = ()
    dtype: str = "float32"
    library: str = "heavyball"


def _goals(gpt: float, gpt_124m: float, many_small: float, convnet: float) -> Goals:
    return {"gpt": gpt, "gpt-124M": gpt_124m, "many-small": many_small, "convnet": convnet}


def adam_cautious_schedule_free(params: Any, lr: float = 1e-3) -> C.ChainOpt:
    """Adam and cautious in front of schedule-free averaging; no preset has this chain."""
    return C.ChainOpt(params, lr, C.scale_by_adam, C.cautious, C.schedule_free)


ADAM = _goals(0.90, 0.95, 0.60, 0.90)
REDUCING = _goals(1.40, 1.40, 0.80, 1.40)
MOMENTS = ("exp_avg", "exp_avg_sq")

CHAINS: dict[str, Case] = {
    "adamw": Case("AdamW", "heavyball:AdamW", goals=ADAM),
    "laprop": Case("LaProp", "heavyball:LaProp", goals=ADAM),
    "adopt": Case("ADOPT", "heavyball:ADOPT", goals=ADAM),
    "nadam": Case("NAdam", "heavyball:NAdam", goals=ADAM),
    "adam-cautious": Case(
        "Adam + cautious",
        "heavyball:AdamW",
        {"caution": True},
        goals=REDUCING,
        again=("grad", *MOMENTS),
    ),
    "adam-rms-clip": Case(
        "Adam + RMS clip",
        "heavyball:AdamW",
        {"update_clipping": "rms_clip"},
        goals=REDUCING,
        again=MOMENTS,
    ),
    "sfadamw": Case("SFAdamW", "heavyball:SFAdamW", goals=_goals(1.25, 1.25, 0.75, 1.25)),
    "adam-cautious-sf": Case(
        "Adam + cautious + schedule-free",
        "benchmarks.cases:adam_cautious_schedule_free",
        goals=_goals(1.70, 1.75, 0.90, 1.70),
        again=("grad", *MOMENTS),
    ),
    # the gradient gives rows and columns, these the size of the update, and that the momentum
    "factored-adamw": Case("FactoredAdamW", "heavyball:FactoredAdamW", again=("grad", "grad")),
    "adamw-global-clip": Case(
        "AdamW + global clip",
        "heavyball:AdamW",
        {"gradient_clipping": "global_norm_clip"},
        over_all=("grad",),
    ),
    # the reference steps bfloat16 parameters too
    "adamw-bf16": Case("AdamW, bfloat16", "heavyball:AdamW", goals={"gpt": 1.20}, dtype="bfloat16"),
}

ORIGINAL, COLLECTION = "HeavyBall", "pytorch-optimizer"
PEERS: list[Case] = [
    Case("AdamW", "heavyball:AdamW", library=ORIGINAL),
    Case("LaProp", "heavyball:LaProp", library=ORIGINAL),
    Case("ADOPT", "heavyball:ADOPT", library=ORIGINAL),
    Case("AdamW + caution", "heavyball:AdamW", {"caution": True}, library=ORIGINAL),
    Case("SFAdamW", "heavyball:SFAdamW", library=ORIGINAL),
    Case("LaProp", "pytorch_optimizer:LaProp", library=COLLECTION),
    Case("ADOPT", "pytorch_optimizer:ADOPT", library=COLLECTION),
    Case("ScheduleFreeAdamW", "pytorch_optimizer:ScheduleFreeAdamW", library=COLLECTION),
    Case("AdamWScheduleFree", "schedulefree:AdamWScheduleFree", library="schedulefree"),
    Case("Prodigy", "prodigyopt:Prodigy", library="prodigyopt"),
    Case(
        "ProdigyPlusScheduleFree",
        "prodigyplus:ProdigyPlusScheduleFree",
        library="prodigy-plus-schedule-free",
    ),
]

# on every chain that has goals
FLOOR_GOALS: Goals = {"gpt-124M": 1.15}
TEMPORARY_GOAL = 2**20
COLD_GOAL, WARM_GOAL = 1.5, 0.2
