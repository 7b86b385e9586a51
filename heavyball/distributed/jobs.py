"""A part's share of a step: which way it is stepped here, its gradient, and its job."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heavyball.distributed import is_sharded
from heavyball.distributed.parts import Part
from heavyball.distributed.plan import Plan
from heavyball.distributed.rollcall import RollCall
from heavyball.distributed.runs import Run
from heavyball.distributed.shard import local
from heavyball.numerics import lasting
from heavyball.optim.checks import check_gradient
from heavyball.runtime.addresses import as_usable, check_memory
from heavyball.runtime.job import Counts, Job, Scalars
from heavyball.state.held import stream_of

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry


class Jobs:
    """Makes the jobs of parts.

    rounds: whether 16-bit values are rounded stochastically.
    """

    def __init__(self, registry: "Registry", plan: Plan, rounds: bool):
        self._registry = weakref.proxy(registry)
        self._plan, self._rounds = plan, rounds
        self._scalars: list[Scalars] = []
        self._counts = Counts()
        self._bare: set[Part] = set()  # what had no state before this step
        self._placed: dict[Part, Tensor] = {}  # gradients that were placed otherwise

    def begin(self, parts: Sequence[Part]) -> None:
        """Begin a step of these: bring gradients to where the parameters are.

        All processes take part, also one that cannot make the step.
        """
        self._placed = {part: _placed(part) for part in parts if _is_elsewhere(part)}

    def look(self, parts: Sequence[Part]) -> None:
        """Note which of these have no state, before this step makes some."""
        self._bare = {part for part in parts if "step" not in part.held}

    def end(self) -> None:
        """Keep nothing of a step."""
        self._bare, self._placed = set(), {}

    def is_cut(self, part: Part) -> bool:
        """Whether a parameter is stepped node by node, also where that asks no other process."""
        if part.mode != "local" or part.step is None:
            return part.mode != "local"
        # a shard without elements still counts its steps; random bits are those of the whole
        rounded = self._rounds and not part.layout.is_whole and self._is_random(part)
        return part.here.numel() == 0 or rounded

    def _is_random(self, part: Part) -> bool:
        if self._registry.chain.storage.is_random or part.here.dtype == torch.bfloat16:
            return True
        return any(where.dtype == torch.bfloat16 for where in part.kept.values())

    def gradient(self, part: Part) -> Tensor:
        """What is here of the gradient, placed as the parameter is; zeros where there is none."""
        if part.param.grad is None:
            return torch.zeros_like(part.here)
        found = self._placed.get(part)
        if found is None:
            found = _placed(part) if _is_elsewhere(part) else part.param.grad
        return local(found)

    def job(self, part: Part, state: dict[str, Tensor]) -> Job:
        """What a step sees of a part."""
        place, program = part.place, part.program
        while len(self._scalars) <= place.index:
            self._scalars.append(Scalars())
        as_usable(program, state, part.here.device)
        scalars = self._scalars[place.index]
        job = Job(program, part.here, self.gradient(part), place.group, state, scalars)
        number = self._plan.number(place)
        if self._rounds and self._is_random(part):
            job.stream = stream_of(place.group["seed"], number)
        if not part.layout.is_whole:
            job.origin = part.origin
        if program.has_whole:
            job.place, job.counts = number, self._counts
            job.noise = stream_of(place.group["seed"], number) if program.has_noise else 0
        return job

    def begun(self, part: Part) -> Job:
        """The job of a part that is stepped as a tensor of its own, with its state."""
        with lasting():
            part.begin(None)
        return self.job(part, part.held)

    def imagined(self, part: Part) -> Job:
        """The job of a step that does not come now; nothing is begun by it."""
        state = part.held if "step" in part.held else {}
        part.begin(None, state)
        return self.job(part, state)

    def run(
        self, part: Part, totals: Mapping[str, Tensor], roll: RollCall, share: str | None = None
    ) -> Run:
        """A part at the beginning of its way through a step, or to its share of a sum."""
        run = Run(part, share, fresh=part in self._bare, absent=part in roll.absent)
        if part.param.grad is None:
            roll.waiting.append(run)
        roll.attempts(self._prepare, run, totals)
        return run

    def _prepare(self, run: Run, totals: Mapping[str, Tensor]) -> None:
        part = run.part
        nothing = run.fresh and part.param.grad is None
        state: dict[str, Tensor] = {} if nothing else part.held
        with lasting():
            part.begin(None, state)
        run.prepare(self.job(part, state), totals)


def _is_elsewhere(part: Part) -> bool:
    """Whether the gradient is not placed as the parameter is."""
    grad = part.param.grad
    if grad is None or not is_sharded(grad):
        return False
    return grad.placements != part.param.placements  # type: ignore[attr-defined]


def _placed(part: Part) -> Tensor:
    """The gradient, placed as the parameter is; all processes take part."""
    grad, placements = part.param.grad, part.param.placements  # type: ignore[attr-defined]
    return grad.redistribute(placements=placements)  # type: ignore[union-attr]


def check_part(part: Part) -> None:
    """Refuse what a step could not use, before any other process is waited for."""
    label, grad = part.place.label, part.param.grad
    assert grad is not None
    check_gradient(label, part.param, grad)
    check_memory(label, part.here)
    check_memory(f"{label}: its gradient", local(grad))
    for key, tensor in part.held.items():
        where = part.kept.get(key)
        if where is not None and not where.is_number:
            found, wanted = tuple(tensor.shape), where.layout.mine[1]
            if found != wanted:
                raise ValueError(
                    f"{label}: its state {key!r} has the shape {found} here, expected {wanted}"
                )
            check_memory(f"{label}: its state {key!r}", tensor)
