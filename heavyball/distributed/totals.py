"""Sums over all parameters, of all processes: what a step needs of them, and norms."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.distributed.entire import EntireWave
from heavyball.distributed.jobs import Jobs
from heavyball.distributed.parts import Part
from heavyball.distributed.plan import Plan
from heavyball.distributed.rollcall import RollCall, refuse_some
from heavyball.distributed.runs import Run, Shares, advance, give_rows
from heavyball.distributed.shard import ALONE, local, replicated
from heavyball.distributed.staged import Staging
from heavyball.distributed.sums import Term, completed, over_stages
from heavyball.numerics import SCALAR

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry


_NOTHING = torch.zeros((), dtype=SCALAR, device="cpu")


class Totals:
    """Adds up what every parameter gives, wherever its parts are."""

    def __init__(self, registry: "Registry", plan: Plan, jobs: Jobs, staging: Staging):
        self._registry = weakref.proxy(registry)
        self._plan, self._jobs, self._staging = plan, jobs, staging

    def before(self, parts: Sequence[Part], roll: RollCall, together: Any) -> dict[str, Tensor]:
        """The sums that a step needs before it goes on, by the elements that ask for them."""
        totals: dict[str, Tensor] = {}
        for key in self._registry.chain.total_keys:
            found = self._shares(key, parts, totals, roll)
            totals[key] = _NOTHING
            if together.node is not None and key == together.node.key:
                self.renew(found, roll, together)
            else:
                own = roll.attempts(_added, found)
                sums = self._of_stages({} if own is None else {0: (own,)}, 1, roll)
                totals[key] = sums[0][0] if sums else _NOTHING
        return totals

    def _shares(
        self, key: str, parts: Sequence[Part], totals: Mapping[str, Tensor], roll: RollCall
    ) -> list[tuple[Part, Shares]]:
        """The complete share of every parameter, in the order of the parameters."""
        having = [part for part in parts if key in part.program.total_keys]
        runs = [self._jobs.run(part, totals, roll, key) for part in having]
        cut = [run for run in runs if run.part.mode != "entire"]
        roll.attempts(give_rows, self._staging, cut, totals)
        phases = [(run, run.recipe.before) for run in cut]
        advance(phases, roll.complete, roll.attempts)
        found: dict[int, Shares] = {}
        for run in cut:
            shares = roll.attempts(_shares_of, run)
            if shares is not None:
                found[id(run)] = shares
        entire = [run for run in runs if run.part.mode == "entire"]
        if entire:
            roll.finish()
            wave = EntireWave(entire, roll.complete, roll.attempts, totals)
            for run, shares in zip(entire, wave.found_shares(key), strict=True):
                if shares is not None:
                    found[id(run)] = shares
        roll.finish()
        return [(run.part, found[id(run)]) for run in runs if id(run) in found and not run.absent]

    def renew(self, found: Sequence[tuple[Part, Shares]], roll: RollCall, together: Any) -> None:
        """Make the new numbers of the groups from the shares of their parameters."""
        sums = roll.attempts(_by_group, found) or {}
        groups = self._registry.groups
        sums = self._of_stages(sums, len(groups), roll)
        if sums:
            given = {id(groups[index]): shares for index, shares in sums.items()}
            roll.attempts(together.renew, groups, given)

    def _of_stages(self, sums: dict[int, Shares], groups: int, roll: RollCall) -> dict[int, Shares]:
        """Sums of this stage and all others; nothing where one of them has failed."""
        if self._plan.stages is ALONE:
            return sums
        failed = roll.attempts.error is not None
        try:
            return over_stages(sums, groups, self._plan.stages, self._plan.device, failed)
        except ValueError as error:
            roll.hear_of_stages(error)
            return {}

    def norm(self, params: Sequence[Tensor], known: Mapping[Tensor, Tensor]) -> float:
        """The Euclidean norm of tensors like these parameters, all together, on all processes.

        params: those that every process asks about. known: the tensors of those that have a gradient.

        Errors: ValueError on every process where only some have one, naming the parameter.
        """
        parts, terms = self._plan.current(), []
        for param in params:
            part = parts[param]
            square = torch.zeros((), dtype=SCALAR, device=part.here.device)
            if param in known and part.layout.is_first:
                square = local(known[param]).to(SCALAR).square().sum()
            has = square.new_full((), float(param in known))
            both = torch.stack((square, has))
            terms.append(Term("sum", replicated((2,), part.layout.group), both, True))
        total = torch.zeros((), dtype=SCALAR, device="cpu")
        for param, found in zip(params, completed(terms), strict=True):
            refuse_some(parts[param], float(found[1]))
            total = total + found[0].cpu()
        if self._plan.stages is not ALONE:
            device = self._plan.device
            total = over_stages({0: (total,)}, 1, self._plan.stages, device)[0][0].cpu()
        return float(total.sqrt())


def _shares_of(run: Run) -> Shares:
    """The shares of a parameter, all sums of which are complete."""
    if run.row is not None:
        return run.row.finish()
    run.values.compute(run.recipe.before.rest)
    outputs = run.recipe.outputs
    names = sorted(outputs, key=lambda name: int(name.rsplit(":", 1)[1]))
    return tuple(run.values.known[outputs[name]] for name in names)


def _added(found: Sequence[tuple[Part, Shares]]) -> Tensor:
    """The sum of the first shares of parameters."""
    return sum((shares[0] for _, shares in found), _NOTHING)


def _by_group(found: Sequence[tuple[Part, Shares]]) -> dict[int, Shares]:
    """The sums of all shares of the parameters of each group, by its number."""
    sums: dict[int, Shares] = {}
    for part, shares in found:
        shares = tuple(share.to(SCALAR).reshape(()) for share in shares)
        index = part.place.index
        if index in sums:
            shares = tuple(a + b for a, b in zip(sums[index], shares, strict=True))
        sums[index] = shares
    return sums
