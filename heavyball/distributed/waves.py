"""Steps of parameters whose programs need other processes: in waves, of which several are under way.

A wave goes through these phases. It starts: what lies before the owner's work is computed on the shards
and sent to the owners. In the middle the owners work and send back; where there are several copies of
the parts, what has come back to one is relayed to the others. It ends: what lies behind is computed on
the shards, and all is written. Every process goes through the same phases with the same sizes, whether
or not it has elements of a parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Opaque, Question
from heavyball.distributed.evaluate import Values
from heavyball.distributed.exchange import Exchanges, Move, back
from heavyball.distributed.parts import Part
from heavyball.distributed.recipe import Phase, Recipe, is_share
from heavyball.distributed.shard import ALONE, Layout, replicated
from heavyball.distributed.staged import Row
from heavyball.distributed.sums import SHARES, Term
from heavyball.linalg.scratch import reused
from heavyball.numerics import SCALAR
from heavyball.runtime.execute import rotating
from heavyball.runtime.job import Answer, Call, Job
from heavyball.runtime.serve import due, serve
from heavyball.runtime.state import loaded, new_states, write
from heavyball.runtime.step import share_of, step_alone, take_given

Shares = tuple[Tensor, ...]
# Completes sums over the processes.
Completes = Callable[[Sequence[Term]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Owned:
    """What the owner of a parameter has in a step."""

    values: Values
    job: Job


@dataclass(eq=False)
class Run:
    """One parameter's way through a step."""

    part: Part
    job: Job
    values: Values
    fresh: bool = False  # whether the parameter had no state before this step
    absent: bool = False  # whether no process has a gradient of it, so that nothing is written
    owned: Owned | None = None
    answered: int = 0
    ended: bool = False
    opaque: dict[Opaque, Any] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Call] = field(default_factory=list)
    shares: Shares | None = None
    row: Row | None = None  # where a kernel computes what `values` would

    @property
    def worker(self) -> "Values | Row":
        """Who computes what is computed on the shard."""
        return self.values if self.row is None else self.row

    @property
    def recipe(self) -> Recipe:
        assert self.part.step is not None
        return self.part.step

    @property
    def whole(self) -> Values:
        """The values that this process computes as the owner."""
        assert self.owned is not None
        return self.owned.values

    @property
    def call(self) -> Job:
        """The parameter as whole transforms see it."""
        assert self.owned is not None
        return self.owned.job


def advance(runs: Sequence[tuple[Values | Row, Phase]], complete: Completes) -> None:
    """Go through the rounds of a phase, all parameters together."""
    for k in range(max((len(phase.rounds) for _, phase in runs), default=0)):
        several = [(v, *phase.rounds[k]) for v, phase in runs if k < len(phase.rounds)]
        terms = []
        for values, order, sums in several:
            values.compute(order)
            terms += [values.term(index) for index in sums]
        totals = iter(complete(terms))
        for values, _, sums in several:
            for index in sums:
                values.take(index, next(totals))


def numbers(
    found: Sequence[tuple[Layout, bool, Sequence[float | Tensor]]], device: torch.device
) -> list[Term]:
    """Terms that give every process of a group what one of them knows; a device is not waited for."""

    def placed(values: Sequence[float | Tensor]) -> Tensor:
        return torch.stack([_number(value, device).to(device, SCALAR) for value in values])

    return [
        Term("sum", replicated((len(values),), layout.group), placed(values), adds)
        for layout, adds, values in found
    ]


