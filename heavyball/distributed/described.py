"""Says how parameters are stepped for which other processes are needed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from heavyball.compiler.run.plan import bytes_of
from heavyball.compiler.run.table import Kernel
from heavyball.diagnostics.plan import EagerStep, KernelLaunch, OwnedStep, StepPlan
from heavyball.distributed.parts import Part
from heavyball.distributed.recipe import Recipe
from heavyball.distributed.staged import Staging
from heavyball.runtime.job import Job


def described(
    parts: Iterable[Part],
    staging: Staging,
    job_of: Callable[[Part], Job],
    names: Mapping[Tensor, str],
) -> StepPlan:
    """How these parameters are stepped; names are those of what is here of them."""
    launches: dict[Any, list[tuple[Part, Job]]] = {}
    kernels: dict[Any, tuple[str, Kernel]] = {}
    eager: dict[tuple[str, str], list[str]] = {}
    owned: dict[tuple[int, int, tuple[str, ...]], list[str]] = {}
    for part in parts:
        name = names[part.here]
        if part.needs_owner or part.step is None:
            calls = () if part.step is None else tuple(q.node.key for q in part.step.questions)
            owned.setdefault((part.owner, part.layout.group.size, calls), []).append(name)
            continue
        job = job_of(part)
        for purpose, recipe in _recipes(part):
            kernel = staging.kernel(part, recipe, job)
            if isinstance(kernel, str):
                eager.setdefault((repr(part.program), kernel), []).append(name)
            else:
                key = purpose, id(kernel), _processes(part, recipe)
                kernels[key] = purpose, kernel
                launches.setdefault(key, []).append((part, job))
    return StepPlan(
        "",
        tuple(_launch(*kernels[key], key[2], found, names) for key, found in launches.items()),
        (),
        tuple(EagerStep(tuple(dict.fromkeys(found)), *key) for key, found in eager.items()),
        owned=tuple(OwnedStep(tuple(found), *key) for key, found in owned.items()),
    )


def _recipes(part: Part) -> Iterable[tuple[str, Recipe]]:
    """What is computed on a shard, and what for."""
    assert part.step is not None
    return [*((f"sums for {key}", r) for key, r in part.shares.items()), ("step", part.step)]


def _processes(part: Part, recipe: Recipe) -> int:
    return part.layout.group.size if recipe.before.rounds else 1


def _launch(
    purpose: str,
    kernel: Kernel,
    processes: int,
    found: list[tuple[Part, Job]],
    names: Mapping[Tensor, str],
) -> KernelLaunch:
    moved = [name for walk in kernel.form.walks for name in walk.moved]
    return KernelLaunch(
        purpose=purpose,
        device=str(found[0][0].here.device),
        parameters=tuple(names[part.here] for part, _ in found),
        elements=sum(part.here.numel() for part, _ in found),
        passes=len(kernel.form.walks),
        bytes_moved=sum(bytes_of(job, name) for _, job in found for name in moved),
        processes=processes,
    )
