"""Steps an optimizer's parameters through kernels, and says what is left for the eager runner."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball import utils
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.cpp.toolchain import ToolchainError
from heavyball.compiler.frontend.graph import NotPrintableError
from heavyball.compiler.passes.axes import axes_of, run_sizes
from heavyball.compiler.pipeline import Printed
from heavyball.compiler.recent import Recent
from heavyball.compiler.run import table as launch
from heavyball.compiler.run import watch
from heavyball.compiler.run.layout import Copied, copied, orders, settle, stage
from heavyball.compiler.run.table import (
    FUNCTION,
    Kernel,
    OrderError,
    Table,
    build,
    check_layout,
    printed_for,
)
from heavyball.compiler.run.watch import Snapshot
from heavyball.compiler.run.waves import Entry, Parts, Waves, arrange, build_parts, printers
from heavyball.compiler.triton import device as cuda
from heavyball.errors import warn
from heavyball.numerics import lasting
from heavyball.runtime.addresses import check_writable
from heavyball.runtime.execute import SHARE
from heavyball.runtime.job import Job
from heavyball.runtime.rates import Pending, Together
from heavyball.runtime.state import lazy_wanted
from heavyball.runtime.step import SCALAR, drive, run, share_of, take_given

Signature = tuple[Any, ...]
NOT_CONTIGUOUS = "rows or columns of a parameter that is not contiguous"


def signature(job: Job) -> Signature:
    """What a kernel depends on, apart from the shape where the program looks at it."""
    param, grad = job.param, job.grad
    states = tuple(
        (k, t.dtype, axes_of(t.shape, param.shape), t.is_contiguous()) for k, t in job.state.items()
    )
    # whether a kernel fits is a matter of which axes have one element and how memory is laid out
    ones = tuple(n == 1 for n in param.shape)
    aligned = param.is_contiguous() and grad.is_contiguous()
    kind = (ones, aligned, param.dtype, grad.dtype, param.device.type)
    return (job.program.identity, *kind, job.stream is not None, states)


@dataclass(eq=False)
class Plan:
    """Tables for a set of jobs, and what must still hold for them to be used again."""

    jobs: list[Job]
    total_keys: list[str]
    groups: list[Mapping[str, Any]]
    tables: list[Table]
    shares: dict[str, list[Table]]
    eager: list[int]
    whole: Waves
    copies: list[Copied] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    snapshot: Snapshot | None = None
    # where a gradient's address goes: for each table, the places of its parameters in the snapshot
    columns: list[tuple[Table, Tensor]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    kinds: list[Job] = field(default_factory=list)
    lazy: list[bool] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [job.param for job in self.jobs]

    @property
    def all_tables(self) -> list[Table]:
        """Those that step."""
        return [*self.tables, *self.whole.tables]

    @property
    def states(self) -> Iterator[Tensor]:
        """Every state tensor. They are in no list here: `Kept` counts who refers to them."""
        return (tensor for job in self.jobs for tensor in job.state.values())

    @lasting()
    def remember(self, groups: list[dict[str, Any]], attributes: Mapping[str, Any]) -> None:
        """Note what must still hold when the tables are used again."""
        self.snapshot = Snapshot(groups, attributes)
        place = {id(p): i for i, p in enumerate(self.snapshot.stepped)}
        self.places = [place[id(param)] for param in self.params]
        shares = (t for ts in self.shares.values() for t in ts)
        for table in [*self.all_tables, *shares]:
            if table.grad_column is not None:
                rows = torch.tensor([self.places[i] for i in table.members], device="cpu")
                self.columns.append((table, rows))
        kinds = {(id(job.program), id(job.group)): job for job in self.jobs}
        self.kinds = [job for job in kinds.values() if job.program.lazy_keys]
        self.lazy, self.seeds = self._lazy(), [group["seed"] for group in self.groups]

    def release(self, members: Iterable[int]) -> None:
        """Keep no gradient of a step alive in these jobs."""
        for index in members:
            self.jobs[index].grad = self.params[index]

    def _lazy(self) -> list[bool]:
        """Which of the states that a hyper-parameter asks for are wanted."""
        return [
            lazy_wanted(node, declared, job.group)
            for job in self.kinds
            for node, _, declared in job.program.states
            if declared.needed_by in node.transform.hyper
        ]

    def still_holds(self, groups: list[dict[str, Any]], attributes: Mapping[str, Any]) -> bool:
        """Whether the same tensors are there, laid out as before; gradients may have moved."""
        if self._lazy() != self.lazy or self.seeds != [g["seed"] for g in self.groups]:
            return False
        addresses = self.snapshot.addresses(groups, attributes)  # type: ignore[union-attr]
        if addresses is None:
            return False
        for table, rows in self.columns:
            table.fixed[:, table.grad_column] = addresses[rows]  # type: ignore[index]
        for index in self.eager:
            self.jobs[index].grad = self.params[index].grad  # type: ignore[assignment]
        return True

    def run(self, together: Together | Pending, groups: list[dict[str, Any]]) -> None:
        """Step every parameter; `groups` are all of the optimizer's."""
        for made in self.copies:
            made.fill()
        try:
            self._run(together, groups)
        finally:
            for made in self.copies:
                made.finish()

    def _run(self, together: Together | Pending, groups: list[dict[str, Any]]) -> None:
        if any(isinstance(table, cuda.DeviceTable) for table in self.all_tables):
            cuda.run_plan(self, together, groups)
            return
        totals: dict[str, Tensor] = {}
        for key in self.total_keys:
            found = self._shares(key, totals)
            for index in self.eager:
                shares = share_of(self.jobs[index], key, totals)
                if shares is not None:
                    found[index] = [share.item() for share in shares]
            totals[key] = torch.zeros((), dtype=SCALAR, device="cpu")
            if together.node is not None and key == together.node.key:
                self._finish(found, together, groups)
            else:
                # in the order of the parameters, whoever computed them
                totals[key].fill_(sum(found[i][0] for i in sorted(found)))
        left: dict[int, list[float]] = {}
        for table in self.tables:
            table.step(self.groups, totals)
            left.update(table.found_shares())
        for index, found_there in self.whole.run(self.groups, totals).items():
            left[index] = [share.item() for share in found_there]
        torch.autograd.graph.increment_version(self.params)
        for index in self.eager:
            drive(self.jobs[index], totals)
            for _, shares in take_given([self.jobs[index]]):
                left[index] = [share.item() for share in shares]
        self._finish(left, together, groups)

    def _shares(self, key: str, totals: Mapping[str, Tensor]) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for table in self.shares[key]:
            table.step(self.groups, totals)
            found.update(table.found_shares())
        return found

    def _finish(
        self,
        found: dict[int, list[float]],
        together: Together | Pending,
        groups: list[dict[str, Any]],
    ) -> None:
        """Renew the numbers of the groups from the shares of the jobs."""
        sums: dict[int, list[float]] = {}
        for index in sorted(found):
            place, shares = id(self.jobs[index].group), found[index]
            before = sums.get(place, [0.0] * len(shares))
            sums[place] = [a + b for a, b in zip(before, shares, strict=True)]
        if sums:
            together.renew(groups, {place: tuple(shares) for place, shares in sums.items()})


