"""All that an optimizer knows of its parameters' parts; it has this where other processes hold some."""

from typing import TYPE_CHECKING

from heavyball.distributed.plan import Plan
from heavyball.distributed.saving import Saving
from heavyball.distributed.staged import Staging
from heavyball.distributed.states import States
from heavyball.distributed.steps import Steps
from heavyball.optim.options import Options

if TYPE_CHECKING:
    from heavyball.optim.registry import Registry


class Sharded:
    """The plan of the parts, their state, how that is saved and loaded, and the steps.

    registry, options: the optimizer's.
    """

    def __init__(self, registry: "Registry", options: Options):
        self._options = options
        staging = Staging(options.compile)
        self.plan = Plan(registry, options, staging)
        self.states = States(self.plan)
        self.saving = Saving(registry, self.plan)
        self.steps = Steps(registry, options, self.plan, self.states, staging)

    def renewed(self, registry: "Registry") -> "Sharded":
        """The same for a registry of the same parameters; owners stay who they are."""
        made = Sharded(registry, self._options)
        made.plan.take_owners(self.plan)
        return made
