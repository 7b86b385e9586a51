"""`heavyball plan`: how much memory optimizers take for an architecture."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from heavyball.diagnostics.report import readable_bytes
from heavyball.errors import REFUSALS, RaceError, one_line, warn
from heavyball.memory import MemoryPlan, memory_plan
from heavyball.presets import PRESETS
from heavyball.race.shapes import architecture

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def plans(
    texts: Sequence[str], model: str, dtype: str, options: dict[str, Any]
) -> dict[str, MemoryPlan]:
    """The plan of each optimizer or chain; of all presets where none is named.

    Errors: RaceError naming what cannot be planned.
    """
    params = architecture(model, DTYPES[dtype])
    found, left = {}, []
    for text in texts or PRESETS:
        try:
            found[text] = memory_plan(params, text, **options)
        except REFUSALS as error:
            message = f"{text}: {one_line(error)}"
            if texts:
                raise RaceError(message) from None
            left.append(message)
    if not found:
        raise RaceError(left[0])
    for message in left:
        warn(f"left out {message}", UserWarning)
    return found


def tables(found: dict[str, MemoryPlan], model: str, dtype: str) -> Iterator[Table]:
    """One row for each optimizer; if there is just one, its transforms and largest parameters too."""
    plan = next(iter(found.values()))
    size = f"{plan.elements:,} elements in {len(plan.parameters):,} {dtype} parameters"
    table = Table(title=f"{model}: {size}", title_justify="left")
    table.add_column("optimizer", overflow="fold", min_width=14)
    for head in (
        "state",
        "bytes per\nelement",
        "in evaluation\nmode",
        "weights, gradients\nand state",
    ):
        table.add_column(head, justify="right")
    for text, plan in sorted(found.items(), key=lambda item: item[1].state_bytes):
        total = plan.parameter_bytes + plan.gradient_bytes + plan.state_bytes
        extra = f"+ {readable_bytes(plan.evaluation_bytes)}" if plan.evaluation_bytes else "-"
        each = f"{plan.state_bytes / plan.elements:.3f}"
        cells = [readable_bytes(plan.state_bytes), each, extra, readable_bytes(total)]
        table.add_row(*map(Text, (text, *cells)))
    yield table
    if len(found) == 1:
        yield from _details(plan)


def _details(plan: MemoryPlan) -> Iterator[Table]:
    table = Table(title=plan.chain, title_justify="left")
    table.add_column("transform")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    for key, count in plan.per_transform.items():
        table.add_row(Text(key), f"{count:,}", readable_bytes(count))
    table.add_section()
    table.add_row("all", f"{plan.state_bytes:,}", readable_bytes(plan.state_bytes))
    yield table
    table = Table(title="the largest of each shape", title_justify="left")
    for head in ("count", "shape", "bytes each", "like"):
        table.add_column(head, justify="left" if head in ("shape", "like") else "right")
    kinds: dict[tuple, list[str]] = {}
    for p in sorted(plan.parameters, key=lambda p: -p.state_bytes):
        kinds.setdefault((p.shape, p.state_bytes), []).append(p.name)
    for (shape, count), names in list(kinds.items())[:12]:
        table.add_row(str(len(names)), str(shape), f"{count:,}", Text(names[0]))
    yield table
