"""One step of a set of parameters: tables, sums, and the parameters of the eager runner."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.run.layout import Copied
from heavyball.compiler.run.table import Table
from heavyball.compiler.run.watch import Snapshot
from heavyball.compiler.run.waves import Waves
from heavyball.compiler.triton import device as cuda
from heavyball.diagnostics.plan import EagerStep, KernelLaunch, StepPlan, WaveStep
from heavyball.numerics import SCALAR, compute_dtype, lasting
from heavyball.runtime.job import Job
from heavyball.runtime.rates import Pending, Together
from heavyball.runtime.state import lazy_wanted
from heavyball.runtime.step import share_of, step_alone, take_given
from heavyball.runtime.sums import Shares, by_group, over_all


@dataclass(eq=False)
class Plan:
    """Tables for a set of jobs, and what must still hold for them to be used again."""

    jobs: list[Job]
    total_keys: list[str]
    groups: list[Mapping[str, Any]]
    tables: list[Table]
    shares: dict[str, list[Table]]
    eager: dict[int, str]  # jobs without a kernel, and why
    whole: Waves
    copies: list[Copied] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    snapshot: Snapshot | None = None
    # where a gradient's address goes: for each table, the places of its parameters in the snapshot
    columns: list[tuple[Table, Tensor]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    # a job of each program in each group, where states are wanted only by some values
    samples: list[Job] = field(default_factory=list)
    lazy: list[bool] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    device: torch.device = field(init=False)
    # whether tables leave something to be added up after the step
    gives: bool = field(init=False)

    def __post_init__(self) -> None:
        self.params = [job.param for job in self.jobs]
        tables = (table for table in self.all_tables if isinstance(table, cuda.DeviceTable))
        # where sums are formed; those on a device stay there
        self.device = next((table.device for table in tables), torch.device("cpu"))
        self.gives = any(table.shares is not None for table in self.tables)

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
        samples = {(id(job.program), id(job.group)): job for job in self.jobs}
        self.samples = [job for job in samples.values() if job.program.lazy_keys]
        self.lazy, self.seeds = self.wanted(), [group["seed"] for group in self.groups]

    def release(self, members: Iterable[int]) -> None:
        """Keep no gradient of a step alive in these jobs."""
        for index in members:
            self.jobs[index].grad = self.params[index]

    def wanted(self) -> list[bool]:
        """Which of the states that a hyper-parameter asks for are wanted."""
        return [
            lazy_wanted(node, declared, job.group)
            for job in self.samples
            for node, _, declared in job.program.states
            if declared.needed_by in node.transform.hyper
        ]

    def still_holds(self, groups: list[dict[str, Any]], attributes: Mapping[str, Any]) -> bool:
        """Whether the same tensors are there, laid out as before; gradients may have moved."""
        if self.wanted() != self.lazy or self.seeds != [g["seed"] for g in self.groups]:
            return False
        addresses = self.snapshot.addresses(groups, attributes)  # type: ignore[union-attr]
        if addresses is None:
            return False
        for table, rows in self.columns:
            table.fixed[:, table.grad_column] = addresses[rows]  # type: ignore[index]
        for index in self.eager:
            self.jobs[index].grad = self.params[index].grad  # type: ignore[assignment]
        return True

    # ---- looking at it

    def described(self, names: Sequence[str]) -> StepPlan:
        """The plan in words; `names` are those of the jobs' parameters."""
        launches = [
            self._launch(table, f"sums for {key}", names)
            for key, tables in self.shares.items()
            for table in tables
        ]
        launches += [self._launch(table, "step", names) for table in self.tables]
        for number, wave in enumerate(self.whole.waves):
            for k, stage in enumerate(wave.stages):
                launches += [self._launch(t, f"segment {k}", names, number) for t in stage]
        waves = [
            WaveStep(tuple(names[entry.index] for entry in wave.entries), wave.calls)
            for wave in self.whole.waves
        ]
        alike: dict[tuple[str, str], list[str]] = {}
        for index, reason in self.eager.items():
            chain = repr(self.jobs[index].program)
            alike.setdefault((chain, reason), []).append(names[index])
        eager = [EagerStep(tuple(members), *key) for key, members in alike.items()]
        moved = {id(made.param) for made in self.copies}
        reordered = [n for n, p in zip(names, self.params, strict=True) if id(p) in moved]
        return StepPlan("", tuple(launches), tuple(waves), tuple(eager), tuple(reordered))

    def _launch(
        self, table: Table, purpose: str, names: Sequence[str], wave: int | None = None
    ) -> KernelLaunch:
        members = sorted(table.members)
        walks = table.kernel.form.walks
        moved = [name for walk in walks for name in walk.moved]
        return KernelLaunch(
            purpose=purpose,
            device=str(self.params[members[0]].device),
            parameters=tuple(names[index] for index in members),
            elements=sum(self.params[index].numel() for index in members),
            passes=len(walks),
            bytes_moved=sum(bytes_of(self.jobs[i], name) for i in members for name in moved),
            wave=wave,
        )

    # ---- a step

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
        totals: dict[str, Tensor] = {}
        for key in self.total_keys:
            for table in self.shares[key]:
                table.step(self.groups, totals)
            asked = {index: share_of(self.jobs[index], key, totals) for index in self.eager}
            given = self._given(self.shares[key], {i: s for i, s in asked.items() if s is not None})
            if together.node is not None and key == together.node.key:
                self._renew(given, together, groups)
                totals[key] = torch.zeros((), dtype=SCALAR, device=self.device)
            else:
                totals[key] = over_all(given.rows)[0]
        for table in self.tables:
            table.step(self.groups, totals)
        others = self.whole.run(self.groups, totals)
        torch.autograd.graph.increment_version(self.params)
        for index in self.eager:
            step_alone(self.jobs[index], totals)
            others.update((index, shares) for _, shares in take_given([self.jobs[index]]))
        if others or self.gives:
            self._renew(self._given(self.tables, others), together, groups)

    def _given(self, tables: list[Table], others: Mapping[int, Shares]) -> "Given":
        """What the jobs have given to a sum: in tables, and by the eager runner and in waves."""
        giving = [table for table in tables if table.shares is not None]
        widths = [table.shares.shape[1] for table in giving]  # type: ignore[union-attr]
        width = max([*widths, *map(len, others.values())], default=1)
        rows = torch.zeros(len(self.jobs), width, dtype=SCALAR, device=self.device)
        for table in giving:
            places = table.positions.to(self.device)  # type: ignore[union-attr]
            rows.index_copy_(0, places, table.shares.to(self.device))  # type: ignore[union-attr]
        for index, shares in others.items():
            for column, share in enumerate(shares):
                rows[index, column].copy_(share)
        return Given(rows, {*others, *(index for table in giving for index in table.members)})

    def _renew(
        self, given: "Given", together: Together | Pending, groups: list[dict[str, Any]]
    ) -> None:
        """Renew the numbers of the groups from what the jobs have given."""
        if given.members:
            giving = {id(self.jobs[index].group) for index in given.members}
            sums = by_group((job.group for job in self.jobs), given.rows)
            together.renew(groups, {group: sums[group] for group in sums if group in giving})


@dataclass(frozen=True, eq=False)
class Given:
    """The shares of a sum: a row for each job, zeros for jobs without a share."""

    rows: Tensor
    members: set[int]


def bytes_of(job: Job, name: str) -> int:
    """The bytes of a tensor of a kernel."""
    tensor = {"param": job.param, "grad": job.grad, **job.state}.get(name)
    if tensor is None:  # a temporary one
        return job.param.numel() * compute_dtype(job.param.dtype).itemsize
    return tensor.numel() * tensor.element_size()