class CutWave:
    """Parameters whose recorded programs are computed in parts."""

    def __init__(self, runs: Sequence[Run], complete: Completes, stack: bool):
        self.runs, self._complete, self._stack = runs, complete, stack

    @property
    def sums_first(self) -> bool:
        """Whether the wave begins with a sum over processes, before anything is written."""
        first = [run.recipe for run in self.runs]
        return any(r.before.rounds for r in first) and not any(r.is_hasty for r in first)

    # ---- before

    def start(self) -> None:
        advance([(run.worker, run.recipe.before) for run in self.runs], self._complete)
        self._asking = [run for run in self.runs if run.recipe.questions]
        for run in self._asking:
            run.values.compute(run.recipe.before.rest)
        fresh = [run for run in self._asking if run.fresh]
        moves = [self._move(run, run.part.here) for run in fresh]
        for run in self._asking:
            moves += [self._move(run, run.values.element(i), i) for i in run.recipe.there]
        self._fresh, self._sent = fresh, Exchanges(moves) if moves else None
        del moves
        for run in self._asking:
            run.values.forget(run.recipe.spent)

    @staticmethod
    def _move(run: Run, tensor: Tensor, index: int | None = None) -> Move:
        layout, part = run.part.layout, tensor.reshape(run.part.layout.mine[1])
        dtype = tensor.dtype if index is None else run.part.rounded.get(index, tensor.dtype)
        return Move(layout, layout.at(run.part.owner), part, dtype, tensor.device)

    # ---- at the owner

    @reused()
    def middle(self) -> None:
        arrived = iter(self._sent.wait() if self._sent is not None else ())
        for run in self._fresh:
            param = next(arrived)
            if run.part.is_mine and not run.absent:
                run.part.begin(param)
        for run in self._asking:
            self._hand_over(run, [next(arrived) for _ in run.recipe.there])
        mine = [run for run in self._asking if run.part.is_mine and not run.absent]
        for k in range(max((len(r.recipe.questions) for r in self._asking), default=0)):
            self._ask(k, mine)
        for run in mine:
            if not run.ended:
                run.whole.compute(run.recipe.at_owner[-1])
        self._send_back()
        self._after(mine)

    def _hand_over(self, run: Run, tensors: list[Tensor]) -> None:
        if not run.part.is_mine or run.absent:
            return
        recipe, part = run.recipe, run.part
        like = torch.empty((), dtype=part.here.dtype, device=part.here.device).expand(part.shape)
        there = replace(run.job, param=like, grad=like, origin=None)
        layout = replicated(part.layout.shape, ALONE)
        whole = Values(recipe, there, layout, run.values.totals)
        whole.frees = {}  # what is sent back is looked for at the end
        run.owned = Owned(whole, there)
        run.whole.known.update({i: v for i, v in run.values.known.items() if v.ndim == 0})
        for index, tensor in zip(recipe.there, tensors, strict=True):
            dtype = run.whole.dtype if index in part.rounded else tensor.dtype
            run.whole.known[index] = tensor.to(dtype).reshape(part.shape or (1,))

    def _ask(self, k: int, mine: Sequence[Run]) -> None:
        asking = [run for run in mine if not run.ended and k < len(run.recipe.questions)]
        calls = []
        for run in asking:
            run.whole.compute(run.recipe.at_owner[k])
            calls.append(self._call(run, run.recipe.questions[k]))
        for run, call, answer in zip(asking, calls, serve(calls, self._stack), strict=True):
            if answer is None:
                run.ended = True
            else:
                run.answered = k + 1
                self._take(run, k, call, answer)

    def _call(self, run: Run, question: Question) -> Call:
        def value(place: "int | Opaque | None") -> Any:
            if place is None:
                return None
            if isinstance(place, Opaque):
                return run.opaque[place]
            known = run.whole.known[place]
            level = run.recipe.graph.values[place].level
            return run.whole.element(place) if level == "element" else known

        context = {name: value(place) for name, place in question.context.items()}
        context["step"] = value(question.step)
        count = run.job.count + 1
        known = run.known.get(str(question.step))
        return Call(
            question.node,
            run.call,
            value(question.update),
            count if question.counted else known,
            context,
            gate=value(question.gate),
        )

    def _take(self, run: Run, k: int, call: Call, answer: Answer) -> None:
        node, place, shape = call.node, f"whole.{k}", run.part.shape or (1,)
        dtype = run.whole.dtype
        run.whole.answers[f"{place}.update"] = answer.update.to(dtype).reshape(shape)
        run.pending.update(new_states(node, run.call, answer.states))
        for name, value in answer.provided.items():
            if name in node.transform.opaque:
                run.opaque[Opaque(k, name)] = value
            elif name == "grad":
                run.whole.answers[f"{place}.{name}"] = value.to(dtype).reshape(shape)
            else:
                run.ended |= name == "gate" and value is False
                run.whole.answers[f"{place}.{name}"] = _number(value, run.part.here.device)
        self._find_given(run, place)
        if due(node, answer.count):
            run.hooks.append(Call(node, run.call, None, answer.count, call.context, after=True))

    @staticmethod
    def _find_given(run: Run, place: str) -> None:
        """Put an answer where it stands in the graph."""
        graph = run.recipe.graph
        for index, value in enumerate(graph.values):
            if value.op in ("load", "number") and value.args[0].startswith(f"{place}."):
                run.whole.known[index] = run.whole.answers[value.args[0]]

    # ---- back

    def _send_back(self) -> None:
        moves, known, telling = [], [], []
        for run in self._asking:
            recipe, part = run.recipe, run.part
            for index in recipe.back:
                dtype = part.rounded.get(index, run.values.dtype)
                tensor = None
                if part.is_mine:
                    tensor = torch.zeros(part.shape, dtype=dtype, device=part.here.device)
                    if not (run.ended or run.absent):
                        tensor = run.whole.element(index).reshape(part.shape)
                moves.append(back(part.layout, part.owner, tensor, dtype, part.here.device))
            told: list[float | Tensor] = [0.0] * (recipe.may_end + len(recipe.numbers))
            if part.is_mine and not run.absent:
                told = [run.whole.known.get(index, 0.0) for index in recipe.numbers]
                if recipe.may_end:
                    told.insert(0, float(-1 - run.answered if run.ended else run.answered))
            if told:
                known.append((part.layout, part.is_mine, told))
                telling.append(run)
            run.answered = run.answered if recipe.may_end else len(recipe.questions)
        self._back = Exchanges(moves) if moves else None
        device = self.runs[0].part.here.device if self.runs else torch.device("cpu")
        heard = self._complete(numbers(known, device)) if known else []
        for run, of in zip(telling, heard, strict=True):
            self._learn(run, of)

    @staticmethod
    def _learn(run: Run, told: Tensor) -> None:
        recipe = run.recipe
        if recipe.may_end:  # the host must know
            first, told = int(told[0]), told[1:]
            run.ended, run.answered = first < 0, -1 - first if first < 0 else first
        for index, number in zip(recipe.numbers, told, strict=True):
            kind = recipe.graph.values[index].kind
            run.values.known[index] = number != 0 if kind == "bool" else number

    def _after(self, mine: Sequence[Run]) -> None:
        """What owners do after the write, and the writing of what they own."""
        for run in mine:
            recipe = run.recipe
            for name, index in recipe.outputs.items():
                known = recipe.until[name] <= run.answered and index in run.whole.known
                if name in recipe.owned and known:
                    run.pending[name] = run.whole.written(name, index)
        waiting = [run for run in mine if not run.ended and run.hooks]
        while waiting:
            calls = [run.hooks.pop(0) for run in waiting]
            for call, run in zip(calls, waiting, strict=True):
                moments, squares = rotating(call.node, run.part.held)
                call.new = run.pending
                call.vectors = [_present(run, key) for key in moments]
                call.squares = [_present(run, key) for key in squares]
            for call, run, answer in zip(calls, waiting, serve(calls, self._stack), strict=True):
                assert answer is not None
                moments, squares = rotating(call.node, run.part.held)
                run.pending.update(new_states(call.node, run.call, answer.states))
                run.pending.update(zip(moments, answer.vectors, strict=True))
                run.pending.update(zip(squares, answer.squares, strict=True))
            waiting = [run for run in waiting if run.hooks]

    # ---- behind

    def relay(self) -> None:
        if self._back is not None:
            self._back.relay()

    def end(self) -> None:
        arrived = iter(self._back.wait() if self._back is not None else ())
        for run in self._asking:
            for index in run.recipe.back:
                shape = run.part.layout.mine[1] or (1,)
                run.values.known[index] = next(arrived).to(run.values.dtype).reshape(shape)
        advance([(run.values, run.recipe.behind) for run in self._asking], self._complete)
        for run in self.runs:
            if run.row is not None:
                run.shares = run.row.finish() or None
                torch.autograd.graph.increment_version(run.part.here)
            elif not run.absent:
                recipe = run.recipe
                run.values.compute((recipe.behind if recipe.questions else recipe.before).rest)
                self._write(run)
            run.values.known.clear()
            run.owned = None

    @staticmethod
    def _write(run: Run) -> None:
        recipe, part = run.recipe, run.part
        new, last, shares = {}, len(recipe.questions), []
        for name, index in recipe.outputs.items():
            if is_share(name):
                shares.append((int(name.rsplit(":", 1)[1]), run.values.known.get(index)))
            elif name not in recipe.owned and not (
                run.ended and (recipe.until[name] > run.answered or name == "param")
            ):
                new[name] = run.values.written(name, index)
        assert run.answered == last or run.ended
        if shares and not run.ended:
            run.shares = tuple(value for _, value in sorted(shares))  # type: ignore[misc]
        step, count = new["step"], run.job.count
        if run.owned is not None:
            write(run.call, run.pending, step)
        write(run.job, new, step)
        if run.job.counts is not None:
            run.job.counts.note(part.held["step"], count + 1)


