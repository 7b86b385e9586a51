"""Reads the state dicts of other optimizers: which optimizer wrote them, and what each state means.

torch.optim, schedulefree 1.4.1, prodigyopt 1.1.2, prodigy-plus-schedule-free 1.9.0, and heavyball 3.2.1
of PyPI, as their source has it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.checkpoint.meanings import Kept, Moment, Record, entry, number

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An optimizer whose dicts can be read.

    named: how errors and reports call it. is_it: whether a group is one of its. record: what the state
    of one parameter means. needs: the transforms of the chain that goes on as it did, one of each tuple.
    hyper: by the name of a transform, the values of its hyper-parameters and options. decay: the
    transform that decays as it does. flags: its switches, each with the name of the transform or option
    that a chain has where they are true. common: numbers of the group that a rate keeps. lr: the
    group's own. evaluates: whether the parameters hold an average. besides: further transforms that
    such a chain may have; None for any, where it can be written in several ways.
    """

    named: str
    is_it: Callable[[Group], bool]
    record: Callable[[State, Group], Record]
    needs: Callable[[Group], tuple[tuple[str, ...], ...]]
    hyper: Callable[[Group], dict[str, dict[str, Any]]]
    decay: Callable[[Group], str] = lambda group: "decoupled"
    flags: Mapping[str, str] = field(default_factory=dict)
    common: Callable[[Group, list[Record]], dict[str, Any]] = lambda group, records: {}
    lr: Callable[[Group], Any] = lambda group: group["lr"]
    evaluates: Callable[[Group], bool] = lambda group: False
    besides: tuple[str, ...] | None = ()

    def known(self, group: Group) -> set[str] | None:
        """The transforms of a chain that goes on as it did; None where others may be there."""
        if self.besides is None:
            return None
        needs = {name for several in self.needs(group) for name in several}
        return needs | {*self.hyper(group), *self.flags.values(), *self.besides}


def _has(*names: str) -> Callable[[Group], bool]:
    return lambda group: all(name in group for name in names)


def _moments(
    state: State, group: Group, names: Iterable[tuple[str, str, float, str]], count: int | None
) -> Record:
    """A record of moments: (key, meaning, beta, form) of each.

    Errors: LookupError or TypeError if one is missing or is no tensor.
    """
    found = {}
    for key, meaning, beta, form in names:
        if not isinstance(state[key], Tensor):
            raise TypeError(f"{key!r} is {state[key]!r}, expected a tensor")
        found[meaning] = Moment(state[key], beta, count, form, key)
    return Record(count, found, keys=tuple(state))


# ---- torch.optim


def _step(state: State) -> int | None:
    return int(number(state["step"])) if "step" in state else None


def _adam(state: State, group: Group) -> Record:
    betas = entry(group, "betas")
    names = (("exp_avg", "mean", betas[0], "ema"), ("exp_avg_sq", "square", betas[1], "ema"))
    record = _moments(state, group, names, _step(state))
    if "max_exp_avg_sq" in state:
        record.others["max_exp_avg_sq"] = Kept(state["max_exp_avg_sq"], "max_exp_avg_sq")
    if "mu_product" in state:
        record.others["mu_product"] = Kept(_scalar(state["mu_product"]), "mu_product")
    return record


def _scalar(value: Any) -> Tensor:
    return torch.tensor(number(value), dtype=torch.float64, device="cpu")


def _betas(transform: str, *more: str) -> Callable[[Group], dict[str, dict[str, Any]]]:
    def read(group: Group) -> dict[str, dict[str, Any]]:
        return {transform: {n: entry(group, n) for n in ("betas", "eps", *more) if n in group}}

    return read


def _decay_of(group: Group) -> str:
    return "decoupled" if group.get("decoupled_weight_decay") else "coupled"


