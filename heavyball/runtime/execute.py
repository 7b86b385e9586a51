"""Runs a program as a generator, which yields wherever it needs others.

A run yields its shares of a sum over all parameters and is sent the sum, or yields a `Call` of a whole
transform and is sent an `Answer`. Who answers is the eager runner or the compiler.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Fork, Node, RateNode, WholeNode
from heavyball.core.transform import CONTEXT, FED, FIRST, WHOLE_CONTEXT, keyword_names
from heavyball.numerics import SCALAR, compute_dtype, shape_of
from heavyball.runtime.job import Answer, Call, Frame, Job
from heavyball.runtime.serve import due
from heavyball.runtime.state import loaded, new_states, working_state
from heavyball.runtime.sums import Shares

# What a run waits for: the sum of its shares and the others', the answer to a call, or, where kernels
# compute the segments between calls, the kernel of a segment.
Request = tuple[str, Shares] | Call | int
Run = Generator[Request, Any, Any]


def advance(run: Run, answer: Any = None) -> Request | None:
    """Send a run its answer (None to start); return its next request, None at its end."""
    try:
        return run.send(answer)
    except StopIteration:
        return None


def complete(run: Run, answer: Callable[[Request], Any], until: str | None = None) -> Shares | None:
    """Advance a run to its end, or to the shares for the sum `until`, which are returned."""
    request = advance(run)
    while request is not None:
        if isinstance(request, tuple) and request[0] == until:
            run.close()
            return request[1]
        request = advance(run, answer(request))
    return None


# Who is shown what each element gives: the job, its key, and the update (or the new parameter).
Watch = Callable[[Job, str, Any], None]
_watches: list[Watch] = []


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show what each element of every eager step gives."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def execute(nodes: Iterable[Node | Fork], update: Any, frame: Frame) -> Run:
    """Run nodes in order; yields (key, shares) wherever sums over all parameters are needed, and a
    call wherever a transform needs the whole tensor."""
    for node in nodes:
        if isinstance(node, Fork):
            update = yield from _fork(node, update, frame)
        elif isinstance(node, WholeNode):
            update = yield from _call(node, update, frame)
        else:
            update = yield from _apply(node, update, frame)
        for watch in _watches:
            watch(frame.job, node.merge.key if isinstance(node, Fork) else node.key, update)
        if frame.ended:
            break
    return update


def offered(frame: Frame) -> dict[str, Any]:
    """Context that nodes compute from their state after the last step, for other nodes."""
    found = {}
    for name, node in frame.job.program.offers.items():
        fn, t = node.transform.offers[name], node.transform
        states = [working_state(node, state, frame.job) for state in t.states]
        found[name] = fn(frame.env["param"], *states, **_asked_by(fn, node, frame))
    return found


def _asked_by(fn: Callable[..., Any], node: Node, frame: Frame) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name in keyword_names(fn):
        if name in node.transform.hyper:
            arguments[name] = frame.hyper(node, name)
        elif name in node.transform.options:
            arguments[name] = node.transform.options[name]
        else:
            arguments[name] = frame.context(name)
    return arguments


def _fork(fork: Fork, update: Tensor, frame: Frame) -> Run:
    results, gates, steps = [], [], []
    for branch in fork.branches:
        inner = Frame(frame.job, dict(frame.env), frame.new, frame.hooks)
        results.append((yield from execute(branch, update, inner)))
        frame.ended |= inner.ended
        gates.append(inner.env["gate"])
        steps.append(inner.env["step"])
    # an update that is missing in one branch is missing as a whole
    if frame.ended:
        return update
    for gate, step in zip(gates, steps, strict=True):
        if gate is not frame.env["gate"]:
            frame.env["gate"] = _both(frame.env["gate"], gate)
            frame.env["step"] = torch.minimum(frame.env["step"], step)
            frame.env["count"] = None
    return (yield from _apply(fork.merge, tuple(results), frame))


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _arguments(node: Node, frame: Frame) -> dict[str, Any]:
    t = node.transform
    arguments: dict[str, Any] = dict(t.options)
    for name in t.hyper:
        arguments[name] = frame.hyper(node, name)
    for name in t.context:
        if name != "total":
            arguments[name] = frame.fed(node) if name == FED else frame.context(name)
    for name in t.optional:
        arguments[name] = frame.env.get(name)
    return arguments


def _apply(node: Node, update: Any, frame: Frame) -> Run:
    t, env = node.transform, frame.env
    arguments = _arguments(node, frame)
    gate = env["gate"]
    old = [_in_present_unit(node, name, frame) for name in t.states]
    if t.over_all is not None:
        known = {**env, **dict(zip(t.states, old, strict=True)), **arguments}
        there = CONTEXT.keys() | frame.job.program.common
        names = keyword_names(t.over_all)
        asked = {n: frame.context(n) if n in there else known.get(n) for n in names}
        found = t.over_all(update, **asked)
        is_rate = isinstance(node, RateNode)
        total = yield node.key, _given(found, frame) if is_rate else _gated((found,), gate)
        if isinstance(node, RateNode):
            arguments = _arguments(node, frame)  # the group's numbers are new now
        else:
            arguments["total"] = total
    before = update
    update, new, provided = _results(node, t.update(update, *old, **arguments))
    compute = compute_dtype(frame.job.param.dtype)
    if update.is_floating_point() and update.dtype != compute:
        update = update.to(compute)  # a condition times a number is float64
    _check_shapes(node, before, update, old, new)
    for name, was, after in zip(t.states, old, new, strict=True):
        if was is not None:
            free = gate is None or t.states[name].passing
            kept = after if free else torch.where(gate, after, was)
            frame.new[node.state_key(name)] = kept
    if isinstance(node, RateNode) and node.transform.gives:
        for place, share in enumerate(_given(provided[len(t.provides) :], frame)):
            frame.new[share_name(node.key, place)] = share
    for name, value in zip(t.provides, provided[: len(t.provides)], strict=True):
        env[name] = _both(gate, value) if name == "gate" else value
        if name == frame.job.program.moment_change and gate is not None:
            # what is left out keeps the unit of the step before, as this element's own state does
            env[name] = torch.where(gate, value, 1.0)
        if name in ("gate", "step"):
            env["count"] = None  # no longer known on the host
    if t.kind in ("writer", "post"):
        update = _written(t.kind, before, update, frame)
    return update


def _written(kind: str, before: Tensor, after: Tensor, frame: Frame) -> Tensor:
    """The parameter after a write, which later elements see in place of an update."""
    env, gate = frame.env, frame.env["gate"]
    if kind == "writer" and frame.job.program.has_post:
        env["old_param"], env["written"] = env["param"], before
    env["param"] = after if gate is None else torch.where(gate, after, env["param"])
    return env["param"]


# What the runner and kernels call a share of a sum over all parameters.
SHARE = "share:"


def share_name(key: str, place: int) -> str:
    return f"{SHARE}{key}:{place}"


def _gated(shares: Shares, gate: Tensor | None) -> Shares:
    """Nothing of a frozen parameter may reach the others."""
    return shares if gate is None else tuple(torch.where(gate, s, 0) for s in shares)


def _given(shares: Shares, frame: Frame) -> Shares:
    """The shares of an element with a `finish`, and behind them 1, or 0 if the step is left out."""
    gate, device = frame.env["gate"], frame.job.param.device
    happens = torch.full((), 1.0, dtype=SCALAR, device=device) if gate is None else gate.to(SCALAR)
    return (*_gated(shares, gate), happens)


def _check_shapes(
    node: Node, before: Any, update: Tensor, old: list[Tensor | None], new: tuple
) -> None:
    expected = [shape_of(before[0] if isinstance(before, tuple) else before), *map(shape_of, old)]
    for name, shape, value in zip(
        ("update", *node.transform.states), expected, (update, *new), strict=True
    ):
        if shape is not None and shape_of(value) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{node.key} returned {name} of shape {got}, expected {tuple(shape)}")


def _in_present_unit(node: Node, name: str, frame: Frame) -> Tensor | None:
    """A state; its unit, the one in which the learning rate is 1, may have changed since last step."""
    declared, tensor = node.transform.states[name], working_state(node, name, frame.job)
    change = frame.env.get(frame.job.program.moment_change)
    if tensor is None or change is None or declared.is_number:
        return tensor
    if declared.holds not in ("moment", "square"):
        return tensor
    return tensor * (change if declared.holds == "moment" else change**2)


def _results(node: Node, result: Any) -> tuple[Any, tuple, tuple]:
    """Split a transform's results into the update, its new state and provided values."""
    t = node.transform
    parts = result if isinstance(result, tuple) else (result,)
    expected = 1 + len(t.states) + len(t.results)
    if len(parts) != expected or not isinstance(parts[0], Tensor):
        names = ", ".join(["update", *t.states, *t.results])
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{node.key} returned ({got}), expected {expected} values: {names}")
    cut = 1 + len(t.states)
    return parts[0], parts[1:cut], parts[cut:]


