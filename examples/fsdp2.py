"""Train with FSDP2 on two processes, resume on three, and compare with an uninterrupted run.

    python examples/fsdp2.py

starts the processes itself, on the CPU of this machine. Under torchrun, call `train` in each process.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import heavyball

STEPS = 10


def data(step: int) -> torch.Tensor:
    """A batch of 12, the same in every process."""
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(rank: int, world: int, first: int, last: int, folder: Path) -> list[torch.Tensor]:
    """Train from the checkpoint of step `first` to step `last`, and save there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 16)).double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt = heavyball.Muon(model.named_parameters(), lr=0.01)
    if first:
        opt.init_state()  # dcp.load writes into existing tensors
        state = {
            "model": get_model_state_dict(model),
            "opt": get_optimizer_state_dict(model, opt),
        }
        dcp.load(state, checkpoint_id=folder / str(first))
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["opt"])
    for step in range(first, last):
        batch = data(step).chunk(world)[rank]  # the same size on every process
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if rank == 0 and step % 5 == 0:
            print(f"step {step:2d} on {world} processes: loss {loss.item():.4f}", flush=True)
    # collective: an owner has state that other processes do not have
    state = {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}
    if world > 1:
        dcp.save(state, checkpoint_id=folder / str(last))
    full = [p.full_tensor() if world > 1 else p for p in model.parameters()]
    return [p.detach() for p in full]


def work(rank: int, world: int, first: int, last: int, folder: Path) -> None:
    """The program of each process."""
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    weights = train(rank, world, first, last, folder)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()


def main() -> None:
    """Train twice, with different numbers of processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world, first in ((2, 0), (3, STEPS)):
            args = world, first, first + STEPS, folder
            mp.start_processes(work, args, nprocs=world, start_method="fork")
        found = torch.load(folder / "weights.pt")
        alone = train(0, 1, 0, 2 * STEPS, folder)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, alone, strict=True))
    print(f"largest difference to one process that never stopped: {worst:.0e}")
    print(f"equal to rounding: {worst < 1e-9}")


if __name__ == "__main__":
    main()