def _sgd(state: State, group: Group) -> Record:
    record = Record(_step(state), keys=tuple(state))
    if isinstance(state.get("momentum_buffer"), Tensor):
        buffer = state["momentum_buffer"]
        record.count = record.count or 1
        record.moments["mean"] = Moment(
            buffer, entry(group, "momentum"), None, "sum", "momentum_buffer"
        )
        record.others["momentum_buffer"] = Kept(buffer, "momentum_buffer")
    return record


def _sgd_hyper(group: Group) -> dict[str, dict[str, Any]]:
    momentum = {"momentum": entry(group, "momentum")}
    return {
        "heavyball_momentum": {**momentum, "dampening": entry(group, "dampening")},
        "nesterov_momentum": momentum,
    }


def _rmsprop(state: State, group: Group) -> Record:
    alpha = entry(group, "alpha")
    names = [("square_avg", "square", alpha, "ema")]
    if group["centered"]:
        names.append(("grad_avg", "centre", alpha, "ema"))
    record = _moments(state, group, names, _step(state))
    if isinstance(state.get("momentum_buffer"), Tensor):
        record.others["momentum_buffer"] = Kept(state["momentum_buffer"], "momentum_buffer")
    return record


def _adafactor(state: State, group: Group) -> Record:
    record = Record(_step(state), keys=tuple(state))
    for theirs, ours in (("row_var", "row"), ("col_var", "col")):
        if theirs in state:
            record.others[ours] = Kept(state[theirs], theirs)
    if "variance" in state:
        # its schedule of beta2 has no bias to correct
        record.moments["square"] = Moment(state["variance"], 0.0, None, "mean", "variance")
    return record


def _adagrad(state: State, group: Group) -> Record:
    record = Record(_step(state), keys=tuple(state))
    record.others["square_sum"] = Kept(state["sum"], "sum")
    return record


def _muon(state: State, group: Group) -> Record:
    names = (("momentum_buffer", "mean", entry(group, "momentum"), "ema"),)
    record = _moments(state, group, names, None)
    record.count = 1 if record.moments else None
    return record


# ---- schedulefree


def _averaged(beta: float, z: Tensor) -> Callable[[Tensor], Tensor]:
    """y, where the parameters hold x."""
    return lambda x: torch.lerp(x, z.to(x), 1 - beta)


def _schedule_free(
    state: State, group: Group, beta: float, count: int, weight_sum: Any, lr_max: float
) -> Record:
    record = Record(count, keys=tuple(state))
    record.others = {
        "z": Kept(state["z"], "z"),
        "weight_sum": Kept(_scalar(weight_sum), "z"),
        "lr_max": Kept(_scalar(max(0.0, lr_max)), "z"),
        "last_beta": Kept(_scalar(beta), "z"),
    }
    record.trained = _averaged(beta, state["z"])
    return record


def _schedulefree(state: State, group: Group) -> Record:
    betas = entry(group, "betas", (entry(group, "momentum", 0.9), 0.0))
    numbers = entry(group, "weight_sum"), number(group["lr_max"])
    record = _schedule_free(state, group, betas[0], int(group["k"]), *numbers)
    if "exp_avg_sq" in state:
        square = Moment(state["exp_avg_sq"], betas[1], record.count, "ema", "exp_avg_sq")
        record.moments["square"] = square
    return record


def _schedulefree_hyper(group: Group) -> dict[str, dict[str, Any]]:
    betas = entry(group, "betas", (entry(group, "momentum", 0.9), None))
    writer = {"beta": betas[0], **{n: entry(group, n) for n in ("r", "weight_lr_power")}}
    square = {} if betas[1] is None else {"beta2": betas[1], "eps": entry(group, "eps")}
    return {"schedule_free": writer, "scale_by_exp_avg_sq": square}


# ---- prodigyopt


