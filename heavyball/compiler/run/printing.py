"""Prints the kernels of a job's program: records, simplifies, and chooses who prints."""

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Graph, NotPrintableError, record
from heavyball.compiler.passes.algebra import simplified
from heavyball.compiler.passes.early_stores import with_final_states
from heavyball.compiler.passes.segments import Segments, cut
from heavyball.compiler.pipeline import Printed, print_kernel
from heavyball.numerics import compute_dtype
from heavyball.runtime.job import Job
from heavyball.state.held import COLUMNS, is_packed

NOT_CONTIGUOUS = "rows or columns of a parameter that is not contiguous"
PACKED = "{} state of a parameter that is not contiguous"


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
    """A kernel for contiguous tensors, and a parameter that is not; with the reason."""


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
        exact = {n for n, d in dtypes.items() if d == compute and not is_packed(state, n)}
        graphs = with_final_states(graphs, program, exact)
    return {k: _printed(job, simplified(g, program), dtypes) for k, g in graphs.items()}, sized


def _printed(job: Job, graph: Graph, dtypes: dict[str, torch.dtype]) -> Printed:
    if (graph.starts is not None or graph.every is not None) and not job.param.is_contiguous():
        raise OrderError(NOT_CONTIGUOUS)
    if (packed := _packed(graph, job)) and not job.param.is_contiguous():
        raise OrderError(PACKED.format(packed))
    return _print(job, graph, dtypes)


def _packed(graph: Graph, job: Job) -> str | None:
    """What state lies in the order of a contiguous tensor, whatever the parameter's is."""
    for name in graph.tensors:
        if is_packed(job.state, name):
            return "rank-one" if name + COLUMNS in job.state else "4-bit"
    return None


def _print(job: Job, graph: Graph, dtypes: dict[str, torch.dtype]) -> Printed:
    """Print a graph of a job's program for tensors like the job's."""
    param, random = job.param, job.stream is not None
    compute = compute_dtype(param.dtype)
    program, shape = job.program, tuple(param.shape)
    holds, passing = program.holds_of, program.passing
    return print_kernel(graph, dtypes, compute, holds, random, param.device, shape, passing)


def printed_segments(job: Job) -> tuple[Segments, list[Printed | None]]:
    """A job's program in segments, and the kernel of each segment that computes something.

    Errors: NotPrintableError with the reason.
    """
    param, state = job.param, job.state
    segments = cut(job.program, param.shape, param.dtype, state, job.group)
    compute = compute_dtype(param.dtype)
    dtypes = {"param": param.dtype, "grad": job.grad.dtype}
    dtypes |= {k: t.dtype for k, t in state.items()} | dict.fromkeys(segments.levels, compute)
    found: list[Printed | None] = []
    for part in segments.parts:
        if part.graph is None:
            found.append(None)
            continue
        if part.graph.starts is not None and not param.is_contiguous():
            raise NotPrintableError(NOT_CONTIGUOUS)
        if (packed := _packed(part.graph, job)) and not param.is_contiguous():
            raise NotPrintableError(PACKED.format(packed))
        found.append(_print(job, part.graph, dtypes))
    return segments, found
