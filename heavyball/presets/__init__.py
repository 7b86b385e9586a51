"""Named optimizers: every public class of the modules here, unless it says that it is not `listed`."""

import importlib
import pkgutil
from typing import Any

from heavyball.errors import no_attribute
from heavyball.presets.base import CLIPPINGS, DEFAULTS, Preset, PresetOptions


def _collect() -> dict[str, type[Preset]]:
    found: dict[str, type[Preset]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in vars(module).items():
            mine = isinstance(value, type) and value.__module__ == module.__name__
            if mine and issubclass(value, Preset) and vars(value).get("listed", name[0] != "_"):
                found[name] = value
    return found


# with second names, such as DelayedPSGDKron
NAMES = _collect()
# each by its own name
ALL_PRESETS = {n: cls for n, cls in NAMES.items() if n == cls.__name__}
# those whose steps are given nothing but gradients
PRESETS = {n: cls for n, cls in ALL_PRESETS.items() if not cls.takes_inputs}

globals().update(NAMES)

__all__ = [  # noqa: PLE0604, the keys of NAMES are strings
    "CLIPPINGS",
    "DEFAULTS",
    "PRESETS",
    "Preset",
    "PresetOptions",
    *NAMES,
]


def __getattr__(name: str) -> Any:
    """The error for a name that is not there, with the nearest that is."""
    raise no_attribute(__name__, name, __all__)
