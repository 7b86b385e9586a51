"""What is done once for all processes that these tests fork."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from distributed.engines import OPTIMIZERS, Model, give
from heavyball.distributed.memory import parts_on


@pytest.fixture(scope="session", autouse=True)
def recorded() -> None:
    """Record the programs of all optimizers here, which is most of the work of a short run."""
    for make in OPTIMIZERS.values():
        opt = make(list(Model().named_parameters()))
        for count in (2, 3):
            parts_on(count, opt.registry.places(), opt.registry.programs(), True)
    _load_all()


# Of a mesh that no test makes: torch keeps by equal meshes what is another one on each process.
UNUSED = 11


def _load_all() -> None:
    """Load what torch and the library load with the first DTensor and its first step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=UNUSED)
    try:
        model = Model()
        fully_shard(model, mesh=init_device_mesh("cpu", (UNUSED,)))
        opt = OPTIMIZERS["AdamW"](list(model.named_parameters()))  # which asks no other process
        give(model, 0)
        opt.step()
    finally:
        dist.destroy_process_group()
