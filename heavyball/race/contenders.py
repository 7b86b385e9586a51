"""Who races: a preset, an optimizer of torch, or a chain, at each learning rate of its grid."""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heavyball.core.schedule import Schedule
from heavyball.core.text import parse_chain, parse_optimizer, split_chain
from heavyball.errors import REFUSALS, ChainError, RaceError, one_line, unknown
from heavyball.optim.optimizer import ChainOpt
from heavyball.optim.scheduling import base_and_schedule
from heavyball.recipes import find

# The learning rate of a chain when no grid is given: that of torch's AdamW.
CHAIN_LR = 1e-3


@dataclass(frozen=True)
class Contender:
    """One line of the result: how it is called, what it is, and the learning rates it tries."""

    label: str
    kind: Literal["optimizer", "chain"]
    text: str
    lrs: tuple[float, ...]

    def build(
        self, model: nn.Module, lr: float, weight_decay: float | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer for a model.

        Errors: RaceError with the contender's label and the reason of the refusal.
        """
        try:
            if self.kind == "chain":
                return _chain_optimizer(self.text, model, lr, weight_decay)
            return _named_optimizer(self.text, model, lr, weight_decay)
        except RaceError as error:
            raise type(error)(f"{self.label}: {error}") from None
        except REFUSALS as error:
            raise RaceError(f"{self.label} cannot be built: {one_line(error)}") from None


def reads_loss(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps must be told the loss."""
    return isinstance(optimizer, ChainOpt) and optimizer.chain.reads_loss


def perturbs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps need a closure, for a second gradient."""
    return isinstance(optimizer, ChainOpt) and optimizer.chain.perturbs


def from_optimizer(text: str, grid: Sequence[float] = ()) -> Contender:
    """`NAME[:arg=value,...]`; an lr of its own (a number or a tuple) goes before the grid.

    The grid is of the peaks where lr is a schedule, whose own peak is tried where there is no grid.

    Errors: RaceError for an unknown name or argument, with the nearest known ones.
    """
    name, options = parse_optimizer(text)
    parameters = inspect.signature(find_optimizer(name)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not open_ended:
            raise RaceError(f"{name}: {unknown('argument', option, list(parameters)[1:])}")
    own = options.pop("lr", tuple(grid) or parameters["lr"].default)
    if isinstance(own, Schedule):
        options = {"lr": own, **options}
        own = tuple(grid) or base_and_schedule(own)[0]
    label = ", ".join([name, *(f"{key}={value!r}" for key, value in options.items())])
    return Contender(label, "optimizer", text, _learning_rates(name, own))


def from_chain(text: str, grid: Sequence[float] = (), label: str = "") -> Contender:
    """A chain; at `CHAIN_LR` where there is no grid.

    Errors: ChainError if the text is not a chain.
    """
    parse_chain(text)
    label = label or _shown(text)
    return Contender(label, "chain", text, _learning_rates(label, tuple(grid) or CHAIN_LR))


def from_recipe(name: str, grid: Sequence[float] = ()) -> Contender:
    """A recipe by its name; at its own learning rate where there is no grid.

    Errors: RaceError for an unknown name, with the nearest.
    """
    recipe = find(name)
    kind: Literal["optimizer", "chain"] = "chain" if recipe.is_chain else "optimizer"
    return Contender(name, kind, recipe.text, tuple(grid) or (recipe.lr,))


def ablations(text: str, grid: Sequence[float] = ()) -> list[Contender]:
    """The chain, and for each of its elements the chain without it.

    Whether a shortened chain can be built is not known here.
    """
    contenders = [from_chain(text, grid, "the full chain")]
    pieces = split_chain(text)
    for position, piece in enumerate(pieces):
        rest = " | ".join(pieces[:position] + pieces[position + 1 :])
        label = f"without {_shown(piece)}"
        if pieces.count(piece) > 1:
            label += f" (element {position + 1})"
        contenders.append(Contender(label, "chain", rest, contenders[0].lrs))
    return contenders


def distinct(contenders: Iterable[Contender]) -> list[Contender]:
    """The contenders, each called otherwise; those that differ only in `lr` by their whole text.

    Errors: RaceError with the text that is there twice.
    """
    contenders = list(contenders)
    count = Counter(c.label for c in contenders)
    named = [replace(c, label=_shown(c.text)) if count[c.label] > 1 else c for c in contenders]
    count = Counter(c.label for c in named)
    for label, times in count.items():
        if times > 1:
            raise RaceError(f"{label!r} is given twice")
    return named


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of a preset, or of `torch.NAME`.

    Errors: RaceError with the nearest names.
    """
    known = {**presets(), **{f"torch.{n}": c for n, c in torch_optimizers().items()}}
    if name not in known:
        raise RaceError(unknown("optimizer", name, known))
    return known[name]


def presets() -> dict[str, type[torch.optim.Optimizer]]:
    """The presets of heavyball by name."""
    from heavyball.presets import ALL_PRESETS

    return dict(ALL_PRESETS)


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers of torch that have a learning rate."""
    found = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c)}
    return {
        name: cls
        for name, cls in found.items()
        if issubclass(cls, torch.optim.Optimizer) and "lr" in inspect.signature(cls).parameters
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all state tensors."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    return sum(_bytes(state) for state in optimizer.state.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    return sum(_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def _chain_optimizer(
    text: str, model: nn.Module, lr: float, weight_decay: float | None
) -> torch.optim.Optimizer:
    from heavyball import chainable

    if not text:
        raise ChainError("nothing is left of the chain")
    elements = parse_chain(text)
    named = list(model.named_parameters())
    return chainable.ChainOpt(named, lr, *elements, weight_decay=weight_decay or 0.0)


def _named_optimizer(
    text: str, model: nn.Module, lr: float, weight_decay: float | None
) -> torch.optim.Optimizer:
    name, options = parse_optimizer(text)
    cls = find_optimizer(name)
    if weight_decay is not None and "weight_decay" in inspect.signature(cls).parameters:
        options = {"weight_decay": weight_decay, **options}
    schedule = options.get("lr")
    rate = schedule.with_peak(lr) if isinstance(schedule, Schedule) else lr
    return cls(list(model.named_parameters()), **{**options, "lr": rate})


def _learning_rates(owner: str, value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, tuple) else (value,)
    for lr in values:
        if isinstance(lr, bool) or not isinstance(lr, int | float):
            raise RaceError(f"{owner}: lr={lr!r}: expected a number; give one with --lr")
        if not (math.isfinite(lr) and lr > 0):
            raise RaceError(f"{owner}: lr={lr!r}: expected a finite number above 0")
    if not values:
        raise RaceError(f"{owner}: the grid of learning rates is empty")
    return tuple(dict.fromkeys(float(lr) for lr in values))


def _shown(text: str) -> str:
    return " ".join(text.split())
