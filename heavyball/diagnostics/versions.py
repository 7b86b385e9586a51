"""Which releases of torch this was tested with; a warning where another one is installed."""

import re

import torch

from heavyball.errors import warn

# the oldest that is admitted, and the newest; those between them were tried in part
TESTED = ("2.11", "2.14")


def check_torch(version: str = torch.__version__) -> None:
    """Warn of a release of torch outside of those that were tested; it is not refused."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = tuple(map(int, numbers.groups())) if numbers else None
    oldest, newest = (tuple(map(int, text.split("."))) for text in TESTED)
    if release is None or not oldest <= release <= newest:
        warn(
            f"torch {version}: heavyball was tested with torch {TESTED[0]} to {TESTED[1]}, "
            "see make test-newest",
            UserWarning,
        )