def _present(run: Run, key: str) -> Tensor:
    """A state that turns with a basis, as this step has made it."""
    return run.pending[key] if key in run.pending else loaded(run.call, key)


def _number(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(())
    if isinstance(value, bool):
        return torch.tensor(value, device=device)
    return torch.full((), float(value), dtype=SCALAR, device=device)


class EntireWave:
    """Parameters that their owners step alone, with the program as it is."""

    sums_first = False

    def __init__(self, runs: Sequence[Run], complete: Completes, totals: Mapping[str, Tensor]):
        self.runs, self._complete, self._totals = runs, complete, totals

    def start(self) -> None:
        moves = []
        for run in self.runs:
            layout, part = run.part.layout, run.part
            there = layout.at(part.owner)
            for tensor in (part.here, run.job.grad):
                moves.append(Move(layout, there, tensor, tensor.dtype, tensor.device))
        self._sent = Exchanges(moves)

    def _jobs(self) -> list[tuple[Run, Job]]:
        arrived, found = iter(self._sent.wait()), []
        for run in self.runs:
            param, grad = next(arrived), next(arrived)
            part = run.part
            if not part.is_mine or run.absent:
                continue
            part.begin(param)
            found.append((run, replace(run.job, param=param, grad=grad, origin=None)))
        return found

    def middle(self) -> None:
        params = {}
        given: dict[int, Shares] = {}
        for run, job in self._jobs():
            step_alone(job, dict(self._totals))
            params[id(run)] = job.param
            for _, shares in take_given([job]):
                given[id(run)] = shares
        moves = []
        for run in self.runs:
            part = run.part
            if not part.is_mine and not run.absent:
                part.held["step"] += 1  # a number is every process's
            param, place = params.get(id(run)), (part.here.dtype, part.here.device)
            if param is None and part.is_mine:  # it stays as it is
                param = torch.zeros(part.shape, dtype=place[0], device=place[1])
            moves.append(back(part.layout, part.owner, param, *place))
        self._back = Exchanges(moves)
        if any(
            run.part.program.rate and run.part.program.rate.transform.gives for run in self.runs
        ):
            found = spread_shares(self.runs, given, self._complete)
            for run, of in zip(self.runs, found, strict=True):
                run.shares = of

    def relay(self) -> None:
        self._back.relay()

    def end(self) -> None:
        for run, tensor in zip(self.runs, self._back.wait(), strict=True):
            if not run.absent and tensor.data_ptr() != run.part.here.data_ptr():
                run.part.here.copy_(tensor.reshape(run.part.here.shape))

    def found_shares(self, key: str) -> list[Shares | None]:
        """Each parameter's shares of a sum over all parameters."""
        self.start()
        found: dict[int, Shares] = {}
        for run, job in self._jobs():
            shares = share_of(job, key, dict(self._totals))
            if shares is not None:
                found[id(run)] = shares
        return spread_shares(self.runs, found, self._complete)


def spread_shares(
    runs: Sequence[Run], found: Mapping[int, Shares], complete: Completes
) -> list[Shares | None]:
    """What owners have found, for every process."""
    known = []
    for run in runs:
        shares = found.get(id(run))
        told = [0.0] * (SHARES + 1)
        if shares is not None:
            told[: len(shares) + 1] = [float(len(shares)), *map(float, shares)]
        known.append((run.part.layout, run.part.is_mine, told))
    device = runs[0].part.here.device
    made = complete(numbers(known, device))
    return [tuple(row[1 : 1 + int(row[0])].clone().unbind()) if row[0] else None for row in made]


Wave = CutWave | EntireWave


def in_flight(waves: Sequence[Wave], meanwhile: Callable[[], None]) -> None:
    """Run waves, each phase of one beside the next phase of the wave before it.

    In every turn one wave is sent to the owners before they work on the one sent in the turn before, and
    what they had sent back by then goes on its way to other copies beside that work.

    meanwhile: what else is to do, while the first exchange is under way.
    """
    for turn in range(len(waves) + 2):
        if turn < len(waves):
            waves[turn].start()
        if turn == 0:
            meanwhile()
        if 0 <= turn - 2 < len(waves):
            waves[turn - 2].relay()
        if 0 <= turn - 1 < len(waves):
            waves[turn - 1].middle()
        if 0 <= turn - 2 < len(waves):
            waves[turn - 2].end()
