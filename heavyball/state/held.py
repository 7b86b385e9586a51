"""How state and parameters are stored: formats with fewer bits than the computation.

A tensor with the key `exp_avg` may have companions: `exp_avg:correction` beside a 16-bit value,
`exp_avg:scale` beside codes (of bfloat16 for 8 bits, of float32 for 4), `exp_avg:columns` and
`exp_avg:signs` beside rows. What is there says how it is to be read, so the runner, kernels and
checkpoints need nothing else but, for 4 bits and rows, the shape of the values. The options in
`formats.py` choose what is made when state is created.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from heavyball.numerics import Origin, random_bits, round_stochastically, stream
from heavyball.state import four_bit, packing, rank_one
from heavyball.state.declare import Holds
from heavyball.state.formats import DTYPES, ECC, Format
from heavyball.state.packed import FourBit, RankOne

CORRECTION, SCALE, COLUMNS, SIGNS = ":correction", ":scale", ":columns", ":signs"
COMPANIONS = (CORRECTION, SCALE, COLUMNS, SIGNS)
PARAM = "param"
# Blocks of codes that are encoded at a time.
PART = 2**10


def dtypes_of(chosen: Format, holds: Holds) -> dict[str, torch.dtype]:
    """The dtypes of a tensor in this format and of its companions."""
    is_square = holds == "square"
    dtypes = {"": chosen.square if is_square and chosen.square is not None else chosen.dtype}
    if chosen.correction is not None:
        dtypes[CORRECTION] = chosen.correction
    if chosen.scale is not None:
        dtypes[SCALE] = chosen.scale
    if chosen.name == "rank1":
        dtypes[COLUMNS] = torch.float32
        if not is_square:
            dtypes[SIGNS] = torch.uint8
    return dtypes


# The dtypes of a tensor and its companions, in every format.
LAYOUTS = [dtypes_of(f, h) for f in (*ECC.values(), *DTYPES.values()) for h in get_args(Holds)]


@dataclass(frozen=True)
class Held:
    """A stored tensor with its companions."""

    main: Tensor
    correction: Tensor | None = None
    scale: Tensor | None = None
    is_root: bool = False

    def load(self, dtype: torch.dtype) -> Tensor:
        """The values, promoted to the dtype of the mathematics; integers and bools as they are."""
        value = self.main
        if self.scale is None and not value.is_floating_point():
            return value
        if self.scale is not None:
            row = packing.in_memory_order(self.main, self.main)
            decoded = packing.decode(packing.blocks(row), self.scale).view(-1)[: row.numel()]
            value = packing.from_memory_order(decoded, self.main)
        elif self.correction is not None:
            value = packing.join(self.main, self.correction)
        if self.is_root:
            value = value.to(torch.float32).square()
        return value.to(dtype)

    def store(self, value: Tensor, bits: Callable[[], Tensor] | None = None) -> None:
        """Write values; `bits` gives the random bits for stochastic rounding."""
        if self.scale is None and self.main.dtype not in (torch.float16, torch.bfloat16):
            self.main.copy_(value)
            return
        value = value.to(torch.float32)
        if self.scale is not None:
            self._encode(packing.root(value) if self.is_root else value, bits)
        elif self.correction is not None:
            value = packing.root(value) if self.is_root else value
            main, correction = packing.split(value, self.main.dtype, self.correction.dtype)
            self.main.copy_(main)
            self.correction.copy_(correction)
        elif self.main.dtype == torch.float16:
            rounded = packing.nearest_root if self.is_root else _nearest_half
            self.main.copy_(rounded(value))
        elif self.main.dtype == torch.bfloat16 and bits is not None:
            self.main.copy_(round_stochastically(value, bits()))
        else:
            self.main.copy_(value)

    def _encode(self, value: Tensor, bits: Callable[[], Tensor] | None) -> None:
        assert self.scale is not None
        old = packing.blocks(packing.in_memory_order(self.main, self.main))
        new = packing.blocks(packing.in_memory_order(value, self.main))
        drawn = None
        if bits is not None:
            drawn = packing.blocks(packing.in_memory_order(bits(), self.main))
        codes = torch.empty_like(old)
        for low in range(
            0, len(new), PART
        ):  # or temporary tensors would be many times the parameter
            here = slice(low, low + PART)
            # Values that did not change must keep their bits, as where a step was skipped.
            same = (packing.decode(old[here], self.scale[here]) == new[here]).all(1)
            scale = packing.scales(new[here])
            drawn_here = None if drawn is None else drawn[here]
            made = packing.encode(new[here], scale, self.main.dtype, drawn_here)
            codes[here] = torch.where(same[:, None], old[here], made)
            self.scale[here] = torch.where(same, self.scale[here], scale)
        row = codes.view(-1)[: value.numel()]
        self.main.copy_(packing.from_memory_order(row, self.main))


def _nearest_half(value: Tensor) -> Tensor:
    return packing.nearest_finite(value, torch.float16)


def is_root(
    main: torch.dtype, holds: Holds | None, scale: torch.dtype | None = torch.bfloat16
) -> bool:
    """Whether a tensor holds the roots of its values: squares would leave the range of float16.

    scale: the dtype of its scales, if it has some.
    """
    of_codes = main == torch.uint8 and scale == torch.bfloat16
    return holds == "square" and (main == torch.float16 or of_codes)


def is_packed(state: Mapping[str, Tensor], key: str) -> bool:
    """Whether a tensor has not the shape of its values."""
    scale = state.get(key + SCALE)
    return key + COLUMNS in state or (scale is not None and scale.dtype == torch.float32)


def held(
    state: Mapping[str, Tensor], key: str, holds: Holds | None, shape: torch.Size | None = None
) -> Held | FourBit | RankOne:
    """A state tensor with its companions.

    shape: of the values, where they are packed.
    """
    main = state[key]
    correction, scale = state.get(key + CORRECTION), state.get(key + SCALE)
    if is_packed(state, key):
        assert shape is not None
        if scale is not None:
            return FourBit(main, scale, shape, holds != "square")
        return RankOne(main, state[key + COLUMNS], state.get(key + SIGNS), shape)
    return Held(main, correction, scale, is_root(main.dtype, holds))


def held_param(state: Mapping[str, Tensor], param: Tensor) -> Held:
    """A parameter with its correction, if it has one."""
    return Held(param, state.get(PARAM + CORRECTION))


def create(
    state: dict[str, Tensor], key: str, value: Tensor, chosen: Format | None, holds: Holds
) -> None:
    """Put a new tensor into a state in the format that was chosen for it; also on meta tensors."""
    if chosen is None or not value.is_floating_point():
        state[key] = value
        return
    _make(state, key, value, dtypes_of(chosen, holds))
    if not value.is_meta:
        held(state, key, holds, value.shape).store(value)


def _make(
    state: dict[str, Tensor], key: str, value: Tensor, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Make a tensor and its companions for values of a shape and an order of memory."""
    for part, shape in _shapes(dtypes, value.shape).items():
        state[key + part] = (
            torch.zeros_like(value, dtype=dtypes[part])
            if shape == value.shape
            else torch.zeros(shape, dtype=dtypes[part], device=value.device)
        )


