"""How much is sent, who works, and where state is."""

import itertools
import math
from itertools import pairwise
from typing import Any

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
from heavyball.distributed.exchange import route
from heavyball.distributed.memory import parts_on
from heavyball.distributed.shard import Group, numel, planned

SIDES = (24, 16, 20, 12, 28, 16, 24, 20)


class Matrices(nn.Module):
    """Matrices that four processes can cut evenly, with repeats several for each of them."""

    def __init__(self, repeats: int = 3):
        super().__init__()
        torch.manual_seed(1)
        shapes = [*pairwise(SIDES)] * repeats
        self.matrices = nn.ParameterList(0.1 * torch.randn(shape) for shape in shapes)
        self.vector = nn.Parameter(torch.zeros(16))


def _sharded(dims: tuple[int, ...], repeats: int = 1) -> Matrices:
    model = Matrices(repeats)
    names = ("copies", "parts")[-len(dims) :]
    fully_shard(model, mesh=init_device_mesh("cpu", dims, mesh_dim_names=names))
    return model


def _step(model: Matrices, opt: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = placed_as(p, torch.randn(p.shape, generator=generator))
    opt.step()


def _sent(
    rank: int, name: str, dims: tuple[int, ...], options: dict, repeats: int = 1
) -> dict[str, Any]:
    model = _sharded(dims, repeats)
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
        assert calls[0][1] <= 8 * 3 * 8  # a sum, a flag and little else for each parameter


def _least(dims: tuple[int, ...]) -> float:
    """The part of the matrices' bytes that a process sends where nothing is received twice.

    Of S parts the owner gets S - 1, and each of the N - 1 others gets its part of the result.
    """
    n, s = math.prod(dims), dims[-1]
    return (s - 1 + n - 1) / s / n


BFLOAT16 = {"products": "bfloat16"}
# An optimizer, and how many bytes of each four of a matrix travel there, and back.
TRAVEL: dict[str, tuple[str, dict, float, float]] = {
    "Muon": ("Muon", {}, 4, 4),
    "SOAP": ("SOAP", {}, 4, 4),
    "Muon, products in bfloat16": ("Muon", BFLOAT16, 2, 2),
    "NorMuon, products in bfloat16": ("NorMuon", BFLOAT16, 2, 4),
}


@pytest.mark.parametrize("case", TRAVEL)
@pytest.mark.parametrize("dims", [(4,), (2, 2)], ids=["fsdp", "hsdp"])
def test_matrices_travel_once_there_and_once_back(case: str, dims: tuple[int, ...]) -> None:
    name, options, there, back = TRAVEL[case]
    found = processes.run(4, _sent, name, dims, options)
    for of in found:
        kinds = [what for what, *_ in of["found"]]
        assert kinds.count("all_to_all_single") == len(dims) + 1  # the way back takes two hops
    sent = sum(size for of in found for what, _, size in of["found"] if "all_to_all" in what)
    n, s = 4, dims[-1]
    of_matrices = ((s - 1) * there + (n - 1) * back) / s / n / 4
    # SOAP's owners have the vector too, of which nothing is said here
    rest = 16 * 4 if name == "SOAP" else 0
    matrices = found[0]["matrices"]
    assert of_matrices * matrices <= sent / 4 <= of_matrices * (matrices + rest)
    assert of_matrices <= _least(dims)
    small = [size for of in found for what, _, size in of["found"] if "all_to_all" not in what]
    assert max(small) <= 64 * 8


@pytest.mark.parametrize("dims", [(4,), (7,), (2, 2), (4, 2), (2, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("rows", [8, 5, 3])
def test_no_process_sends_a_piece_twice_to_one_copy(dims: tuple[int, ...], rows: int) -> None:
    n, s = math.prod(dims), dims[-1]
    sent = [0] * n
    for me, owner in itertools.product(range(n), repeat=2):
        layout = planned((rows, 6), dims, Group(None, n, me))
        near = layout.copy_at(owner)
        assert (near is None) == (len(dims) == 1)
        hops = [(layout, layout.at(owner)), (layout.at(owner), near or layout)]
        hops += [(near, layout)] if near else []
        for number, hop in enumerate(hops):
            for receiver, pieces in enumerate(route((hop,)).sent):
                assert len(pieces) <= 1
                # only what comes last crosses between copies, and there it stays at its place
                if pieces and number < 2:
                    assert receiver // s == me // s == owner // s
                elif pieces:
                    assert receiver % s == me % s
                    assert receiver // s != me // s == owner // s
                sent[me] += sum(numel(box) for _, box in pieces)
    # there and back all but the owner's part, and the whole for each of the other copies
    owned = [box[1][0] for box in planned((rows, 6), dims, Group(None, n, 0)).boxes]
    assert sum(sent) == sum(6 * (2 * (rows - own) + (n // s - 1) * rows) for own in owned)
    if rows % s == 0:
        assert {*sent} == {round(_least(dims) * n * rows * 6)}


@pytest.mark.parametrize("dims", [(2,), (4,), (2, 2)], ids=str)
def test_work_is_shared_out_by_cost(dims: tuple[int, ...]) -> None:
    """Of five matrices a process or more, none has over a tenth more to do than the mean."""
    opt = heavyball.Muon(list(Matrices().named_parameters()), lr=1e-3)
    given = opt.registry.places(), opt.registry.programs()
    parts = [part for part in parts_on(dims, *given, False) if part.needs_owner]
    loads = [0.0] * math.prod(dims)
    assert len(parts) >= 5 * len(loads)
    for part in parts:
        loads[part.owner] += part.cost
    assert max(loads) <= 1.10 * sum(loads) / len(loads)


def test_matrix_state_is_spread_out() -> None:
    found = [of["held"] for of in processes.run(4, _sent, "SOAP", (4,), {}, 3)]
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
