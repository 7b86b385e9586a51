"""GaLore and Fira: a chain, Adam by default, in the leading singular vectors of the gradient."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heavyball.core.combine import Within, as_chain
from heavyball.core.hyper import Live, positive, shared
from heavyball.core.transform import Transform
from heavyball.core.whole import whole_transform
from heavyball.errors import nearest
from heavyball.linalg.low_rank import channels, image_shape, limited, matrix_shape, wrong_rank
from heavyball.state.declare import State, scalar
from heavyball.transforms.adam import scale_by_adam


def _directions(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    rows, columns = matrix_shape(param.shape)
    return param.new_zeros(min(rows, columns), options["rank"])


def _project(
    update: Tensor, directions: Tensor, *, count: int, rank: int = 128, gap: int = 200
) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """g V of the first right singular vectors V where R >= C, else U^T g."""
    rows, columns = matrix_shape(update.shape[1:])
    g = update.reshape(len(update), rows, columns)
    tall = rows >= columns
    if (count - 1) % gap == 0:
        u, _, vh = torch.linalg.svd(torch.where(torch.isfinite(g), g, 0.0), full_matrices=False)
        directions = (vh.mT if tall else u)[..., :rank].contiguous()
    image = g @ directions if tall else directions.mT @ g
    return image, directions, directions, g, image


def _back(update: Tensor, directions: Tensor, tall: bool) -> Tensor:
    return update @ directions.mT if tall else directions @ update


def _leave_galore(
    update: Tensor, *, used: Any, g: Any, image: Any, param: Tensor, scale: Live = 0.25
) -> Tensor:
    tall = g.shape[-2] >= g.shape[-1]
    return (scale * _back(update, used, tall)).reshape(param.shape)


def _leave_fira(
    update: Tensor,
    last: Tensor,
    *,
    used: Any,
    g: Any,
    image: Any,
    param: Tensor,
    scale: Live = 1.0,
) -> tuple[Tensor, Tensor]:
    tall = g.shape[-2] >= g.shape[-1]
    ratio = channels(update, not tall, "channel") / (channels(image, not tall, "channel") + 1e-8)
    rest, size = limited(ratio * (g - _back(image, used, tall)), last)
    return (scale * (_back(update, used, tall) + rest)).reshape(param.shape), size


def _leave_fira_of_adam(
    update: Tensor,
    last: Tensor,
    *,
    used: Any,
    g: Any,
    image: Any,
    param: Tensor,
    step: Tensor,
    scale: Live = 1.0,
    betas: Live = (0.9, 0.999),
) -> tuple[Tensor, Tensor]:
    """Behind an Adam without bias corrections, which are made here: the limiter does not see them."""
    scale = scale * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    return _leave_fira(update, last, used=used, g=g, image=image, param=param, scale=scale)


# in a mapping, because a transform at the top of a module is found by its name
ENDS: dict[str, Transform] = {
    "enter": whole_transform(
        directions=State(_directions, "the leading singular vectors of the shorter side"),
        opaque=("used", "g", "image"),
        requires=wrong_rank,
        domains={"rank": positive, "gap": positive},
        inner_shape=lambda shape, options: image_shape(shape, options["rank"]),
    )(_project),
    "galore": whole_transform()(_leave_galore),
    "fira": whole_transform(last=scalar(0.0, low=0.0))(_leave_fira),
    "fira of adam": whole_transform(last=scalar(0.0, low=0.0))(_leave_fira_of_adam),
}
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
    enter = {n: options[n] for n in ("rank", "gap") if n in options}
    leave = {n: v for n, v in options.items() if n not in enter}
    if len(inner) == 1 and isinstance(inner[0], tuple | list):
        inner = tuple(inner[0])
    chain = as_chain(inner, name) if inner else DEFAULTS[name]
    for unknown in leave.keys() - {"scale"}:
        raise TypeError(
            f"{name} has no option {unknown!r}; {nearest(unknown, ['rank', 'gap', 'scale'])}"
        )
    of_adam = name == "fira" and not inner
    end = ENDS["fira of adam"](betas=BETAS) if of_adam else ENDS[name]
    first, last = (replace(t, name=name) for t in (ENDS["enter"], end))
    return LowRank(name, first(**enter), chain, last(**leave))


def galore(*inner: Any, **options: Any) -> Within:
    """Run a chain, Adam by default, on the gradient's image in its leading singular vectors.

    Every `gap` steps, the first among them, the SVD of g gives B, the `rank` leading right singular
    vectors where R >= C, else the left ones.  Z = g B, or B^T g;  u = scale (inner(Z) turned back)
    The chain keeps its states in the shape of Z, and they stay as they are when B is renewed.

    rank (128), gap (200), scale (0.25, live).

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Errors: ValueError for a rank that is larger than the matrix.
    Source: Zhao et al. 2024, https://arxiv.org/abs/2403.03507; galore-torch 1.0.
    """
    return _low_rank("galore", inner, options)


def fira(*inner: Any, **options: Any) -> Within:
    """`galore` with what the image has left out, as large per channel as the chain made the image.

    u = scale (inner(Z) turned back + w), w = s (g - Z turned back), s = ||inner(Z)|| / (||Z|| + 1e-8)
    per column of a wide matrix and per row of another;  ||w|| is at most 1.01 times that of before

    rank (128), gap (200), scale (1, live).

    Shapes: two or more dimensions, R x C as (size of axis 0, rest).
    Errors: ValueError for a rank that is larger than the matrix.
    Source: Chen et al. 2024, https://arxiv.org/abs/2410.01623.
    """
    return _low_rank("fira", inner, options)
