"""Checks of an optimizer's inputs; each error names the value and what was expected."""

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import BOOKKEEPING, RESERVED, Chain
from heavyball.core.hyper import check_live, nonnegative
from heavyball.core.program import Node, Program
from heavyball.core.text import known_names
from heavyball.numerics import host
from heavyball.runtime.addresses import is_plain_number


def checked_lr(lr: Any) -> float | Tensor:
    """A learning rate: a float, or a tensor of one element, which is used as it is."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr={lr!r}: Tensor lr must be 1-element")  # torch's words
        if not lr.is_floating_point():
            raise ValueError(f"lr={lr!r}: expected a floating-point number")
        if not (torch.isfinite(lr).item() and lr.item() >= 0):
            raise ValueError(f"lr={lr!r}: expected in {nonnegative}")
        return lr
    return check_live("lr", lr, 0.0, nonnegative)


def checked_seed(seed: Any) -> int:
    """A whole number."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected a whole number")
    return int(seed)


# Arguments of torch.optim's classes, and why some of their values cannot be had here.
TORCH_SWITCHES: dict[str, str | None] = {
    "fused": None,
    "capturable": None,
    "differentiable": "a step here is not recorded by autograd",
}


def check_torch_switches(owner: str, given: Mapping[str, Any], foreach: bool | None) -> None:
    """Refuse what torch's own arguments ask for where it is not so; the rest of them has no meaning."""
    for name in TORCH_SWITCHES.keys() & given.keys():
        value, reason = given[name], TORCH_SWITCHES[name]
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{owner}: {name}={value!r}: expected True or False, as in torch.optim")
        if value and reason:
            raise ValueError(
                f"{owner}: {name}=True is an argument of torch.optim that is not supported: {reason}; "
                "leave it out"
            )
    if given.get("fused") and foreach:
        raise ValueError(
            f"{owner}: fused=True and foreach=True exclude each other, as in torch.optim"
        )


# What a group of torch.optim may ask for, and whether an element of a chain does it.
_ASKED: dict[str, Callable[[Node], bool]] = {
    "maximize": lambda node: node.transform.name == "maximize",
    "differentiable": lambda node: False,
    "amsgrad": lambda node: bool(node.transform.options.get("amsgrad")),
    "nesterov": lambda node: (
        node.transform.name == "nesterov_momentum" or bool(node.transform.options.get("nesterov"))
    ),
    "centered": lambda node: bool(node.transform.options.get("centered")),
}
# Every optimizer has these; the others matter where the optimizer has an option of that name.
_EVERYBODYS = ("maximize", "differentiable")


def check_entries(owner: type, group: Mapping[Any, Any], known: list[str], chain: Chain) -> None:
    """Refuse entries of a new group that are meant for the chain and would have no effect on it.

    owner: the optimizer's class. known: the entries that the chain has.

    Errors: ValueError for a near miss of a known entry, for what is decided when the chain is built, and
        for a number that is found while training.
    """
    _check_asked(owner, group, chain)
    # a group of another optimizer, ours or torch's, has the names of its own hyper-parameters
    of_another = {"seed", "warmup_steps"} <= group.keys() or "maximize" in group
    common = chain.rate.transform.numbers if chain.rate else {}
    found = sorted(common.keys() & group.keys())
    # of another optimizer they come along, and begin anew here, as state does
    if found and not of_another:
        starts = sorted({start for start in common.values() if isinstance(start, str)})
        raise ValueError(
            f"parameter group: {', '.join(found)} cannot be set here, it is estimated during training; "
            f"set {', '.join(starts)}"
        )
    for key in group:
        if not isinstance(key, str):
            raise ValueError(f"parameter group: the entry {key!r} is not a string")
        others = (*known, *common, *RESERVED, *BOOKKEEPING, *_ASKED, *TORCH_SWITCHES)
        if key in others or key.startswith("_"):
            continue
        if of_another and ("." in key or key in _others_names()):
            continue
        near = next((name for name in ("params", *known) if nearly(key, name)), None)
        if near is not None:
            raise ValueError(
                f"parameter group: unknown entry {key!r}; known: params, {', '.join(known)}; "
                f"did you mean {near!r}?"
            )


