"""Exchanges of one wave run beside the products of another, and no step waits where it need not."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from helpers import eager  # noqa: F401, the order is the same with kernels
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import heavyball
from distributed import processes
from distributed.engines import placed_as
from heavyball.distributed import cut, exchange, steps

WAVES = 5


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # one for each of four processes in every wave
        self.matrices = nn.ParameterList(0.1 * torch.randn(8, 12) for _ in range(4 * WAVES))


class FakeStream:
    """Stands in for a stream of a device: notes what is done on it."""

    def __init__(self, said: list[str]):
        self.said, self.used = said, list[Tensor]()

    @contextlib.contextmanager
    def __call__(self, used: Iterable[Tensor]) -> Iterator[None]:
        self.used += used
        self.said.append("beside")
        yield
        self.said.append("back")

    def join(self, made: Iterable[Tensor]) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in made)
        self.said.append("join")


def _ordered(rank: int, dims: tuple[int, ...], fake: bool) -> tuple[list[str], list[Tensor]]:
    """What a step does, in order, and the weights after it."""
    model, said = Matrices(), list[str]()
    names = ("copies", "parts")[-len(dims) :]
    fully_shard(model, mesh=init_device_mesh("cpu", dims, mesh_dim_names=names))
    opt = heavyball.Muon(list(model.named_parameters()), lr=1e-2)
    steps.WAVE = 4 * 8 * 12 - 1
    stream = FakeStream(said)
    if fake:
        exchange.beside = lambda device: stream  # type: ignore[assignment]
    sent, served, reduced = dist.all_to_all_single, cut.serve, dist.all_reduce

    def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["async_op"] is True
        said.append("send")
        return sent(*args, **kwargs)

    def serve(*args: Any) -> Any:
        said.append("products")
        return served(*args)

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        said.append("sum")
        return reduced(*args, **kwargs)

    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = placed_as(p, torch.randn(p.shape, generator=generator))
        if step:
            said.clear()
            dist.all_to_all_single, cut.serve = all_to_all_single, serve  # type: ignore[assignment]
            dist.all_reduce = all_reduce
        opt.step()
    return said, [p.detach().full_tensor() for p in model.parameters()]


# A turn of the pipeline, from the third on: one wave is sent, the last but one relayed (on HSDP), the
# last multiplied and sent back. One sum a step says who has gradients; others would let the host wait
# for a GPU in every wave.
FSDP = ["sum", "send", *["send", "products", "send"] * (WAVES - 1), "products", "send"]


def _hsdp(*relay: str) -> list[str]:
    found = ["sum", "send", "send", "products", "send"]
    found += ["send", *relay, "products", "send"] * (WAVES - 2)
    return [*found, *relay, "products", "send", *relay]


def test_a_wave_is_sent_before_the_products_of_the_wave_before_it() -> None:
    for said, _ in processes.run(4, _ordered, (4,), False):
        assert said == FSDP
    for said, _ in processes.run(4, _ordered, (2, 2), False):
        assert said == _hsdp("send")


def test_what_is_relayed_is_on_a_stream_beside_the_products() -> None:
    plain = processes.run(4, _ordered, (2, 2), False)
    for (said, weights), (_, expected) in zip(
        processes.run(4, _ordered, (2, 2), True), plain, strict=True
    ):
        assert [s for s in said if s != "join"] == _hsdp("beside", "send", "back")
        # before its results are used behind the products of the wave after it
        assert said.count("join") == WAVES
        first = said.index("join")
        assert said[:first].count("products") == 2
        assert said[:first].count("back") == 1
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
