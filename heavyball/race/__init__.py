"""The command `heavyball`: race optimizers against each other, and take chains apart."""

import importlib.util
import sys

EXTRAS = {
    "click": "click",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}


def main() -> None:
    """Run the command line; exit with code 2 where one of its libraries is not installed."""
    missing = [name for module, name in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        text = f'heavyball: {", ".join(missing)} not installed; pip install "heavyball[race]"'
        print(text, file=sys.stderr)
        raise SystemExit(2)
    from heavyball.race.cli import cli

    cli(prog_name="heavyball")


__all__ = ["main"]
