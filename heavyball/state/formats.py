"""The options for storage formats of state and parameters."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.errors import nearest
from heavyball.state import four_bit, rank_one
from heavyball.state.declare import State

# Smaller tensors are not worth a coarse format.
SMALLEST = 4096


@dataclass(frozen=True)
class Format:
    """One way to store a tensor: the dtype of the main tensor, and of its companions if it has any.

    correction: the dtype of the correction of a 16-bit value. scale: the dtype of the scales of codes.
    square: the dtype of codes of means of squares, if it differs. coarse: for formats that are only
    for means of gradients and of squares, how coarse they are. fits: whether a tensor may have this
    number of elements.
    """

    name: str
    dtype: torch.dtype
    correction: torch.dtype | None = None
    scale: torch.dtype | None = None
    square: torch.dtype | None = None
    coarse: str | None = None
    fits: Callable[[int], bool] = bool

    def suits(self, numel: int) -> bool:
        """Whether a tensor with this number of elements is stored in this format."""
        return self.coarse is None or (numel >= SMALLEST and self.fits(numel))


DTYPES = {
    "float32": Format("float32", torch.float32),
    "bfloat16": Format("bfloat16", torch.bfloat16),
    "float16": Format("float16", torch.float16),
    "8bit": Format(
        "8bit",
        torch.int8,
        scale=torch.bfloat16,
        square=torch.uint8,
        coarse="has steps of about 1/100 of the largest of 32 neighbours",
    ),
    "4bit": Format(
        "4bit",
        torch.uint8,
        scale=torch.float32,
        coarse="has steps of up to 1/4 of the largest of 128 neighbours",
        fits=four_bit.fits,
    ),
    "rank1": Format(
        "rank1",
        torch.float32,
        coarse="stores row and column sums instead of single values",
        fits=rank_one.fits,
    ),
}
# What is rounded stochastically.
ROUNDED = ("bfloat16", "8bit", "4bit")
ECC = {
    "bf16+8": Format("bf16+8", torch.bfloat16, torch.int8),
    "bf16+16": Format("bf16+16", torch.bfloat16, torch.int16),
    "fp16+8": Format("fp16+8", torch.float16, torch.int8),
    "fp16+16": Format("fp16+16", torch.float16, torch.int16),
}
Choice = str | torch.dtype | Mapping[str, str | torch.dtype] | None


def _format(option: str, value: Any, known: Mapping[str, Format]) -> Format:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str):
        raise TypeError(f"{option}={value!r}: expected one of {', '.join(known)}")
    if value not in known:
        raise ValueError(f"{option}={value!r}; {nearest(value, known)}")
    return known[value]


def _choices(option: str, value: Choice, known: Mapping[str, Format]) -> dict[str | None, Format]:
    """Formats by the name of the state, that for all others under None."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {name: _format(f"{option}[{name!r}]", v, known) for name, v in value.items()}
    return {None: _format(option, value, known)}


@dataclass(frozen=True)
class Storage:
    """The formats that an optimizer was asked for.

    storage_dtype, ecc: what `DTYPES` and `ECC` name, for every state or by the state's name or key.
    param_ecc: the same as `ecc`, for the parameters.
    """

    storage_dtype: Choice = None
    ecc: Choice = None
    param_ecc: str | None = None
    _options: dict[str, dict[str | None, Format]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        options = {
            "storage_dtype": _choices("storage_dtype", self.storage_dtype, DTYPES),
            "ecc": _choices("ecc", self.ecc, ECC),
        }
        object.__setattr__(self, "_options", options)
        if self.param_ecc is not None:
            _format("param_ecc", self.param_ecc, ECC)

    @property
    def param(self) -> Format | None:
        """The format of the parameters, if it is not their own dtype."""
        return None if self.param_ecc is None else ECC[self.param_ecc]

    @property
    def is_random(self) -> bool:
        """Whether some state may be rounded stochastically."""
        formats = (f for option in self._options.values() for f in option.values())
        return any(f.name in ROUNDED for f in formats)

    def check(self, states: Iterable[tuple[str, str, State]]) -> None:
        """Refuse formats that these states (key, name, declaration) cannot have.

        Errors: ValueError for a name that no state has, listing those that there are, for two
            formats of one state, and for weights in a coarse format.
        """
        states = list(states)
        known = {k: None for key, name, s in states if not s.is_number for k in (name, key)}
        numbers = {k for key, name, s in states if s.is_number for k in (name, key)} - known.keys()
        for option, chosen in self._options.items():
            for name in chosen.keys() - {None}:
                if name in numbers:
                    raise ValueError(
                        f"{option}: {name!r} is one number per parameter, which stays float64"
                    )
                if name not in known:
                    raise ValueError(
                        f"{option}: there is no state {name!r}; {nearest(str(name), known)}"
                    )
        for key, name, declared in states:
            self.choose(key, name, declared)

    def choose(self, key: str, name: str, declared: State) -> tuple[Format | None, bool]:
        """The format of a state by its names, and whether it was selected by name."""
        if declared.is_number:
            return None, False
        for place in (key, name, None):
            found = {o: chosen[place] for o, chosen in self._options.items() if place in chosen}
            if len(found) > 1:
                both = " and ".join(f"{o}={f.name!r}" for o, f in found.items())
                raise ValueError(f"{key}: {both} both apply; pass one of them by the state's name")
            for option, chosen in found.items():
                if chosen.coarse and declared.holds not in ("moment", "square"):
                    if place is None:
                        return None, False
                    raise ValueError(
                        f"{option}: {key!r} cannot be stored as {chosen.name!r}, which {chosen.coarse}: "
                        "sufficient for means of gradients and of squares, too coarse for weights and "
                        "other values"
                    )
                return chosen, place is not None
        return None, False

    def format_of(
        self, key: str, name: str, declared: State, shape: torch.Size, param: torch.Size
    ) -> Format | None:
        """The format of a state of this shape; None keeps it in the dtype of the mathematics.

        A format for all states is for those of the parameter's shape. Others, such as means over rows
        and the factors of a preconditioner, are small or delicate, and stay unless they are named.
        Coarse formats are for means of gradients and of squares with at least 4096 elements; in 4 bits
        these must be whole blocks of 128, and for a format of rank one no prime number.
        """
        chosen, by_name = self.choose(key, name, declared)
        if chosen is None or not chosen.suits(shape.numel()):
            return None
        # the factors of a square matrix have its shape
        return chosen if by_name or (shape == param and not declared.several) else None

    def check_param(self, label: str, param: Tensor) -> None:
        """Refuse a parameter that `param_ecc` is not for."""
        if self.param is not None and param.dtype != self.param.dtype:
            raise ValueError(
                f"{label} is {param.dtype}, param_ecc={self.param_ecc!r} is for parameters of "
                f"{self.param.dtype}"
            )
