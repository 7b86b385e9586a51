"""Checks that a loaded object is a state dict with possible values.

Every function raises ValueError that names the entry, before anything has been changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import check_live, finite, nonnegative
from heavyball.core.program import Program
from heavyball.core.schedule import COUNT, SCHEDULES
from heavyball.numerics import compute_dtype
from heavyball.optim.checkpoint import DESCRIPTION, SAVED_WEIGHTS
from heavyball.optim.checks import checked_seed
from heavyball.optim.scheduling import BEGUN, check_saved
from heavyball.state.held import (
    COLUMNS,
    CORRECTION,
    SCALE,
    SIGNS,
    fault,
    held,
    is_companion,
    layout,
    main_of,
    mixture,
)

# A schedule may end a rounding error below zero.
LEAST_LR = -1e-6


def _malformed(entry: str, value: Any, expected: str) -> ValueError:
    shown = f"a {type(value).__name__}"
    if isinstance(value, int | float | str | bool | type(None)):
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:60]}.."
    return ValueError(f"load_state_dict: {entry} is {shown}, expected {expected}")


def check_form(state_dict: Any) -> None:
    """Refuse what is no state dict in one place."""
    if not isinstance(state_dict, Mapping):
        raise _malformed("the state dict", state_dict, "a dict")
    for entry in ("state", "param_groups"):
        if entry not in state_dict:
            raise ValueError(f"load_state_dict: {entry!r} is missing in the state dict")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise _malformed("'state'", state, "a dict")
    if not isinstance(groups, list | tuple):
        raise _malformed("'param_groups'", groups, "a list")
    seen: set[Any] = set()
    for index, group in enumerate(groups):
        numbers = _check_group_form(index, group)
        if seen & set(numbers):
            number = next(n for n in numbers if n in seen)
            raise ValueError(f"load_state_dict: parameter {number!r} is in two groups")
        seen |= set(numbers)
    for number, entries in state.items():
        if number in seen or isinstance(number, int):
            _check_entries(number, entries)
        if number not in seen and isinstance(number, int):
            raise ValueError(
                f"load_state_dict: it has state for parameter {number}, which is in no group"
            )
    _check_description(state_dict.get(DESCRIPTION))


def _check_group_form(index: int, group: Any) -> list[Any]:
    place = f"'param_groups'[{index}]"
    if not isinstance(group, Mapping):
        raise _malformed(place, group, "a dict")
    for key in group:
        if not isinstance(key, str):
            raise _malformed(f"an entry's name in {place}", key, "a string")
    if "params" not in group:
        raise ValueError(f"load_state_dict: 'params' is missing in {place}")
    numbers = group["params"]
    if not isinstance(numbers, list | tuple):
        raise _malformed(f"'params' of {place}", numbers, "a list")
    for number in numbers:
        if not isinstance(number, int | str) or isinstance(number, bool):
            raise _malformed(f"an element of 'params' of {place}", number, "a number or a name")
    names = group.get("param_names")
    if names is not None:
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise _malformed(f"'param_names' of {place}", names, "a list of strings")
        # numbers that are names by themselves go first, see `migrate`
        if len(names) != len(numbers) and not all(isinstance(n, str) for n in numbers):
            raise ValueError(
                f"load_state_dict: 'param_names' of {place} has {len(names)} names for "
                f"{len(numbers)} parameters"
            )
    return list(numbers)


def _check_entries(number: Any, entries: Any) -> None:
    place = f"'state'[{number!r}]"
    if not isinstance(entries, Mapping):
        raise _malformed(place, entries, "a dict")
    for key, value in entries.items():
        if not isinstance(key, str):
            raise _malformed(f"an entry's name in {place}", key, "a string")
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
            raise _malformed(f"{key!r} of {place}", value, "a number below 2^53")


def _check_description(described: Any) -> None:
    if described is None:
        return
    if not isinstance(described, Mapping):
        raise _malformed(f"{DESCRIPTION!r}", described, "a dict with a version and a chain")
    if "chain" in described and not isinstance(described["chain"], str):
        raise _malformed(f"'chain' of {DESCRIPTION!r}", described["chain"], "a string")


def check_source(loading: Mapping[str, Any]) -> None:
    """Refuse what one of torch.optim's optimizers wrote."""
    for group in loading["param_groups"] if DESCRIPTION not in loading else ():
        foreign = [k for k in ("maximize", "foreach", "differentiable") if k in group]
        if len(foreign) > 1 and not {"seed", "warmup_steps"} & group.keys():
            raise ValueError(
                "load_state_dict: this is a state dict of torch.optim (its groups have "
                f"{', '.join(map(repr, foreign))} and neither 'seed' nor 'warmup_steps'), whose state "
                "has other names and meanings; use heavyball.checkpoint.adopt, or strict=False for what "
                "matches"
            )


# ---- numbers


