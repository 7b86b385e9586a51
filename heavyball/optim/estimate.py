"""What groups and parameters must be like for an estimate of the learning rate to mean something."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.errors import warn


def check_fixed(chain: Chain, group: Mapping[str, Any]) -> None:
    """Refuse an entry of a new group that would set what the estimate has for all groups.

    Errors: ValueError naming the entry and its value.
    """
    if chain.rate is None:
        return
    t = chain.rate.transform
    for name, value in t.options.items():
        if name in group and group[name] != value and name not in chain.hyper:
            raise ValueError(
                f"parameter group: {name}={group[name]!r} has no effect, because {t.name} has "
                f"{name}={value!r} for all groups: pass it to the optimizer"
            )


def check_alike(chain: Chain, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups with one estimate that do not agree on how it is made, or warn of it.

    Errors: ValueError naming the entry, both values and the groups.
    """
    rate = chain.rate
    if rate is None or rate.transform.estimate is None or not rate.transform.is_shared:
        return
    estimate = rate.transform.estimate
    held = [(i, group) for i, group in enumerate(groups) if group["params"]]
    for name, (key, index) in rate.hyper.items() if len(held) > 1 else ():
        (first, start), *others = held
        expected = _value(start, key, index)
        for number, group in others:
            value = _value(group, key, index)
            if value == expected:
                continue
            unlike = estimate.unlike and estimate.unlike(name, value, expected, rate.hyper)
            said = f"{key}={group[key]!r} of parameter group {number}, "
            said += f"but {start[key]!r} of group {first}"
            if unlike is None:
                raise ValueError(
                    f"{said}: the groups share one {estimate.name}, which needs a single value; use the "
                    f"same in both, or pass {estimate.split}=True for a separate {estimate.name} in each"
                )
            if unlike:
                warn(f"{said}: {unlike}, or pass {estimate.split}=True")


def _value(group: Mapping[str, Any], key: str, index: int | None) -> Any:
    value = group[key] if index is None else group[key][index]
    return tuple(value) if isinstance(value, list) else value


def warn_of_half(chain: Chain, params: Mapping[Tensor, str]) -> None:
    """Say that float16 weights do not follow the small steps that an estimate begins with.

    params: parameters that come to the optimizer, with what to call them.
    """
    rate = chain.rate
    if rate is None or rate.transform.estimate is None or chain.storage.param is not None:
        return
    halves = [label for param, label in params.items() if param.dtype == torch.float16]
    if halves:
        more = f" and {len(halves) - 1} more" if len(halves) > 1 else ""
        estimate = rate.transform.estimate
        warn(
            f"{halves[0]}{more} in float16: the first steps of {rate.transform.name} are lost in "
            f"the rounding of such weights, so that {estimate.name} may stay at {estimate.start} for "
            "good; use float32 or bfloat16 weights, or param_ecc='fp16+8'"
        )
