"""Calls transforms of whole tensors, for several parameters at once where that is faster.

An answer does not depend on which parameters were called together, beyond the rounding of products.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.transform import FED, FIRST, keyword_names
from heavyball.numerics import generator, host_uniform, normals, saturate, working
from heavyball.runtime.job import FIRST_KEY, Answer, Batch, Call, Pieces, fed_key
from heavyball.runtime.state import old_states
from heavyball.runtime.threads import each

if TYPE_CHECKING:
    from heavyball.core.program import WholeNode

# Batched products of small matrices are 1.9 to 2.6 times faster than one by one, up to about this many
# elements per matrix; above it stacking only costs copies and memory.
STACKED = 2**15
# On a device what counts is the number of launches, and what is copied moves at the speed of its memory.
DEVICE_STACKED = 2**22
# The most elements in one stack, so that its temporary tensors stay small beside the model.
MOST, DEVICE_MOST = 2**22, 2**25


def due(node: "WholeNode", count: int) -> bool:
    """Whether a node has something to do after the write."""
    t = node.transform
    if t.after is None or t.due is None:
        return t.after is not None
    return t.due(count, **{n: v for n, v in t.options.items() if n in keyword_names(t.due)})


def serve(calls: list[Call], stack: bool) -> list[Answer | None]:
    """Answer calls in order, None where the gate is closed.

    stack: allows to join parameters of one shape into one call of the function.
    """
    answers: dict[int, Answer] = {}
    open_calls = [call for call in calls if call.gate is None or call.gate]
    for call in open_calls:
        if call.count is None:
            call.count = int(call.context["step"])
        call.old = old_states(call)
        if call.trial:
            call.old = [_copied(pieces) for pieces in call.old]
    groups = list(_groups(open_calls, stack))
    for group, found in zip(groups, each(_answer, groups, [_cost(g) for g in groups]), strict=True):
        answers.update(zip(map(id, group), found, strict=True))
    return [answers.get(id(call)) for call in calls]


def _cost(group: list[Call]) -> float:
    """The approximate cost of calls that gain from running in parallel; 0 for others.

    Decompositions are what an `after` and the first step of a basis are for. On one thread each they
    take 0.65 to 0.75 of their time on two; products, which need the cache, take 1.1 of theirs.
    """
    call = group[0]
    if call.job.param.device.type != "cpu" or not (call.after or call.count == 1):
        return 0
    numel = call.shape.numel()
    matrices = [t for old in call.old for t in _flat(old) if t is not None and t.ndim == 2]
    sizes = {t.shape[-1] for t in matrices if t.shape[0] == t.shape[1]} or call.shape
    return len(group) * sum(n**3 + n * numel for n in sizes)


def stacks(param: Tensor) -> bool:
    """Whether a parameter is small enough to share a call with others of its shape."""
    return 0 < param.numel() <= (DEVICE_STACKED if param.is_cuda else STACKED)


def _groups(calls: list[Call], stack: bool) -> Iterator[list[Call]]:
    found: dict[Any, list[Call]] = {}
    for number, call in enumerate(calls):
        small = stack and stacks(call.job.param)
        found.setdefault(_kind(call) if small else number, []).append(call)
    for group in found.values():
        limit = DEVICE_MOST if group[0].job.param.is_cuda else MOST
        most = max(1, limit // max(1, group[0].shape.numel()))
        for low in range(0, len(group), most):
            yield group[low : low + most]


def _kind(call: Call) -> Any:
    """Equal for calls that can be one: shapes, dtype, device, group and decisions on the host."""
    shapes = tuple(None if t is None else t.shape for old in call.old for t in _flat(old))
    rotating = len(call.vectors), len(call.squares)
    missing = tuple(name for name, value in call.context.items() if value is None)
    # what another transform has handed on is of the parameters that were called together there
    handed = tuple(id(v.value) for v in call.context.values() if isinstance(v, Batch))
    where = (id(call.node), call.after, id(call.job.group), call.count)
    return (
        *where,
        call.shape,
        call.dtype,
        call.job.param.device,
        shapes,
        rotating,
        missing,
        handed,
    )


def _flat(pieces: Pieces) -> tuple[Tensor | None, ...]:
    return pieces if isinstance(pieces, tuple) else (pieces,)


def _copied(pieces: Pieces) -> Pieces:
    if isinstance(pieces, tuple):
        return tuple(None if piece is None else piece.clone() for piece in pieces)
    return None if pieces is None else pieces.clone()


def _answer(group: list[Call]) -> list[Answer]:
    t = group[0].node.transform
    fn = t.after if group[0].after else t.update
    assert fn is not None
    old = [_join([call.old[k] for call in group]) for k in range(len(t.states))]
    wanted = (*keyword_names(fn), *t.context, *t.optional) if group[0].after else None
    arguments = _arguments(group, wanted)
    if group[0].after:
        return _hook(group, fn, old, arguments)
    update = _join([call.update for call in group])
    result = fn(update, *old, **arguments)
    parts = result if isinstance(result, tuple) else (result,)
    names = ["update", *t.states, *t.results]
    if len(parts) != len(names) or not isinstance(parts[0], Tensor):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"{group[0].node.key} returned ({got}), expected {len(names)} values: {', '.join(names)}"
        )
    _check(group[0].node, "update", update, parts[0])
    cut = 1 + len(t.states)
    for name, before, after in zip(t.states, old, parts[1:cut], strict=True):
        _check(group[0].node, name, before, after)
    answers = []
    for i in range(len(group)):
        states = [_cut(new, i, len(group)) for new in parts[1:cut]]
        answers.append(Answer(_cut(parts[0], i, len(group)), states, group[i].count or 0))
        for name, value in zip(t.provides, parts[cut:], strict=False):
            answers[-1].provided[name] = _number(group[0].node, name, value, i, len(group))
        for name, value in zip(t.opaque, parts[cut + len(t.provides) :], strict=True):
            answers[-1].provided[name] = Batch(value, len(group), i)
    return answers


def _hook(group: list[Call], fn: Any, old: list[Pieces], arguments: dict[str, Any]) -> list[Answer]:
    first = group[0]
    vectors = tuple(_join([c.vectors[k] for c in group]) for k in range(len(first.vectors)))
    squares = tuple(_join([c.squares[k] for c in group]) for k in range(len(first.squares)))
    result = fn(*old, vectors=vectors, squares=squares, **arguments)
    names = [*first.node.transform.states, "vectors", "squares"]
    if not isinstance(result, tuple) or len(result) != len(names):
        raise TypeError(
            f"{first.node.key}: after= returned {type(result).__name__}, expected {names}"
        )
    for name, before, after in zip(names, [*old, vectors, squares], result, strict=True):
        _check(first.node, name, before, after)
    answers = []
    for i, call in enumerate(group):
        *states, turned, squared = (_cut(new, i, len(group)) for new in result)
        found = Answer(None, states, call.count or 0, {}, list(turned), list(squared))
        answers.append(found)
    return answers


def _arguments(group: list[Call], wanted: tuple[str, ...] | None) -> dict[str, Any]:
    """Options, hyper-parameters and context by name; those in `wanted`, or all that are declared."""
    call = group[0]
    t, job = call.node.transform, call.job
    accepted = keyword_names(t.after if call.after else t.update)
    arguments: dict[str, Any] = dict(t.options)
    for name, (key, index) in call.node.hyper.items():
        if name in t.host:
            value = job.group[key]
            arguments[name] = float(value if index is None else value[index])
        else:
            value = job.scalars.get(job.group, key, job.param.device)
            arguments[name] = value if index is None else value[index]
    for name in wanted if wanted is not None else (*t.context, *t.optional):
        if name in t.options or name in t.hyper or name in ("vectors", "squares"):
            continue
        arguments[name] = _context(group, name)
    return {n: v for n, v in arguments.items() if n in accepted}


def _context(group: list[Call], name: str) -> Any:
    call = group[0]
    if name == "count":
        return call.count
    if name == FED:
        fed = call.job.group.get(fed_key(call.node.transform.signal))
        return None if fed is None else fed.to(call.job.param.device)
    if name == FIRST:
        found = [c.job.group.get(FIRST_KEY, {}).get(c.job.place) for c in group]
        return None if any(g is None for g in found) else _join([_as_grad(g, call) for g in found])
    if name == "places":
        return tuple(c.job.place for c in group)
    if name == "noise":
        return Noise(group)
    if name == "chance":
        return Chance(call.job.group["seed"], call.count or 0)
    values: list[Any] = [c.context.get(name) for c in group]
    if isinstance(values[0], Batch):
        return _rejoin(values)
    if values[0] is None or name in ("step", "base_lr"):
        return values[0]  # equal for all: the counts are, and they share a group
    if values[0].ndim == 0:
        return torch.stack(values).reshape(-1, *[1] * len(call.shape))
    return _join(values)


def _as_grad(grad: Tensor, call: Call) -> Tensor:
    """A gradient as the first element of a chain sees it."""
    return saturate(working(grad).to(call.dtype), call.job.narrow)


def _check(node: "WholeNode", name: str, before: Pieces, after: Any) -> None:
    old, new = _flat(before), _flat(after)
    if isinstance(before, tuple) != isinstance(after, tuple) or len(old) != len(new):
        raise ValueError(
            f"{node.key} returned {name} as {_shown(after)}, expected {_shown(before)}"
        )
    for one, other in zip(old, new, strict=True):
        if one is not None and (not isinstance(other, Tensor) or one.shape != other.shape):
            raise ValueError(
                f"{node.key} returned {name} as {_shown(after)}, expected {_shown(before)}"
            )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)


def _number(node: "WholeNode", name: str, value: Any, index: int, size: int) -> Any:
    """One parameter's part of a number for later elements."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if name == "grad":
        return value[index]
    if value.numel() != size:
        raise ValueError(
            f"{node.key} provided {name} of shape {tuple(value.shape)}, expected {size} values"
        )
    return value.reshape(-1)[index]


