"""Refuses tensors without the memory that a step would read and write.

Kernels take addresses and ask nobody what lies there, so every tensor of a step is looked at here before
tables are made of them. `compiler/run/` then notices when one has changed.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Program
from heavyball.numerics import lasting
from heavyball.runtime.meta import Remembering
from heavyball.runtime.state import PLAIN, add_missing_state
from heavyball.state.held import (
    CORRECTION,
    PARAM,
    fault,
    is_companion,
    is_packed,
    is_real,
    layout,
    main_of,
    mixture,
)

_PLAIN = Tensor.__torch_dispatch__


def check_plain(label: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements are not in memory of its own, as a DTensor's are not.

    Errors: ValueError that begins with the label.
    """
    reason = _not_plain(tensor)
    if reason is not None:
        raise ValueError(f"{label} {reason}")


def check_memory(label: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not plain, or whose memory was freed or is too small for it.

    Errors: ValueError that begins with the label.
    """
    reason = _not_plain(tensor) or _not_there(tensor)
    if reason is not None:
        raise ValueError(f"{label} {reason}")


def _not_plain(tensor: Tensor) -> str | None:
    if type(tensor).__torch_dispatch__ != _PLAIN:
        kind = type(tensor).__name__
        return f"is a {kind}, which has no memory of its own, expected a plain tensor or a DTensor"
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
        return f"is {kind}, expected a dense tensor"
    return None


def _not_there(tensor: Tensor) -> str | None:
    if tensor.is_meta or not tensor.numel():
        return None
    try:
        address, held = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return "is inside a transform of torch.func, expected a plain tensor"
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in axes)
    if not address or held < (last + 1) * tensor.element_size():
        return f"needs more memory than the {held} bytes of its storage: was it freed or resized?"
    return None


def check_state_memory(
    label: str,
    program: Program,
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """Refuse state that was replaced by what its transform could not have left there.

    Errors: ValueError that names the entry, what it is and what was expected.
    """
    expected = _expected(program, param, group)
    for key, tensor in state.items():
        if main_of(key) not in expected or not isinstance(tensor, Tensor):
            continue
        check_memory(f"{label}: its state {key!r}", tensor)
        if is_companion(key):
            continue
        shape, real = expected[key]
        reason, packed = None, is_packed(state, key)
        if (
            not packed
            and tensor.shape != shape
            and not (key in program.numbers and tensor.numel() == 1)
        ):
            reason = f"has the shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        elif key in program.numbers:
            if tensor.is_complex() or tensor.dtype == torch.bool:
                reason = f"is {tensor.dtype}, expected a real number"
        elif is_real(state, key) != real or tensor.is_complex():
            reason = f"is {tensor.dtype}, expected {'real' if real else 'whole'} numbers"
        else:
            holds = program.holds_of(key)
            reason = mixture(layout(state, key), key, holds) or fault(state, key, shape)
        if reason is not None:
            raise ValueError(f"{label}: its state {key!r} {reason}")
    if PARAM + CORRECTION in state:
        dtypes = {"": param.dtype, CORRECTION: state[PARAM + CORRECTION].dtype}
        reason = mixture(dtypes, PARAM, None)
        if reason is not None or state[PARAM + CORRECTION].shape != param.shape:
            raise ValueError(f"{label}: its state {PARAM + CORRECTION!r} does not fit it")


def _expected(
    program: Program, param: Tensor, group: Mapping[str, Any]
) -> dict[str, tuple[torch.Size, bool]]:
    """The shape of each state that a parameter can have, and whether it holds real numbers."""
    place = param.shape, param.dtype
    if place not in program.expected:
        made: dict[str, Tensor] = {}
        like = param.detach().to("meta")
        with Remembering():
            add_missing_state(program, like, group, made, all_lazy=True, storage=PLAIN)
        program.expected[place] = {
            key: (tensor.shape, is_real(made, key))
            for key, tensor in made.items()
            if not is_companion(key)
        }
    return program.expected[place]


def is_plain_number(program: Program, key: str, value: Any) -> bool:
    """Whether a number of the state was set to one of Python's or numpy's that it can be."""
    if key not in program.numbers or not isinstance(value, Real) or isinstance(value, bool):
        return False
    return math.isfinite(value) and (float(value) >= 0 or key != "step")


def check_writable(params: Iterable[Tensor]) -> None:
    """Refuse tensors that torch's operations cannot write to: inference tensors outside inference mode.

    Errors: RuntimeError that names the shape.
    """
    if torch.is_inference_mode_enabled():
        return
    for param in params:
        if param.is_inference():
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} was created inside torch.inference_mode(), "
                "so outside of it only a compiled kernel can step it: step inside, or create the "
                "parameter outside, for example with clone()"
            )


def as_usable(program: Program, state: dict[str, Tensor], device: torch.device) -> None:
    """Bring state that was given in another form into the one that is read and written."""
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.is_inference() and program.owns((key,)):
            with lasting():
                state[key] = tensor.clone()
    for key in program.numbers:
        number: Any = state.get(key)
        if is_plain_number(program, key, number):
            state[key] = torch.tensor(float(number), dtype=torch.float64, device=device)
        elif number is not None and (number.dtype != torch.float64 or number.ndim):
            state[key] = number.detach().to(torch.float64).reshape(())
