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
                f"parameter group: {name}={group[name]!r} has no effect, since {t.name} has "
                f"{name}={value!r} for all groups: give it to the optimizer"
            )


def check_alike(chain: Chain, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups with one d that do not agree on how it is estimated; warn of unlike decays.

    Errors: ValueError naming the entry, both values and the groups.
    """
    rate = chain.rate
    if rate is None or rate.transform.options.get("split_groups", True):
        return
    held = [(i, group) for i, group in enumerate(groups) if group["params"]]
    for name, (key, index) in rate.hyper.items() if len(held) > 1 else ():
        (first, start), *others = held
        expected = _value(name, start, key, index)
        for number, group in others:
            value = _value(name, group, key, index)
            if value == expected:
                continue
            if name != "betas":
                raise ValueError(
                    f"{key}={value!r} of parameter group {number}, but {expected!r} of group {first}: "
                    "the groups share one d, which is estimated with one of them; give both the same, "
                    "or pass split_groups=True for a d of each"
                )
            if "beta3" not in rate.hyper:
                warn(
                    f"{key}={group[key]!r} of parameter group {number}, but {start[key]!r} of group "
                    f"{first}: the estimate of their one d decays with the square root of {expected!r} "
                    "for both; give a beta3, or pass split_groups=True"
                )


def _value(name: str, group: Mapping[str, Any], key: str, index: int | None) -> Any:
    value = group[key] if index is None else group[key][index]
    return value[1] if name == "betas" else value


def warn_of_half(chain: Chain, params: Mapping[Tensor, str]) -> None:
    """Say that float16 weights do not follow the small steps that a d begins with.

    params: parameters that come to the optimizer, with what to call them.
    """
    if chain.rate is None or chain.storage.param is not None:
        return
    halves = [label for param, label in params.items() if param.dtype == torch.float16]
    if halves:
        more = f" and {len(halves) - 1} more" if len(halves) > 1 else ""
        warn(
            f"{halves[0]}{more} in float16: the first steps of {chain.rate.transform.name} are lost in "
            "the rounding of such weights, so that d may stay at d0 for good; use float32 or bfloat16 "
            "weights, or param_ecc='fp16+8'"
        )
