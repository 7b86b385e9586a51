"""Runs a program over many parameters: promote, execute, write.

A program runs as a generator. Where an element needs a sum over all parameters it yields its share
and is sent the sum, so that the parameters meet there and nowhere else.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from heavyball.calls import call, run_hooks
from heavyball.chain import Fork, Node, Program
from heavyball.numerics import SCALAR, compute_dtype, saturate, shape_of, version_of, working
from heavyball.states import add_several, working_param, working_state
from heavyball.storage import create, create_param, drawing, held, held_param
from heavyball.transform import CONTEXT, State, frozen, keyword_names
from heavyball.whole import Call, serve, stacks

# Dtypes of state that do not have the range of float64.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Scalars:
    """The live hyper-parameters of one group as 0-d tensors, refilled where they changed."""

    def __init__(self) -> None:
        self._filled: dict[tuple[str, torch.device], tuple[Any, Any]] = {}

    def get(self, group: Mapping[str, Any], key: str, device: torch.device) -> Any:
        """The value as a tensor, a tuple as a tuple of tensors; None stays None."""
        value = group[key]
        if value is None:
            return None
        value = frozen(value)  # a list could change in place and still be equal to itself
        if isinstance(value, Tensor):
            return value.detach().to(device, SCALAR).reshape(())
        known, tensors = self._filled.get((key, device), (None, None))
        if known != value:
            parts = value if isinstance(value, tuple) else (value,)
            made = tuple(torch.full((), v, dtype=SCALAR, device=device) for v in parts)
            tensors = made if isinstance(value, tuple) else made[0]
            self._filled[key, device] = value, tensors
        return tensors


class Counts:
    """The steps of parameters as Python numbers, so that no step has to wait for a device.

    A number is read from its tensor again when that was replaced or written by somebody else.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def read(self, step: Tensor) -> int:
        """How many gradients a parameter has had, given its `step` tensor."""
        version, count = self._known.get(step, (None, 0))
        if version is None or version != version_of(step):
            count = int(step)
            self.note(step, count)
        return count

    def note(self, step: Tensor, count: int) -> None:
        """Remember what was just written to a `step` tensor."""
        self._known[step] = version_of(step), count


@dataclass
class Job:
    """One parameter's part of a step."""

    program: Program
    param: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: dict[str, Tensor]
    scalars: Scalars
    # of the bits to round the parameter and its state with; None rounds to nearest
    stream: int | None = None
    # for whole transforms: the stream of their noise, and who knows `step` as a Python number
    noise: int = 0
    place: int = 0
    counts: Counts | None = None
    # shares of sums that are needed after the step, by their names
    gave: dict[str, Tensor] = field(default_factory=dict)
    # whether something is kept that has not the range of float64
    narrow: bool = field(init=False)

    def __post_init__(self) -> None:
        self.narrow = has_narrow(self.state)

    @property
    def count(self) -> int:
        """How many gradients the parameter had before this one."""
        return 0 if self.counts is None else self.counts.read(self.state["step"])


def has_narrow(state: Mapping[str, Tensor]) -> bool:
    """Whether state (or its scales) is of a dtype with the range of float32 or less."""
    return any(tensor.dtype in NARROW for tensor in state.values())


@dataclass
class Frame:
    """What one run of a program knows: context for its elements, and the new state so far."""

    job: Job
    env: dict[str, Any]
    new: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Call] = field(default_factory=list)  # what may be to do after the write
    ended: bool = False  # a host decision: nothing behind this point happens for the parameter

    def hyper(self, node: Node, name: str) -> Any:
        key, index = node.hyper[name]
        value = self.job.scalars.get(self.job.group, key, self.job.param.device)
        value = value if index is None else value[index]
        # it has the unit of the gradient, as moments have
        scaled = name == "eps" and value is not None and "eps_change" in self.env
        return value * self.env["eps_change"] if scaled else value

    def context(self, name: str) -> Any:
        if name in self.job.program.common and name not in self.env:
            return self.job.scalars.get(self.job.group, name, self.job.param.device)
        if name == "lr" and "lr" not in self.env:
            return self.env["base_lr"] * self._warmup()
        return self.env[name]

    def _warmup(self) -> Tensor | float:
        if not self.job.group["warmup_steps"]:
            return 1.0
        steps = self.job.scalars.get(self.job.group, "warmup_steps", self.job.param.device)
        return (self.env["step"] / steps).clamp(max=1)


