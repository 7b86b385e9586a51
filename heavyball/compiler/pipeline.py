"""From a recorded graph to the source of its kernel: simplify, schedule, lower, check, print."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from heavyball.compiler.cpp.printer import CppPrinter
from heavyball.compiler.cpp.rows import RowPrinter
from heavyball.compiler.frontend.graph import Graph
from heavyball.compiler.passes.loops import Kernel, verify
from heavyball.compiler.passes.lower import lower
from heavyball.compiler.passes.rank_one import expanded
from heavyball.compiler.passes.stages import schedule
from heavyball.compiler.triton.printer import DEVICES, TritonPrinter
from heavyball.compiler.triton.rows import Memory, TritonRowPrinter
from heavyball.state.declare import Holds
from heavyball.state.held import SCALE, is_root


@dataclass(frozen=True)
class Printed:
    """A kernel of the loop form, and its source.

    functions: the names of the device's kernels in the order in which they run, none on the CPU. memory:
    what a tensor needs there besides its own, where values belong to some of the axes.
    """

    kernel: Kernel
    source: str
    functions: tuple[str, ...] = ()
    memory: Memory | None = None

    @property
    def names(self) -> tuple:
        """What the columns and the numbers of a table are, which the source does not say."""
        k = self.kernel
        return (*(tuple(x) for x in (k.columns, k.numbers, k.hypers, k.totals)), k.starts, k.view)


def print_kernel(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    compute: torch.dtype,
    holds: Callable[[str], Holds | None],
    random: bool,
    device: torch.device,
    shape: tuple[int, ...] = (),
    passing: frozenset[str] = frozenset(),
    early: bool = True,
    placed: bool = False,
) -> Printed:
    """Print a simplified graph for tensors of these dtypes on a device.

    holds: what a state holds. random: whether bfloat16 and codes are rounded stochastically. shape: the
    parameter's; what matters of it is how state of rank one lies in it. passing: the numbers of which
    nothing is made. early: whether state may be stored before the last walk. placed: whether tensors
    are parts of others, whose random bits are those of the whole.

    Errors: NotPrintableError with the reason.
    """
    graph, view = expanded(graph, dtypes, shape)
    on_device, flat = device.type in DEVICES, graph.starts is None
    roots = frozenset(
        name
        for name in graph.tensors
        if is_root(dtypes[name], holds(name), dtypes.get(name + SCALE))
    )
    # programs that walk over rows divide a slice among them: it is read before others write
    exact = dtypes if early else {}
    plan = schedule(graph, exact, compute, slices_wait=flat or not on_device, early=early)
    squares = frozenset(name for name in graph.tensors if holds(name) == "square")
    late = not on_device
    kernel = lower(
        graph, plan, dtypes, compute, random, roots, late, squares, view, passing, placed
    )
    verify(kernel)
    if not on_device:
        return Printed(kernel, (CppPrinter if flat else RowPrinter)(kernel).source())
    printer = (TritonPrinter if flat else TritonRowPrinter)(kernel)
    memory = printer.memory if isinstance(printer, TritonRowPrinter) else None
    return Printed(kernel, printer.source(), tuple(printer.functions), memory)
