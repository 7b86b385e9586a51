"""Waves of parameters whose recorded programs are computed in parts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.frontend.graph import Opaque, Question
from heavyball.distributed.attempts import Attempts
from heavyball.distributed.evaluate import Values
from heavyball.distributed.exchange import Exchanges, Move, back
from heavyball.distributed.recipe import is_share
from heavyball.distributed.runs import Completes, Owned, Run, advance, as_number, numbers
from heavyball.distributed.shard import ALONE, replicated
from heavyball.linalg.scratch import reused
from heavyball.runtime.execute import rotating
from heavyball.runtime.job import Answer, Call
from heavyball.runtime.serve import due, serve
from heavyball.runtime.state import loaded, new_states, write


class CutWave:
    """Parameters whose recorded programs are computed in parts.

    What is computed is attempted, and what is exchanged follows from the recipes alone, so that a
    process takes part in every exchange also where it has failed.
    """

    def __init__(self, runs: Sequence[Run], complete: Completes, attempts: Attempts, stack: bool):
        self.runs, self._complete, self._attempt, self._stack = runs, complete, attempts, stack
        self._asking = [run for run in runs if run.recipe.questions]
        self._fresh = [run for run in self._asking if run.fresh]

    @property
    def sums_first(self) -> bool:
        """Whether the wave begins with a sum over processes, before anything is written."""
        first = [run.recipe for run in self.runs]
        return any(r.before.rounds for r in first) and not any(r.is_hasty for r in first)

    # ---- before

    def start(self) -> None:
        phases = [(run, run.recipe.before) for run in self.runs]
        advance(phases, self._complete, self._attempt)
        for run in self._asking:
            self._attempt(self._compute_rest, run)
        moves = [self._move(run, None) for run in self._fresh]
        for run in self._asking:
            moves += [self._move(run, index) for index in run.recipe.there]
        self._sent = Exchanges(moves) if moves else None
        del moves
        for run in self._asking:
            self._attempt(self._forget_sent, run)

    @staticmethod
    def _compute_rest(run: Run) -> None:
        run.values.compute(run.recipe.before.rest)

    @staticmethod
    def _forget_sent(run: Run) -> None:
        run.values.forget(run.recipe.spent)

    def _move(self, run: Run, index: int | None) -> Move:
        """The move of a value to the owner, or of the parameter."""
        part, layout = run.part, run.part.layout
        dtype = part.here.dtype if index is None else run.dtype(index)
        here = self._attempt(self._here, run, index)
        return Move(layout, layout.at(part.owner), here, dtype, part.here.device)

    @staticmethod
    def _here(run: Run, index: int | None) -> Tensor:
        tensor = run.part.here if index is None else run.values.element(index)
        return tensor.reshape(run.part.layout.mine[1])

    # ---- at the owner

    @reused()
    def middle(self) -> None:
        arrived = self._sent.wait() if self._sent is not None else []
        mine = [run for run in self._asking if run.part.is_mine and not run.absent]
        self._attempt(self._work, mine, arrived)
        self._send_back()
        self._attempt(self._after, mine)

    def _work(self, mine: Sequence[Run], arrived: Sequence[Tensor]) -> None:
        """What this process computes as the owner of parameters."""
        tensors = iter(arrived)
        for run in self._fresh:
            param = next(tensors)
            if run.part.is_mine and not run.absent:
                run.part.begin(param)
        for run in self._asking:
            self._hand_over(run, [next(tensors) for _ in run.recipe.there])
        for k in range(max((len(r.recipe.questions) for r in self._asking), default=0)):
            self._ask(k, mine)
        for run in mine:
            if not run.ended:
                run.whole.compute(run.recipe.at_owner[-1])

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
        whole.known.update({i: v for i, v in run.values.known.items() if v.ndim == 0})
        for index, tensor in zip(recipe.there, tensors, strict=True):
            dtype = whole.dtype if index in part.rounded else tensor.dtype
            whole.known[index] = tensor.to(dtype).reshape(part.shape or (1,))

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
                run.whole.answers[f"{place}.{name}"] = as_number(value, run.part.here.device)
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
                made = self._attempt(self._result, run, index) if part.is_mine else None
                moves.append(
                    back(part.layout, part.owner, made, run.dtype(index), part.here.device)
                )
            if recipe.may_end or recipe.numbers:
                told = self._attempt(self._told, run)
                # who has failed ends the step of what it owns before the first question
                failed = [-1.0] * recipe.may_end + [0.0] * len(recipe.numbers)
                known.append((part.layout, part.is_mine, failed if told is None else told))
                telling.append(run)
            run.answered = run.answered if recipe.may_end else len(recipe.questions)
        self._back = Exchanges(moves) if moves else None
        device = self.runs[0].part.here.device if self.runs else torch.device("cpu")
        heard = self._complete(numbers(known, device)) if known else []
        for run, of in zip(telling, heard, strict=True):
            self._attempt(self._learn, run, of)

    @staticmethod
    def _result(run: Run, index: int) -> Tensor:
        part = run.part
        if run.ended or run.absent:
            return torch.zeros(part.shape, dtype=run.dtype(index), device=part.here.device)
        return run.whole.element(index).reshape(part.shape)

    @staticmethod
    def _told(run: Run) -> list[float | Tensor]:
        """The numbers that every process needs of what the owner computes."""
        recipe = run.recipe
        if not run.part.is_mine or run.absent:
            return [0.0] * (recipe.may_end + len(recipe.numbers))
        told: list[float | Tensor] = [run.whole.known.get(index, 0.0) for index in recipe.numbers]
        if recipe.may_end:
            told.insert(0, float(-1 - run.answered if run.ended else run.answered))
        return told

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
        arrived = self._back.wait() if self._back is not None else []
        self._attempt(self._take_back, arrived)
        phases = [(run, run.recipe.behind) for run in self._asking]
        advance(phases, self._complete, self._attempt)
        for run in self.runs:
            self._attempt(self._finish, run)
            run.owned = None

    def _take_back(self, arrived: Sequence[Tensor]) -> None:
        tensors = iter(arrived)
        for run in self._asking:
            for index in run.recipe.back:
                shape = run.part.layout.mine[1] or (1,)
                run.values.known[index] = next(tensors).to(run.values.dtype).reshape(shape)

    def _finish(self, run: Run) -> None:
        """Compute what is left and write."""
        if run.row is not None:
            run.shares = run.row.finish() or None
            torch.autograd.graph.increment_version(run.part.here)
        elif not run.absent:
            recipe = run.recipe
            run.values.compute((recipe.behind if recipe.questions else recipe.before).rest)
            self._write(run)
        run.values.known.clear()

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
