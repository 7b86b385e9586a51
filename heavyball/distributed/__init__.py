"""Chains on torch.distributed: shards, owners of matrix work, sums over processes."""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without loading what only a DTensor needs."""
    return type(tensor).__torch_dispatch__ != _PLAIN and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def check_parts(label: str, param: Tensor) -> None:
    """Refuse a DTensor that cannot be stepped in parts.

    Errors: ValueError that begins with the label.
    """
    from heavyball.distributed.shard import check_placements

    check_placements(label, param)  # type: ignore[arg-type]


_PLAIN = Tensor.__torch_dispatch__
