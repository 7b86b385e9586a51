"""What an optimizer prints of itself."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import by_name
from heavyball.core.program import Program
from heavyball.distributed import local

# State by parameter, and by name.
States = Mapping[Tensor, Mapping[str, Any]]


def readable_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


def _bytes(state: Mapping[str, Any]) -> int:
    tensors = [local(t) for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(state: States) -> int:
    """Bytes of all state tensors."""
    return sum(map(_bytes, state.values()))


def optimizer_repr(
    name: str, chain: Chain, groups: Sequence[Mapping[str, Any]], state: States
) -> str:
    """The chain, each group's hyper-parameters, and the bytes of state per parameter and in all."""
    lines = [f"{name}(", f"  {by_name(repr(chain))}"]
    for index, group in enumerate(groups):
        params = dict.fromkeys(group["params"])  # one may be listed twice
        count, size = len(params), sum(p.numel() for p in params)
        shown = "  ".join(f"{k}={_plain(v)}" for k, v in group.items() if _is_shown(k))
        lines.append(f"  group {index}: {count} parameters, {size:,} elements  {shown}")
    lines += [f"  {line}" for line in _state_lines(groups, state)]
    return "\n".join([*lines, ")"])


def _is_shown(key: str) -> bool:
    return key not in ("params", "param_names", "differentiable") and not key.startswith("_")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _state_lines(groups: Sequence[Mapping[str, Any]], states: States) -> Iterable[str]:
    total, elements = state_bytes(states), 0
    alike: dict[tuple, list[int]] = defaultdict(list)
    for param in dict.fromkeys(p for group in groups for p in group["params"]):
        elements += param.numel()
        state = states.get(param, {})
        parts = ", ".join(f"{k} {_bytes({k: v}):,}" for k, v in state.items())
        dtype = str(param.dtype).removeprefix("torch.")
        alike[tuple(param.shape), dtype, parts].append(_bytes(state))
    yield f"state: {total:,} bytes ({readable_bytes(total)}), {total / max(elements, 1):.4g} per element"
    for (shape, dtype, parts), sizes in alike.items():
        detail = f": {parts}" if parts else ""
        yield f"  {len(sizes)} x {shape} {dtype}, {sizes[0]:,} bytes each{detail}"


def routing_table(
    groups: Iterable[Mapping[str, Any]],
    programs: Mapping[Tensor, Program],
    why: Callable[[str | None, Tensor], list[str]],
) -> str:
    """One line per parameter: its name or place, its shape, the chain that it got, and why.

    why: the reasons for a parameter's chain, given its name, if it has one.
    """
    rows = [("parameter", "shape", "chain")]
    for index, group in enumerate(groups):
        names = group.get("param_names") or [
            f"group {index}[{i}]" for i in range(len(group["params"]))
        ]
        for name, param in zip(names, group["params"], strict=True):
            reasons = ", ".join(why(name if group.get("param_names") else None, param))
            shape = f"{tuple(param.shape)}{f': {reasons}' if reasons else ''}"
            rows.append((name, shape, repr(programs[param])))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
