"""Runs a table's kernel one walk at a time, for sums that others must complete between two walks."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heavyball.compiler.passes.loops import Reduce
from heavyball.compiler.run.table import Table, threads, walks_of


@dataclass(frozen=True)
class Left:
    """A sum that a walk has left behind, for each tensor of the table.

    how: "add" and "count" are added up over the parts of a tensor, of "max" the largest is taken.
    values: one number for each tensor, in the order of the rows; where the sum is one for each place
    along some axes, a list of arrays. What is written into them is what the next walk reads.
    """

    how: Literal["add", "count", "max"]
    values: Tensor | list[Tensor]


class Stages:
    """The walks of a table's kernel on the CPU, whose numbers are in `numbers`, a row for each tensor.

    `run(0, hyper)` to `run(len(stages), hyper)`, in this order, make one step of the table; the last
    computes what comes behind the walks and writes the states that are numbers. Between two calls `left`
    has what the walk has summed up.
    """

    def __init__(self, table: Table):
        self.table, kernel = table, table.kernel
        self.form, rows = kernel.form, table.rows
        self.numbers = torch.zeros(len(rows), kernel.values, dtype=torch.float64, device="cpu")
        fixed: Tensor = table.fixed  # type: ignore[assignment]
        self._walk, kept = walks_of(kernel)
        sizes = [kept(fixed[i].data_ptr()) for i in range(len(rows))]
        self.arrays = [torch.zeros(n, dtype=self.form.compute, device="cpu") for n in sizes]
        places = [array.data_ptr() for array in self.arrays]
        self._memory = torch.tensor(places, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.form.walks)

    def run(self, k: int, hyper: Tensor) -> None:
        """Run walk k; `hyper` is what `hyper_values` gives."""
        address, small, large, chunks, batches, count, values, _, parts = self.table.arguments(
            hyper
        )
        used = threads(self.table.elements)
        given = (
            address,
            small,
            large,
            chunks,
            batches,
            count,
            values,
            self.numbers.data_ptr(),
            parts,
        )
        self._walk(*given, used, k, self._memory.data_ptr())

    def left(self, k: int) -> list[Left]:
        """The sums of walk k over the elements and over slices of them."""
        return [Left(s.how, self._values(s)) for s in self.form.walks[k].sums]

    def _values(self, s: Reduce) -> Tensor | list[Tensor]:
        if s.var.level == "scalar":
            return self.numbers[:, s.var.index]  # type: ignore[index]
        return [self.at(row, s.var.index) for row in range(len(self.arrays))]  # type: ignore[arg-type]

    def at(self, row: int, node: int) -> Tensor:
        """The number of a node for one tensor, or its array, which is one that something later reads."""
        kept = [v.index for v in self.form.kept]
        if node not in kept:
            return self.numbers[row, node]
        low, size = self._place(self.table.rows[row], node)
        return self.arrays[row][low : low + size]

    def _place(self, row: list[int], node: int) -> tuple[int, int]:
        """The offset and the length of a tensor's array of values."""
        frame, leading = self.form.frame, len(self.form.leading)
        assert frame is not None
        later = row[leading - len(frame.later) : leading]
        runs = (row[0] // math.prod(later), *later)
        low = 0
        for v in self.form.kept:
            size = math.prod(runs[k] for k in frame.runs(v.level))
            if v.index == node:
                return low, size
            low += size
        raise KeyError(node)
