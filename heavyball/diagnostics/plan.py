"""How a step runs: what `ChainOpt.plan` returns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heavyball.diagnostics.report import readable_bytes

# So many names are printed of each list of parameters.
SHOWN = 4


@dataclass(frozen=True)
class KernelLaunch:
    """A compiled kernel and what it steps.

    purpose: "step", "sums for <key>" (of an element that sums over all parameters), or "segment <n>",
        the part of a chain before its n-th transform of whole tensors.
    device: where; parameters: their names, or their numbers where they have none; elements: of all.
    passes: how often it walks over the elements. bytes_moved: what the passes read and write of
        parameters, gradients, state and temporary tensors.
    wave: the number of the wave that it belongs to; None outside of waves. processes: how many complete
        its sums between two passes.
    """

    purpose: str
    device: str
    parameters: tuple[str, ...]
    elements: int
    passes: int
    bytes_moved: int
    wave: int | None = None
    processes: int = 1


@dataclass(frozen=True)
class WaveStep:
    """Parameters that go through kernels and transforms of whole tensors together.

    calls: the keys of these transforms, which run in torch between the segments.
    """

    parameters: tuple[str, ...]
    calls: tuple[str, ...]


@dataclass(frozen=True)
class EagerStep:
    """Parameters that are stepped by plain torch operations, and why."""

    parameters: tuple[str, ...]
    chain: str
    reason: str


@dataclass(frozen=True)
class OwnedStep:
    """Sharded parameters whose step one process computes.

    owner: which of the `processes` that is, counted from 0. calls: the keys of the transforms of whole
    tensors that it runs, while what lies around them is computed on the parts; () for the whole step.
    """

    parameters: tuple[str, ...]
    owner: int
    processes: int
    calls: tuple[str, ...]


@dataclass(frozen=True)
class StepPlan:
    """How the next step runs, for the parameters that have a gradient.

    chain: the chain as text. kernels: in the order of their launches. eager: parameters without a
        kernel.
    reordered: parameters that are copied in each step to change their memory layout, or whose
        gradients are.
    without_gradient: parameters that the step does not change. owned: work distributed over processes.
    """

    chain: str
    kernels: tuple[KernelLaunch, ...] = ()
    waves: tuple[WaveStep, ...] = ()
    eager: tuple[EagerStep, ...] = ()
    reordered: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    owned: tuple[OwnedStep, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """What all kernels read and write in a step; products and eager operations are not counted."""
        return sum(kernel.bytes_moved for kernel in self.kernels)

    @property
    def reasons(self) -> dict[str, str]:
        """Why a parameter is stepped eagerly, by its name."""
        return {name: each.reason for each in self.eager for name in each.parameters}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(plan: StepPlan) -> Iterable[str]:
    yield plan.chain
    if plan.kernels:
        moved = readable_bytes(plan.bytes_moved)
        yield f"kernels: {len(plan.kernels)}, which move {plan.bytes_moved:,} bytes ({moved})"
    for kernel in plan.kernels:
        where = "" if kernel.wave is None else f" of wave {kernel.wave}"
        passes = "1 pass" if kernel.passes == 1 else f"{kernel.passes} passes"
        yield (
            f"  {kernel.purpose}{where} on {kernel.device}: {_named(kernel.parameters)}, "
            f"{kernel.elements:,} elements, {passes}, {kernel.bytes_moved:,} bytes"
            + (f", sums over {kernel.processes} processes" if kernel.processes > 1 else "")
        )
    for number, wave in enumerate(plan.waves):
        yield f"wave {number}: {', '.join(wave.calls)} for {_named(wave.parameters)}"
    for part in plan.owned:
        what = ", ".join(part.calls) or "the whole step"
        where = f"process {part.owner} of {part.processes}"
        yield f"at {where}: {what} for {_named(part.parameters)}"
    for each in plan.eager:
        yield f"eagerly: {_named(each.parameters)}: {each.reason}"
    if plan.reordered:
        yield f"copied into another order: {_named(plan.reordered)}"
    if plan.without_gradient:
        yield f"without a gradient: {_named(plan.without_gradient)}"


def _named(names: Sequence[str]) -> str:
    several = "1 parameter" if len(names) == 1 else f"{len(names)} parameters"
    more = ", ..." if len(names) > SHOWN else ""
    return f"{several} ({', '.join(names[:SHOWN])}{more})"
