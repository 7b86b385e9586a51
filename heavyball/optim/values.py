"""The live hyper-parameters of the groups, checked when they change."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import check_live, finite, frozen, nonnegative
from heavyball.core.schedule import SCHEDULES
from heavyball.optim.checks import check_entries, checked_lr, checked_seed
from heavyball.optim.estimate import check_alike, check_fixed
from heavyball.optim.scheduling import separated, warn_of_peak
from heavyball.runtime.rates import Together


class Values:
    """Checks the values of an optimizer's groups, each once for as long as it stays."""

    def __init__(self, chain: Chain, rates: Together):
        self.keys = ("lr", "warmup_steps", "seed", *chain.hyper)
        self._chain = chain
        self._rates = rates
        self._checked: dict[int, list[Any]] = {}

    def checked(self, key: str, value: Any) -> Any:
        """A value as a new group takes it.

        Errors: TypeError or ValueError naming the entry.
        """
        if key == "lr":
            return checked_lr(value)
        if key == "seed":
            return checked_seed(value)
        if key == "warmup_steps":
            return check_live(key, value, 0.0, nonnegative)
        return self._chain.hyper[key].check(key, value)

    def checked_group(self, owner: type, group: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A new group, of an optimizer of this class with these defaults.

        Errors: TypeError or ValueError naming a value outside its interval, or an entry that is nearly
            a known one.
        """
        if not isinstance(group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
        warn_of_peak(owner, group.get("lr"))
        checked = separated(self._chain, group, defaults.get(SCHEDULES, {}))
        apart = ("train_mode", "differentiable", SCHEDULES)
        known = [key for key in defaults if key not in apart]
        check_fixed(self._chain, checked)
        check_entries(owner, checked, known, self._chain)
        # a mode is the optimizer's own, whatever another one's group says
        checked.pop("train_mode", None)
        for key in known:
            if key in checked:
                checked[key] = self.checked(key, checked[key])
        return checked

    def check(self, groups: list[dict[str, Any]], only: int | None = None) -> None:
        """Check every group, or one, where a value has changed.

        Errors: TypeError or ValueError naming the group and the entry.
        """
        changed = {}
        for index, group in enumerate(groups):
            if only is None or index == only:
                values = [frozen(group.get(key)) for key in self.keys]
                if values != self._checked.get(index):
                    self._check_group(index, group)
                    changed[index] = values
        if changed:
            check_alike(self._chain, groups)
        if self._chain.rate is not None:
            self._rates.take(groups)
        for index, values in changed.items():
            self._rates.begin_again(index, groups)
            self._checked[index] = values

    def _check_group(self, index: int, group: Mapping[str, Any]) -> None:
        for key in self.keys:
            if key not in group:
                raise ValueError(f"parameter group {index} is missing its entry {key!r}")
            value = group[key]
            try:
                if key != "lr":
                    self.checked(key, value)
                # a schedule may end a rounding error below zero, so only the sign is not checked
                elif not isinstance(value, Tensor):
                    check_live(key, value, 0.0, finite)
            except (TypeError, ValueError) as error:
                raise type(error)(f"parameter group {index}: {error}") from None
