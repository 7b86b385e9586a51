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
PLACED = {"before_state", "requires", "opens_once", "instead"}
OWN = {
    C.transform: {"kind", "modifier", "over_all", "evaluate", "perturb", "offers", *PLACED},
    C.whole_transform: {"kind", "opaque", "host", "after", "due", "lead", "noise_every",
                        "inner_shape", "fed_numbers", "perturb", "perturb_every", "rounds", *PLACED},
    C.rate: {
        "numbers", "past", "made_from", "from_sums", "gives", "finish", "moment_unit",
        "moment_change", "hyper_change", "estimate", "kind", "shared",
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
    for names in OWN.values():
        for name in names - OWN[decorator] - PLACED - {"estimate"}:
            if name in ("moment_unit", "moment_change", "hyper_change"):
                continue
            with pytest.raises(TypeError, match=rf"{name}=.*belongs to @"):
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
    made = C.rate(
        numbers={"d": 1.0}, finish=lambda m, o: [], gives=("a",), hyper_change={"eps": "change"}
    )
    with pytest.raises(TypeError, match=r"'change' changes a unit, but provides=\('lr',\)"):
        made(found)


# ---- the core names no transform and no hyper-parameter of one

# what an optimizer has itself
OPTIMIZERS = {"lr", "base_lr", "step", "param", "grad", "seed", "weight_decay", "weights", "start"}
# the core's own words: gates, what a state holds, operations, and what arguments of torch are called
WORDS = {
    "gate", "square", "squares", "beta", "graft", "lerp", "load", "sign", "alpha", "maximize",
    "amsgrad", "nesterov", "centered", "decay", "every", "norm", "rho", "shared", "name", "largest",
    "scale", "floor", "second_moment", "signal",
}  # fmt: skip
# names of checkpoints of before, what to write in place of an argument or a call of torch's, and what
# an element asks of the optimizer
EXCEPT = (
    "optim/flight.py",
    "optim/migrations.py",
    "optim/checks.py: nesterov_momentum",
    "optim/outer_clip.py",
)


def strings(path: Path) -> Iterator[str]:
    """Every string of a file, docstrings excepted."""
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
            yield node.value


def names_of_transforms() -> set[str]:
    """Of transforms, their states, hyper-parameters and numbers, and what they provide."""
    names = set(C.TRANSFORMS)
    for t in C.TRANSFORMS.values():
        names |= {*t.provides, *t.states, *t.defaults}
        names |= set(t.numbers) if isinstance(t, C.Rate) else set()
    return {name for name in names - OPTIMIZERS - WORDS if len(name) > 1 or name == "d"}


@pytest.mark.parametrize("folder", ["core", "runtime", "compiler", "optim", "state", "numerics"])
def test_the_core_names_no_transform_and_nothing_of_one(folder: str) -> None:
    """Names of several words anywhere in a string; others where they are all of it, as keys are."""
    names = names_of_transforms()
    assert {"d", "d_step", "eps", "split_groups", "decayed", "unit_change"} <= names
    found = set()
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        for text in strings(path):
            said = {word for word in re.findall(r"[A-Za-z_]\w*", text) if "_" in word}
            # in the text of kernels, `s` and `row` are variables
            said |= {text} if not place.startswith(("compiler/cpp", "compiler/triton")) else set()
            found |= {f"{place}: {word}" for word in said & names}
    assert not {f for f in found if not f.startswith(EXCEPT)}


def test_a_chain_is_completed_with_what_says_so() -> None:
    assert {kind: t.name for kind, t in DEFAULTS.items()} == {
        "decay": "decoupled",
        "writer": "descend",
    }
