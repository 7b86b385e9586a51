"""What an optimizer is built with, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import check_live, check_scheduled, nonnegative
from heavyball.core.schedule import SCHEDULES, Scheduled, is_scheduled
from heavyball.errors import nearest
from heavyball.optim.checks import TORCH_SWITCHES, check_torch_switches, checked_lr, checked_seed
from heavyball.optim.scheduling import CAPTURED, Schedules, base_and_schedule

# The options of `ChainOpt`, as an error lists them.
NAMES = (
    "weight_decay",
    "warmup_steps",
    "foreach",
    "compile",
    "stochastic_rounding",
    "seed",
    "fuse_backward",
    "storage_dtype",
    "ecc",
    "param_ecc",
    "replicas",
    "stages",
    "metrics",
)


@dataclass(frozen=True)
class Options:
    """How a chain is run, see `ChainOpt`.

    Errors: TypeError or ValueError naming the option and its value.
    """

    foreach: bool | None
    compile: bool | str
    stochastic_rounding: bool
    replicas: Any = None
    stages: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.stochastic_rounding, bool):
            raise TypeError(
                f"stochastic_rounding={self.stochastic_rounding!r}: expected True or False"
            )
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ValueError(f"compile={self.compile!r}: expected 'auto', True or False")
        if self.foreach is not None and not isinstance(self.foreach, bool):
            raise TypeError(f"foreach={self.foreach!r}: expected True, False or None")


def check_names(owner: str, others: Mapping[str, Any], foreach: bool | None) -> None:
    """Refuse unknown options, and torch arguments that are not supported."""
    check_torch_switches(owner, others, foreach)
    for name in others.keys() - TORCH_SWITCHES.keys():
        raise TypeError(
            f"{owner} has no option {name!r}; {nearest(name, NAMES)}; the "
            "hyper-parameters of a transform are passed to the transform, or set per group"
        )


def check_switches(**switches: Any) -> None:
    """Refuse switches that are not booleans."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False")


def check_capturable(chain: Chain, capturable: Any, schedules: Iterable[str]) -> None:
    """Refuse to be captured in a CUDA graph where a chain decides on the host.

    schedules: the names of numbers that follow some.
    """
    if capturable and schedules:
        raise ValueError(f"capturable=True: {CAPTURED.format(', '.join(schedules))}")
    if capturable and any(program.has_whole for program in chain.programs):
        raise ValueError(
            "capturable=True: a chain with transforms of whole tensors makes decisions on the host and "
            f"cannot be captured in a CUDA graph: {chain!r}"
        )


def group_defaults(
    chain: Chain, lr: float | Tensor, weight_decay: Any, warmup_steps: Any, seed: Any
) -> dict[str, Any]:
    """The defaults of a group: hyper-parameters, seed and mode.

    Errors: TypeError or ValueError naming the value, and where it would have no effect.
    """
    base, factor = base_and_schedule(lr)
    schedules = dict(chain.schedules)
    if factor is not None:
        if "lr" in schedules:
            raise ValueError(f"lr={lr!r}, but the chain has a schedule of it: {chain!r}")
        schedules["lr"] = factor
        chain.check_schedule("lr", factor, "lr")
    defaults: dict[str, Any] = {"lr": checked_lr(base)}
    defaults |= {key: hyper.default for key, hyper in chain.hyper.items()}
    first = check_scheduled("weight_decay", weight_decay, 0.0, nonnegative)
    if first or is_scheduled(weight_decay):
        _check_decay(chain, weight_decay)
        defaults["weight_decay"] = first
    if (
        is_scheduled(weight_decay)
        and schedules.setdefault("weight_decay", weight_decay) != weight_decay
    ):
        raise ValueError(
            f"weight_decay={weight_decay}, but the chain has a schedule of it: {chain!r}"
        )
    if schedules:
        defaults[SCHEDULES] = Schedules(schedules)
    defaults["warmup_steps"] = check_live("warmup_steps", warmup_steps, 0.0, nonnegative)
    defaults["seed"] = checked_seed(seed)
    if any(program.evaluators for program in chain.programs):
        defaults["train_mode"] = True
    return defaults


def _check_decay(chain: Chain, weight_decay: Scheduled) -> None:
    if "weight_decay" not in chain.hyper:
        raise ValueError(f"weight_decay={weight_decay}: no element of the chain decays")
    hyper = chain.hyper["weight_decay"]
    if hyper.given == weight_decay:  # as the chain says
        return
    for program in chain.programs:
        if not any(key == "weight_decay" for n in program.flat for key, _ in n.hyper.values()):
            raise ValueError(
                f"weight_decay={weight_decay} would not reach the branch {program!r}: pass it to "
                "each decay in the chain"
            )
    if hyper.given:
        raise ValueError(
            f"weight_decay={weight_decay}, but the chain says {hyper.given} ({hyper.owner})"
        )
