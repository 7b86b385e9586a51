"""Ways to put a model on several processes, and optimizers to step it with, there and on one."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import heavyball
from heavyball import chainable as C

Params = list[tuple[str, Tensor]]


class Model(nn.Module):
    """Matrices of several shapes, of which none can be cut evenly by three or four, and vectors."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        # not torch.manual_seed, which prints the whole stack to a string for devices that come later
        torch.default_generator.manual_seed(0)
        self.first = nn.Linear(10, 8)
        self.second = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.third = nn.Linear(6, 3, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Few(Model):
    """Two matrices and a vector of these, where what is done to each parameter takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm = nn.Identity(), nn.Identity()


@functools.cache
def _shapes() -> dict[str, torch.Size]:
    return {name: p.shape for name, p in Model().named_parameters()}


@functools.cache
def _gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)

    def made(shape: torch.Size) -> Tensor:
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        return ((g * 2**20).round() / 2**20).to(dtype)

    return {name: made(shape) for name, shape in _shapes().items()}


def gradients(step: int, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """The gradients of a step: multiples of 2^-20, the same on every process."""
    return (g.clone() for g in _gradients(step, dtype).values())


def give(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> None:
    """Put the gradients of a step where the parameters are."""
    for name, p in model.named_parameters():
        g = _gradients(step, dtype)[name]
        p.grad = placed_as(p, g) if isinstance(p, DTensor) else g.clone()


# ---- whole tensors and their parts


@functools.cache
def _pieces(shape: torch.Size, mesh: tuple[int, ...], placements: Any) -> list[tuple[slice, ...]]:
    """What each place of a mesh has of a tensor."""
    found = []
    for place in itertools.product(*map(range, mesh)):
        sizes, first = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        found.append(tuple(slice(o, o + n) for o, n in zip(first, sizes, strict=True)))
    return found


def _pieces_of(tensor: DTensor) -> list[tuple[slice, ...]]:
    return _pieces(tensor.shape, tuple(tensor.device_mesh.shape), tuple(tensor.placements))


@functools.cache
def _ranks(mesh: DeviceMesh) -> list[int]:
    """The processes of a mesh, in its order."""
    return mesh.mesh.flatten().tolist()


def placed_as(param: DTensor, tensor: Tensor) -> DTensor:
    """A whole tensor, cut as a parameter is."""
    mine = _ranks(param.device_mesh).index(dist.get_rank())
    part = tensor[_pieces_of(param)[mine]].clone()
    if tensor.dtype == param.dtype:  # from_local would make an equal description
        return DTensor(part, param._spec, requires_grad=False)  # type: ignore[call-arg]
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    return wholes([tensor])[0]


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors from what all processes have of them, in one exchange of all.

    What this process has itself is what it gets of that: copies are not taken for one another.
    """
    tensors = [tensor.detach() for tensor in tensors]
    found = [torch.empty(t.shape, dtype=t.dtype) if _is_cut(t) else t.clone() for t in tensors]
    cut = [(t, made) for t, made in zip(tensors, found, strict=True) if _is_cut(t)]
    if not cut:
        return found
    rooms = [max(made[piece].nbytes for piece in _pieces_of(t)) for t, made in cut]
    own = torch.zeros(sum(rooms), dtype=torch.uint8)
    for room, (tensor, _) in zip(own.split(rooms), cut, strict=True):
        part = tensor.to_local().contiguous().view(-1)
        room[: part.nbytes] = part.view(torch.uint8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    split = [part.split(rooms) for part in parts]
    me = dist.get_rank()
    for number, (tensor, made) in enumerate(cut):
        ranks, pieces = _ranks(tensor.device_mesh), _pieces_of(tensor)
        for rank, piece in sorted(zip(ranks, pieces, strict=True), key=lambda pair: pair[0] == me):
            target = made[piece]
            target.copy_(split[rank][number][: target.nbytes].view(made.dtype).view(target.shape))
    return found


def _is_cut(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


# ---- engines: what is done to a model, and what the optimizer is told


@functools.cache
def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """The mesh of this process; each new one would be new groups of processes."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _plain(model: nn.Module, world: int) -> dict[str, Any]:
    return {}


def _replicas(model: nn.Module, world: int) -> dict[str, Any]:
    return {"replicas": dist.group.WORLD}


def _fsdp(model: nn.Module, world: int) -> dict[str, Any]:
    fully_shard(model, mesh=mesh_of(world))
    return {}


def _nested(model: nn.Module, world: int) -> dict[str, Any]:
    mesh = mesh_of(world)
    fully_shard(model.first, mesh=mesh)
    fully_shard(model.third, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {}


def _columns(model: nn.Module, world: int) -> dict[str, Any]:
    mesh = mesh_of(world)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    return {}


def _hsdp(model: nn.Module, world: int) -> dict[str, Any]:
    mesh = mesh_of(2, world // 2, names=("copies", "parts"))
    fully_shard(model, mesh=mesh)
    return {}


def _tensor_parallel(model: nn.Module, world: int) -> dict[str, Any]:
    mesh = mesh_of(world)
    parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    return {}


def _both(model: nn.Module, world: int) -> dict[str, Any]:
    mesh = mesh_of(2, world // 2, names=("data", "tensor"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    return {}


Engine = Callable[[nn.Module, int], dict[str, Any]]
ENGINES: dict[str, tuple[Engine, int]] = {
    "ddp": (_plain, 2),
    "replicas": (_replicas, 2),
    "fsdp2-even": (_fsdp, 2),
    "fsdp2-uneven": (_fsdp, 3),
    "nested": (_nested, 4),
    "columns": (_columns, 2),
    "hsdp": (_hsdp, 4),
    "tensor-parallel": (_tensor_parallel, 2),
    "fsdp2-and-tensor-parallel": (_both, 4),
}


# ---- optimizers


def _chain(*elements: Any, lr: float = 1e-2) -> Callable[..., Any]:
    return lambda params, **options: C.ChainOpt(params, lr, *elements, **options)


def _preset(name: str, **given: Any) -> Callable[..., Any]:
    return lambda params, **options: getattr(heavyball, name)(params, **{**given, **options})


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": _preset("AdamW", lr=1e-2, weight_decay=0.1),
    "AdamW, eager": _preset("AdamW", lr=1e-2, compile=False),
    "cautious AdamW": _preset("AdamW", lr=1e-2, caution=True),
    "global clip": _preset("AdamW", lr=1e-2, gradient_clipping="global_norm_clip"),
    "AGC": _preset("AdamW", lr=1e-2, gradient_clipping="agc"),
    "skip_not_finite": _chain(C.skip_not_finite, C.scale_by_adam),
    "stable_adamw": _chain(C.scale_by_adam, C.stable_adamw),
    "SFAdamW": _preset("SFAdamW", lr=1e-2),
    "cautious LaProp": _preset("LaProp", lr=1e-2, caution=True),
    "Lion": _preset("Lion", lr=1e-3),
    "FactoredAdamW": _preset("FactoredAdamW", lr=1e-2),
    "ADOPT": _preset("ADOPT", lr=1e-2),
    "Prodigy": _preset("Prodigy"),
    "ProdigyPlusScheduleFree": _preset("ProdigyPlusScheduleFree"),
    "SOAP": _preset("SOAP", lr=1e-2, precondition_frequency=3),
    "PrecondSchedulePaLMSOAP": _preset("PrecondSchedulePaLMSOAP", lr=1e-2),
    "PSGDKron": _preset("PSGDKron", lr=1e-2),
    "LATHER": _preset("LATHER", lr=1e-2),
    "Muon": _preset("Muon", lr=1e-2),
    "Muon, products in bfloat16": _preset("Muon", lr=1e-2, products="bfloat16"),
    "NorMuon, products in bfloat16": _preset("NorMuon", lr=1e-2, products="bfloat16"),
    "NorMuon": _preset("NorMuon", lr=1e-2),
    "Shampoo": _preset("Shampoo", lr=1e-2),
    "8-bit AdamW": _preset("AdamW", lr=1e-2, storage_dtype="8bit"),
}


def on_one(make: Callable[..., Any], steps: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """The parameters of a process alone: at first, after some steps, and where it is evaluated."""
    model = Model(dtype)
    opt = make(list(model.named_parameters()))
    first = wholes([*model.parameters()])
    for step in range(steps):
        give(model, step, dtype)
        opt.step()
    last = wholes([*model.parameters()])
    opt.eval()
    return [first, last, wholes([*model.parameters()])]
