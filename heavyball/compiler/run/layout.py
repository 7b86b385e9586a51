"""Brings tensors into the order in which a kernel walks through memory, where they lie otherwise.

A kernel counts the elements of a parameter, its gradient and its state in one order. A gradient that
lies in another order is copied before the kernel runs, a parameter that does not fill a block of memory
is copied and written back; the copies live as long as the step. State is brought in order once.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.compiler.run.table import Table
from heavyball.runtime.job import Job

Strides = tuple[int, ...]


def in_order(tensor: Tensor, strides: Strides) -> bool:
    """Whether the elements lie as with these strides; an axis of one element has no stride."""
    found = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return not tensor.is_neg() and all(a == b or n == 1 for a, b, n in found)


def orders(job: Job) -> Iterator[Strides]:
    """The orders to try: the parameter's own, without gaps; then that of a contiguous tensor."""
    own = torch.empty_like(job.param, device="meta")
    yield own.stride()
    # random bits are counted in the parameter's own order
    if not own.is_contiguous() and job.stream is None:
        yield torch.empty(job.param.shape, device="meta").stride()


def stage(job: Job, strides: Strides) -> Job:
    """The job with tensors of this order: its own ones, or new ones that are still to be filled.

    Errors: NotPrintableError for state that is no plain number per element and lies otherwise.
    """
    state = {key: _placed(key, t, job.param, strides) for key, t in job.state.items()}
    param, grad = _like(job.param, strides), _like(job.grad, strides)
    same = param is job.param and grad is job.grad
    if same and all(state[key] is t for key, t in job.state.items()):
        return job
    return dataclasses.replace(job, param=param, grad=grad, state=state)


def _like(tensor: Tensor, strides: Strides) -> Tensor:
    if in_order(tensor, strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def _placed(key: str, tensor: Tensor, param: Tensor, strides: Strides) -> Tensor:
    if tensor.shape != param.shape:
        strides = torch.empty(tensor.shape, device="meta").stride()
    if not (in_order(tensor, strides) or tensor.is_floating_point()):
        raise NotPrintableError(f"{key} of {tensor.dtype}, whose layout is not the parameter's")
    return _like(tensor, strides)


def settle(job: Job, work: Job) -> None:
    """Take over the state that was brought in order."""
    for key, tensor in work.state.items():
        if tensor is not job.state[key]:
            job.state[key] = tensor.copy_(job.state[key])


@dataclasses.dataclass(eq=False)
class Copied:
    """A parameter or a gradient, or both, that a kernel sees as copies."""

    param: Tensor
    strides: Strides
    moves: bool  # whether the parameter itself is copied
    # where the addresses go: table, row, column, and whether it is the gradient's
    cells: list[tuple[Table, int, int, bool]] = dataclasses.field(default_factory=list)
    copy: Tensor | None = None
    grad: Tensor | None = None

    def place(self, tables: list[Table], index: int) -> None:
        """Find the cells of the parameter with this number."""
        for table in tables:
            if index in table.members:
                row, leading = table.members.index(index), table.kernel.leading
                for column, name in enumerate(table.kernel.tensors, start=leading):
                    if name == "grad" or (name == "param" and self.moves):
                        self.cells.append((table, row, column, name == "grad"))

    def fill(self) -> None:
        """Make the copies of a step."""
        assert self.param.grad is not None
        self.grad = self._copy_of(self.param.grad)
        self.copy = self._copy_of(self.param.detach()) if self.moves else None
        for table, row, column, is_grad in self.cells:
            tensor = self.grad if is_grad else self.copy
            table.fixed[row, column] = tensor.data_ptr()  # type: ignore[index, union-attr]

    def _copy_of(self, tensor: Tensor) -> Tensor:
        made = _like(tensor, self.strides)
        return made if made is tensor else made.copy_(tensor)

    def finish(self) -> None:
        """Write the parameter back, and let the copies go."""
        if self.copy is not None:
            self.param.detach().copy_(self.copy)
        self.copy = self.grad = None


def copied(job: Job, work: Job) -> Copied | None:
    """What has to be copied in each step of a job; None if nothing has."""
    if work.param is job.param and work.grad is job.grad:
        return None
    moved = work.grad if work.param is job.param else work.param
    return Copied(job.param, moved.stride(), work.param is not job.param)
