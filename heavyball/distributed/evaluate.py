"""Computes the nodes of a recorded program with torch, on what one process holds of a tensor.

It is what a kernel would compute: decisions are those of the recording, which saw the whole shape, and
counts are those of the whole tensor.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Graph, Ref, Value
from heavyball.compiler.frontend.ops import OPERATIONS
from heavyball.compiler.passes.axes import is_along
from heavyball.compiler.run.table import entry
from heavyball.distributed.recipe import Recipe, axes_of_level
from heavyball.distributed.shard import Layout
from heavyball.distributed.sums import Term
from heavyball.numerics import SCALAR, compute_dtype, working
from heavyball.runtime.job import Job
from heavyball.runtime.state import loaded, working_param


class Values:
    """The values of one parameter's graph, in one step.

    layout: how the tensors of the job lie. totals: the sums over all parameters.
    """

    def __init__(
        self, recipe: Recipe | None, job: Job, layout: Layout, totals: Mapping[str, Tensor]
    ):
        self.graph = Graph() if recipe is None else recipe.graph
        self.frees = {} if recipe is None else recipe.frees
        self.job, self.layout, self.totals = job, layout, totals
        self.dtype = compute_dtype(job.param.dtype)
        self.device = job.param.device
        self.known: dict[int, Any] = {}
        self.answers: dict[str, Any] = {}  # what whole transforms gave, by name

    def compute(self, order: Iterable[int]) -> None:
        """Compute nodes of which the arguments are known."""
        for index in order:
            self.known[index] = self._value(self.graph.values[index])
            self.forget(self.frees.get(index, ()))

    def forget(self, nodes: Iterable[int]) -> None:
        """Free values that nothing needs any more."""
        for index in nodes:
            self.known.pop(index, None)

    def element(self, index: int) -> Tensor:
        """A value with one number for each element that is here."""
        value, shape = self._tensor(index), self._shape("element")
        return value if value.shape == shape else value.to(self.dtype).expand(shape)

    def _tensor(self, index: int) -> Tensor:
        value = self.known[index]
        if isinstance(value, Tensor):
            return value.to(self.device)
        return torch.tensor(value, dtype=SCALAR, device=self.device)

    def written(self, name: str, index: int) -> Tensor:
        """A value as the tensor of this name is kept here."""
        value, level = self.known[index], self.graph.tensors.get(name)
        if level is None:
            return value
        shape = self._shape(level)
        return value if value.shape == shape else value.to(self.dtype).expand(shape)

    # ---- sums

    def term(self, index: int) -> Term:
        """What this process adds to a sum."""
        value = self.graph.values[index]
        level = self._source(value).level
        if level == "slice":
            layout = self.layout.flat(self.graph.every or 1)
            assert layout is not None
        else:
            layout = self.layout.along(axes_of_level(level, self.layout))
        kept = self.layout.along(axes_of_level(value.level, self.layout))
        term = Term(value.op, kept, self._partial(value), layout.is_first)
        self.forget(self.frees.get(index, ()))
        return term

    def take(self, index: int, total: Tensor) -> None:
        """Put a sum in its place that all processes have completed."""
        self.known[index] = self._summed(self.graph.values[index], total)

    def _source(self, value: Value) -> Value:
        return self.graph.values[value.args[0].index]

    def _partial(self, value: Value) -> Tensor:
        """The sum over what is here, in float64, with all axes kept."""
        source, index = self._source(value), value.args[0].index
        shape = self._shape(source.level)
        if source.op == "square":  # to be squared in float64
            x = self._tensor(source.args[0].index).to(SCALAR).square()
        else:
            x = self._tensor(index).to(SCALAR)
        x = x.expand(shape)
        if value.level == "scalar":
            axes = tuple(range(x.ndim))
        else:
            summed = axes_of_level(source.level, self.layout)
            axes = tuple(sorted(summed - axes_of_level(value.level, self.layout)))
        if value.op == "sum" or not x.numel():  # of no elements it is nobody's largest
            return x.sum(axes, keepdim=True)
        return x.amax(axes, keepdim=True)

    def _summed(self, value: Value, total: Tensor) -> Tensor:
        return total.reshape(()) if value.level == "scalar" else total.to(self.dtype)

    # ---- one node

    def _value(self, value: Value) -> Any:
        if value.op in ("load", "pick"):
            return self._loaded(value)
        if value.op == "const":
            return torch.full((), value.args[0], dtype=SCALAR, device=self.device)
        if value.op == "hyper":
            key, place = value.args
            return self._hyper(key, place)
        if value.op == "number":
            name = value.args[0]
            return self.answers[name] if name in self.answers else self.job.state[name]
        if value.op == "total":
            return self.totals[value.args[0]].to(self.device)
        if value.op in ("numel", "members", "slices"):
            return torch.full((), self._count(value), dtype=SCALAR, device=self.device)
        if value.op in ("sum", "amax"):
            return self._summed(value, self._partial(value))
        return self._computed(value)

    def _computed(self, value: Value) -> Tensor:
        """An operation on what is known, in the dtype of the node's level."""
        dtype = SCALAR if value.level == "scalar" else self.dtype
        operation = OPERATIONS[value.op]
        args = [
            self._argument(a, dtype if letter == "n" else torch.bool)
            for a, letter in zip(value.args, operation.takes, strict=True)
        ]
        if value.op == "to_float":
            return args[0].to(dtype)
        if value.op == "pow" and not isinstance(value.args[1], Ref):
            args[1] = value.args[1]  # squares and roots are exact
        return operation.eager(*args)

    def _argument(self, given: Any, dtype: torch.dtype) -> Tensor:
        if isinstance(given, Ref):
            known = self.known[given.index]
            return known if known.dtype == dtype else known.to(dtype)
        return torch.full((), given, dtype=dtype, device=self.device)

    def _hyper(self, key: str, place: int) -> Tensor:
        value = self.job.group[key]
        if isinstance(value, Tensor):
            return value.detach().to(self.device, SCALAR).reshape(())
        return torch.full((), entry(value, place), dtype=SCALAR, device=self.device)

    def _count(self, value: Value) -> float:
        numel = max(math.prod(self.layout.shape), 1)
        if value.op == "numel":
            return numel
        if value.op == "slices":
            return -(-numel // (self.graph.every or 1))
        before, after = (axes_of_level(level, self.layout) for level in value.args)
        return math.prod(self.layout.shape[axis] for axis in before - after)

    def _loaded(self, value: Value) -> Tensor:
        name, job = value.args[0], self.job
        if name in self.answers:
            found = self.answers[name]
        elif name == "param":
            found = working_param(job.param, job.state)
        elif name == "grad":
            found = working(job.grad).to(self.dtype)
        else:
            found = loaded(job, name)
        if value.op == "load":
            return found
        k = self.graph.every or 1
        return found.flatten()[first_of_slice(self.layout, k) :: k]

    def _shape(self, level: str) -> tuple[int, ...]:
        sizes = self.layout.mine[1]
        if level == "element":
            return sizes or (1,)
        if level == "slice":
            flat = self.layout.flat(self.graph.every or 1)
            assert flat is not None
            return flat.mine[1]
        if is_along(level):
            kept = axes_of_level(level, self.layout)
            return tuple(n if axis in kept else 1 for axis, n in enumerate(sizes))
        return ()


def first_of_slice(layout: Layout, k: int) -> int:
    """Which of the elements here is the first of every k-th of the whole tensor."""
    offset, sizes = layout.mine
    if not offset:
        return 0
    return -offset[0] * math.prod(sizes[1:]) % k