def _prodigy(state: State, group: Group) -> Record:
    count, d, betas = int(state["step"]), entry(group, "d"), entry(group, "betas")
    record = Record(count, keys=tuple(state))
    moments = (("exp_avg", "mean", d, betas[0]), ("exp_avg_sq", "square", d * d, betas[1]))
    for key, meaning, unit, beta in moments:
        if key in state:
            record.moments[meaning] = Moment(state[key] / unit, beta, count, "ema", key)
    p0 = state["p0"] if state["p0"].ndim else state["p0"].expand(state["s"].shape)
    record.others = {
        "p0": Kept(p0, "p0"),
        "s": Kept(state["s"], "s"),
        "unit": Kept(_scalar(d), "s"),
    }
    return record


def _prodigy_hyper(group: Group) -> dict[str, dict[str, Any]]:
    names = ("betas", "d0", "d_coef", "growth_rate", "use_bias_correction", "safeguard_warmup")
    adam = {"betas": entry(group, "betas"), "eps": entry(group, "eps")}
    rate = {**{n: entry(group, n) for n in names}, "beta3": _beta3(group)}
    return {"prodigy_d": rate, "scale_by_adam": adam}


def _beta3(group: Group) -> float | None:
    """The decay of the sums; None where it is the root of beta2, as in a chain that is given none."""
    beta3, usual = entry(group, "beta3"), math.sqrt(entry(group, "betas")[1])
    return None if beta3 is None or math.isclose(beta3, usual, rel_tol=1e-12) else beta3


def _covered(records: list[Record]) -> dict[str, Any]:
    """||s||_1 over all parameters, and how many of them have an s that is not 0."""
    sums = [
        r.others["s"].value.abs().sum(dtype=torch.float64).item()
        for r in records
        if "s" in r.others
    ]
    return {"d_norm": math.fsum(sums), "d_members": float(sum(value != 0 for value in sums))}


def _prodigy_common(group: Group, records: list[Record]) -> dict[str, Any]:
    d = entry(group, "d")
    numbers = {n: float(entry(group, n)) for n in ("d", "d_max", "d_numerator")}
    return {**numbers, "d_before": d, "d_steps": int(group["k"]), **_covered(records)}


# ---- prodigy-plus-schedule-free


def _plus(state: State, group: Group) -> Record:
    betas, d, steps = entry(group, "betas"), entry(group, "d"), int(group["k"]) - 1
    record = _schedule_free(state, group, betas[0], steps, entry(group, "weight_sum"), 0.0)
    before = entry(group, "d_prev")
    square = state.get("exp_avg_sq")
    # its moments are in the unit of the d of the step, which was d_prev
    if isinstance(square, Tensor):
        record.moments["square"] = Moment(square, betas[1], None, "ema", "exp_avg_sq")
    elif isinstance(square, list | tuple):
        record.others |= {n: Kept(square[i], "exp_avg_sq") for i, n in enumerate(("row", "col"))}
    if "s" in state:
        p0 = state["p0"] if state["p0"].ndim else state["p0"].expand(state["s"].shape)
        record.others |= {"p0": Kept(p0, "p0"), "s": Kept(state["s"], "s")}
    if isinstance(state.get("rms_sq"), Tensor):
        record.others["rms_sq"] = Kept(state["rms_sq"], "rms_sq")
    record.others["unit"] = Kept(_scalar(before if before else d), "z")
    return record


def _plus_hyper(group: Group) -> dict[str, dict[str, Any]]:
    betas, eps = entry(group, "betas"), entry(group, "eps")
    options = ("use_bias_correction", "use_speed", "prodigy_steps")
    rate = {n: entry(group, n) for n in ("betas", "d0", "d_coef", *options)}
    square = {"beta2": betas[1], "eps": eps}
    caution = [name for name in ("cautious", "grams") if group[f"use_{name}"]]
    return {
        "prodigy_plus_d": {**rate, "beta3": _beta3(group)},
        "factored_rms": square,
        "scale_by_exp_avg_sq": square,
        "separate_decay": {"by_lr": entry(group, "weight_decay_by_lr")},
        "schedule_free": {"beta": betas[0], "caution": caution[0] if caution else "none"},
    }


