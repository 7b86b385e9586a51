"""The tables of `heavyball replay`: what each element gave in the steps of a file, and gives now."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from heavyball.core.text import parse_chain
from heavyball.errors import REFUSALS, RaceError, one_line, unknown
from heavyball.optim.flight import Flight, read, replayed
from heavyball.optim.optimizer import ChainOpt

COLUMNS = ("step", "element", "rms", "largest", "not finite", "computed again")
# So many parameters are shown where none was asked for.
SHOWN = 4


def tables(path: Path, wanted: Sequence[str] = ()) -> Iterator[Any]:
    """What is printed of a file.

    Errors: RaceError where it cannot be read, is none, or has no such parameter.
    """
    try:
        flight = read(path)
    except (OSError, ValueError) as error:
        raise RaceError(one_line(error)) from None
    for name in wanted:
        if name not in flight.names.values():
            raise RaceError(unknown("parameter", name, flight.names.values()))
    yield Text(f"step {flight.count} of {flight.chain}")
    yield Text(f"abnormal changes: {', '.join(flight.wrong)}")
    again, reason = _again(flight)
    if reason:
        yield Text(f"not computed again: {reason}")
    chosen = wanted or flight.wrong[:SHOWN]
    for number, name in flight.names.items():
        if name in chosen:
            yield _table(flight, number, name, again)


def _again(flight: Flight) -> tuple[list[list[Any]], str]:
    """The outputs of each step, computed again; or none, and why."""
    try:
        elements = parse_chain(flight.elements)
        return [replayed(ChainOpt, elements, s, flight.options) for s in flight.steps], ""
    except REFUSALS as error:  # a chain of a user's own transforms, above all
        return [[] for _ in flight.steps], one_line(error)


def _table(flight: Flight, number: int, name: str, again: list[list[Any]]) -> Table:
    shape = tuple(flight.steps[-1]["params"][number].shape)
    table = Table(*COLUMNS, title=f"{name} {shape}", box=box.SIMPLE_HEAD, title_justify="left")
    first = flight.count - len(flight.steps) + 1
    for place, (step, found) in enumerate(zip(flight.steps, again, strict=True)):
        when = str(first + place)
        for what in ("params", "grads"):
            if number in step[what]:
                table.add_row(when, what[:-1], *_measured(step[what][number]), "")
        mine = [(key, tensor) for n, key, tensor in step["outputs"] if n == number]
        theirs = [tensor for n, _, tensor in found if n == number]
        for i, (key, tensor) in enumerate(mine):
            table.add_row(when, key, *_measured(tensor), _compared(tensor, theirs[i : i + 1]))
    return table


def _measured(tensor: Tensor) -> tuple[str, str, str]:
    values = tensor.double()
    wrong = int((~values.isfinite()).sum())
    if not values.numel():
        return "", "", "0"
    rms = float(values.square().mean().sqrt())
    return f"{rms:.4g}", f"{float(values.abs().amax()):.4g}", str(wrong)


def _compared(tensor: Tensor, again: Sequence[Tensor]) -> str:
    if not again:
        return ""
    if tensor.shape == again[0].shape and torch.equal(tensor.nan_to_num(), again[0].nan_to_num()):
        return "the same"
    return f"differs by {float((tensor - again[0]).double().abs().amax()):.3g}"
