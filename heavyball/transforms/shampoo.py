"""Shampoo: divide every axis by a root of its own covariance."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, closed_fraction, nonnegative
from heavyball.core.whole import whole_transform
from heavyball.linalg.basis import Sides, one_sided
from heavyball.linalg.device_memory import warn_if_large
from heavyball.linalg.kron import gram
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.roots import inverse_root
from heavyball.linalg.view import WorkingShape, working_shape
from heavyball.numerics import debiased_weight
from heavyball.state.declare import State

ADVICE = "a smaller max_precond_dim (longer axes are left alone), or split=True, takes less"


@functools.lru_cache(maxsize=4096)
def _view(
    shape: tuple[int, ...], limit: int, merge_dims: bool, split: bool, blocks: Any, axis: int
) -> WorkingShape:
    return working_shape(shape, "right" if merge_dims else "none", limit, split, blocks, axis)


def view_of(shape: Sequence[int], options: Mapping[str, Any]) -> WorkingShape:
    """How Shampoo sees a tensor of this shape."""
    names = "max_precond_dim", "merge_dims", "split", "blocks", "axis"
    return _view(tuple(shape), *(options[name] for name in names))


def axes_of(block: Sequence[int], limit: int, sides: Sides = "all") -> list[int]:
    """The axes of a block that are preconditioned."""
    return [axis for axis, size in enumerate(one_sided(block, sides)) if 1 < size <= limit]


def _matrices(make: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def init(param: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
        limit, sides = options["max_precond_dim"], options["sides"]
        blocks = view_of(param.shape, options).blocks
        sizes = [block[axis] for block in blocks for axis in axes_of(block, limit, sides)]
        bytes_of_both = 2 * sum(n * n for n in sizes) * param.element_size()
        warn_if_large("shampoo", param, bytes_of_both, ADVICE)
        return tuple(make(n, dtype=param.dtype, device=param.device) for n in sizes)

    return init


def _zeros(size: int, **how: Any) -> Tensor:
    return torch.zeros(size, size, **how)


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    for name in ("precondition_frequency", "max_precond_dim"):
        if options[name] < 1:
            raise ValueError(f"{name}={options[name]!r}: expected at least 1")
    if options["order"] is not None and options["order"] < 1:
        raise ValueError(f"order={options['order']!r}: expected at least 1, or None")
    try:
        view_of(shape, options)
    except ValueError as error:
        return str(error)
    return None


@whole_transform(
    host=("beta2", "eps"),
    requires=_problem,
    domains={"beta2": closed_fraction, "eps": nonnegative},
    grams=State(_matrices(_zeros), "zero matrices, one for each axis", several=True),
    roots=State(_matrices(torch.eye), "identities, one for each axis", several=True),
)
def shampoo(
    update: Tensor,
    grams: tuple[Tensor, ...],
    roots: tuple[Tensor, ...],
    *,
    grad: Tensor,
    count: int,
    beta2: Live = 1.0,
    eps: Live = 1e-12,
    precondition_frequency: int = 1,
    max_precond_dim: int = 1024,
    merge_dims: bool = False,
    split: bool = False,
    sides: Sides = "all",
    order: int | None = None,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Multiply along every axis by the inverse root of the accumulated Gram matrices.

    L_i <- L_i + G G^T for the unfolding G of the gradient along axis i (beta2 = 1), or for beta2 < 1
        the mean of those with weights beta2^(t-j)
    u'  = u x_1 (L_1 + eps I)^(-1/(2n)) ... x_n (L_n + eps I)^(-1/(2n)), n preconditioned axes

    The roots are computed in the first step and in every step that `precondition_frequency` divides.
    Axes of one element or of more than `max_precond_dim` are skipped; if none is left, the update passes
    unchanged.

    merge_dims: merge axes from the right while the product is at most `max_precond_dim`.
    split: split longer axes into blocks with separate matrices.
    sides: "smaller" or "larger" preconditions only the shortest or the longest axis.
    order: the order of the root instead of 2n; `sides="smaller", order=2` after a momentum is ASGO.
    blocks, axis: blocks of an axis with separate matrices, as in `orthogonalize`.

    Shapes: all (*).
    Units: with beta2 < 1 the result is dimensionless; its size falls with the rank of the gradients,
        so it is usually grafted: `graft(shampoo, scale_by_adam)`.
    Source: Gupta, Koren and Singer 2018, Algorithm 2, https://arxiv.org/abs/1802.09568; ASGO: An et
        al. 2025, https://arxiv.org/abs/2503.20762. Departures: eps is added when a root is computed
        (for a sum that is equivalent), and the mean is unbiased.
    """
    view = _view(tuple(update.shape[1:]), max_precond_dim, merge_dims, split, blocks, axis)
    weight = 1.0 if beta2 == 1 else debiased_weight(beta2, count)  # type: ignore[arg-type]
    kept = 1.0 if beta2 == 1 else 1 - weight
    refreshes = count == 1 or count % precondition_frequency == 0
    old, old_roots = iter(grams), iter(roots)
    outputs, new, new_roots = [], [], []
    for x, seen, block in zip(
        view.blocks_of(update), view.blocks_of(grad), view.blocks, strict=True
    ):
        axes = axes_of(block, max_precond_dim, sides)
        for side in axes:
            matrix = kept * next(old) + weight * gram(seen, side, False)
            root = next(old_roots)
            if refreshes:
                root = inverse_root(matrix, order or 2 * len(axes), eps, root)
            new.append(matrix)
            new_roots.append(root)
            rows = x.movedim(side + 1, -1)
            x = (
                (rows.reshape(len(x), -1, x.shape[side + 1]) @ root)
                .reshape(rows.shape)
                .movedim(-1, side + 1)
            )
        outputs.append(x)
    return view.whole_of(outputs), tuple(new), tuple(new_roots)