# Kernels by what they depend on, for all optimizers of the process, of programs that hold only the
# library's own functions. Those with a user's are kept by the optimizer, so that they are freed with it.
_known: dict[Signature, Kernel] = Recent(4096)
_known_parts: dict[Signature, Parts] = Recent(4096)


def forget_kernels() -> None:
    """Find kernels on the disk or compile them anew, as in a new process, also those that failed."""
    for known in (_known, _known_parts, _warned):
        known.clear()
    for part in (launch, cuda, toolchain):
        part.forget()
    watch.native.cache_clear()


@dataclass(eq=False)
class Known:
    """What is known of an optimizer's programs, for all of its engines."""

    kernels: dict[Signature, Kernel] = field(default_factory=dict)
    parts: dict[Signature, Parts] = field(default_factory=dict)
    # why there is no kernel, and that without what differs from kernel to kernel
    refused: dict[Signature, tuple[str, str | None]] = field(default_factory=lambda: Recent(4096))
    told: set[str] = field(default_factory=set)


class Engine:
    """Steps one optimizer, through kernels where it can. It holds nothing a checkpoint would need.

    foreach: False keeps one parameter's intermediate tensors at a time. known: what the optimizer's
    other engines know.
    """

    def __init__(self, mode: str | bool, foreach: bool | None = None, known: Known | None = None):
        self.mode = mode
        self.foreach = foreach
        self.known = known or Known()
        self._printed: dict[Signature, tuple[Any, bool]] = {}  # while tables are made
        self._plan: Plan | None = None

    def another(self) -> "Engine":
        """An engine for some of the parameters alone, which shares what is known."""
        return Engine(self.mode, self.foreach, self.known)

    @property
    def plan(self) -> Plan | None:
        """The tables of the last step, if they can be used again."""
        return self._plan

    def forget(self) -> None:
        """Look at every tensor anew in the next step."""
        self._plan = None

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
    ) -> None:
        """Step these parameters, which are those of the groups that have a gradient."""
        finisher = functools.partial(together.finish, groups)
        self._plan = None
        # the same parameter twice is stepped twice, one after the other
        twice = len({id(job.param) for job in jobs}) < len(jobs)
        if self.mode is False or utils.compile_mode is None or twice:
            run(jobs, total_keys, self.foreach, finisher)
            return
        plan = self._make(jobs, total_keys)
        if len(plan.eager) == len(jobs):
            run(jobs, total_keys, self.foreach, finisher)
            return
        check_writable(plan.params[index] for index in plan.eager)
        plan.run(together, groups)
        plan.remember(groups, attributes)
        plan.release(range(len(jobs)))
        self._plan = plan

    @lasting()
    def _make(self, jobs: list[Job], total_keys: list[str]) -> Plan:
        """Sort jobs into tables; jobs without a kernel are the plan's `eager` ones."""
        groups: list[Mapping[str, Any]] = []
        tables: dict[tuple[str | None, int, torch.device], Table] = {}
        eager, entries, copies = [], [], dict[int, Copied]()
        self._prepare(jobs, total_keys)
        for index, job in enumerate(jobs):
            if not any(job.group is g for g in groups):
                groups.append(job.group)
            number = next(i for i, g in enumerate(groups) if g is job.group)
            sums: list[str | None] = [k for k in total_keys if k in job.program.total_keys]
            if job.program.has_whole:
                parts, work, made = self._parts(job), job, None
                kernels = self._as_it_lies(job, sums)
            else:
                parts, (work, made, kernels) = None, self._in_order(job, [None, *sums])
            if None in kernels.values() or (job.program.has_whole and parts is None):
                eager.append(index)
                continue
            if parts is not None:
                entries.append(Entry(index, job, parts, number))
            for key, kernel in kernels.items():
                device = job.param.device
                place = (key, id(kernel), device)
                if place not in tables:
                    tables[place] = cuda.table(kernel, device)  # type: ignore[arg-type]
                table = tables[place]
                _add_row(table, index, work, number)
            if made is not None:
                copies[index] = made
        for table in tables.values():
            table.finish()
        for index, made in copies.items():
            made.place(list(tables.values()), index)
        shares = {key: [t for (k, *_), t in tables.items() if k == key] for key in total_keys}
        steps = [t for (k, *_), t in tables.items() if k is None]
        self._printed.clear()
        waves = arrange(entries, self.foreach)
        return Plan(jobs, total_keys, groups, steps, shares, eager, waves, [*copies.values()])

    def _in_order(
        self, job: Job, wanted: list[str | None]
    ) -> tuple[Job, Copied | None, dict[str | None, Kernel | None]]:
        """A job with tensors that kernels can walk through, what of them are copies, and the kernels."""
        if job.param.device.type != "cpu":
            return job, None, self._as_it_lies(job, wanted)
        for strides in orders(job):
            try:
                work = stage(job, strides)
                kernels = {key: self._kernel(work, key) for key in wanted}
            except NotPrintableError as error:
                self._refuse(job, str(error))
                break
            except OrderError:
                continue
            if None not in kernels.values():
                settle(job, work)
            return work, copied(job, work, strides), kernels
        else:
            self._refuse(job, NOT_CONTIGUOUS)
        return job, None, {None: None}

    def _as_it_lies(self, job: Job, wanted: list[str | None]) -> dict[str | None, Kernel | None]:
        try:
            return {key: self._kernel(job, key) for key in wanted}
        except OrderError:
            self._refuse(job, NOT_CONTIGUOUS)
            return {None: None}

    def _prepare(self, jobs: list[Job], total_keys: list[str]) -> None:
        """Compile all new kernels at the same time; what has none is found out later."""
        found: dict[str, None] = {}
        self._printed.clear()
        for job in jobs:
            if job.param.device.type != "cpu":
                continue
            sums = [key for key in total_keys if key in job.program.total_keys]
            for key in ("whole" if job.program.has_whole else None, *sums):
                kind = (*signature(job), key)
                exact = (*kind, job.param.shape)
                asked = (*self._kept(job), self.known.refused, self._printed)
                if any(k in place for k in (kind, exact) for place in asked):
                    continue
                with contextlib.suppress(NotPrintableError, OrderError):
                    check_layout(job)
                    printed = self._print(job, key)[0]
                    made = printed[1] if key == "whole" else [printed]
                    found.update((p.source, None) for p in made if p is not None)
        toolchain.prepare(found, FUNCTION)

    def _print(self, job: Job, share: str | None) -> tuple[Any, bool]:
        """What `printed_for` says, or `printers` for "whole", asked once while tables are made."""
        known = signature(job)
        for key in ((*known, share), (*known, share, job.param.shape)):
            if key in self._printed:
                return self._printed[key]
        found: dict[str | None, Any]
        if share == "whole":
            whole = printers(job)
            found, sized = {share: whole}, whole[0].sized
        else:
            found, sized = printed_for(job)
        end = (job.param.shape,) if sized else ()
        self._printed |= {(*known, key, *end): (made, sized) for key, made in found.items()}
        return found[share], sized

    def _kept(self, job: Job) -> tuple[dict[Signature, Kernel], dict[Signature, Parts]]:
        """Where kernels, and programs in parts, of a job's program are kept."""
        if job.program.is_library:
            return _known, _known_parts
        return self.known.kernels, self.known.parts

    def _kernel(self, job: Job, share: str | None) -> Kernel | None:
        """The kernel of a job's program for tensors like its own; None where there is none."""
        make: Callable[[Any], Kernel] = cuda.build if cuda.serves(job.param.device) else build
        return self._found(job, share, self._kept(job)[0], make)

    def _parts(self, job: Job) -> Parts | None:
        """The segments of a program with whole transforms, compiled; None where there is none."""
        return self._found(job, "whole", self._kept(job)[1], lambda printed: build_parts(*printed))

    def _found(
        self, job: Job, share: str | None, kept: dict[Signature, Any], make: Callable[[Any], Any]
    ) -> Any:
        """What is kept for a job, or is made from what is printed; None where it cannot be made."""
        kind = (*signature(job), share)
        exact = (*kind, job.param.shape)
        place, refused = exact, self.known.refused
        try:
            check_layout(job)
            for key in (kind, exact):
                if (found := kept.get(key)) is not None:
                    return found
                if key in refused:
                    self._refuse(job, *refused[key])
                    return None
            printed, sized = self._print(job, share)
            place = exact if sized else kind
            kept[place] = made = make(printed)
            return made
        except (NotPrintableError, ToolchainError) as error:
            # not the exception, whose frames hold tensors
            refused[place] = str(error), getattr(error, "cause", None)
            self._refuse(job, *refused[place])
            return None

    def _refuse(self, job: Job, reason: str, cause: str | None = None) -> None:
        """Warn or raise. A cause is the machine's, and is told once for all programs and kernels."""
        message = f"the chain {job.program!r} runs without a compiled kernel: {reason}"
        if self.mode is True:
            raise RuntimeError(f"compile=True, but {message}") from None
        if cause is None:
            warn_once(message)
        elif cause not in self.known.told:
            self.known.told.add(cause)
            warn_once(message, f"{job.program!r}: {cause}")


