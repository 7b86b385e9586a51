"""Each file needs its framework, and is collected where that is installed."""

import importlib.util

collect_ignore = [
    f"test_{name}.py"
    for name in ("transformers", "lightning")
    if importlib.util.find_spec(name) is None
]