def add_missing_state(
    program: Program,
    param: Tensor,
    group: Mapping[str, Any],
    state: dict[str, Tensor],
    all_lazy: bool = False,
) -> None:
    """Create the state that a parameter needs under the group's present values and does not have.

    all_lazy: also what it would need under other values.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=SCALAR, device=param.device)
    create_param(state, param, program.storage.param)
    for node, name, declared in program.states:
        key = node.state_key(name)
        if key in state:
            continue
        if key in program.lazy_keys and not (all_lazy or lazy_wanted(node, declared, group)):
            continue
        if declared.several:
            add_several(program, node, name, param, state)
            continue
        tensor = declared.init(working_param(param, state), node.transform.options)
        if tensor is not None:
            plain = declared.is_number or param.ndim or node.transform.whole
            shape = tensor.shape if plain else param.shape
            chosen = program.storage.format_of(key, name, declared, shape, param.shape)
            # a view would hold on to its memory a second time, see `heavyball.compiler.watch.Kept`
            tensor = tensor if tensor.shape == shape else tensor.reshape(shape).clone()
            create(state, key, tensor, chosen, declared.holds)


def lazy_wanted(node: Node, declared: State, group: Mapping[str, Any]) -> bool:
    """Whether a state that may be missing is needed by this group."""
    if declared.given_up(node.transform.options, group):
        return False
    if declared.needed_by not in node.transform.hyper:
        return True
    key, index = node.hyper[declared.needed_by or ""]
    return bool(group[key] if index is None else group[key][index])


Shares = tuple[Tensor, ...]
# What a run waits for: the sums of its shares and the others', or an answer to calls.
Request = tuple[str, Shares] | Call
Run = Generator[Request, Any, Any]


def execute(nodes: Iterable[Node | Fork], update: Any, frame: Frame) -> Run:
    """Run nodes in order; yields (key, shares) wherever sums over all parameters are needed, and a
    call wherever a transform needs the whole tensor."""
    for node in nodes:
        if isinstance(node, Fork):
            update = yield from _fork(node, update, frame)
        elif node.transform.whole:
            update = yield from call(node, update, frame)
        else:
            update = yield from _apply(node, update, frame)
        if frame.ended:
            break
    return update


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
            arguments[name] = frame.context(name)
    for name in t.optional:
        arguments[name] = frame.env.get(name)
    return arguments


def _apply(node: Node, update: Any, frame: Frame) -> Run:
    t, env = node.transform, frame.env
    arguments = _arguments(node, frame)
    gate = env["gate"]
    old = [_in_present_unit(node, name, frame) for name in t.states]
    if t.over_all is not None:
        known = {**dict(zip(t.states, old, strict=True)), **arguments}
        there = CONTEXT.keys() | frame.job.program.common
        asked = {n: frame.context(n) if n in there else known[n] for n in t.over_all_context}
        shares = t.over_all(update, **asked)
        total = yield node.key, _given(shares, frame) if t.finish else _gated((shares,), gate)
        if t.finish:
            arguments = _arguments(node, frame)  # the group's numbers are new now
        else:
            arguments["total"] = total
    before = update
    update, new, provided = _results(node, t.update(update, *old, **arguments))
    compute = compute_dtype(frame.job.param.dtype)
    if update.is_floating_point() and update.dtype != compute:
        update = update.to(compute)  # a condition times a number is float64
    _check_shapes(node, before, update, old, new)
    for name, before, after in zip(t.states, old, new, strict=True):
        if before is not None:
            kept = after if gate is None else torch.where(gate, after, before)
            frame.new[node.state_key(name)] = kept
    if t.gives:
        for place, share in enumerate(_given(provided[len(t.provides) :], frame)):
            frame.new[share_name(node.key, place)] = share
    for name, value in zip(t.provides, provided[: len(t.provides)], strict=True):
        env[name] = _both(gate, value) if name == "gate" else value
        if name == "unit_change" and gate is not None:
            # what is left out keeps the unit of the step before, as this element's own state does
            env[name] = torch.where(gate, value, 1.0)
        if name in ("gate", "step"):
            env["count"] = None  # no longer known on the host
    if t.kind == "writer":
        update = env["param"] = update if gate is None else torch.where(gate, update, env["param"])
    return update


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
    change = frame.env.get("unit_change")
    if tensor is None or change is None or declared.is_number:
        return tensor
    if declared.holds not in ("moment", "square"):
        return tensor
    return tensor * (change if declared.holds == "moment" else change**2)


def _results(node: Node, result: Any) -> tuple[Any, tuple, tuple]:
    """Split what a transform returned into the update, its new state and what it provides."""
    t = node.transform
    parts = result if isinstance(result, tuple) else (result,)
    expected = 1 + len(t.states) + len(t.provides) + len(t.gives)
    if len(parts) != expected or not isinstance(parts[0], Tensor):
        names = ", ".join(["update", *t.states, *t.provides, *t.gives])
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{node.key} returned ({got}), expected {expected} values: {names}")
    cut = 1 + len(t.states)
    return parts[0], parts[1:cut], parts[cut:]


# Makes new numbers of the groups from the shares of their jobs.
Finisher = Callable[[list[tuple[Job, Shares]]], None]


def run(
    jobs: list[Job],
    total_keys: list[str],
    foreach: bool | None = None,
    finisher: Finisher | None = None,
) -> None:
    """Step every job's parameter.

    Parameters run one after the other where they can. Where the chain needs sums over all of them, or
    small ones can share a call of a whole transform, their intermediate tensors are kept while they
    wait for each other. With `foreach=False` the part before a sum runs again after it instead, so
    that at most one parameter's intermediate tensors exist at a time. The mathematics is the same either
    way; small parameters whose whole transforms are called together have batched products, which round
    otherwise.

    finisher: takes the shares of an element that has a `finish`.
    """
    if foreach is False or not total_keys:
        totals: dict[str, Tensor] = {}
        for key in total_keys:
            found = [(job, share_of(job, key, totals)) for job in jobs]
            totals.update(_meet(key, [(j, s) for j, s in found if s is not None], finisher))
        small = [] if foreach is False else [job for job in jobs if _stacks(job)]
        if small:
            _run_together(small, [], finisher)
        for job in jobs:
            if not (small and _stacks(job)):
                drive(job, totals)
    else:
        _run_together(jobs, total_keys, finisher)
    left = take_given(jobs)
    if left:
        assert finisher is not None
        finisher(left)


def _stacks(job: Job) -> bool:
    return job.program.has_whole and stacks(job.param)


def _run_together(jobs: list[Job], total_keys: list[str], finisher: Finisher | None) -> None:
    runs = {id(job): _start(job) for job in jobs}
    waiting = {id(job): next(runs[id(job)], None) for job in jobs}

    def answer(job: Job, value: Any) -> None:
        try:
            waiting[id(job)] = runs[id(job)].send(value)
        except StopIteration:
            waiting[id(job)] = None

    def answer_calls() -> None:
        while asking := [job for job in jobs if isinstance(waiting[id(job)], Call)]:
            calls: list[Call] = [waiting[id(job)] for job in asking]  # type: ignore[misc]
            for job, found in zip(asking, serve(calls, stack=True), strict=True):
                answer(job, found)

    answer_calls()
    for key in total_keys:
        members = [job for job in jobs if (share := waiting[id(job)]) and share[0] == key]  # type: ignore[index]
        shares = [(job, waiting[id(job)][1]) for job in members]  # type: ignore[index]
        totals = _meet(key, shares, finisher)  # type: ignore[arg-type]
        for job in members:
            answer(job, totals[key].to(job.param.device))
        answer_calls()


Finish = Callable[[dict[str, Tensor]], object]


def start(job: Job, finish: Finish) -> Run:
    """One parameter's step: yields its requests, and hands the new values to `finish` at the end."""
    raw = working(job.grad)
    if raw.dtype != compute_dtype(job.param.dtype):
        raw = raw.to(compute_dtype(job.param.dtype))
    grad = saturate(raw, job.narrow)
    device = job.param.device
    env = {
        "step": job.state["step"] + 1,
        "param": working_param(job.param, job.state),
        "grad": grad,
        "raw_grad": raw,
        "base_lr": job.scalars.get(job.group, "lr", device),
        "gate": None,
        "count": job.count + 1,
    }
    frame = Frame(job, env)
    step = env["step"]
    yield from execute(job.program.nodes, grad, frame)
    if not frame.ended:
        yield from run_hooks(frame)
        frame.new["param"] = frame.env["param"]
    new = {**frame.new, "step": step}
    # what only led to the new values is not kept beside the temporary tensors of writing them
    del frame, env, grad, raw
    finish(new)


