"""Steps many parameters: starts their runs, answers what they ask, writes the results."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.program import Node, Program
from heavyball.core.transform import keyword_names
from heavyball.numerics import SCALAR, compute_dtype, saturate, working
from heavyball.runtime.addresses import check_writable
from heavyball.runtime.execute import (
    SHARE,
    Request,
    Run,
    advance,
    complete,
    execute,
    offered,
    run_hooks,
)
from heavyball.runtime.job import Call, Frame, Job, Scalars
from heavyball.runtime.serve import serve, stacks
from heavyball.runtime.state import working_param, working_state, write
from heavyball.runtime.sums import Shares, over_all, stacked

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
    check_writable(job.param for job in jobs)
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
                step_alone(job, totals)
    else:
        _run_together(jobs, total_keys, finisher)
    left = take_given(jobs)
    if left:
        assert finisher is not None
        finisher(left)


def _stacks(job: Job) -> bool:
    return job.program.has_whole and stacks(job.param)


def _run_together(jobs: list[Job], total_keys: list[str], finisher: Finisher | None) -> None:
    runs = Runs(map(_start, jobs))
    runs.answer_calls()
    for key in total_keys:
        shares = runs.shares_for(key)
        totals = _meet(key, [(jobs[i], share) for i, share in shares.items()], finisher)
        for index in shares:
            runs.answer(index, totals[key].to(jobs[index].param.device))
        runs.answer_calls()


class Runs:
    """Runs that advance together, and the request of each."""

    def __init__(self, runs: Iterable[Run]):
        self._runs = list(runs)
        self.waiting = [advance(run) for run in self._runs]

    def asking(self, kind: type) -> list[int]:
        """The numbers of those whose request is of this type."""
        return [i for i, request in enumerate(self.waiting) if isinstance(request, kind)]

    def shares_for(self, key: str) -> dict[int, Shares]:
        """The shares of the runs that wait for this sum, by number."""
        requests = ((i, self.waiting[i]) for i in self.asking(tuple))
        return {i: request[1] for i, request in requests if request[0] == key}  # type: ignore[index]

    def answer(self, index: int, value: Any) -> None:
        """Go on with one of them."""
        self.waiting[index] = advance(self._runs[index], value)

    def answer_calls(self, stack: bool = True) -> None:
        """Answer all calls of whole transforms, also those that follow.

        stack: allows to join parameters of one shape into one call.
        """
        while asking := self.asking(Call):
            answers = serve([self.waiting[i] for i in asking], stack)  # type: ignore[misc]
            for index, answer in zip(asking, answers, strict=True):
                self.answer(index, answer)


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
    if job.program.offers:
        env.update(offered(frame))
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
    return complete(run, functools.partial(_answer, job, totals, trial=True), until=key)


def step_alone(job: Job, totals: Mapping[str, Tensor]) -> None:
    """Step one parameter, given every sum that it needs."""
    complete(_start(job), functools.partial(_answer, job, totals))


def _answer(job: Job, totals: Mapping[str, Tensor], request: Request, trial: bool = False) -> Any:
    if isinstance(request, Call):
        request.trial = trial
        return serve([request], stack=False)[0]
    assert isinstance(request, tuple)
    return totals[request[0]].to(job.param.device)


def _meet(
    key: str, found: list[tuple[Job, Shares]], finisher: Finisher | None
) -> dict[str, Tensor]:
    """The sum of all shares; also computes the numbers of a group that depend on it."""
    if not found:
        return {}
    rate = found[0][0].program.rate
    if rate is not None and rate.key == key:
        assert finisher is not None
        finisher(found)
        return {key: torch.zeros((), dtype=SCALAR, device="cpu")}
    return {key: over_all(stacked([shares for _, shares in found]))[0]}


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


def average(
    node: Node, param: Tensor, state: dict[str, Tensor], group: Mapping[str, Any], scalars: Scalars
) -> Tensor:
    """The weights to evaluate with, from the node of a chain that keeps an average."""
    assert node.transform.evaluate is not None
    job = Job(Program((node,)), param, param, group, state, scalars)
    frame = Frame(job, {})
    old = [working_state(node, name, frame.job) for name in node.transform.states]
    names = keyword_names(node.transform.evaluate)
    hyper = {name: frame.hyper(node, name) for name in names}
    current = working_param(param, state)
    return node.transform.evaluate(current, *old, **hyper).reshape(param.shape)
