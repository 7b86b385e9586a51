"""Code of docs/frameworks.md, for the tests that run it."""

import re
from pathlib import Path

import pytest
import torch

import heavyball

PAGE = (Path(__file__).parent.parent.parent / "docs" / "frameworks.md").read_text()


def code_of(framework: str) -> str:
    """The code of a framework's paragraph."""
    (block,) = re.findall(rf"\*\*{framework}\.\*\*.*?```(?:py|yaml)\n(.*?)```", PAGE, re.DOTALL)
    return block


def recipe(framework: str, **names: object) -> dict:
    """The names that the code of a framework's paragraph defines, with those that it uses."""
    pytest.importorskip(framework.lower())
    given = {"torch": torch, "heavyball": heavyball, "C": heavyball.chainable, **names}
    exec(code_of(framework), given)
    return given