def check_hyper(chain: Chain, index: int, group: Mapping[str, Any], strict: bool) -> None:
    """Refuse entries of a group that the optimizer could not step with.

    strict: False leaves those that another chain may have had, see `load_state_dict`.
    """
    place = f"load_state_dict: parameter group {index}"
    try:
        for key, value in group.items():
            if key == "lr":
                _check_lr(value)
            elif key == "seed":
                checked_seed(value)
            elif key == "warmup_steps":
                check_live(key, value, 0.0, nonnegative)
            elif key == "train_mode" and not isinstance(value, bool):
                raise TypeError(f"train_mode={value!r}: expected True or False")
            elif key in (SCHEDULES, COUNT, BEGUN):
                check_saved(group)
            elif key in chain.hyper and strict:
                chain.hyper[key].check(key, value)
            elif key in chain.hyper:
                parts = value if isinstance(value, list | tuple) else (value,)
                if any(isinstance(v, float) and math.isnan(v) for v in parts):
                    raise ValueError(f"{key}={value!r}: expected a number, not NaN")
        for key, first in chain.rate.transform.numbers.items() if chain.rate else ():
            if key in group:
                _check_common(key, group[key], isinstance(first, int))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: {error}") from None


def _check_lr(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"lr={value!r}: expected one floating-point number")
        value = value.item()
    if check_live("lr", value, 0.0, finite) < LEAST_LR:
        raise ValueError(f"lr={value!r}: expected in {nonnegative}")


def _check_common(key: str, value: Any, is_count: bool) -> None:
    if isinstance(value, Tensor) and not is_count:
        if value.numel() != 1 or not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, expected one number")
        value = value.item()
    if is_count and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{key}={value!r}: expected a count")
    check_live(key, value, 0.0, finite)


def impossible(
    saved: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    program: Program,
    param: Tensor,
    shapes: Callable[[str], torch.Size],
) -> Iterator[str]:
    """What of a parameter's state cannot be: no tensors, no counts, negative squares.

    shapes: of the values, by key.
    """
    bounds = {n.state_key(name): s.low for n, name, s in program.states if s.is_number}
    readable = {k: v for k, v in saved.items() if k in expected or k == SAVED_WEIGHTS}
    readable |= {k: v for k, v in saved.items() if is_companion(k) and main_of(k) in expected}
    for key, value in readable.items():
        if reason := _unreadable(key, value):
            yield f"{key!r} {reason}"
            return
    for key, value in readable.items():
        if is_companion(key):
            continue
        if key == "step" or key in bounds:
            if value.numel() == 1 and (reason := _no_number(key, float(value), bounds)):
                yield f"{key!r} {reason}"
        elif reason := mixture(layout(readable, key), key, program.holds_of(key)):
            yield f"{key!r} {reason}"
        elif key == SAVED_WEIGHTS:
            if value.shape == param.shape:
                yield from _unusable(key, readable, program, param, param.shape)
        elif not fault(readable, key, shapes(key)):
            yield from _unusable(key, readable, program, param, shapes(key))


def _unreadable(key: str, value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, expected a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        return f"is {value.layout} of {value.dtype} on {value.device}, expected a dense real tensor"
    if key.endswith(CORRECTION) and value.dtype not in (torch.int8, torch.int16):
        return f"is {value.dtype}, expected torch.int8 or torch.int16"
    if key.endswith(SIGNS) and value.dtype != torch.uint8:
        return f"is {value.dtype}, expected torch.uint8"
    real = key.endswith((SCALE, COLUMNS)) or key == SAVED_WEIGHTS
    if real and not value.is_floating_point():
        return f"is {value.dtype}, expected a floating-point dtype"
    return None


def _no_number(key: str, value: float, bounds: Mapping[str, float]) -> str | None:
    if key == "step":
        good = math.isfinite(value) and value >= 0 and value == int(value)
        return None if good else f"is {value}, expected a count"
    if not math.isfinite(value) or value < bounds[key]:
        least = "" if math.isinf(bounds[key]) else f" of at least {bounds[key]:g}"
        return f"is {value}, expected a finite number{least}"
    return None


def _unusable(
    key: str,
    saved: Mapping[str, Tensor],
    program: Program,
    param: Tensor,
    shape: torch.Size,
) -> Iterator[str]:
    value, wide = saved[key], compute_dtype(param.dtype)
    if (
        value.dtype == torch.float64 != wide
        and (value.isfinite() & ~value.to(wide).isfinite()).any()
    ):
        yield f"{key!r} has numbers beyond the range of {wide}"
    if program.holds_of(key) == "square" and value.numel():
        squares = held(saved, key, "square", shape).load(torch.float64)
        if not (squares >= 0).all() or not squares.isfinite().all():
            yield f"{key!r} has a square that is {_worst(squares)}, expected finite ones from 0"


def _worst(values: Tensor) -> float:
    return float(values[~(values >= 0) | ~values.isfinite()].flatten()[0])
