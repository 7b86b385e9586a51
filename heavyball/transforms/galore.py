"""GaLore and Fira: a chain, Adam by default, in the leading singular vectors of the gradient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.combine import Within, as_chain
from heavyball.core.hyper import Live, is_sequence, positive, shared
from heavyball.core.transform import Transform
from heavyball.core.whole import whole_transform
from heavyball.errors import nearest
from heavyball.linalg.low_rank import channels, images_shape, limit, wrong_rank
from heavyball.linalg.matrices import (
    Blocks,
    Matrices,
    matrices,
    matrices_of,
    packed,
    per_matrix,
    unpacked,
)
from heavyball.state.declare import State, scalar
from heavyball.transforms.adam import scale_by_adam


def _directions(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    shapes = _sides(matrices_of(param.shape, options), options["rank"])
    return param.new_zeros(shapes[0] if len(shapes) == 1 else sum(map(math.prod, shapes)))


def _sides(view: Matrices, rank: int) -> list[tuple[int, int]]:
    """The shape of every block's directions."""
    return [(min(sizes), rank) for sizes in view.sizes]


def _project(
    update: Tensor,
    directions: Tensor,
    *,
    count: int,
    rank: int = 128,
    gap: int = 200,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Any, Any, Any, Any]:
    """g V of the first right singular vectors V where R >= C, else U^T g, of every block."""
    options = {"rank": rank, "blocks": blocks, "axis": axis}
    view = matrices(update.shape[1:], False, blocks, axis)
    held = unpacked(directions, _sides(view, rank))
    images = list(held)
    for numbers, g in zip(view.of, view.batches(update), strict=True):
        q = torch.cat([held[k] for k in numbers])
        tall = g.shape[-2] >= g.shape[-1]
        if (count - 1) % gap == 0:
            finite = torch.where(torch.isfinite(g), g, 0.0)
            u, _, vh = torch.linalg.svd(finite, full_matrices=False)
            q = (vh.mT if tall else u)[..., :rank].contiguous()
        image = g @ q if tall else q.mT @ g
        for x, made in ((held, q), (images, image)):
            for k, part in zip(numbers, made.split(len(update)), strict=True):
                x[k] = part
    inner = packed(images).reshape(len(update), *images_shape(update.shape[1:], options))
    return inner, packed(held, directions), tuple(held), update, tuple(images), view


def _back(update: Tensor, directions: Tensor, tall: bool) -> Tensor:
    return update @ directions.mT if tall else directions @ update


def _each(
    update: Tensor,
    used: tuple[Tensor, ...],
    g: Tensor,
    images: tuple[Tensor, ...],
    view: Matrices,
    fn: Callable[..., Tensor],
) -> Tensor:
    """The tensor of what `fn(z, directions, g, image, tall)` makes of the blocks of each size.

    z: what the chain inside has made of the image.
    """
    parts = unpacked(update, [tuple(image.shape[1:]) for image in images])
    results = []
    for numbers, block in zip(view.of, view.batches(g), strict=True):
        given = [torch.cat([x[k] for k in numbers]) for x in (parts, used, images)]
        tall = block.shape[-2] >= block.shape[-1]
        results.append(fn(given[0], given[1], block, given[2], tall))
    return view.whole(results, g)


def _leave_galore(
    update: Tensor, *, used: Any, g: Any, image: Any, view: Any, scale: Live = 0.25
) -> Tensor:
    def back(z: Tensor, directions: Tensor, block: Tensor, image: Tensor, tall: bool) -> Tensor:
        return scale * _back(z, directions, tall)

    return _each(update, used, g, image, view, back)


def _leave_fira(
    update: Tensor,
    last: Tensor,
    *,
    used: Any,
    g: Any,
    image: Any,
    view: Any,
    scale: Live = 1.0,
) -> tuple[Tensor, Tensor]:
    several = len(image) > 1
    before = iter(view.batches(last) if several else [last])
    lengths = []

    def back(z: Tensor, directions: Tensor, block: Tensor, image: Tensor, tall: bool) -> Tensor:
        ratio = channels(z, not tall, "channel") / (channels(image, not tall, "channel") + 1e-8)
        rest = ratio * (block - _back(image, directions, tall))
        length = torch.linalg.vector_norm(rest, dim=(-2, -1), dtype=torch.float64)
        excess, size = limit(length, next(before), rest.dtype)
        lengths.append(size)
        return scale * (_back(z, directions, tall) + rest / excess)

    result = _each(update, used, g, image, view, back)
    if not several:
        return result, lengths[0].reshape(last.shape).to(last.dtype)
    sizes = [size.to(last.dtype).reshape(-1, 1, 1) for size in lengths]
    return result, view.whole(sizes, last)


