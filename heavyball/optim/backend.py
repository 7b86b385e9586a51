"""Chooses how parameters are stepped: through compiled kernels, or eagerly."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from heavyball import utils
from heavyball.diagnostics.plan import EagerStep, StepPlan
from heavyball.optim.options import Options
from heavyball.runtime.job import Job
from heavyball.runtime.rates import Pending, Together
from heavyball.runtime.step import run

if TYPE_CHECKING:
    from heavyball.compiler.run.engine import Engine
    from heavyball.compiler.run.row import Row


class Backend:
    """Steps jobs through kernels where some of them have one, else eagerly.

    The compiler is imported when it may be used for the first time.

    first: another backend of the same optimizer, whose kernels are shared.
    """

    def __init__(self, options: Options, first: "Backend | None" = None):
        self._options = options
        self._first = first
        self._engine: Engine | None = None

    def another(self) -> "Backend":
        """A backend for some of the parameters alone."""
        return Backend(self._options, self)

    def forget(self) -> None:
        """Recheck every tensor in the next step."""
        if self._engine is not None:
            self._engine.forget()

    def step_again(
        self,
        groups: list[dict[str, Any]],
        attributes: Mapping[str, Any],
        together: Together | Pending,
    ) -> bool:
        """Step as the last time, if that was through kernels and nothing has changed."""
        engine = self._engine
        return engine is not None and engine.step_again(groups, attributes, together)

    def step(
        self,
        jobs: list[Job],
        total_keys: list[str],
        groups: list[dict[str, Any]],
        attributes: Mapping[str, Any],
        together: Together | Pending,
    ) -> None:
        """Step these parameters, which are those of the groups that have a gradient.

        attributes: those of the optimizer.
        """
        self.forget()
        engine = self._engine_for(jobs)
        if engine is None or not engine.step(jobs, total_keys, groups, attributes, together):
            finisher = functools.partial(together.finish, groups)
            run(jobs, total_keys, self._options.foreach, finisher)

    def row(self, keys: tuple[str, ...]) -> "Row | None":
        """The last step of one parameter, where it can be repeated by itself."""
        return None if self._engine is None else self._engine.row(keys)

    def described(self, jobs: list[Job], total_keys: list[str], names: list[str]) -> StepPlan:
        """How these jobs would be stepped; `names` are those of their parameters."""
        reason = self._no_engine(jobs)
        if reason is None:
            return self._ready().make(jobs, total_keys).described(names)
        alike: dict[str, list[str]] = {}
        for job, name in zip(jobs, names, strict=True):
            alike.setdefault(repr(job.program), []).append(name)
        eager = (EagerStep(tuple(names), chain, reason) for chain, names in alike.items())
        return StepPlan("", eager=tuple(eager))

    def _engine_for(self, jobs: list[Job]) -> "Engine | None":
        return self._ready() if self._no_engine(jobs) is None else None

    def _no_engine(self, jobs: list[Job]) -> str | None:
        """Why nothing is compiled for these jobs."""
        if self._options.compile is False:
            return "compile=False"
        if utils.compile_mode is None:
            return "heavyball.utils.compile_mode is None"
        if len({id(job.param) for job in jobs}) < len(jobs):
            return (
                "a parameter is in the optimizer twice, and is stepped twice, one after the other"
            )
        return None

    def _ready(self) -> "Engine":
        from heavyball.compiler.run.engine import Engine
        from heavyball.compiler.run.kernels import Kernels

        if self._engine is None and self._first is not None:
            self._engine = self._first._ready().another()
        elif self._engine is None:
            self._engine = Engine(Kernels(self._options.compile), self._options.foreach)
        return self._engine
