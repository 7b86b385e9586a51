"""Callbacks for training frameworks, which heavyball does not install."""

from collections.abc import Iterable, Iterator
from typing import Any

from heavyball.optim.optimizer import ChainOpt


def averaging(optimizers: Any) -> Iterator[ChainOpt]:
    """The optimizers that evaluate at an average, unwrapped."""
    several = optimizers if isinstance(optimizers, Iterable) else [optimizers]
    for opt in several:
        found = unwrapped(opt)
        if found is not None and "train_mode" in found.defaults:
            yield found


def unwrapped(opt: Any) -> ChainOpt | None:
    """The heavyball optimizer inside a framework's wrapper, if it is one."""
    for _ in range(8):  # accelerate, Lightning and others hold it as `optimizer`
        if opt is None or isinstance(opt, ChainOpt):
            return opt
        opt = getattr(opt, "optimizer", None)
    return None


def plain_metrics(optimizers: Any, prefix: str) -> dict[str, float]:
    """The metrics of several optimizers as plain numbers; synchronizes with the device."""
    several = optimizers if isinstance(optimizers, Iterable) else [optimizers]
    found = [opt for opt in map(unwrapped, several) if opt is not None]
    made: dict[str, float] = {}
    for number, opt in enumerate(found):
        place = f"{prefix}{number}/" if len(found) > 1 else prefix
        made |= {f"{place}{name}": value.item() for name, value in opt.metrics().items()}
    return made