def _leave_fira_of_adam(
    update: Tensor,
    last: Tensor,
    *,
    used: Any,
    g: Any,
    image: Any,
    view: Any,
    step: Tensor,
    scale: Live = 1.0,
    betas: Live = (0.9, 0.999),
) -> tuple[Tensor, Tensor]:
    """Behind an Adam without bias corrections, which are made here: the limiter does not see them."""
    scale = scale * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    return _leave_fira(update, last, used=used, g=g, image=image, view=view, scale=scale)


# in a mapping, because a transform at the top of a module is found by its name
ENDS: dict[str, Transform] = {
    "enter": whole_transform(
        directions=State(_directions, "the leading singular vectors of the shorter side"),
        opaque=("used", "g", "image", "view"),
        requires=wrong_rank,
        domains={"rank": positive, "gap": positive},
        inner_shape=images_shape,
    )(_project),
    "galore": whole_transform()(_leave_galore),
    "fira": whole_transform(last=scalar(0.0, low=0.0))(_leave_fira),
    "fira of adam": whole_transform(last=scalar(0.0, low=0.0))(_leave_fira_of_adam),
    # a length for each block, whose number the entrance's options say
    "fira of blocks": whole_transform(last=per_matrix("values"))(_leave_fira),
    "fira of adam of blocks": whole_transform(last=per_matrix("values"))(_leave_fira_of_adam),
}
ENTER = ("rank", "gap", "blocks", "axis")
BETAS = shared("betas", (0.9, 0.999))
DEFAULTS = {
    "galore": (scale_by_adam(betas=BETAS, eps=1e-6, eps_placement="biased"),),
    "fira": (scale_by_adam(betas=BETAS, eps=1e-6, correct_bias=False),),
}


class LowRank(Within):
    """`galore` or `fira`, printed as it is written."""

    def __repr__(self) -> str:
        options = {**self.enter.options, **self.leave.hyper}
        given = [n for n in options if n in self.enter.given | self.leave.given and n != "betas"]
        inner = () if self.chain is DEFAULTS[self.name] else map(repr, self.chain)
        return f"{self.name}({', '.join([*inner, *(f'{n}={options[n]!r}' for n in given)])})"

    def __reduce__(self) -> tuple:
        options = {**self.enter.options, **self.leave.hyper}
        given = {n: v for n, v in options.items() if n in self.enter.given | self.leave.given}
        given.pop("betas", None)
        inner = () if self.chain is DEFAULTS[self.name] else self.chain
        return _low_rank, (self.name, inner, given)


def _low_rank(name: str, inner: tuple[Any, ...], options: dict[str, Any]) -> Within:
    enter = {n: options[n] for n in ENTER if n in options}
    leave = {n: v for n, v in options.items() if n not in enter}
    if len(inner) == 1 and is_sequence(inner[0]):
        inner = tuple(inner[0])
    chain = as_chain(inner, name) if inner else DEFAULTS[name]
    for unknown in leave.keys() - {"scale"}:
        raise TypeError(f"{name} has no option {unknown!r}; {nearest(unknown, [*ENTER, 'scale'])}")
    of_adam = name == "fira" and not inner
    of_blocks = " of blocks" if name == "fira" and enter.get("blocks") is not None else ""
    end = ENDS[f"fira of adam{of_blocks}"](betas=BETAS) if of_adam else ENDS[name + of_blocks]
    first, last = (replace(t, name=name) for t in (ENDS["enter"], end))
    return LowRank(name, first(**enter), chain, last(**leave))


def galore(*inner: Any, **options: Any) -> Within:
    """Run a chain, Adam by default, on a low-rank projection of the gradient (GaLore).

    In the first step and then every `gap` steps, the SVD of g gives B, the `rank` leading right singular
    vectors if R >= C, else the left ones.  Z = g B, or B^T g;  u = scale (inner(Z) projected back)

    The inner chain's states have the shape of Z, and do not change when B is recomputed.

    rank (128), gap (200), scale (0.25, live).
    blocks (None), axis (0): as in `orthogonalize`. Every block has its own B, and the inner chain's
        states are vectors that contain all projections, so transforms that need a matrix cannot be
        inside.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Errors: ValueError for a rank that is larger than the matrix, or a block.
    Source: Zhao et al. 2024, https://arxiv.org/abs/2403.03507; galore-torch 1.0.
    """
    return _low_rank("galore", inner, options)


def fira(*inner: Any, **options: Any) -> Within:
    """`galore` plus the residual of the projection, scaled per channel like the projected part (Fira).

    u = scale (inner(Z) projected back + w), w = s (g - Z projected back),
    s = ||inner(Z)|| / (||Z|| + 1e-8) per column of a wide matrix, else per row;
    ||w|| grows by at most the factor 1.01 per step

    rank (128), gap (200), scale (1, live), blocks (None), axis (0), as in `galore`; every block
        has its own limit of ||w||.

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Errors: ValueError for a rank that is larger than the matrix, or a block.
    Source: Chen et al. 2024, https://arxiv.org/abs/2410.01623.
    """
    return _low_rank("fira", inner, options)
