"""Process-wide settings."""

from typing import Any

import torch

from heavyball.errors import no_attribute

__all__ = ["compile_mode", "set_torch", "zeroth_power_mode"]

# None runs every optimizer of the process without compiled kernels, whatever its `compile` says.
compile_mode: str | None = "auto"

# How SOAP's presets and `soap_precond` refresh a basis where they are not told: "qr", "newtonschulz",
# "svd" or "eigh", see `heavyball.linalg.eigenbasis.refreshed`; "newtonschulz5" makes so many steps.
# It counts for chains that are built after it is set.
zeroth_power_mode: str = "qr"


def set_torch() -> dict[str, tuple[Any, Any]]:
    """Enable torch's fast modes for float32 matrix products.

    Sets torch.set_float32_matmul_precision("high") (TF32 or bf16 passes where the hardware has them),
    torch.backends.opt_einsum.strategy = "auto-hq" (better contraction orders), and
    torch.backends.cudnn.benchmark = True (measures convolution algorithms), the last unless
    determinism was requested with torch.use_deterministic_algorithms or cudnn.deterministic.

    Returns the settings that changed, name: (before, after).
    """
    changed: dict[str, tuple[Any, Any]] = {}

    def note(name: str, before: Any, after: Any) -> bool:
        if before != after:
            changed[name] = before, after
        return before != after

    if note("float32_matmul_precision", torch.get_float32_matmul_precision(), "high"):
        torch.set_float32_matmul_precision("high")
    einsum = torch.backends.opt_einsum
    if einsum.is_available() and note("opt_einsum.strategy", einsum.strategy, "auto-hq"):
        einsum.strategy = "auto-hq"
    cudnn = torch.backends.cudnn
    exact = torch.are_deterministic_algorithms_enabled() or cudnn.deterministic
    if not exact and note("cudnn.benchmark", cudnn.benchmark, True):
        cudnn.benchmark = True
    return changed


def __getattr__(name: str) -> Any:
    """The error for a name that is not there, with the nearest that is."""
    raise no_attribute(__name__, name, __all__)
