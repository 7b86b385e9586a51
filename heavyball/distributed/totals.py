"""Sums over all parameters, of all processes: what a step needs of them, and norms."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.distributed.evaluate import Values
from heavyball.distributed.jobs import Jobs
from heavyball.distributed.parts import Part
from heavyball.distributed.plan import Plan
from heavyball.distributed.rollcall import RollCall, refuse_some
from heavyball.distributed.shard import ALONE, local, replicated
from heavyball.distributed.staged import Staging
from heavyball.distributed.sums import Term, completed, over_stages
from heavyball.distributed.waves import EntireWave, Run, Shares, advance
from heavyball.numerics import SCALAR

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry


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
            totals[key] = torch.zeros((), dtype=SCALAR, device="cpu")
            if together.node is not None and key == together.node.key:
                self.renew(found, together)
            else:
                total = sum((s[0] for _, s in found), torch.zeros((), dtype=SCALAR, device="cpu"))
                sums: dict[int, Shares] = {0: (total,)}
                if self._plan.stages is not ALONE:
                    device = parts[0].here.device if parts else torch.device("cpu")
                    sums = over_stages(sums, 1, self._plan.stages, device)
                totals[key] = sums[0][0]
        return totals

    def _shares(
        self, key: str, parts: Sequence[Part], totals: Mapping[str, Tensor], roll: RollCall
    ) -> list[tuple[Part, Shares]]:
        """The complete share of every parameter, in the order of the parameters."""
        having = [part for part in parts if key in part.program.total_keys]
        runs = [self._jobs.run(part, totals, roll) for part in having]
        found = self._shares_of_cut(key, [r for r in runs if r.part.mode != "entire"], totals, roll)
        entire = [run for run in runs if run.part.mode == "entire"]
        if entire:
            roll.finish()
            wave = EntireWave(entire, roll.complete, totals)
            for run, shares in zip(entire, wave.found_shares(key), strict=True):
                if shares is not None:
                    found[id(run)] = shares
        roll.finish()
        return [(run.part, found[id(run)]) for run in runs if id(run) in found and not run.absent]

    def _shares_of_cut(
        self, key: str, runs: Sequence[Run], totals: Mapping[str, Tensor], roll: RollCall
    ) -> dict[int, Shares]:
        """The shares of parameters that are computed on their shards, by the identity of the run."""
        for run in runs:
            run.values = Values(run.part.shares[key], run.job, run.part.layout, totals)
        given = [(run.part, run.part.shares[key], run.job, run.values) for run in runs]
        for run, row in zip(runs, self._staging.rows(given, totals), strict=True):
            run.row = row
        advance([(run.worker, run.part.shares[key].before) for run in runs], roll.complete)
        found: dict[int, Shares] = {}
        for run in runs:
            if run.row is not None:
                found[id(run)] = run.row.finish()
                continue
            run.values.compute(run.part.shares[key].before.rest)
            outputs = run.part.shares[key].outputs
            names = sorted(outputs, key=lambda name: int(name.rsplit(":", 1)[1]))
            found[id(run)] = tuple(run.values.known[outputs[name]] for name in names)
        return found

    def renew(self, found: Sequence[tuple[Part, Shares]], together: Any) -> None:
        """Make the new numbers of the groups from the shares of their parameters."""
        sums: dict[int, Shares] = {}
        for part, shares in found:
            shares = tuple(share.to(SCALAR).reshape(()) for share in shares)
            index = part.place.index
            if index in sums:
                shares = tuple(a + b for a, b in zip(sums[index], shares, strict=True))
            sums[index] = shares
        groups, stages = self._registry.groups, self._plan.stages
        if stages is not ALONE:
            device = groups[0]["params"][0].device if groups[0]["params"] else torch.device("cpu")
            sums = over_stages(sums, len(groups), stages, device)
        if sums:
            together.renew(groups, {id(groups[index]): shares for index, shares in sums.items()})

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
            device = params[0].device if params else torch.device("cpu")
            total = over_stages({0: (total,)}, 1, self._plan.stages, device)[0][0].cpu()
        return float(total.sqrt())
