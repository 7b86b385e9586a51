"""Writes state dicts that torch.optim can load."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Node, Program
from heavyball.optim.checkpoint import plain
from heavyball.optim.optimizer import ChainOpt
from heavyball.runtime.place import Place
from heavyball.runtime.state import packed_shape
from heavyball.state.held import held

# What a group of each of torch's optimizers holds, where the chain does not say otherwise.
_SWITCHES = {"maximize": False, "foreach": None, "differentiable": False}
_FUSED = {**_SWITCHES, "capturable": False, "fused": None}
_CAPTURABLE = {**_SWITCHES, "capturable": False}
_KNOWN = frozenset({"maximize", "coupled", "decoupled", "descend"})
# By the transforms between decay and write: torch's class and the rest of its group.
_CLASSES: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {
    (): ("SGD", {**_SWITCHES, "fused": None, "momentum": 0.0, "dampening": 0.0, "nesterov": False}),
    ("heavyball_momentum",): ("SGD", {**_SWITCHES, "fused": None, "nesterov": False}),
    ("nesterov_momentum",): (
        "SGD",
        {**_SWITCHES, "fused": None, "dampening": 0.0, "nesterov": True},
    ),
    ("scale_by_adam",): ("Adam", {**_FUSED, "amsgrad": False}),
    ("scale_by_nadam",): ("NAdam", _CAPTURABLE),
    ("scale_by_rms",): ("RMSprop", {**_CAPTURABLE, "momentum": 0.0, "centered": False}),
    ("scale_by_rms", "heavyball_momentum"): ("RMSprop", {**_CAPTURABLE, "centered": False}),
}
# Options of transforms, and the values with which torch has them.
_OPTIONS = {
    "amsgrad": (True, False),
    "centered": (True, False),
    "correct_bias": (True,),
    "eps_placement": ("outside",),
}
_OURS = ("warmup_steps", "seed", "train_mode", "params", "param_names")


def to_torch(opt: ChainOpt) -> dict[str, Any]:
    """Return a state dict with which an optimizer of torch.optim continues as this one would.

    Supports SGD, Adam, AdamW, NAdam and RMSprop, also written as chains: `coupled | scale_by_adam`
    is Adam. The dict contains all entries of torch's groups, so the values that torch's optimizer
    was built with do not matter.

    Errors: ValueError for a chain that torch does not have, naming the element, and for a warm-up that
        has not ended.
    """
    if not isinstance(opt, ChainOpt):
        raise TypeError(f"to_torch: expected an optimizer of heavyball, got {type(opt).__name__}")
    programs = opt.registry.programs()
    numbers: dict[Tensor, int] = {}
    for place in opt.registry.places():
        numbers.setdefault(place.param, len(numbers))
    groups, states = [], {}
    for index, group in enumerate(opt.param_groups):
        members = [programs[p] for p in group["params"]] or [*opt.chain.programs]
        if len({id(program) for program in members}) > 1:
            raise ValueError(f"to_torch: torch does not support routes: {opt.chain!r}")
        made = _group(members[0], group, index)
        made["params"] = [numbers[param] for param in group["params"]]
        if "param_names" in group:
            made["param_names"] = list(group["param_names"])
        groups.append(made)
    for place in opt.registry.places():
        found = _state(programs[place.param], place, opt.state.get(place.param, {}))
        if found:
            states[numbers[place.param]] = found
    return {"state": states, "param_groups": groups}


def _refused(program: Program, why: str) -> ValueError:
    return ValueError(
        f"to_torch: torch.optim has no such optimizer: {why}; the chain is {program!r}"
    )


def _rules(program: Program) -> tuple[Node, ...]:
    """The nodes other than decay and write, in order."""
    if len(program.flat) != len(program.nodes):
        raise _refused(program, "it has branches")
    return tuple(node for node in program.flat if node.transform.name not in _KNOWN)


def _group(program: Program, group: Mapping[str, Any], index: int) -> dict[str, Any]:
    rules = _rules(program)
    names = tuple(node.transform.name for node in rules)
    if names not in _CLASSES:
        known = {name for several in _CLASSES for name in several}
        other = next((name for name in names if name not in known), " | ".join(names))
        raise _refused(program, f"it has {other}")
    kind, rest = _CLASSES[names]
    made = {key: value for key, value in group.items() if key not in _OURS} | rest
    for node in rules:
        for option, value in node.transform.options.items():
            if option in _OPTIONS and value not in _OPTIONS[option]:
                raise _refused(program, f"{node.key} has {option}={value!r}")
            if option in ("amsgrad", "centered"):
                made[option] = value
        for name, (key, part) in node.hyper.items():
            value = group[key] if part is None else group[key][part]
            if key not in (name, "betas"):
                made.pop(key, None)
            if kind == "RMSprop" and name == "dampening":
                made.pop(name, None)
                if value:
                    raise _refused(program, f"its momentum has dampening={value}")
            elif value is not None:
                made[name] = value
    made["maximize"] = any(n.transform.name == "maximize" for n in program.flat)
    made |= _decay(program, group, kind)
    _check_warm_up(group, index)
    return plain({key: _number(value) for key, value in made.items()})


def _decay(program: Program, group: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The decay of a group as torch has it."""
    found = {}
    for node in program.flat:
        if node.transform.name in ("coupled", "decoupled"):
            found[node.transform.name] = group[node.hyper["weight_decay"][0]]
    decays = {name: value for name, value in found.items() if value}
    separate = kind in ("Adam", "NAdam")
    if len(decays) > 1 or ("decoupled" in decays and not separate):
        raise _refused(program, f"{kind} has no such weight decay")
    made: dict[str, Any] = {"weight_decay": next(iter(decays.values()), 0.0)}
    if separate:
        made["decoupled_weight_decay"] = "decoupled" in (decays or found)
    return made


