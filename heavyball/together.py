"""Numbers that the parameters of a group decide on together, such as Prodigy's d.

They belong to the group, not to a parameter: entries of it that are saved with it, 0-d float64 tensors
on the device of its first parameter (an int counts its steps). A parameter that joins late sees the
present ones, and one without a gradient has no part in them.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.chain import Chain, Program
from heavyball.numerics import lasting
from heavyball.runner import SCALAR, Job, Scalars
from heavyball.transform import Member

Sums = dict[int, tuple[Tensor, ...]]


def sums_of(found: list[tuple[Job, tuple[Tensor, ...]]]) -> Sums:
    """What the jobs of each group gave, added up, by the group's identity."""
    sums: Sums = {}
    for job, shares in found:
        shares = tuple(s.detach().to(SCALAR).reshape(()) for s in shares)
        place = id(job.group)
        if place in sums:
            shares = tuple(a + b.to(a.device) for a, b in zip(sums[place], shares, strict=True))
        sums[place] = shares
    return sums


def _is_gated(program: Program) -> bool:
    """Whether something in front of a program's rate may leave out steps."""
    before = itertools.takewhile(lambda node: node is not program.rate, program.flat)
    return any("gate" in node.transform.provides for node in before)


class Together:
    """Makes and renews the common numbers of an optimizer's groups. Nothing waits for the device."""

    def __init__(self, chain: Chain):
        self.node = chain.rate
        self._scalars: list[Scalars] = []
        self._gated = any(_is_gated(program) for program in chain.programs)

    @lasting()
    def begin(self, index: int, groups: list[dict[str, Any]]) -> None:
        """Give a new group its numbers."""
        if self.node is None or not groups[index]["params"]:
            return
        group, t = groups[index], self.node.transform
        others = [g for i, g in enumerate(groups) if i != index and set(t.common) <= g.keys()]
        for name, first in t.common.items():
            if others and not t.options.get("split_groups", True):
                value = others[0][name]
                group[name] = value.clone() if isinstance(value, Tensor) else value
            elif isinstance(first, int):
                group[name] = first
            else:
                value = self._hyper(group, first) if isinstance(first, str) else first
                group[name] = torch.full((), value, dtype=SCALAR, device="cpu")
        self.settle(group)

    def begin_again(self, index: int, groups: list[dict[str, Any]]) -> None:
        """Give a group that has not stepped its numbers anew: a hyper-parameter has changed."""
        for name, first in self.node.transform.common.items() if self.node else ():
            if isinstance(first, int) and groups[index].get(name) == 0:
                self.begin(index, groups)

    @lasting()
    def settle(self, group: dict[str, Any]) -> None:
        """Bring a group's numbers to where its parameters are, in memory of their own."""
        for name in self.node.transform.common if self.node else ():
            value = group.get(name)
            if isinstance(value, Tensor) and group["params"]:
                device = group["params"][0].device
                group[name] = value.detach().to(device, SCALAR, copy=True).reshape(())

    def _hyper(self, group: Mapping[str, Any], name: str) -> float:
        assert self.node is not None
        key, index = self.node.hyper[name]
        return float(group[key] if index is None else group[key][index])

    def finish(
        self, groups: list[dict[str, Any]], found: list[tuple[Job, tuple[Tensor, ...]]]
    ) -> None:
        """Renew the numbers of every group from what its jobs gave."""
        self.renew(groups, sums_of(found))

    def renew(self, groups: list[dict[str, Any]], sums: Sums) -> None:
        """The same, given the sums of each group by its identity."""
        assert self.node is not None
        t = self.node.transform
        assert t.finish is not None
        home = next(s[0].device for s in sums.values())
        # the last share counts the parameters whose step no gate has left out
        counts = {place: shares[-1].to(home) for place, shares in sums.items()}
        sums = {place: shares[:-1] for place, shares in sums.items()}
        unsure = (
            self._gated and home.type != "cpu"
        )  # only the device knows, and nothing waits for it
        if self._gated and not unsure:
            sums = {place: shares for place, shares in sums.items() if counts[place].tolist() > 0}
        if not sums:
            return
        while len(self._scalars) < len(groups):
            self._scalars.append(Scalars())
        whole = [i for i, g in enumerate(groups) if set(t.common) <= g.keys()]
        for i in whole:
            for name, first in t.common.items():
                if isinstance(first, int) and id(groups[i]) in sums:
                    more = counts[id(groups[i])] > 0 if unsure else 1
                    groups[i][name] = groups[i][name] + more
        members = [self._member(groups[i], self._scalars[i], sums, home) for i in whole]
        together = not t.options.get("split_groups", True)
        everyone = torch.stack([*counts.values()]).sum()
        for i, values in zip(whole, t.finish(members, t.options), strict=True):
            count = everyone if together else counts.get(id(groups[i]), everyone)
            kept = {name: groups[i][before] for name, before in t.past.items()}
            for name, value in (kept | values).items():
                if not isinstance(value, Tensor):
                    groups[i][name] = value
                elif unsure:
                    old = groups[i][name]
                    old.copy_(torch.where(count.to(old.device) > 0, value.to(old.device), old))
                else:
                    groups[i][name].copy_(value)

    def _member(
        self,
        group: dict[str, Any],
        scalars: Scalars,
        sums: Sums,
        home: torch.device,
    ) -> Member:
        assert self.node is not None
        t = self.node.transform
        values: dict[str, Any] = {}
        for name in t.common:
            value = group[name]
            values[name] = value.to(home) if isinstance(value, Tensor) else value
        for name, (key, index) in self.node.hyper.items():
            value = scalars.get(group, key, home)
            values[name] = value if index is None else value[index]
        mine = sums.get(id(group))
        return Member(None if mine is None else tuple(s.to(home) for s in mine), values)


class Pending:
    """Takes the place of a `Together` while parameters are stepped one at a time.

    What they give waits until the step ends, and is then added in the order of the parameters.
    """

    def __init__(self, together: Together):
        self._together = together
        self._given: dict[Tensor, Sums] = {}
        self.param: Tensor | None = None  # the one that is stepped now

    @property
    def node(self) -> Any:
        return self._together.node

    def finish(
        self, groups: list[dict[str, Any]], found: list[tuple[Job, tuple[Tensor, ...]]]
    ) -> None:
        """Keep what the parameter gave."""
        self.renew(groups, sums_of(found))

    def renew(self, groups: list[dict[str, Any]], sums: Sums) -> None:
        """The same, given it by its group."""
        assert self.param is not None
        self._given[self.param] = sums

    def before(self, param: Tensor, groups: list[dict[str, Any]]) -> None:
        """A parameter is about to be stepped: if it was before, that step has ended."""
        if param in self._given:
            self.close(groups)
        self.param = param

    def after(self, groups: list[dict[str, Any]]) -> None:
        """End the step if no parameter is left to wait for."""
        if self._given and all(
            p in self._given or not p.requires_grad for g in groups for p in g["params"]
        ):
            self.close(groups)

    def close(self, groups: list[dict[str, Any]]) -> None:
        """The step has ended: renew the numbers of the groups."""
        total: Sums = {}
        for group in groups:
            for param in group["params"]:
                for place, shares in self._given.pop(param, {}).items():
                    before = total.get(place)
                    total[place] = (
                        shares
                        if before is None
                        else tuple(a + b.to(a.device) for a, b in zip(before, shares, strict=True))
                    )
        self._given = {}
        if total:
            self._together.renew(groups, total)