def _start(job: Job) -> Run:
    return start(job, functools.partial(_commit, job))


def share_of(job: Job, key: str, totals: Mapping[str, Tensor]) -> Shares | None:
    """A job's shares of one element's sums, given the sums before it; None where it has no part."""
    if key not in job.program.total_keys:
        return None
    run = start(job, lambda values: None)
    request = next(run, None)
    while request is not None:
        if isinstance(request, Call):
            request.trial = True  # the step asks again
            answer: Any = serve([request], stack=False)[0]
        elif request[0] == key:
            run.close()
            return request[1]
        else:
            answer = totals[request[0]].to(job.param.device)
        try:
            request = run.send(answer)
        except StopIteration:
            break
    return None  # it ended before


def drive(job: Job, totals: Mapping[str, Tensor]) -> None:
    """Step one parameter, given every sum that it needs."""
    generator = _start(job)
    request = next(generator, None)
    while request is not None:
        if isinstance(request, Call):
            answer: Any = serve([request], stack=False)[0]
        else:
            answer = totals[request[0]].to(job.param.device)
        try:
            request = generator.send(answer)
        except StopIteration:
            request = None


def _meet(
    key: str, found: list[tuple[Job, Shares]], finisher: Finisher | None
) -> dict[str, Tensor]:
    """The sum of all shares; where an element makes numbers of the group from them, that is done."""
    if not found:
        return {}
    rate = found[0][0].program.rate
    if rate is not None and rate.key == key:
        assert finisher is not None
        finisher(found)
        return {key: torch.zeros((), dtype=SCALAR, device="cpu")}
    total = None
    for _, (share,) in found:
        share = share.to(SCALAR)
        total = share if total is None else total + share.to(total.device)
    assert total is not None
    return {key: total}