def _check_asked(owner: type, group: Mapping[Any, Any], chain: Chain) -> None:
    options = inspect.signature(owner).parameters
    for key, does in _ASKED.items():
        if group.get(key) is not True or not (key in _EVERYBODYS or key in options):
            continue
        if not any(does(node) for program in chain.programs for node in program.flat):
            raise ValueError(
                f"parameter group: {key}=True has no effect on {chain!r}: it cannot be set per "
                f"group{f', pass it to {owner.__name__}' if key in options else ''}"
            )


@functools.cache
def _others_names() -> frozenset[str]:
    """Hyper-parameters and options of the transforms here, and of the classes of torch.optim."""
    names = {name for t in known_names().transforms.values() for name in t.defaults}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            names |= inspect.signature(kind).parameters.keys()
    return frozenset(names)


def nearly(key: str, name: str) -> bool:
    """Whether a name was meant and mistyped: one letter, two in long names, or case, - and _.

    A name with further words (`no_weight_decay`), or three letters of which one is another (`tag` and
    `tau`), is a name of its own.
    """
    words = [re.split("[-_]+", text.lower()) for text in (key, name)]
    plain = ["".join(each) for each in words]
    if plain[0] == plain[1]:
        return True
    shorter = min(map(len, plain))
    others = len(words[0]) > len(words[1]) and set(words[0]) > set(words[1])
    if others or (list(map(len, plain)) == [3, 3] and sorted(plain[0]) != sorted(plain[1])):
        return False
    return shorter > 2 and edits(*plain) <= (2 if shorter > 7 else 1)


def edits(a: str, b: str) -> int:
    """How many letters to insert, remove, replace or exchange with their neighbours lead from a to b."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            cost = min(row[j - 1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def overlaps(param: Tensor) -> bool:
    """Whether two elements may share memory: an axis that steps into the extent of a finer one."""
    extent = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def labelled(index: int, group: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The names, where there are some, and the parameters of a group.

    Errors: ValueError if the list of parameters was changed and that of names was not.
    """
    names, params = group.get("param_names"), group["params"]
    names = [None] * len(params) if names is None else names
    if len(names) != len(params):
        raise ValueError(
            f"parameter group {index} has {len(params)} parameters and {len(names)} names: change "
            '"params" and "param_names" together'
        )
    return zip(names, params, strict=True)


def check_shape(label: str, param: Tensor, program: Program) -> None:
    """Refuse a parameter that one of its transforms is not defined for."""
    for node in program.flat:
        t = node.transform
        reason = None if t.rules.requires is None else t.rules.requires(param.shape, t.options)
        if reason:
            raise ValueError(f"{label}: {node.key} {reason}")


def check_gradient(label: str, param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that the step could not use."""
    if grad.layout != torch.strided:
        raise ValueError(f"{label} has a sparse gradient ({grad.layout}), expected a dense one")
    if not grad.is_floating_point():
        raise ValueError(f"{label} has a gradient of {grad.dtype}, expected a real floating dtype")
    if grad.dtype == torch.float64 != param.dtype:
        raise ValueError(
            f"{label} is {param.dtype}, but its gradient is {grad.dtype}, which has more precision"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{label} has a gradient of shape {tuple(grad.shape)}")
    if grad.device != param.device:
        raise ValueError(f"{label} is on {param.device}, but its gradient on {grad.device}")


def check_state(label: str, program: Program, param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Refuse state that is not a tensor or number, or is not on the device of its parameter."""
    for key, tensor in state.items():
        if not program.owns((key,)) or is_plain_number(program, key, tensor):
            continue
        if not isinstance(tensor, Tensor):
            expected = "a finite number" if key in program.numbers else "a tensor"
            raise ValueError(f"{label}: its state {key!r} is {tensor!r}, expected {expected}")
        if tensor.device != param.device:
            raise ValueError(
                f"{label} is on {param.device}, but its state {key!r} on {tensor.device}; "
                "opt.load_state_dict(opt.state_dict()) moves the state to the parameters"
            )
    check_count(label, state.get("step"))


def check_count(label: str, step: Any) -> None:
    """Refuse a count of steps that is none. One on another device is not waited for."""
    if not isinstance(step, Tensor) or not host.on_host(step):
        return
    if step.numel() == 1 and not step.is_complex():
        count = step.item()
        if not (count >= 0 and count == int(count)):
            raise ValueError(
                f"{label}: its state 'step' is {count}, expected a count of at least 0"
            )
