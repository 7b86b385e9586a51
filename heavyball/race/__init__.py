"""The command `heavyball`: benchmark optimizers against each other, and inspect chains."""

import importlib.util
import sys

EXTRAS = {
    "click": "click",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}


def main() -> None:
    """Run the command line; exit with code 2 if one of its libraries is not installed."""
    missing = [name for module, name in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        text = f"heavyball: {', '.join(missing)} not installed; pip install {' '.join(missing)}"
        print(text, file=sys.stderr)
        raise SystemExit(2)
    from heavyball.race.cli import cli

    cli(prog_name="heavyball")


__all__ = ["main"]