def _shapes(
    dtypes: Mapping[str, torch.dtype], shape: torch.Size
) -> dict[str, torch.Size | tuple[int, ...]]:
    """The shapes of a tensor with these dtypes and of its companions, given that of the values."""
    count = shape.numel()
    if COLUMNS in dtypes:
        rows, columns = rank_one.sides(count)
        found = {"": (rows,), COLUMNS: (columns,), SIGNS: rank_one.sign_shape(count)}
        return {part: found[part] for part in dtypes if part in found}
    if dtypes.get(SCALE) == torch.float32:
        return {"": (count // 2,), SCALE: (count // four_bit.BLOCK,)}
    plain = {"": shape, CORRECTION: shape, SCALE: (packing.block_count(count),)}
    return {part: plain[part] for part in dtypes if part in plain}


def create_param(state: dict[str, Tensor], param: Tensor, chosen: Format | None) -> None:
    """Give a parameter its correction, at first nothing."""
    if chosen is not None and PARAM + CORRECTION not in state:
        state[PARAM + CORRECTION] = torch.zeros_like(param, dtype=chosen.correction)


def is_companion(key: str) -> bool:
    return key.endswith(COMPANIONS)


def main_of(key: str) -> str:
    """The key of the tensor that this one is or accompanies."""
    return key.split(":")[0]


def layout(state: Mapping[str, Tensor], key: str) -> dict[str, torch.dtype]:
    """The dtypes of a tensor and its companions."""
    return {part: state[key + part].dtype for part in ("", *COMPANIONS) if key + part in state}


def fault(state: Mapping[str, Tensor], key: str, shape: torch.Size) -> str | None:
    """The fault of the tensors under one key, if they cannot be read together.

    shape: of the values.
    """
    dtypes = layout(state, key)
    for part, expected in _shapes(dtypes, shape).items():
        found = tuple(state[key + part].shape)
        if found != tuple(expected):
            return f"{key + part!r} has the shape {found}, expected {tuple(expected)}"
    return None


def mixture(dtypes: Mapping[str, torch.dtype], key: str, holds: Holds | None) -> str | None:
    """The fault of the dtypes of a tensor and its companions, if no format has them."""
    if len(dtypes) > 1:
        packed_moment = COLUMNS in dtypes and holds == "moment"
        if dtypes not in LAYOUTS or (packed_moment and SIGNS not in dtypes):
            beside = ", ".join(f"{key + part!r} of {dtypes[part]}" for part in dtypes if part)
            return f"is {dtypes['']}, with {beside}: this is not a storage format"
    return None


def is_real(state: Mapping[str, Tensor], key: str) -> bool:
    """Whether a tensor stands for real numbers; a transform may have one of integers or truth values."""
    return state[key].is_floating_point() or key + SCALE in state


def recode(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    holds: Callable[[str], Holds | None],
    shapes: Callable[[str], torch.Size],
) -> None:
    """Bring every tensor of a state into the layout that `expected` has, where it is another one.

    Values round to nearest. shapes: of the values, by key.
    """
    for key in [k for k in expected if k in state and not is_companion(k)]:
        wanted, found = layout(expected, key), layout(state, key)
        if wanted == found:
            continue
        kind, shape = holds(key), shapes(key)
        wide = torch.float64 if torch.float64 in (wanted[""], found[""]) else torch.float32
        value = held(state, key, kind, shape).load(wide)
        # the order of memory is the state's own, and what has none takes the expected one
        like = value
        if is_packed(state, key) and not is_packed(expected, key):
            like = torch.empty_like(expected[key], dtype=wide, device=value.device)
        for part in COMPANIONS:
            state.pop(key + part, None)
        _make(state, key, like, wanted)
        held(state, key, kind, shape).store(value)


@functools.cache
def word_of(key: str) -> int:
    """The number that distinguishes the random stream of a state from that of its parameter, 0."""
    return 0 if key == PARAM else zlib.crc32(key.encode())


@functools.lru_cache(maxsize=65536)
def stream_of(seed: int, number: int) -> int:
    """`numerics.stream`, cached because every step needs it."""
    return stream(seed, number)


def drawing(
    like: Tensor, stream: int | None, key: str, step: Tensor, origin: Origin | None = None
) -> Callable[[], Tensor] | None:
    """Gives the bits for a tensor when they are needed; None where nothing is rounded at random.

    origin: where in a whole tensor this one lies, if it is a part of one.
    """
    if stream is None:
        return None
    return functools.partial(random_bits, like, stream ^ word_of(key), step, origin)