def _join(values: list[Any]) -> Any:
    """Stack the parameters' tensors along a new first dimension; a view where there is one."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        return tuple(_join([v[k] for v in values]) for k in range(len(first)))
    return first.unsqueeze(0) if len(values) == 1 else torch.stack(values)


def _cut(value: Any, index: int, size: int) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_cut(v, index, size) for v in value)
    return value[index]


def _rejoin(values: list[Batch]) -> Any:
    """An opaque result for another set of parameters than it was made for."""
    first = values[0]
    order = [b.index for b in values]
    if all(b.value is first.value for b in values) and order == list(range(first.size)):
        return first.value
    return _join([_cut_opaque(b.value, b.index) for b in values])


def _cut_opaque(value: Any, index: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut_opaque(v, index) for v in value)
    return value[index] if isinstance(value, Tensor) else value


class Noise:
    """Standard normals, drawn from the seed, each parameter's place, its step and a salt."""

    def __init__(self, group: list[Call]):
        self._group = group
        self._device = group[0].job.param.device

    def __call__(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        """A tensor of `shape`, whose first dimension counts the parameters."""
        size, dtype = self._size(shape), self._group[0].dtype
        rows = [
            normals(size, c.job.noise, self._count(c), salt, self._device, dtype)
            for c in self._group
        ]
        return _join(rows).reshape(shape)

    def bits(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        """Sixteen random bits for every element of `shape`, as int32, to round with."""
        size = self._size(shape)
        rows = [
            torch.randint(
                1 << 16,
                (size,),
                dtype=torch.int32,
                device=self._device,
                generator=generator(c.job.noise, self._count(c), salt, self._device),
            )
            for c in self._group
        ]
        return _join(rows).reshape(shape)

    def _count(self, call: Call) -> int:
        """The step that the noise is of: the first of those for which it stays the same."""
        t, count = call.node.transform, call.count or 0
        every = t.options[t.noise_every] if t.noise_every else 1
        return count - (count - 1) % every

    def _size(self, shape: tuple[int, ...]) -> int:
        if shape[0] != len(self._group):
            raise ValueError(f"noise of shape {tuple(shape)} for {len(self._group)} parameters")
        return math.prod(shape[1:])


class Chance:
    """Random numbers on the host that are the same for all parameters of one count."""

    def __init__(self, seed: int, count: int):
        self._seed, self._count = seed, count

    def __call__(self, salt: int = 0) -> float:
        return host_uniform(self._seed, self._count, salt)