def _plus_needs(group: Group) -> tuple[tuple[str, ...], ...]:
    clipped = group["use_stableadamw"] and group["eps"] is not None
    return (
        ("prodigy_plus_d",),
        ("schedule_free",),
        *((("clip_update_rms",),) if clipped else ()),
    )


def _adafactor_hyper(group: Group) -> dict[str, dict[str, Any]]:
    first, second = entry(group, "eps")
    return {
        "palm_beta2": {"beta2_scale": -entry(group, "beta2_decay")},
        "factored_rms": {"eps": first},
        "clip_update_rms": {"threshold": entry(group, "d")},
        "scale_by_parameter_rms": {"eps": second},
    }


def _plus_common(group: Group, records: list[Record]) -> dict[str, Any]:
    numbers = {n: float(entry(group, n)) for n in ("d", "d_numerator")}
    return {**numbers, "d_step": numbers["d"], "d_steps": int(group["k"]) - 1, **_covered(records)}


# ---- heavyball 3.2.1 of PyPI

# By the names of its functions: which states are which moments, with which of the betas, and their form.
_PYPI_MOMENTS: dict[str, tuple[tuple[str, str, int, str], ...]] = {
    "update_by_adam": (("exp_avg", "mean", 0, "mean"), ("exp_avg_sq", "square", 1, "mean")),
    "scale_by_soap": (("exp_avg", "mean", 0, "mean"), ("exp_avg_sq", "square", 1, "mean")),
    "scale_by_exp_avg_sq": (("exp_avg_sq", "square", 1, "mean"),),
    "exp_avg": (("exp_avg", "mean", 0, "mean"),),
    "nesterov_ema": (("momentum", "mean", 0, "ema"),),
    "nesterov_momentum": (("momentum", "mean", 0, "sum"),),
    "heavyball_momentum": (("momentum", "mean", 0, "sum"),),
}


# How its preconditioners are fitted, which is done otherwise here.
_PYPI_FITS = ("scale_by_psgd_Q_cache", "scale_by_psgd_running", "scale_by_psgd_step")


def _pypi(state: State, group: Group) -> Record:
    count = int(number(group["step_count"])) if "step_count" in group else None
    betas = _pypi_betas(group)
    aside = tuple(key for key in state if key.startswith(_PYPI_FITS) and state[key] is not None)
    kept = (k for k, v in state.items() if v is not None and not k.startswith(_PYPI_FITS))
    record = Record(count, keys=tuple(kept), aside=aside)
    for function, moments in _PYPI_MOMENTS.items():
        for name, meaning, index, form in moments:
            key = _pypi_key(state, function, name)
            if key is not None:
                # SOAP's Adam counts from the second gradient
                steps = None if count is None else count - (function == "scale_by_soap")
                value = _unbatched(state[key])
                record.moments[meaning] = Moment(value, betas[index], steps, form, key)
    _pypi_soap(state, group, record)
    _pypi_psgd(state, record)
    z = _pypi_key(state, "update_by_schedule_free", "z")
    if z is not None:
        lr = entry(group, "lr")
        averaged = _schedule_free(
            {"z": state[z]}, group, betas[0], count or 1, entry(group, "weight_sum", 0.0), lr
        )
        record.others |= {n: Kept(kept.value, z) for n, kept in averaged.others.items()}
        record.trained = averaged.trained
    return record


def _pypi_key(state: State, function: str, name: str) -> str | None:
    for key in state:
        start, _, place = key.rpartition("_")
        if start == f"{function}_{name}" and place.isdigit():
            return key
    return None


def _pypi_betas(group: Group) -> tuple[float, float]:
    betas = entry(group, "betas", (0.9, 0.99))
    beta = entry(group, "beta")
    return (betas[0] if beta is None else beta, betas[1])


def _unbatched(value: Tensor) -> Tensor:
    """A tensor without the axis of one that 3.2.1 stacks parameters along, where there is one."""
    return value[0] if value.ndim and value.shape[0] == 1 else value


