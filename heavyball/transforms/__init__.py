"""The transforms, one idea per file. `TRANSFORMS` finds them by name."""

import importlib
import pkgutil

from heavyball.core.transform import Transform


def _collect() -> dict[str, Transform]:
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, Transform):
                found[value.name] = value
    return dict(sorted(found.items()))


TRANSFORMS = _collect()
