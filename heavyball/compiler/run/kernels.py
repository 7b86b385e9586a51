"""Finds, builds and caches the kernels of programs, and reports why there is none."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.toolchain import ToolchainError
from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.compiler.passes.axes import axes_of, view_of
from heavyball.compiler.passes.segments import Segments
from heavyball.compiler.pipeline import Printed
from heavyball.compiler.run.printing import (
    OrderError,
    check_layout,
    printed_for,
    printed_segments,
)
from heavyball.compiler.run.table import FUNCTION, Kernel, compiled
from heavyball.compiler.triton import device as cuda
from heavyball.errors import warn
from heavyball.runtime.job import Job
from heavyball.runtime.recent import Recent
from heavyball.state.held import COLUMNS

# What a kernel depends on.
Signature = tuple[Any, ...]
MOST = 8192

# What the process has built: by source and the names in it, since two chains may print the same code for
# different hyper-parameters; and by signature, for programs that hold only the library's own functions.
# Those with a user's are kept by the optimizer, so that they are freed with it.
_built: dict[Any, Any] = Recent(MOST)
# What was warned of.
warned: set[str] = set()


def forget() -> None:
    """Rebuild all kernels of the process, including those that failed."""
    _built.clear()
    warned.clear()


@dataclass(eq=False)
class Parts:
    """A program cut into segments, and the kernel of each."""

    segments: Segments
    kernels: list[Kernel | None]


def build(printed: Printed) -> Kernel:
    """Compile a printed kernel, or take it from what the process or the disk has.

    Errors: ToolchainError with the complaint of what compiles.
    """
    key = printed.source, printed.names
    if key not in _built:
        compile = cuda.compiled if printed.functions else compiled
        _built[key] = compile(printed)
    return _built[key]


def _build_all(printed: Any) -> Kernel | Parts:
    """The built kernels of a program: one, or one for each segment."""
    if isinstance(printed, Printed):
        return build(printed)
    segments, several = printed
    return Parts(segments, [None if each is None else build(each) for each in several])


def signature(job: Job) -> Signature:
    """What a kernel depends on, except the shape."""
    param, grad = job.param, job.grad
    states = tuple(
        (k, t.dtype, axes_of(t.shape, param.shape), t.is_contiguous()) for k, t in job.state.items()
    )
    # whether a kernel fits is a matter of which axes have one element and how memory is laid out
    ones = tuple(n == 1 for n in param.shape)
    aligned = param.is_contiguous() and grad.is_contiguous()
    rank_one = any(key.endswith(COLUMNS) for key in job.state)
    view = view_of(tuple(param.shape)) if rank_one else None
    layout = (ones, aligned, param.dtype, grad.dtype, param.device.type, view)
    return (job.program.identity, *layout, job.stream is not None, states)


class NoKernelError(Exception):
    """A job has no kernel, as was warned; with the reason."""


class Kernels:
    """The kernels of one optimizer's programs.

    mode: True raises where there is none, "auto" warns once.
    """

    def __init__(self, mode: str | bool):
        self._mode = mode
        self._own: dict[Signature, Any] = Recent(MOST)
        # why there is no kernel, and that without what differs from kernel to kernel
        self._refused: dict[Signature, tuple[str, str | None]] = Recent(MOST)
        self._told: set[str] = set()
        self._printed: dict[Signature, tuple[Any, bool]] = {}  # while tables are made

    def of(self, job: Job, share: str | None) -> Kernel:
        """The kernel of a job's program for tensors like its own.

        share: the element whose sum over all parameters it is for; None is the step.

        Errors: NoKernelError with the reason; OrderError if contiguous tensors would have one.
        """
        return self._find(job, share)

    def parts_of(self, job: Job) -> Parts:
        """The segments of a program with whole transforms, and their kernels.

        Errors: as `of`.
        """
        return self._find(job, "whole")

    @contextlib.contextmanager
    def preparing(self, jobs: list[Job], total_keys: list[str]) -> Iterator[None]:
        """Compile all new kernels at the same time; what has none is found out later."""
        sources: dict[str, None] = {}
        self._printed.clear()
        for job in jobs:
            if job.param.device.type != "cpu":
                continue
            sums = [key for key in total_keys if key in job.program.total_keys]
            for key in ("whole" if job.program.has_whole else None, *sums):
                general, exact = _keys(job, key)
                asked = (self._kept(job), self._refused, self._printed)
                if any(k in known for k in (general, exact) for known in asked):
                    continue
                with contextlib.suppress(NotPrintableError, OrderError):
                    check_layout(job)
                    printed = self._print(job, key)[0]
                    several = [printed] if isinstance(printed, Printed) else printed[1]
                    sources.update((p.source, None) for p in several if p is not None)
        toolchain.prepare(sources, FUNCTION)
        try:
            yield
        finally:
            self._printed.clear()

    def _print(self, job: Job, share: str | None) -> tuple[Any, bool]:
        """The printed kernels of a job, and whether they are specific to its shape."""
        for key in _keys(job, share):
            if key in self._printed:
                return self._printed[key]
        printed: dict[str | None, Any]
        if share == "whole":
            segments, several = printed_segments(job)
            printed, sized = {share: (segments, several)}, segments.sized
        else:
            printed, sized = printed_for(job)
        for name, made in printed.items():
            self._printed[_keys(job, name)[sized]] = made, sized
        return printed[share], sized

    def _kept(self, job: Job) -> dict[Signature, Any]:
        """The cache of a job's kernels."""
        return _built if job.program.is_library else self._own

    def _find(self, job: Job, share: str | None) -> Any:
        kept, keys = self._kept(job), _keys(job, share)
        place = keys[1]
        try:
            check_layout(job)
            for key in keys:
                if (known := kept.get(key)) is not None:
                    return known
                if key in self._refused:
                    self.refuse(job, *self._refused[key])
            printed, sized = self._print(job, share)
            place = keys[sized]
            kept[place] = made = _build_all(printed)
            return made
        except (NotPrintableError, ToolchainError) as error:
            # not the exception, whose frames hold tensors
            self._refused[place] = str(error), getattr(error, "cause", None)
            self.refuse(job, *self._refused[place])

    def refuse(self, job: Job, reason: str, cause: str | None = None) -> NoReturn:
        """Say that a job has no kernel.

        cause: of the machine, told once for all programs and kernels.

        Errors: NoKernelError after a warning; RuntimeError where kernels are asked for.
        """
        message = f"the chain {job.program!r} runs without a compiled kernel: {reason}"
        if self._mode is True:
            raise RuntimeError(f"compile=True, but {message}") from None
        if cause is None:
            _warn_once(message)
        elif cause not in self._told:
            self._told.add(cause)
            _warn_once(message, f"{job.program!r}: {cause}")
        raise NoKernelError(reason) from None


def _keys(job: Job, share: str | None) -> tuple[Signature, Signature]:
    """The cache keys of a kernel for all shapes, and of one for the job's shape."""
    general = (*signature(job), share)
    return general, (*general, job.param.shape)


def _warn_once(message: str, what: str | None = None) -> None:
    """Warn, but say the same thing only once in a process.

    what: by what to tell that it is the same, where that is not the message.
    """
    if len(warned) >= MOST:  # chains of functions that are made anew
        warned.clear()
    if (what or message) not in warned:
        warned.add(what or message)
        warn(message)