def _pypi_soap(state: State, group: Group, record: Record) -> None:
    basis, gram = (_pypi_key(state, "scale_by_soap", n) for n in ("Q", "GG"))
    if basis is None or gram is None:
        return
    beta, count = entry(group, "shampoo_beta", 0.95), record.count or 1
    bias = 1 - beta**count
    turned = [None if q is None else _unbatched(q).mT.contiguous() for q in state[basis]]
    record.others["basis"] = Kept(tuple(turned), basis)
    means = [None if g is None else _unbatched(g) * bias for g in state[gram]]
    record.others["gram"] = Kept(tuple(means), gram)


def _pypi_psgd(state: State, record: Record) -> None:
    factors = _pypi_key(state, "scale_by_psgd", "Q")
    if factors is not None:
        lines = [f[1] if isinstance(f, list | tuple) else f for f in state[factors]]
        record.others["factors"] = Kept(tuple(_unbatched(line) for line in lines), factors)


def _pypi_lr(group: Group) -> Any:
    """Its `lr` is that of the last step, with warm-up, unless somebody has set it since."""
    lr, last = entry(group, "lr"), entry(group, "prev_lr")
    untouched = last is not None and math.isclose(lr, last, rel_tol=1e-6)
    return entry(group, "base_lr", lr) if untouched else lr


def _pypi_hyper(group: Group) -> dict[str, dict[str, Any]]:
    betas, eps = _pypi_betas(group), entry(group, "eps", 1e-8)
    square = {"beta2": betas[1], "eps": eps}
    writer = {
        "beta": betas[0],
        **{n: entry(group, n) for n in ("r", "weight_lr_power") if n in group},
    }
    return {
        "scale_by_adam": {"betas": betas, "eps": eps},
        "scale_by_exp_avg_sq": square,
        "schedule_free": writer,
        "to_eigenbasis": {n: entry(group, n) for n in ("shampoo_beta",) if n in group},
        "exp_avg": {"beta": betas[0]},
        "muon_momentum": {"momentum": betas[0]},
        "nesterov_momentum": {"momentum": betas[0]},
        "psgd_kron": {n: entry(group, n) for n in ("precond_lr",) if n in group},
    }


def _needs(*names: str | tuple[str, ...]) -> Callable[[Group], tuple[tuple[str, ...], ...]]:
    several = tuple((name,) if isinstance(name, str) else name for name in names)
    return lambda group: several


def _sgd_needs(group: Group) -> tuple[tuple[str, ...], ...]:
    momentum = "nesterov_momentum" if group["nesterov"] else "heavyball_momentum"
    return ((momentum,),) if entry(group, "momentum") else ()


def _is_pypi(*names: str) -> Callable[[Group], bool]:
    return lambda group: "is_preconditioning" in group and all(n in group for n in names)


_TORCH_FLAGS = {"maximize": "maximize"}
_ADAM_FLAGS = {"maximize": "maximize", "amsgrad": "amsgrad"}
_PLUS_FLAGS = {
    "use_muon_pp": "adaptive_orthogonalize",
    "use_adopt": "delayed_rms",
    "use_orthograd": "orthograd",
    "use_focus": "focus",
}

