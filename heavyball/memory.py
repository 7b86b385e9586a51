"""The memory that an optimizer's state will take, computed from shapes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heavyball.core.program import Program
from heavyball.core.transform import Transform
from heavyball.diagnostics.report import readable_bytes
from heavyball.optim.optimizer import ChainOpt
from heavyball.presets.create import chosen

# Rows of parameters that a printed plan shows.
SHOWN = 12


@dataclass(frozen=True)
class Planned:
    """The state of one parameter, in bytes by state key."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    parameter_bytes: int
    trained: bool
    state: Mapping[str, int]
    per_transform: Mapping[str, int]
    evaluation_bytes: int

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The state of an optimizer after its first step, exact to the byte.

    chain: the chain as text. parameters: the state of each parameter. per_process: for a mesh, the
        bytes of state in each of its processes.
    """

    chain: str
    parameters: tuple[Planned, ...]
    per_process: tuple[int, ...] = ()

    @property
    def state_bytes(self) -> int:
        """The value of `ChainOpt.state_bytes()` after a step in which every parameter had a gradient."""
        return sum(p.state_bytes for p in self.parameters)

    @property
    def elements(self) -> int:
        return sum(p.elements for p in self.parameters)

    @property
    def parameter_bytes(self) -> int:
        return sum(p.parameter_bytes for p in self.parameters)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of the parameters' dtype, all of them at once."""
        return sum(p.parameter_bytes for p in self.parameters if p.trained)

    @property
    def evaluation_bytes(self) -> int:
        """Additional bytes in evaluation mode, in which the training weights are stored."""
        return sum(p.evaluation_bytes for p in self.parameters)

    @property
    def per_transform(self) -> dict[str, int]:
        """Bytes by the transform's key; `step` is the count that every parameter has."""
        found: Counter[str] = Counter()
        for parameter in self.parameters:
            found.update(parameter.per_transform)
        return dict(found)

    @property
    def per_parameter(self) -> dict[str, int]:
        """Bytes of state by the parameter's name, or its index if it has none."""
        return {p.name: p.state_bytes for p in self.parameters}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def memory_plan(
    model_or_params: Any, chain_or_preset: Any, *, mesh: Any = None, **options: Any
) -> MemoryPlan:
    """Compute the bytes of an optimizer's state, per parameter and per transform, without allocating it.

    model_or_params: a module, or parameters in any form that an optimizer takes; their values are
        not used, so they may be on the device "meta".
    chain_or_preset: a preset's class or name, a transform, a tuple of elements, text as the command
        `heavyball` takes it ("AdamW:amsgrad=True", "scale_by_adam | cautious"), or a function that
        makes the optimizer from its parameters.
    mesh: also compute the bytes in each process if `fully_shard` shards the parameters: a
        `DeviceMesh`, a number of processes, or (copies, processes per copy); the processes need not
        exist.
    options: those of the preset, or of `ChainOpt`; `lr` is optional.

    Errors: those of the optimizer, and ValueError for an unknown name.
    """
    make, options = _maker(chain_or_preset, options)
    opt = make(_on_meta(model_or_params), **options)
    if not isinstance(opt, ChainOpt):
        raise TypeError(f"memory_plan: {type(opt).__name__} is not an optimizer of heavyball")
    opt.init_state()
    return MemoryPlan(repr(opt.chain), tuple(_planned(opt)), _per_process(opt, mesh))


def _per_process(opt: ChainOpt, mesh: Any) -> tuple[int, ...]:
    if mesh is None:
        return ()
    from heavyball.distributed.memory import bytes_on, parts_on

    registry, chain = opt.registry, opt.chain
    totals = bool(chain.total_keys) or chain.rate is not None
    return tuple(bytes_on(parts_on(mesh, registry.places(), registry.programs(), totals)))


