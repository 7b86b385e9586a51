"""Callbacks for frameworks; each module needs its framework, which heavyball does not install."""

from collections.abc import Iterable, Iterator
from typing import Any

from heavyball.optim.optimizer import ChainOpt


def averaging(optimizers: Any) -> Iterator[ChainOpt]:
    """Those of some optimizers that evaluate at an average, whatever has wrapped them."""
    several = optimizers if isinstance(optimizers, Iterable) else [optimizers]
    for opt in several:
        found = unwrapped(opt)
        if found is not None and "train_mode" in found.defaults:
            yield found


def unwrapped(opt: Any) -> ChainOpt | None:
    """The optimizer of heavyball that a framework has wrapped, if it is one."""
    for _ in range(8):  # accelerate, Lightning and others hold it as `optimizer`
        if opt is None or isinstance(opt, ChainOpt):
            return opt
        opt = getattr(opt, "optimizer", None)
    return None


def plain_metrics(optimizers: Any, prefix: str) -> dict[str, float]:
    """The metrics of some optimizers as plain numbers, which waits for the device."""
    several = optimizers if isinstance(optimizers, Iterable) else [optimizers]
    found = [opt for opt in map(unwrapped, several) if opt is not None]
    made: dict[str, float] = {}
    for number, opt in enumerate(found):
        place = f"{prefix}{number}/" if len(found) > 1 else prefix
        made |= {f"{place}{name}": value.item() for name, value in opt.metrics().items()}
    return made
