"""Steps an optimizer's parameters through kernels."""

import contextlib
from collections.abc import Mapping
from typing import Any, Self

import torch

from heavyball import utils
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.compiler.pipeline import Printed
from heavyball.compiler.run import kernels, watch
from heavyball.compiler.run.kernels import Kernels, NoKernelError
from heavyball.compiler.run.layout import Copied, copied, orders, settle, stage
from heavyball.compiler.run.plan import Plan
from heavyball.compiler.run.printing import (
    NOT_CONTIGUOUS,
    OrderError,
    check_layout,
    printed_for,
    printed_segments,
)
from heavyball.compiler.run.row import Row
from heavyball.compiler.run.table import Kernel, Table
from heavyball.compiler.run.waves import Entry, arrange
from heavyball.compiler.triton import device as cuda
from heavyball.numerics import lasting
from heavyball.runtime.addresses import check_writable
from heavyball.runtime.job import Job
from heavyball.runtime.rates import Pending, Together


def forget_kernels() -> None:
    """Load kernels from disk or recompile them, as in a new process, including those that failed."""
    for part in (kernels, toolchain, watch):
        part.forget()


class Engine:
    """Steps parameters of one optimizer as the last time, or makes a plan for them.

    It holds nothing a checkpoint would need. foreach: False keeps one parameter's intermediate tensors
    at a time.
    """

    def __init__(self, kernels: Kernels, foreach: bool | None):
        self._kernels = kernels
        self._foreach = foreach
        self._plan: Plan | None = None

    def another(self) -> Self:
        """An engine for some of the parameters alone, with the same kernels."""
        return type(self)(self._kernels, self._foreach)

    def forget(self) -> None:
        """Recheck every tensor in the next step."""
        self._plan = None

    def row(self, keys: tuple[str, ...]) -> Row | None:
        """The last step of one parameter, to be used again; keys are those of its group's values."""
        return Row.of(self._plan, keys)

    def step_again(
        self,
        groups: list[dict[str, Any]],
        attributes: Mapping[str, Any],
        together: Together | Pending,
    ) -> bool:
        """Step as the last time, if everything is where it was then; else do nothing.

        attributes: those of the optimizer, see `heavyball.compiler.run.watch.Snapshot`.
        """
        if self._plan is None or utils.compile_mode is None:
            return False
        if not self._plan.still_holds(groups, attributes):
            return False
        check_writable(self._plan.params[index] for index in self._plan.eager)
        self._plan.run(together, groups)
        self._plan.release(self._plan.eager)
        return True

    def step(
        self,
        jobs: list[Job],
        total_keys: list[str],
        groups: list[dict[str, Any]],
        attributes: Mapping[str, Any],
        together: Together | Pending,
    ) -> bool:
        """Step these parameters, which are those of the groups that have a gradient.

        Does nothing and returns False where none of them has a kernel.
        """
        self._plan = None
        plan = self.make(jobs, total_keys)
        if len(plan.eager) == len(jobs):
            return False
        check_writable(plan.params[index] for index in plan.eager)
        plan.run(together, groups)
        plan.remember(groups, attributes)
        plan.release(range(len(jobs)))
        self._plan = plan
        return True

    @lasting()
    def make(self, jobs: list[Job], total_keys: list[str]) -> Plan:
        """Sort jobs into tables; those without a kernel are the plan's `eager` ones."""
        tables: dict[tuple[str | None, int, torch.device], Table] = {}
        groups: list[Mapping[str, Any]] = []
        eager, entries, copies = dict[int, str](), [], dict[int, Copied]()
        with self._kernels.preparing(jobs, total_keys):
            for index, job in enumerate(jobs):
                if not any(job.group is g for g in groups):
                    groups.append(job.group)
                number = next(i for i, g in enumerate(groups) if g is job.group)
                sums: list[str | None] = [k for k in total_keys if k in job.program.total_keys]
                try:
                    if job.program.has_whole:
                        entry = Entry(index, job, self._kernels.parts_of(job), number)
                        work, kernels = job, self._as_it_lies(job, sums)
                        entries.append(entry)
                    else:
                        work, kernels = self._in_order(job, [None, *sums])
                except NoKernelError as error:
                    eager[index] = str(error)
                    continue
                for key, kernel in kernels.items():
                    device = job.param.device
                    place = (key, id(kernel), device)
                    if place not in tables:
                        tables[place] = cuda.table(kernel, device)
                    tables[place].add(index, work, number)
                made = copied(job, work)
                if made is not None:
                    copies[index] = made
        for table in tables.values():
            table.finish()
        for index, made in copies.items():
            made.place(list(tables.values()), index)
        shares = {key: [t for (k, *_), t in tables.items() if k == key] for key in total_keys}
        steps = [t for (k, *_), t in tables.items() if k is None]
        waves = arrange(entries, self._foreach)
        return Plan(jobs, total_keys, groups, steps, shares, eager, waves, [*copies.values()])

    def _in_order(self, job: Job, wanted: list[str | None]) -> tuple[Job, dict[str | None, Kernel]]:
        """A job with tensors that kernels can walk through, copies where they lie otherwise."""
        if job.param.device.type != "cpu":
            return job, self._as_it_lies(job, wanted)
        reason = NOT_CONTIGUOUS
        for strides in orders(job):
            try:
                work = stage(job, strides)
                kernels = {key: self._kernels.of(work, key) for key in wanted}
            except NotPrintableError as error:
                self._kernels.refuse(job, str(error))
            except OrderError as error:
                reason = str(error)
                continue
            settle(job, work)
            return work, kernels
        self._kernels.refuse(job, reason)

    def _as_it_lies(self, job: Job, wanted: list[str | None]) -> dict[str | None, Kernel]:
        try:
            return {key: self._kernels.of(job, key) for key in wanted}
        except OrderError as error:
            self._kernels.refuse(job, str(error))


def sources(jobs: list[Job], total_keys: list[str]) -> list[str]:
    """The distinct kernels of some jobs as text, those for sums over all parameters first."""
    found: dict[str, None] = {}
    for key in (*total_keys, None):
        for job in jobs:
            if key is None or key in job.program.total_keys:
                whole = key is None and job.program.has_whole
                made = printed_segments(job)[1] if whole else [_printer_in_order(job, key)]
                found.update((printer.source, None) for printer in made if printer is not None)
    return list(found)


def _printer_in_order(job: Job, share: str | None) -> Printed:
    for strides in orders(job) if job.param.device.type == "cpu" else [job.param.stride()]:
        with contextlib.suppress(OrderError):
            work = stage(job, strides)
            check_layout(work)
            return printed_for(work)[0][share]
    raise NotPrintableError(NOT_CONTIGUOUS)