SOURCES: tuple[Source, ...] = (
    Source(
        "SFAdamW of the PyPI package heavyball",
        _is_pypi("weight_lr_power"),
        _pypi,
        _needs("scale_by_exp_avg_sq", "schedule_free"),
        _pypi_hyper,
        lr=_pypi_lr,
        besides=None,
    ),
    Source(
        "SOAP of the PyPI package heavyball",
        _is_pypi("shampoo_beta", "max_precond_dim"),
        _pypi,
        _needs("scale_by_adam"),
        _pypi_hyper,
        lr=_pypi_lr,
        besides=None,
    ),
    Source(
        "PSGDKron of the PyPI package heavyball",
        _is_pypi("max_size_triangular"),
        _pypi,
        _needs("psgd_kron"),
        _pypi_hyper,
        lr=_pypi_lr,
        besides=None,
    ),
    Source(
        "Muon of the PyPI package heavyball",
        _is_pypi("nesterov", "heavyball_momentum"),
        _pypi,
        _needs(("muon_momentum", "nesterov_momentum", "exp_avg")),
        _pypi_hyper,
        lr=_pypi_lr,
        besides=None,
    ),
    Source(
        "AdamW of the PyPI package heavyball",
        _is_pypi("betas"),
        _pypi,
        _needs("scale_by_adam"),
        _pypi_hyper,
        lr=_pypi_lr,
        besides=None,
    ),
    Source(
        "prodigy-plus-schedule-free",
        _has("d0", "use_stableadamw"),
        _plus,
        _plus_needs,
        _plus_hyper,
        decay=lambda group: "separate_decay",
        flags=_PLUS_FLAGS,
        common=_plus_common,
        evaluates=lambda group: not group["train_mode"],
        besides=("scale_by_tensor_rms",),
    ),
    Source(
        "prodigyopt",
        _has("d0", "fsdp_in_use"),
        _prodigy,
        _needs("prodigy_d", "scale_by_adam"),
        _prodigy_hyper,
        decay=lambda group: "decoupled" if group["decouple"] else "regularized",
        common=_prodigy_common,
    ),
    Source(
        "schedulefree",
        _has("scheduled_lr", "weight_lr_power", "k"),
        _schedulefree,
        _needs("schedule_free"),
        _schedulefree_hyper,
        evaluates=lambda group: not group["train_mode"],
    ),
    Source(
        "torch.optim.NAdam",
        _has("momentum_decay"),
        _adam,
        _needs("scale_by_nadam"),
        _betas("scale_by_nadam", "momentum_decay"),
        decay=_decay_of,
        flags=_TORCH_FLAGS,
    ),
    Source(
        "torch.optim.RMSprop",
        _has("alpha", "centered"),
        _rmsprop,
        _needs("scale_by_rms"),
        lambda group: {
            "scale_by_rms": {n: entry(group, n) for n in ("alpha", "eps")},
            "heavyball_momentum": {"momentum": entry(group, "momentum")},
        },
        decay=lambda group: "coupled",
        flags={"maximize": "maximize", "centered": "centered"},
    ),
    Source(
        "torch.optim.Adagrad",
        _has("lr_decay", "initial_accumulator_value"),
        _adagrad,
        _needs("scale_by_adagrad"),
        lambda group: {
            "scale_by_adagrad": {"eps": entry(group, "eps")},
            "inverse_time": {"decay": entry(group, "lr_decay")},
        },
        decay=lambda group: "coupled",
        flags=_TORCH_FLAGS,
    ),
    Source(
        "torch.optim.Adafactor",
        _has("beta2_decay", "d"),
        _adafactor,
        _needs("factored_rms", "palm_beta2"),
        _adafactor_hyper,
        flags=_TORCH_FLAGS,
    ),
    Source(
        "torch.optim.Muon",
        _has("ns_coefficients", "momentum"),
        _muon,
        _needs("muon_momentum"),
        lambda group: {
            "muon_momentum": {"momentum": entry(group, "momentum")},
            "muon": {"momentum": entry(group, "momentum"), "eps": entry(group, "eps")},
        },
        besides=None,
    ),
    Source(
        "torch.optim.SGD",
        _has("dampening", "nesterov"),
        _sgd,
        _sgd_needs,
        _sgd_hyper,
        decay=lambda group: "coupled",
        flags=_TORCH_FLAGS,
    ),
    Source(
        "torch.optim.Adam",
        _has("betas", "amsgrad"),
        _adam,
        _needs("scale_by_adam"),
        _betas("scale_by_adam"),
        decay=_decay_of,
        flags=_ADAM_FLAGS,
    ),
)


def source_of(groups: Iterable[Group]) -> Source | None:
    """The optimizer that saved these groups; None for one that is not known."""
    groups = list(groups)
    for source in SOURCES:
        if groups and all(source.is_it(group) for group in groups):
            return source
    return None
