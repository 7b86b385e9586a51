"""`heavyball list` and `heavyball show`: the available names, and explanations of chains."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from heavyball import chainable
from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.core.program import HiddenNode
from heavyball.core.shapes import SHAPES
from heavyball.core.text import parse_optimizer
from heavyball.errors import ChainError, RaceError, unknown
from heavyball.race.contenders import (
    Contender,
    from_chain,
    from_optimizer,
    presets,
    state_bytes,
)
from heavyball.race.tasks import TASKS
from heavyball.recipes import RECIPES

# Inputs and outputs of the layer that `show` counts the state of.
EXAMPLE = 256, 128
# Headings that end the part of a docstring which says what is computed.
HEADING = re.compile(r"^(Shapes|Units|Errors|Source|Departure|Bound)s?:", re.MULTILINE)


def listing() -> Iterator[Table]:
    """A table each of presets, transforms, combinators, schedules and tasks."""
    rows = [(name, first_sentence(cls)) for name, cls in presets().items()]
    yield _table("Presets: --optimizer NAME, and torch.NAME for those of torch.optim", rows)
    rows = [(name, t.summary) for name, t in sorted(chainable.TRANSFORMS.items())]
    yield _table("Transforms: --chain 'NAME | NAME(key=value)'", rows)
    rows = [(name, first_sentence(fn)) for name, fn in chainable.COMBINATORS.items()]
    yield _table("Combinators: they take chains as arguments", rows)
    rows = [(name, first_sentence(fn)) for name, fn in SHAPES.items()]
    yield _table("Schedules: NAME(T, peak=value) in place of a number", rows)
    yield _table("Tasks: --task NAME", [(name, task.summary) for name, task in TASKS.items()])


def recipe_listing() -> Iterator[Table]:
    """A table of the recipes: description, text, learning rate and source."""
    for recipe in RECIPES.values():
        rows = [
            ("what", recipe.summary),
            ("text", recipe.text),
            ("lr", f"{recipe.lr:g}"),
            ("source", recipe.source),
        ]
        yield _table(f"{recipe.name}: --recipe {recipe.name}", rows)


def kernels(text: str) -> Iterator[str]:
    """The source of every kernel of a chain or preset, for a linear layer.

    Errors: RaceError if the chain cannot be built, or a part of it has no kernel.
    """
    contender = _find(text)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(*EXAMPLE)
        optimizer: Any = contender.build(layer, contender.lrs[0])
        layer(torch.randn(1, EXAMPLE[0])).sum().backward()
    if not isinstance(optimizer, chainable.ChainOpt):
        raise RaceError(f"{text} is not made of a chain, so it has no kernel")
    try:
        yield from optimizer.kernel_sources()
    except NotPrintableError as error:
        raise RaceError(f"{text} has no kernel: {error}") from None


def explanation(text: str) -> Group:
    """What a chain, or a preset with or without arguments, does.

    Errors: RaceError if it is neither, or cannot be built.
    """
    contender = _find(text)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(*EXAMPLE)
        optimizer: Any = contender.build(layer, contender.lrs[0])
    if not isinstance(optimizer, chainable.ChainOpt):
        raise RaceError(f"{text} is not made of a chain")
    optimizer.init_state()
    parts = [Text(contender.label, style="bold")]
    if contender.kind == "optimizer":
        parts.append(Text(first_sentence(type(optimizer))))
    chain = optimizer.chain
    parts.append(Text(f"completed: {chain!r}"))
    nodes: dict[str, Any] = {}
    for node in (n for program in chain.programs for n in program.flat):
        if not isinstance(node, HiddenNode) and (node.transform.whole or node.key not in nodes):
            nodes[node.key] = node
    for place, node in enumerate(nodes.values(), start=1):
        parts.append(_element(place, node, optimizer.state[layer.weight]))
    if len(chain.programs) > 1:
        parts.append(Text(optimizer.routing()))
    parts.append(_size(optimizer, layer))
    return Group(*(item for part in parts for item in (part, Text())))


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return paragraph or "-"


def gist(doc: str) -> str:
    """The part of a transform's docstring between its first sentence and its headings."""
    body = doc.partition("\n\n")[2]
    found = HEADING.search(body)
    return body[: found.start() if found else None].strip()


def _find(text: str) -> Contender:
    names = presets()
    try:
        if parse_optimizer(text)[0] in names:
            return from_optimizer(text)
    except ChainError:
        if ":" in text:
            raise
    try:
        return from_chain(text)
    except ChainError:
        known = [*names, *chainable.TRANSFORMS]
        if text.strip().isidentifier() and text.strip() not in chainable.COMBINATORS:
            raise RaceError(unknown("preset or transform", text.strip(), known)) from None
        raise


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(no_wrap=True, style="cyan")
    table.add_column()
    for name, summary in rows:
        table.add_row(Text(name), Text(summary))
    return table


def _element(place: int, node: Any, state: dict[str, Any]) -> Text:
    transform = node.transform
    lines = Text(f"{place}. {transform!r}", style="bold")
    for line in [transform.summary, *gist(transform.doc).splitlines()]:
        lines.append(f"\n   {line}" if line else "\n", style="not bold")
    for kind, fact in [*_states(node, state), *_options(node)]:
        lines.append(f"\n   {kind:6} ", style="not bold cyan")
        lines.append(fact, style="not bold")
    return lines


def _states(node: Any, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, rule in node.transform.all_states.items():
        key = node.state_key(name)
        several = [k for k in state if rule.several and k.startswith(f"{key}.")]
        held = [state[k] for k in (key, *several) if k in state]
        shown = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in held]
        example = f"here {' and '.join(shown)}" if held else "not held here"
        yield "state", f"{name}: {rule}; {example}"
    if not node.transform.all_states:
        yield "state", "none"


def _options(node: Any) -> Iterator[tuple[str, str]]:
    """Live hyper-parameters, which the parameter group holds, and options, which stay as they are."""
    for name, value in node.transform.hyper.items():
        key, index = node.hyper[name]
        entry = key if index is None else f"{key}[{index}]"
        where = "" if entry == name else f', in the parameter group as "{entry}"'
        yield "live", f"{name}={getattr(value, 'item', value)!r}{where}"
    for name, value in node.transform.options.items():
        yield "fixed", f"{name}={value!r}"


def _size(optimizer: torch.optim.Optimizer, layer: nn.Module) -> Text:
    total, elements = state_bytes(optimizer), sum(p.numel() for p in layer.parameters())
    shapes = " and ".join(str(tuple(p.shape)) for p in layer.parameters())
    each = f"{total / elements:.2f} bytes for each parameter element"
    return Text(f"state for float32 parameters {shapes}: {total:,} bytes, {each}")