def _maker(what: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A function that builds the optimizer, and its options."""
    if callable(what) and not isinstance(what, type | Transform):
        return what, options
    make, given = chosen(what, "memory_plan")
    return make, {**given, **options}


# ---- parameters without memory


def _on_meta(given: Any) -> list[Any]:
    """The same groups, names and parameters, on the device "meta"."""
    if isinstance(given, nn.Module):
        given = given.named_parameters()
    if isinstance(given, Tensor):
        raise TypeError("memory_plan: a tensor was given, expected a module or several parameters")
    known: dict[Tensor, nn.Parameter] = {}
    return [_entry(item, known) for item in given]


def _entry(item: Any, known: dict[Tensor, nn.Parameter]) -> Any:
    if isinstance(item, Mapping):
        params = item["params"]
        several = [params] if isinstance(params, Tensor) else list(params)
        return {**item, "params": [_entry(p, known) for p in several]}
    if isinstance(item, tuple):
        return item[0], _entry(item[1], known)
    if not isinstance(item, Tensor):
        raise TypeError(f"memory_plan: expected parameters, got {type(item).__name__}")
    if item not in known:
        # plain tensors are given gradients by hand
        trained = item.requires_grad or not isinstance(item, nn.Parameter)
        empty = torch.empty_like(item, device="meta", requires_grad=False)
        known[item] = nn.Parameter(empty, requires_grad=trained)
    return known[item]


# ---- what they hold


def _planned(opt: ChainOpt) -> Iterator[Planned]:
    programs, seen = opt.registry.programs(), set()
    for place in opt.registry.places():
        param = place.param
        if param in seen:
            continue
        seen.add(param)
        state = {key: _bytes(t) for key, t in opt.state.get(param, {}).items()}
        yield Planned(
            name=place.name or str(place.number),
            shape=tuple(param.shape),
            dtype=param.dtype,
            elements=param.numel(),
            parameter_bytes=_bytes(param),
            trained=param.requires_grad,
            state=state,
            per_transform=_by_transform(state, programs[param]),
            evaluation_bytes=_bytes(param) if state and programs[param].evaluators else 0,
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _by_transform(state: Mapping[str, int], program: Program) -> dict[str, int]:
    found: Counter[str] = Counter()
    keys = sorted((node.key for node in program.flat), key=len, reverse=True)
    for key, count in state.items():
        # the longest, since `exp_avg` begins `exp_avg.1` too
        owners = (k for k in keys if key == k or (key.startswith(k) and not _is_name(key[len(k)])))
        found[next(owners, key.partition(":")[0])] += count
    return dict(found)


def _is_name(character: str) -> bool:
    return character.isalnum() or character == "_"


# ---- printing


def _lines(plan: MemoryPlan) -> Iterable[str]:
    yield plan.chain
    each = plan.state_bytes / max(plan.elements, 1)
    yield (
        f"{len(plan.parameters):,} parameters, {plan.elements:,} elements: "
        f"{plan.parameter_bytes:,} bytes ({readable_bytes(plan.parameter_bytes)})"
    )
    yield (
        f"state: {plan.state_bytes:,} bytes ({readable_bytes(plan.state_bytes)}), "
        f"{each:.4g} per element"
    )
    for key, count in plan.per_transform.items():
        yield f"  {key:<28} {count:>20,}  {readable_bytes(count)}"
    if plan.per_process:
        most, count = max(plan.per_process), len(plan.per_process)
        share = most * count / max(sum(plan.per_process), 1)
        yield (
            f"on {count} processes: at most {most:,} bytes ({readable_bytes(most)}) on one, "
            f"{share:.2f} of an even share"
        )
    if plan.evaluation_bytes:
        more = readable_bytes(plan.evaluation_bytes)
        yield f"in evaluation mode: {plan.evaluation_bytes:,} bytes more ({more})"
    largest = sorted(plan.parameters, key=lambda p: -p.state_bytes)[:SHOWN]
    yield "largest:" if len(largest) < len(plan.parameters) else "parameters:"
    width = max((len(p.name) for p in largest), default=0)
    for p in largest:
        dtype = str(p.dtype).removeprefix("torch.")
        yield f"  {p.name:<{width}}  {p.shape!s:<20} {dtype:<9} {p.state_bytes:>18,}"
