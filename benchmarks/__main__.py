"""`python -m benchmarks`, if its libraries are installed."""

import importlib.util

from heavyball.race import EXTRAS


def main() -> None:
    """Run the command line, or name the libraries that are missing."""
    missing = [EXTRAS[name] for name in ("click", "rich") if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not installed; pip install {' '.join(missing)}")
    from benchmarks.cli import bench

    bench(prog_name="python -m benchmarks")


if __name__ == "__main__":
    main()
