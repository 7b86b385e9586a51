"""Tables of pointers that compiled kernels step, and the calls of these."""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.printer import BATCH, CHUNK, SMALL
from heavyball.compiler.passes import loops
from heavyball.compiler.passes.axes import Runs
from heavyball.compiler.pipeline import Printed
from heavyball.core.hyper import is_sequence
from heavyball.numerics import SCALAR
from heavyball.runtime.execute import SHARE
from heavyball.runtime.job import Job

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
    source: str


FUNCTION = "run"  # what a kernel's function is called
# what it takes: table, small, large, chunks, batches, count, hyper, scratch, parts, threads
ARGUMENTS: list[Any] = [
    *(ctypes.c_void_p, ctypes.c_int64),
    *[ctypes.c_void_p] * 3,
    ctypes.c_int64,
    *[ctypes.c_void_p] * 3,
    ctypes.c_int,
]


def compiled(printed: Printed) -> Kernel:
    """Compile a printed kernel, or take it from the disk's cache."""
    run = toolchain.load(printed.source, FUNCTION).run
    run.argtypes, run.restype = ARGUMENTS, None
    return Kernel(**described(printed), run=run)


def walks_of(kernel: Kernel) -> tuple[Any, Any]:
    """The functions of a C++ kernel for a single walk, and for the values stored between two."""
    library = toolchain.load("#define ONE_WALK\n" + kernel.source, FUNCTION)
    walk, kept = library.walk, library.kept
    walk.argtypes, walk.restype = [*ARGUMENTS, ctypes.c_int64, ctypes.c_void_p], None
    kept.argtypes, kept.restype = [ctypes.c_void_p], ctypes.c_int64
    return walk, kept


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
        "source": printed.source,
    }


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
    # what each tensor gives to sums over all parameters, and the numbers of the jobs in the same order
    shares: Tensor | None = None
    positions: Tensor | None = None

    def add(
        self, member: int, job: Job, group: int, address: Callable[[str], int] | None = None
    ) -> None:
        """Append a parameter's row: its sizes, and where its tensors and numbers are.

        member: the job's number. group: that of its values among the hyper-parameters. address: where
            a tensor or a number is; those of the job if it is not given.
        """
        kernel, address = self.kernel, address or functools.partial(_address, job)
        row = [
            job.param.numel(),
            group,
            job.stream or 0,
            *(_place(job) if kernel.form.placed else ()),
            *kernel.form.run_sizes(job.param.shape),
        ]
        if "grad" in kernel.tensors:
            self.grad_column = len(row) + kernel.tensors.index("grad")
        row += [address(name) for name in (*kernel.tensors, *kernel.numbers)]
        self.members.append(member)
        self.rows.append(row)

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
            self.positions = torch.tensor(self.members, dtype=torch.int64, device="cpu")
            first = self.kernel.leading + len(self.kernel.tensors)
            for index, row in enumerate(self.rows):
                for place, name in enumerate(names):
                    row[first + numbers.index(name)] = self.shares[index, place].data_ptr()

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


def _address(job: Job, name: str) -> int:
    if name.startswith(SHARE):
        return 0  # it gets room later
    tensor = {"param": job.param, "grad": job.grad}.get(name)
    return (job.state[name] if tensor is None else tensor).data_ptr()


def _place(job: Job) -> tuple[int, int, int]:
    """How the elements of a part are numbered in the whole, see `Origin.steps`."""
    origin = None if job.origin is None else job.origin("param")
    found = None if origin is None else origin.steps
    return (0, max(job.param.numel(), 1), 0) if found is None else found


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
