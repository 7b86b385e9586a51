"""One run: a contender, a learning rate and a seed; and what was measured in it."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from heavyball.errors import REFUSALS, RaceError, one_line
from heavyball.optim.optimizer import ChainOpt
from heavyball.race.contenders import Contender, perturbs, reads_loss, state_bytes
from heavyball.race.tasks import Task

# Steps of one seed draw from generators of their own; a run has fewer steps than this.
SEED_STRIDE = 2**31


@dataclass(frozen=True)
class Settings:
    """What is the same for every run of a race."""

    steps: int
    batch_size: int
    eval_every: int
    weight_decay: float | None = None
    metrics: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What the results depend on; measuring changes none."""
        return {name: value for name, value in vars(self).items() if name != "metrics"}


@dataclass
class Curve:
    """What an evaluation found, one entry for each.

    train_loss: the mean since the last one.
    d: the first group's estimated distance, of an optimizer that finds its learning rate.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    measure: list[float] = field(default_factory=list)
    d: list[float | None] = field(default_factory=list)


def rehearse(task: Task, contender: Contender, seed: int, settings: Settings) -> set[str]:
    """Build the contender at every learning rate, make one step at the first, and say which of the
    metrics it has.

    Errors: RaceError with the label and the reason if any of it is refused.
    """
    for lr in contender.lrs[::-1]:
        with seeded(seed):
            run = _Run(task, contender, lr, seed, settings)
    with seeded(seed):
        try:
            run.step(1, task.batches(seed, settings.batch_size))
            return {name for name, value in run.measured().items() if value is not None}
        except REFUSALS as error:
            raise RaceError(f"{contender.label} cannot step: {one_line(error)}") from None


def train(
    task: Task,
    contender: Contender,
    lr: float,
    seed: int,
    settings: Settings,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train one model and return the record of the run.

    Initial weights, the order of the data and dropout depend on the seed alone, so every contender
    meets the same. A run ends early when a loss is not finite.
    """
    with seeded(seed):
        run = _Run(task, contender, lr, seed, settings)
        finite = run.evaluate(0)
        batches = task.batches(seed, settings.batch_size)
        for step in range(1, settings.steps + 1):
            finite = finite and run.step(step, batches)
            if finite and (step % settings.eval_every == 0 or step == settings.steps):
                finite = run.evaluate(step)
                on_step(step)
            if not finite:
                break
        return run.record("finished" if finite else "diverged", step)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _Run:
    """A model and its optimizer, and the clock."""

    def __init__(
        self, task: Task, contender: Contender, lr: float, seed: int, settings: Settings
    ) -> None:
        self.task, self.contender, self.lr, self.seed = task, contender, lr, seed
        self.model = task.model(seed).to(task.device)
        self.optimizer = contender.build(self.model, lr, settings.weight_decay)
        self.reads_loss = reads_loss(self.optimizer)
        self.curve = Curve()
        # of `opt.metrics()`, at each evaluation as of the last step; None where there is none
        self.metrics: dict[str, list[float | None]] = {name: [] for name in settings.metrics}
        self.measured()  # a first call asks for them
        self.seconds = 0.0
        self.step_ms: list[float] = []
        self.losses: list[float] = []

    def _again(self, step: int, batch: Any, loss: Any) -> Callable[[], Any]:
        """A closure for a second gradient: the first call finds the gradients that are there."""
        calls = iter([True])

        def closure() -> Any:
            if next(calls, False):
                return loss
            torch.manual_seed(self.seed * SEED_STRIDE + step)
            self.optimizer.zero_grad()
            again = self.task.loss(self.model, batch)
            again.backward()
            return again

        return closure

    def step(self, step: int, batches: Iterator[Any]) -> bool:
        """One step of training; whether its loss was finite."""
        # Drawing from a fresh generator keeps dropout the same whatever an optimizer draws.
        torch.manual_seed(self.seed * SEED_STRIDE + step)
        start = time.perf_counter()
        batch = next(batches)
        loss = self.task.loss(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            return False
        self.optimizer.zero_grad()
        loss.backward()
        before = self._now()
        if perturbs(self.optimizer):
            self.optimizer.step(self._again(step, batch, loss))
        elif self.reads_loss:
            self.optimizer.step(loss=value)  # type: ignore[call-overload]
        else:
            self.optimizer.step()
        after = self._now()
        self.seconds += after - start
        self.step_ms.append((after - before) * 1000)
        self.losses.append(value)
        return True

    def _now(self) -> float:
        """The time after the device has finished its work."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()

    def evaluate(self, step: int) -> bool:
        """Evaluate, with averaged weights where the optimizer has them; whether it was finite."""
        with evaluating(self.model, self.optimizer), torch.no_grad():
            loss, measure = self.task.evaluate(self.model)
        if not math.isfinite(loss):
            return False
        curve = self.curve
        curve.step.append(step)
        curve.seconds.append(self.seconds)
        curve.train_loss.append(statistics.fmean(self.losses) if self.losses else None)
        curve.test_loss.append(loss)
        curve.measure.append(measure)
        distance = self.optimizer.param_groups[0].get("d")
        curve.d.append(None if distance is None else float(distance))
        for name, value in self.measured().items():
            self.metrics[name].append(value)
        self.losses.clear()
        return True

    def measured(self) -> dict[str, float | None]:
        """The requested metrics, of the first group unless another is named."""
        names = self.metrics
        if not names or not isinstance(self.optimizer, ChainOpt):
            return dict.fromkeys(names)
        every = self.optimizer.metrics()
        found = {name: every.get(name, every.get(f"group_0/{name}")) for name in names}
        values = {name: math.nan if v is None else v.item() for name, v in found.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def record(self, status: str, step: int) -> dict[str, Any]:
        # The first step creates state and may compile.
        timed = self.step_ms[1:] or self.step_ms
        done = status == "finished"
        return {
            "contender": self.contender.label,
            "lr": self.lr,
            "seed": self.seed,
            "status": status,
            "stopped_at_step": step,
            "test_loss": self.curve.test_loss[-1] if done else None,
            "measure": self.curve.measure[-1] if done else None,
            "seconds": self.seconds,
            "step_ms": statistics.median(timed) if timed else None,
            "state_bytes": state_bytes(self.optimizer),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "d": getattr(self.optimizer, "d", None),  # of optimizers that find their rate
            "curve": vars(self.curve),
            **({"metrics": self.metrics} if self.metrics else {}),
        }


@contextlib.contextmanager
def evaluating(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Model and optimizer in evaluation mode, then back; torch's optimizers have no modes."""
    modes: list[Any] = [m for m in (optimizer, model) if hasattr(m, "eval")]
    for mode in modes:
        mode.eval()
    try:
        yield
    finally:
        for mode in modes:
            mode.train()
