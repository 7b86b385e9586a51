"""Runs compiled kernels over the parameters of an optimizer."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.printer import BATCH, CHUNK, SMALL
from heavyball.compiler.frontend.graph import Graph, NotPrintableError, record
from heavyball.compiler.passes import loops
from heavyball.compiler.passes.algebra import simplified
from heavyball.compiler.passes.axes import Runs
from heavyball.compiler.passes.early_stores import with_final_states
from heavyball.compiler.pipeline import Printed, print_kernel
from heavyball.compiler.recent import Recent
from heavyball.core.hyper import is_sequence
from heavyball.runtime.execute import SHARE
from heavyball.runtime.job import Job
from heavyball.runtime.step import SCALAR, compute_dtype

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not survive a fork, and a parallel region would wait for them forever.
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)


# A thread should have at least this many elements: waking one costs as much as stepping them.
GRAIN = 32768


def threads(elements: int) -> int:
    """How many threads a kernel may use for so many elements."""
    return 1 if _forked else min(torch.get_num_threads(), 1 + elements // GRAIN)


@dataclass(eq=False)
class Kernel:
    """A compiled graph: what its table and its numbers consist of, and the function itself."""

    tensors: list[str]
    numbers: list[str]
    hypers: list[tuple[str, int]]
    totals: list[str]
    values: int
    parts: int
    leading: int
    starts: Runs | None
    form: loops.Kernel
    run: Any
    # on the CPU: one walk alone, and how many values a tensor keeps between two, see `Stages`
    walk: Any = None
    kept: Any = None


FUNCTION = "run"  # what a kernel's function is called

# By source and by the names in it: two chains may print the same code for different hyper-parameters.
_kernels: dict[Any, Kernel] = Recent(4096)


def forget() -> None:
    """Look on the disk again for what the process has loaded."""
    _kernels.clear()


def build(printed: Printed) -> Kernel:
    """Compile a printed kernel, or take it from the process's or the disk's cache."""
    key = (printed.source, printed.names)
    kernel = _kernels.get(key)
    if kernel is None:
        library = toolchain.load(printed.source, FUNCTION)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        run, walk, kept = library.run, library.walk, library.kept
        run.argtypes = [pointer, size, *[pointer] * 3, size, *[pointer] * 3, ctypes.c_int]
        walk.argtypes = [*run.argtypes, size, pointer]
        kept.argtypes = [pointer]
        run.restype = walk.restype = None
        kept.restype = size
        kernel = Kernel(**described(printed), run=run, walk=walk, kept=kept)
        _kernels[key] = kernel
    return kernel


def described(printed: Printed) -> dict[str, Any]:
    """What a printed kernel's table and numbers consist of."""
    form = printed.kernel
    return {
        "tensors": [c.name for c in form.tensors],
        "numbers": form.numbers,
        "hypers": form.hypers,
        "totals": form.totals,
        "values": form.slots,
        "leading": len(form.leading),
        "starts": form.starts,
        "parts": form.parts,
        "form": form,
    }


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill a block of memory, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def check_layout(job: Job) -> None:
    """Refuse tensors that a kernel cannot walk through as flat memory."""
    param = job.param
    if param.device.type not in ("cpu", "cuda"):
        raise NotPrintableError(f"parameters on {param.device.type}")
    if not dense(param):
        raise NotPrintableError("a parameter whose elements do not fill a block of memory")
    shaped = [t for t in job.state.values() if t.shape == param.shape]
    if not all(_alike(t, param) for t in (job.grad, *shaped)):
        raise NotPrintableError("a gradient or state whose layout is not the parameter's")


def _alike(tensor: Tensor, param: Tensor) -> bool:
    strides = zip(tensor.stride(), param.stride(), param.shape, strict=True)
    return not tensor.is_neg() and all(a == b or n == 1 for a, b, n in strides)


class OrderError(Exception):
    """A kernel for contiguous tensors, and a parameter that is not."""


def printed_for(job: Job) -> tuple[dict[str | None, Printed], bool]:
    """A job's kernels, printed, and whether they are for tensors of this very shape.

    They are named by the element whose sum over all parameters they are for, and None for the step,
    which a program with whole transforms has not here.

    Errors: NotPrintableError with the reason; OrderError if contiguous tensors would have one.
    """
    param, state, program = job.param, job.state, job.program
    graphs: dict[str | None, Graph] = {}
    sized = False
    for key in (*program.total_keys, *([] if program.has_whole else [None])):
        graphs[key], looked = record(program, param.shape, param.dtype, state, job.group, key)
        sized |= looked
    dtypes = {"param": param.dtype, "grad": job.grad.dtype}
    dtypes |= {k: t.dtype for k, t in state.items()}
    if len(graphs) > 1 and None in graphs:
        compute = compute_dtype(param.dtype)
        graphs = with_final_states(graphs, program, {n for n, d in dtypes.items() if d == compute})
    return {k: _printed(job, simplified(g, program), dtypes) for k, g in graphs.items()}, sized


def _printed(job: Job, graph: Graph, dtypes: dict[str, torch.dtype]) -> Printed:
    if (graph.starts is not None or graph.every is not None) and not job.param.is_contiguous():
        raise OrderError
    return print_for(job, graph, dtypes)


