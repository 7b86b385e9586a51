"""Who imports whom: folders stand in an order, and no two modules import each other."""

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import fresh

import heavyball

ROOT = Path(heavyball.__file__).parent
# Each of these imports only what stands behind it.
ORDER = (
    "race",
    "integrations",
    "recipes",
    "memory",
    "presets",
    "checkpoint",
    "chainable",
    "optim",
    "metrics",
    "distributed",
    "compiler",
    "diagnostics",
    "runtime",
    "transforms",
    "linalg",
    "core",
    "state",
    "numerics",
    "utils",
    "errors",
)
# Parts of a parameter are stepped and checked as parameters are; what is printed counts the parts here.
AGAINST = {("distributed", "optim"), ("diagnostics", "distributed")}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """What every module of the library says."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """What importing each module imports: not what a function imports when it is called, nor types."""
    known = modules()

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            called = isinstance(child, ast.FunctionDef | ast.Lambda)
            if not called and not (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            ):
                yield child
                yield from nodes(child)

    def named(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)

    return {
        name: {m for node in nodes(tree) for m in named(node)} & known.keys() - {name}
        for name, tree in known.items()
    }


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def level(name: str) -> int:
    return ORDER.index(name) if name else -1


def test_every_folder_stands_in_the_order() -> None:
    assert {folder(name) for name in modules()} - {""} == {*ORDER}


def test_imports_follow_the_order() -> None:
    arrows = {(folder(one), folder(other)) for one, others in imports().items() for other in others}
    # what is run as a program, and nobody imports, may use the package as users do
    against = {(a, b) for a, b in arrows if a != b and level(a) > level(b) and b}
    assert against == AGAINST
    assert len(AGAINST) <= 2
    assert {a for a, b in arrows if not b} <= {"race"}


def test_no_modules_import_each_other() -> None:
    graph = imports()
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_nobody_reads_the_private_attributes_of_an_optimizer() -> None:
    """Modules of the library ask the registry."""
    names = {"opt", "optimizer", "registry"}
    found = [
        f"{name}:{node.lineno} {ast.unparse(node)}"
        for name, tree in modules().items()
        if name != "heavyball.optim.optimizer"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
        and node.attr.startswith("_")
    ]
    assert not found


def test_without_kernels_nothing_of_the_compiler_is_imported() -> None:
    ways = itertools.product(("AdamW", "SOAP", "ProdigyPlusScheduleFree"), (False, True))
    program = f"""
import sys, torch, heavyball
for name, fused in {list(ways)}:
    weights = torch.nn.Parameter(torch.ones(3, 3))
    opt = getattr(heavyball, name)([weights], compile=False, fuse_backward=fused)
    for _ in range(2):
        weights.square().sum().backward()
        opt.step()
    opt.load_state_dict(opt.state_dict())
    print(opt.plan(), opt)
found = [name for name in sys.modules if name.startswith("heavyball.compiler")]
assert not found, found
"""
    done = fresh.run(program, warned=[("ignore", Warning)])
    assert done.returncode == 0, done.stderr
