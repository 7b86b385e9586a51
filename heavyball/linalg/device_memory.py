"""Warns about state that would fill the memory, before it is allocated."""

import os

import torch
from torch import Tensor

from heavyball.errors import warn

# More than this share of a device's memory for the preconditioner of one tensor is worth a warning.
SHARE = 0.25


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def warn_if_large(name: str, param: Tensor, size: int, advice: str) -> None:
    """Warn when a tensor's preconditioner would take more than `SHARE` of its device's memory."""
    memory = memory_of(param.device)
    if memory is None or size <= SHARE * memory:
        return
    warn(
        f"{name}: the preconditioner of a parameter of shape {tuple(param.shape)} takes "
        f"{size / 2**30:.1f} GiB, more than {SHARE:.0%} of the {memory / 2**30:.1f} GiB of "
        f"{param.device}: {advice}",
        UserWarning,
    )
