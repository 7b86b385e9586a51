"""What is done once for all processes that these tests fork."""

import pytest

from distributed.engines import OPTIMIZERS, Model
from heavyball.distributed.memory import parts_on


@pytest.fixture(scope="session", autouse=True)
def recorded() -> None:
    """Record the programs of all optimizers here, which is most of the work of a short run."""
    for make in OPTIMIZERS.values():
        opt = make(list(Model().named_parameters()))
        for count in (2, 3):
            parts_on(count, opt.registry.places(), opt.registry.programs(), True)
