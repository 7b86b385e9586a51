"""Adds up what was measured, by group."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.loss import KEY
from heavyball.core.program import Node, Program
from heavyball.core.schedule import last_lr
from heavyball.numerics import SCALAR
from heavyball.transforms.probe import sum_of_squares

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry

NAMES = (
    *("lr", "effective_lr", "grad_norm", "update_norm", "param_norm", "update_to_param"),
    *("skipped_steps", "d"),
)
# Gates that count the steps that they leave out, and where.
SKIPPING = {"skip_not_finite": "skipped", KEY: "left_out"}
PROBED = ("rms", "norm", "max", "cosine", "zeros")


def totals(registry: "Registry", stepped: Collection[Tensor] | None) -> dict[str, Tensor]:
    """The metrics of every group, see `heavyball.metrics`.

    stepped: the parameters that had a part in the last step; None before the first that was measured.
    """
    found: dict[str, Tensor] = {}
    programs, states = registry.programs(), registry.state
    for index, group in enumerate(registry.groups):
        members = [(p, programs[p], states.get(p, {})) for p in dict.fromkeys(group["params"])]
        device = members[0][0].device if members else torch.device("cpu")
        numbers = {**_rates(group, device), **_step(members, stepped, device), **_d(group, device)}
        for names in _probes(programs.values()):
            numbers |= _probed(members, names, stepped, device)
        found |= {f"group_{index}/{name}": value for name, value in numbers.items()}
    return found


def with_gradient(groups: list[dict[str, Any]]) -> set[Tensor]:
    """The parameters that have a gradient now."""
    return {p for group in groups for p in group["params"] if p.grad is not None}


Member = tuple[Tensor, Program, Mapping[str, Any]]


def _number(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, SCALAR, copy=True).reshape(())
    return torch.full((), float(value), dtype=SCALAR, device=device)


def _rates(group: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    lr = _number(last_lr(group), device)
    d = group.get("d_step", group.get("d", 1.0))
    return {"lr": lr, "effective_lr": lr * _number(d, device)}


def _d(group: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {"d": _number(group["d"], device)} if "d" in group else {}


def _sum(values: list[Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros((), dtype=SCALAR, device=device)
    return torch.stack([value.to(device) for value in values]).sum()


def _step(
    members: list[Member], stepped: Collection[Tensor] | None, device: torch.device
) -> dict[str, Tensor]:
    now = [state for param, _, state in members if stepped is not None and param in stepped]
    weights = [
        state["behind_step.weight"]
        if "behind_step.weight" in state
        else sum_of_squares(param.detach())
        for param, _, state in members
    ]
    gradient = _sum([s["before_step.grad"] for s in now if "before_step.grad" in s], device)
    moved = _sum([s["behind_step.moved"] for s in now if "behind_step.moved" in s], device)
    norm = _sum(weights, device).sqrt()
    grad_norm, update_norm = gradient.sqrt(), moved.sqrt()
    measured = not now or any("before_step.grad" in state for state in now)
    if stepped is None or not measured:
        grad_norm = update_norm = torch.full((), float("nan"), dtype=SCALAR, device=device)
    skipped = [_sum(_skipped(program, state), device) for _, program, state in members]
    return {
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": norm,
        "update_to_param": update_norm / norm,
        "skipped_steps": torch.stack(skipped).amax() if skipped else _sum([], device),
    }


def _skipped(program: Program, state: Mapping[str, Any]) -> list[Tensor]:
    gates = [node for node in program.flat if node.transform.name in SKIPPING]
    keys = [node.state_key(SKIPPING[node.transform.name]) for node in gates]
    return [state[key] for key in keys if key in state]


def _probes(programs: Any) -> list[str]:
    """The names of the probes of all programs, each once."""
    names = (n.transform.options["name"] for p in programs for n in p.flat if _is_probe(n))
    return list(dict.fromkeys(names))


def _is_probe(node: Node) -> bool:
    return node.transform.name == "probe"


def _probed(
    members: list[Member],
    name: str,
    stepped: Collection[Tensor] | None,
    device: torch.device,
) -> dict[str, Tensor]:
    there = [
        (param, node, state)
        for param, program, state in members
        for node in program.flat
        if _is_probe(node) and node.transform.options["name"] == name
    ]
    if not there:
        return {}
    now = [
        (param, node, state)
        for param, node, state in there
        if stepped is not None and param in stepped and node.state_key("square") in state
    ]

    def of(what: str) -> list[Tensor]:
        return [state[node.state_key(what)].to(device) for _, node, state in now]

    norm, gradient = _sum(of("square"), device).sqrt(), _sum(of("grad_square"), device).sqrt()
    elements = sum(param.numel() for param, *_ in now)
    values = {
        "rms": norm / elements**0.5 if elements else norm,
        "norm": norm,
        "max": torch.stack(of("largest")).amax() if now else norm,
        "cosine": _sum(of("along"), device) / (norm * gradient),
        "zeros": _sum(of("zeros"), device),
    }
    if not now:
        values = {key: torch.full_like(norm, float("nan")) for key in values}
    return {f"{name}/{key}": value for key, value in values.items()}
