"""How much is sent, who works, and where state is."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import heavyball
from distributed import processes
from distributed.engines import placed_as

SIDES = (24, 16, 20, 12, 28, 16, 24, 20)


class Matrices(nn.Module):
    """Matrices that four processes can cut evenly, several for each of them."""

    def __init__(self, repeats: int = 3):
        super().__init__()
        torch.manual_seed(1)
        shapes = [*pairwise(SIDES)] * repeats
        self.matrices = nn.ParameterList(0.1 * torch.randn(shape) for shape in shapes)
        self.vector = nn.Parameter(torch.zeros(16))


def _sharded(dims: tuple[int, ...]) -> Matrices:
    model = Matrices()
    names = ("copies", "parts")[-len(dims) :]
    fully_shard(model, mesh=init_device_mesh("cpu", dims, mesh_dim_names=names))
    return model


def _step(model: Matrices, opt: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = placed_as(p, torch.randn(p.shape, generator=generator))
    opt.step()


def _sent(rank: int, name: str, dims: tuple[int, ...], options: dict) -> dict:
    model = _sharded(dims)
    opt = getattr(heavyball, name)(list(model.named_parameters()), lr=1e-3, **options)
    _step(model, opt, 0)  # plans are compared once
    with processes.recorded() as found:
        _step(model, opt, 1)
    matrices = sum(p.numel() * 4 for p in model.matrices)
    state = {
        "held": opt.state_bytes(),
        "weights": sum(p.to_local().nbytes for p in model.parameters()),
    }
    return {"found": found, "matrices": matrices, **state}


@pytest.mark.parametrize("name", ["AdamW", "Lion", "ADOPT", "SFAdamW"])
def test_elementwise_chains_send_nothing(name: str) -> None:
    for of in processes.run(2, _sent, name, (2,), {}):
        assert of["found"] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {"caution": True}), ("AdamW", {"gradient_clipping": "rms_clip"})],
    ids=str,
)
def test_sums_over_tensors_travel_together(name: str, options: dict) -> None:
    for of in processes.run(2, _sent, name, (2,), options):
        calls = [(what, size) for what, _, size in of["found"]]
        assert [what for what, _ in calls] == ["all_reduce"]
        assert calls[0][1] <= 8 * 3 * 23  # a sum, a flag and little else for each parameter


@pytest.mark.parametrize("name", ["Muon", "SOAP"])
@pytest.mark.parametrize("dims", [(4,), (2, 2)], ids=["fsdp", "hsdp"])
def test_matrices_travel_once_there_and_once_back(name: str, dims: tuple[int, ...]) -> None:
    found = processes.run(4, _sent, name, dims, {})
    for of in found:
        kinds = [what for what, *_ in of["found"]]
        assert kinds.count("all_to_all_single") == 2
    sent = sum(size for of in found for what, _, size in of["found"] if "all_to_all" in what)
    # each of four needs a quarter of each matrix from its owner, who needs the others' quarters
    bound = 0.40 if dims == (4,) else 0.52
    assert sent / 4 <= bound * found[0]["matrices"]
    small = [size for of in found for what, _, size in of["found"] if "all_to_all" not in what]
    assert max(small) <= 64 * 23


def test_matrix_state_is_spread_out() -> None:
    found = [of["held"] for of in processes.run(4, _sent, "SOAP", (4,), {})]
    assert max(found) <= 1.25 * sum(found) / 4
    model = Matrices()
    plan = heavyball.memory_plan(model, "SOAP", mesh=4)
    assert list(plan.per_process) == found
    alone = heavyball.memory_plan(model, "SOAP")
    numbers = 8 * len(list(model.parameters()))  # a count of steps is everybody's
    assert sum(plan.per_process) == alone.state_bytes + 3 * numbers


def _kinds(rank: int) -> dict[str, bool]:
    model = _sharded((2,))
    opt = heavyball.Muon(list(model.named_parameters()), lr=1e-3)
    _step(model, opt, 0)
    return {key: isinstance(t, DTensor) for key, t in opt.state[model.vector].items()}


def test_state_of_the_parameters_shape_is_a_dtensor() -> None:
    for kinds in processes.run(2, _kinds):
        assert all(is_dtensor == (key != "step") for key, is_dtensor in kinds.items())
        assert len(kinds) > 1


def _replicas(rank: int) -> tuple[int, list[torch.Tensor]]:
    model = Matrices()
    params = list(model.named_parameters())
    opt = heavyball.SOAP(params, lr=1e-3, replicas=dist.group.WORLD)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return opt.state_bytes(), [p.detach() for p in model.parameters()]


def test_replicas_share_state_and_hold_equal_bits() -> None:
    found = processes.run(2, _replicas)
    alone = heavyball.memory_plan(Matrices(), "SOAP").state_bytes
    assert max(size for size, _ in found) < 0.8 * alone
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)