def take_given(jobs: Iterable[Job]) -> list[tuple[Job, Shares]]:
    """The shares that a step has left behind, each once."""
    found = [(job, tuple(job.gave.values())) for job in jobs if job.gave]
    for job, _ in found:
        job.gave = {}
    return found


def _commit(job: Job, values: dict[str, Tensor]) -> None:
    """Write the new parameter and state into the tensors that hold the old ones."""
    job.gave = {key: values.pop(key) for key in list(values) if key.startswith(SHARE)}
    count = job.count
    write(job, values, values["step"])
    if job.counts is not None:
        job.counts.note(job.state["step"], count + 1)


def write(job: Job, values: dict[str, Tensor], step: Tensor) -> None:
    """Write new values by key in the formats in which they are kept; empties `values`.

    step: of which the random bits are.
    """
    targets = {key: job.param if key == "param" else job.state[key] for key in values}
    old = {target.untyped_storage().data_ptr() for target in targets.values()}
    # a transform may hand on an old state as another state: save it before it is overwritten
    safe = {
        k: v.clone() if v.untyped_storage().data_ptr() in old and not _same(targets[k], v) else v
        for k, v in values.items()
    }
    values.clear()  # each is freed when it is written
    for key, target in targets.items():
        value = safe.pop(key).reshape(target.shape)
        if _same(target, value):
            continue  # handed back as it was
        if key == "param":
            kept = held_param(job.state, target)
        elif (holds := job.program.holds_of(key)) is not None:
            kept = held(job.state, key, holds)
        else:
            target.copy_(value)
            continue
        kept.store(value, drawing(target, job.stream, key, step))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of memory in the same order."""
    place = one.data_ptr(), one.numel(), one.dtype
    return place == (other.data_ptr(), other.numel(), other.dtype) and (
        one.stride() == other.stride() or one.ndim == 0
    )


def average(
    node: Node, param: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], scalars: Scalars
) -> Tensor:
    """The weights to evaluate with, from the node of a chain that keeps an average."""
    assert node.transform.evaluate is not None
    job = Job(Program(()), param, param, group, state, scalars)
    frame = Frame(job, {})
    old = [working_state(node, name, frame.job) for name in node.transform.states]
    names = keyword_names(node.transform.evaluate)
    hyper = {name: frame.hyper(node, name) for name in names}
    current = working_param(param, state)
    return node.transform.evaluate(current, *old, **hyper).reshape(param.shape)
