"""What a declaration can say: each decorator its own, and the core nothing of any transform."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.core.transform import DEFAULTS

PACKAGE = Path(heavyball.__file__).parent
# What each decorator takes besides what all take.
OWN = {
    C.transform: {"kind", "modifier", "over_all", "evaluate", "before_state", "requires"},
    C.whole_transform: {"opaque", "host", "after", "due", "lead", "before_state", "requires"},
    C.rate: {
        "numbers", "past", "made_from", "from_sums", "gives", "finish", "moment_change",
        "hyper_change", "estimate",
    },
}  # fmt: skip
COMMON = {"provides", "domains", "excludes"}


@pytest.mark.parametrize("decorator", OWN, ids=lambda d: d.__name__)
def test_a_decorator_takes_what_its_kind_can_say(decorator: Any) -> None:
    options = inspect.signature(decorator).parameters.values()
    assert {p.name for p in options if p.kind is p.KEYWORD_ONLY} == COMMON | OWN[decorator]


@pytest.mark.parametrize("decorator", OWN, ids=lambda d: d.__name__)
def test_what_another_kind_says_is_refused_by_name(decorator: Any) -> None:
    needed = {"numbers": {"d": 1.0}, "finish": lambda members, options: [], "gives": ("x",)}
    needed = needed if decorator is C.rate else {}
    for other, names in OWN.items():
        for name in names - OWN[decorator] - {"before_state", "requires", "estimate"}:
            if name in ("moment_change", "hyper_change"):
                continue
            with pytest.raises(TypeError, match=rf"{name}=.*belongs to @{other.__name__}"):
                decorator(**needed, **{name: "x"})(lambda update: update)


def test_a_rate_is_declared_with_rate() -> None:
    with pytest.raises(TypeError, match=r"kind='rate': expected one of 'transform'.*with @rate"):
        C.transform(kind="rate")


def test_a_rate_says_where_its_sums_come_from() -> None:
    def found(update: Tensor) -> Tensor:
        return update

    for sums in ({}, {"gives": ("a",), "from_sums": found}):
        with pytest.raises(TypeError, match="found: expected sums from either"):
            C.rate(numbers={"d": 1.0}, finish=lambda members, options: [], **sums)(found)
    made = C.rate(numbers={"d": 1.0}, finish=lambda m, o: [], gives=("a",), moment_change="change")
    with pytest.raises(TypeError, match=r"'change' changes a unit, but provides=\('lr',\)"):
        made(found)


# ---- the core names no transform and no hyper-parameter of one

# what the optimizer itself has
OPTIMIZERS = {"lr", "base_lr", "step", "param", "grad", "seed", "weight_decay", "weights", "start"}
CORE = ("core", "runtime", "compiler", "optim", "state", "numerics")


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Every name in a string of a file, docstrings excepted, with its line."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            for word in re.findall(r"[A-Za-z_]\w*", node.value):
                yield node.lineno, word


def names_of_transforms() -> set[str]:
    names = set(C.TRANSFORMS)
    for t in C.TRANSFORMS.values():
        names |= {*t.provides, *t.states, *t.defaults}
        names |= set(t.numbers) if isinstance(t, C.Rate) else set()
    # words that mean what they mean in English too
    english = {name for name in names if ("_" not in name and len(name) > 3) or name in ("a", "to")}
    return names - english - OPTIMIZERS


def test_the_core_names_no_transform() -> None:
    names = names_of_transforms()
    assert {"d", "d_step", "eps", "split_groups", "unit_change"} <= names
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {word}"
        for folder in CORE
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, word in words(path)
        if word in names
    ]
    assert not found


def test_a_chain_is_completed_with_what_says_so() -> None:
    assert {kind: t.name for kind, t in DEFAULTS.items()} == {
        "decay": "decoupled",
        "writer": "descend",
    }