def sources(jobs: list[Job], total_keys: list[str]) -> list[str]:
    """The distinct kernels of some jobs as text, those for sums over all parameters first."""
    found: dict[str, None] = {}
    for key in (*total_keys, None):
        for job in jobs:
            if key is None or key in job.program.total_keys:
                whole = key is None and job.program.has_whole
                made = printers(job)[1] if whole else [_printer_in_order(job, key)]
                found.update((printer.source, None) for printer in made if printer is not None)
    return list(found)


def _printer_in_order(job: Job, share: str | None) -> Printed:
    for strides in orders(job) if job.param.device.type == "cpu" else [job.param.stride()]:
        with contextlib.suppress(OrderError):
            work = stage(job, strides)
            check_layout(work)
            return printed_for(work)[0][share]
    raise NotPrintableError(NOT_CONTIGUOUS)


def _add_row(table: Table, index: int, job: Job, group: int) -> None:
    kernel = table.kernel
    row = [job.param.numel(), group, job.stream or 0]
    row += run_sizes(kernel.starts, job.param.shape)
    for name in kernel.tensors:
        if name == "grad":
            table.grad_column = len(row)
        tensor = {"param": job.param, "grad": job.grad}.get(name)
        row.append((job.state[name] if tensor is None else tensor).data_ptr())
    numbers = (None if n.startswith(SHARE) else job.state[n] for n in kernel.numbers)
    row += [0 if number is None else number.data_ptr() for number in numbers]
    table.members.append(index)
    table.rows.append(row)


_warned: set[str] = set()


def warn_once(message: str, what: str | None = None) -> None:
    """Warn, but say the same thing only once in a process.

    what: by what to tell that it is the same, where that is not the message.
    """
    if len(_warned) >= 4096:  # chains of functions that are made anew
        _warned.clear()
    if (what or message) not in _warned:
        _warned.add(what or message)
        warn(message)