def _call(node: WholeNode, update: Tensor, frame: "Frame") -> Generator[Any, Any, Tensor]:
    """The call of a whole transform: its context, and its results."""
    t, env = node.transform, frame.env
    served = (*WHOLE_CONTEXT, FED, FIRST)
    known = {n: frame.context(n) for n in t.context if n not in served}
    known |= {n: env.get(n) for n in t.optional if n not in served}
    known["step"] = env["step"]
    asked = Call(node, frame.job, update, env["count"], known, gate=env["gate"], new=frame.new)
    answer = yield from ask(asked, frame)
    if answer is None:
        return update
    # that the gate is open is a decision on the host
    env["gate"], env["count"] = None, answer.count
    for name, value in answer.provided.items():
        _provide(node, name, value, frame)
    if t.kind == "post":
        return _written(t.kind, update, answer.update, frame)
    return answer.update


def ask(asked: Call, frame: "Frame") -> Generator[Any, Any, Answer | None]:
    """Wait for the answer to a call and note its states; None where the step ends for the parameter."""
    answer: Answer | None = yield asked
    if answer is None:  # the gate is closed
        frame.ended = True
        return None
    node = asked.node
    frame.new.update(new_states(node, frame.job, answer.states))
    if answer.count is not None and due(node, answer.count):
        hook = Call(node, frame.job, None, answer.count, asked.context, after=True, new=frame.new)
        frame.hooks.append(hook)
    return answer


