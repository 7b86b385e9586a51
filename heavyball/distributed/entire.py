"""Waves of parameters that their owners step alone, with the program as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from heavyball.distributed.attempts import Attempts
from heavyball.distributed.exchange import Exchanges, Move, back
from heavyball.distributed.runs import Completes, Run, Shares, numbers
from heavyball.distributed.sums import SHARES
from heavyball.runtime.job import Job
from heavyball.runtime.step import share_of, step_alone, take_given


class EntireWave:
    """Parameters that their owners step alone, with the program as it is."""

    sums_first = False

    def __init__(
        self,
        runs: Sequence[Run],
        complete: Completes,
        attempts: Attempts,
        totals: Mapping[str, Tensor],
    ):
        self.runs, self._complete, self._attempt, self._totals = runs, complete, attempts, totals
        self._stepped: dict[int, Tensor] = {}
        self._given: dict[int, Shares] = {}

    def start(self) -> None:
        moves = []
        for run in self.runs:
            layout, part = run.part.layout, run.part
            there, place = layout.at(part.owner), (part.here.dtype, part.here.device)
            grad = self._attempt(self._gradient, run)
            dtype = part.here.dtype if part.param.grad is None else part.param.grad.dtype
            moves += [Move(layout, there, part.here, *place)]
            moves += [Move(layout, there, grad, dtype, part.here.device)]
        self._sent = Exchanges(moves)

    @staticmethod
    def _gradient(run: Run) -> Tensor:
        return run.job.grad

    def _jobs(self, arrived: Sequence[Tensor]) -> list[tuple[Run, Job]]:
        """The jobs of what is here whole."""
        tensors, found = iter(arrived), []
        for run in self.runs:
            param, grad = next(tensors), next(tensors)
            part = run.part
            if part.is_mine and not run.absent:
                part.begin(param)
                found.append((run, replace(run.job, param=param, grad=grad, origin=None)))
        return found

    def middle(self) -> None:
        self._attempt(self._step, self._sent.wait())
        moves = []
        for run in self.runs:
            part, param = run.part, self._stepped.get(id(run))
            moves.append(back(part.layout, part.owner, param, part.here.dtype, part.here.device))
        self._back = Exchanges(moves)
        rates = [run.part.program.rate for run in self.runs]
        if any(rate is not None and rate.transform.gives for rate in rates):
            found = self._spread(self._given)
            for run, of in zip(self.runs, found, strict=True):
                run.shares = of

    def _step(self, arrived: Sequence[Tensor]) -> None:
        for run, job in self._jobs(arrived):
            step_alone(job, dict(self._totals))
            self._stepped[id(run)] = job.param
            for _, shares in take_given([job]):
                self._given[id(run)] = shares
        for run in self.runs:
            if not run.part.is_mine and not run.absent:
                run.part.held["step"] += 1  # a number is every process's

    def relay(self) -> None:
        self._back.relay()

    def end(self) -> None:
        self._attempt(self._write, self._back.wait())

    def _write(self, arrived: Sequence[Tensor]) -> None:
        for run, tensor in zip(self.runs, arrived, strict=True):
            if not run.absent and tensor.data_ptr() != run.part.here.data_ptr():
                run.part.here.copy_(tensor.reshape(run.part.here.shape))

    def found_shares(self, key: str) -> list[Shares | None]:
        """Each parameter's shares of a sum over all parameters."""
        self.start()
        found: dict[int, Shares] = {}
        self._attempt(self._find_shares, key, self._sent.wait(), found)
        return self._spread(found)

    def _find_shares(self, key: str, arrived: Sequence[Tensor], found: dict[int, Shares]) -> None:
        for run, job in self._jobs(arrived):
            shares = share_of(job, key, dict(self._totals))
            if shares is not None:
                found[id(run)] = shares

    def _spread(self, found: Mapping[int, Shares]) -> list[Shares | None]:
        """What owners have found, for every process."""
        device = self.runs[0].part.here.device
        known = []
        for run in self.runs:
            told = self._attempt(_told, found.get(id(run))) or [0.0] * (SHARES + 1)
            known.append((run.part.layout, run.part.is_mine, told))
        made = self._complete(numbers(known, device))
        return [self._attempt(_heard, row) for row in made]


def _told(shares: Shares | None) -> list[float]:
    """How many shares there are, and which."""
    if shares is None:
        return [0.0] * (SHARES + 1)
    return [float(len(shares)), *map(float, shares), *[0.0] * (SHARES - len(shares))]


def _heard(row: Tensor) -> Shares | None:
    return tuple(row[1 : 1 + int(row[0])].clone().unbind()) if row[0] else None
