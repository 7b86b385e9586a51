"""Recordings of programs, kept: parameters of one kind need one, and plans that are made anew none.

A recording serves every shape where the program has looked at none, as kernels do. Programs with
functions of a user are recorded each time, so that these are freed with their optimizer.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Graph, NotPrintableError, Question, trace
from heavyball.compiler.passes.axes import axes_of
from heavyball.core.hyper import is_sequence
from heavyball.core.program import Program
from heavyball.numerics import compute_dtype
from heavyball.runtime.recent import Recent

MOST = 4096


@dataclass(frozen=True, eq=False)
class Recording:
    """What a program computes; nobody changes it.

    outputs: the node of each tensor that is written. looked: whether it is for one shape alone.
    cuts: the recipes that were made of it, by what they depend on.
    """

    graph: Graph
    questions: list[Question]
    outputs: dict[str, int]
    looked: bool
    cuts: dict[Any, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def key(self) -> str:
        """A text that two recordings share exactly if they compute the same."""
        graph = self.graph.copy()
        graph.outputs = dict(self.outputs)
        return graph.live().key()

    def of(self, program: Program) -> "Recording":
        """The same for another program that computes the same."""
        if not self.questions:
            return self
        nodes: dict[str, Any] = {node.key: node for node in program.flat}
        questions = [replace(q, node=nodes[q.node.key]) for q in self.questions]
        return Recording(self.graph, questions, self.outputs, self.looked, self.cuts)


_kept: dict[Any, Recording | str] = Recent(MOST)


def recorded(
    program: Program,
    shape: torch.Size,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    share: str | None = None,
) -> Recording:
    """What a program computes for a tensor of this shape, as `trace` finds it.

    Errors: NotPrintableError with the reason.
    """
    given = program, shape, dtype, state, group, share
    if not program.is_library:
        return _recorded(*given)
    keys = _keys(*given)
    found = next((_kept[key] for key in keys if key in _kept), None)
    if found is None:
        try:
            found = _recorded(*given)
            _kept[keys[found.looked]] = found
        except NotPrintableError as error:
            found = _kept[keys[1]] = str(error)
    if isinstance(found, str):
        raise NotPrintableError(found)
    return found.of(program)


def _recorded(*given: Any) -> Recording:
    recorder, tensors = trace(*given)
    outputs = recorder.written(tensors)
    return Recording(recorder.graph, recorder.questions, outputs, recorder.watch.looked)


def _keys(
    program: Program,
    shape: torch.Size,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    share: str | None,
) -> tuple[Any, Any]:
    """What a recording is kept under if it serves all shapes, and if it serves this one alone."""
    states = tuple(
        (k, t.dtype, axes_of(t.shape, shape), t.is_contiguous()) for k, t in state.items()
    )
    # sorted, since checkpoints may bring them in another order
    hypers = tuple(
        (k, group[k] is None, len(group[k]) if is_sequence(group[k]) else None)
        for k in sorted(group)
        if k != "params"
    )
    ones = tuple(n == 1 for n in shape)
    general = program.identity, ones, dtype, compute_dtype(dtype), states, hypers, share
    return general, (*general, shape, tuple(t.shape for t in state.values()))