def print_for(job: Job, graph: Graph, dtypes: dict[str, torch.dtype]) -> Printed:
    """Print a graph of a job's program for tensors like the job's."""
    param, random = job.param, job.stream is not None
    compute = compute_dtype(param.dtype)
    return print_kernel(graph, dtypes, compute, job.program.holds_of, random, param.device)


@dataclass(eq=False)
class Table:
    """The tensors that one kernel steps, as pointers."""

    kernel: Kernel
    members: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    grad_column: int | None = None
    fixed: Tensor | None = None
    small: int = 0
    elements: int = 0
    large: Tensor | None = None
    chunks: Tensor | None = None
    batches: Tensor | None = None
    count: int = 0
    scratch: Tensor | None = None
    parts: Tensor | None = None
    shares: Tensor | None = None

    def finish(self) -> None:
        """Order the rows, small tensors first, and cut the large ones into chunks."""
        order = sorted(range(len(self.rows)), key=lambda i: self.rows[i][0] > SMALL)
        self.members = [self.members[i] for i in order]
        self.rows = [self.rows[i] for i in order]
        self.elements = sum(row[0] for row in self.rows)
        self.small = sum(row[0] <= SMALL for row in self.rows)
        large: list[tuple[int, ...]] = []
        chunks: list[tuple[int, ...]] = []
        flat = self.kernel.starts is None
        for index in range(self.small, len(self.rows) if flat else self.small):
            size, first = self.rows[index][0], len(chunks)
            for low in range(0, size, CHUNK):
                chunks.append((index, low, min(low + CHUNK, size), len(large)))
            large.append((index, first, len(chunks)))
        batches = _batches(large, chunks) if flat else []
        self.count = len(batches) if flat else len(self.rows) - self.small
        self.give_shares_room(torch.device("cpu"))
        self.fixed = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
        self.large = torch.tensor(large, dtype=torch.int64, device="cpu")
        self.chunks = torch.tensor(chunks, dtype=torch.int64, device="cpu")
        self.batches = torch.tensor(batches, dtype=torch.int64, device="cpu")
        self.scratch = torch.empty(
            len(large) * self.kernel.values, dtype=torch.float64, device="cpu"
        )
        self.parts = torch.empty(len(chunks) * self.kernel.parts, dtype=torch.float64, device="cpu")

    def give_shares_room(self, device: torch.device) -> None:
        """Make the memory in which each tensor leaves its shares of sums over all parameters."""
        numbers = self.kernel.numbers
        # the place of a share is the end of its name
        names = sorted((n for n in numbers if n.startswith(SHARE)), key=place_of)
        if names:
            self.shares = torch.zeros(len(self.rows), len(names), dtype=SCALAR, device=device)
            first = self.kernel.leading + len(self.kernel.tensors)
            for index, row in enumerate(self.rows):
                for place, name in enumerate(names):
                    row[first + numbers.index(name)] = self.shares[index, place].data_ptr()

    def found_shares(self) -> dict[int, list[float]]:
        """The shares that the last launch has left, by the numbers of the jobs."""
        if self.shares is None:
            return {}
        return dict(zip(self.members, self.shares.tolist(), strict=True))

    def step(self, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, Tensor]) -> None:
        """Run the kernel with the groups' present values and the sums over all parameters."""
        sums = {key: totals[key].item() for key in self.kernel.totals}
        self.launch(hyper_values(self.kernel, groups, sums))

    def launch(self, hyper: Tensor) -> None:
        """Run the kernel over the table."""
        self.kernel.run(*self.arguments(hyper), threads(self.elements))

    def arguments(self, hyper: Tensor) -> tuple[int, ...]:
        """What the kernel is called with, but for the number of threads."""
        return (
            self.fixed.data_ptr(),  # type: ignore[union-attr]
            self.small,
            self.large.data_ptr(),  # type: ignore[union-attr]
            self.chunks.data_ptr(),  # type: ignore[union-attr]
            self.batches.data_ptr(),  # type: ignore[union-attr]
            self.count,
            hyper.data_ptr(),
            self.scratch.data_ptr(),  # type: ignore[union-attr]
            self.parts.data_ptr(),  # type: ignore[union-attr]
        )


def place_of(name: str) -> int:
    return int(name.rsplit(":", 1)[1])


def _batches(large: list[tuple[int, ...]], chunks: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Runs of large tensors that take their passes together: about BATCH elements, or one tensor."""
    found: list[tuple[int, ...]] = []
    start = elements = 0
    for position, (_, first, end) in enumerate(large):
        elements += sum(chunk[2] - chunk[1] for chunk in chunks[first:end])
        if elements >= BATCH or position == len(large) - 1:
            found.append((start, position + 1, large[start][1], end))
            start, elements = position + 1, 0
    return found


def hyper_values(
    kernel: Kernel, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, float]
) -> Tensor:
    """Each group's live hyper-parameters, and the sums over all parameters, as the kernel reads them."""
    sums = [totals[key] for key in kernel.totals]
    rows = [[entry(group[key], i) for key, i in kernel.hypers] + sums for group in groups]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def entry(value: Any, index: int) -> float:
    if isinstance(value, Tensor):
        return value.item()
    return float(value[index] if is_sequence(value) else value)