def _check_warm_up(group: Mapping[str, Any], index: int) -> None:
    if group["warmup_steps"]:
        raise ValueError(
            f"to_torch: warmup_steps={group['warmup_steps']} of parameter group {index} has no "
            "equivalent in torch.optim: set it to 0 when it has ended, or use a scheduler"
        )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _state(program: Program, place: Place, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one parameter under torch's names and in its forms."""
    if "step" not in state:
        return {}
    step, group, made = float(state["step"]), place.group, {}

    def kept(key: str) -> Tensor:
        holds = program.holds_of(key)
        shape = packed_shape(program, key, place.param, state)
        return held(state, key, holds, shape).load(torch.float64)

    def is_there(node: Node, name: str) -> bool:
        return node.state_key(name) in state

    for node in _rules(program):
        name = node.transform.name

        def hyper(name: str, node: Node = node) -> Any:
            key, part = node.hyper[name]
            return group[key] if part is None else group[key][part]

        if name in ("scale_by_adam", "scale_by_nadam"):
            betas = hyper("betas")
            bias = [1 - beta**step for beta in betas]
            mean = kept(node.state_key("exp_avg"))
            made["exp_avg"] = mean * bias[0] if name == "scale_by_adam" else mean
            made["exp_avg_sq"] = kept(node.state_key("exp_avg_sq")) * bias[1]
            if is_there(node, "max_exp_avg_sq"):
                made["max_exp_avg_sq"] = kept(node.state_key("max_exp_avg_sq"))
            if name == "scale_by_nadam":
                made["mu_product"] = state[node.state_key("mu_product")]
        elif name == "scale_by_rms":
            made["square_avg"] = kept(node.state_key("exp_avg_sq"))
            if is_there(node, "grad_avg"):
                made["grad_avg"] = kept(node.state_key("grad_avg"))
        elif is_there(node, "momentum_buffer") and step:
            made["momentum_buffer"] = kept(node.state_key("momentum_buffer"))
    if any(node.transform.name.startswith("scale_by") for node in _rules(program)):
        made["step"] = state["step"]
    numbers = ("step", "mu_product")
    return {
        key: value.to(torch.float32 if key in numbers else place.param.dtype, copy=True)
        for key, value in made.items()
    }