def _provide(node: WholeNode, name: str, value: Any, frame: "Frame") -> None:
    if name == "gate":
        frame.ended |= value is False
        value = None if isinstance(value, bool) else value
    elif name == "step":
        frame.env["count"] = value if isinstance(value, int) else None
    if isinstance(value, int | float) and name not in node.transform.opaque:
        value = torch.full((), value, dtype=SCALAR, device=frame.job.param.device)
    frame.env[name] = value


def run_hooks(frame: "Frame") -> Generator[Any, Any, None]:
    """Run what nodes do after the write, on the new states."""
    new, job = frame.new, frame.job
    while frame.hooks:
        hook = frame.hooks.pop(0)
        moments, squares = rotating(hook.node, job.state)
        # what a kernel has computed is stored already
        hook.vectors = [new[key] if key in new else loaded(job, key) for key in moments]
        hook.squares = [new[key] if key in new else loaded(job, key) for key in squares]
        answer: Answer = yield hook
        new.update(new_states(hook.node, job, answer.states))
        new.update(zip(moments, answer.vectors, strict=True))
        new.update(zip(squares, answer.squares, strict=True))


def rotating(node: Node, present: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys of the moments and of the squares that turn with a node's basis."""
    moments: list[str] = []
    squares: list[str] = []
    for inner in node.inner:
        for name, declared in inner.transform.states.items():
            key = inner.state_key(name)
            if key in present and declared.holds in ("moment", "square"):
                (moments if declared.holds == "moment" else squares).append(key)
    return moments, squares
