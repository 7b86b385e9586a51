"""AdaMuon: Muon whose result is divided by its own running second moment."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices, matrices_of
from heavyball.linalg.orthogonalize import Products
from heavyball.numerics import lerp
from heavyball.state.declare import State
from heavyball.transforms.muon import Method, muon_momentum, needs_matrix, orthogonal, size_of

NS_EPS = 1e-7  # of the products, which the authors leave alone


def _second(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    if options["second_moment"] == "elements":
        return torch.zeros_like(param)
    return param.new_zeros(matrices_of(param.shape, options).number_shape)


@whole_transform(
    requires=needs_matrix,
    lead=muon_momentum,
    square=State(_second, "zeros like the parameter, or a number per matrix", holds="square"),
)
def scale_by_adamuon(
    update: Tensor,
    square: Tensor,
    *,
    grad: Tensor,
    beta2: Live = 0.95,
    eps: Live = 1e-8,
    sign: bool = True,
    second_moment: Literal["elements", "norm"] = "elements",
    method: Method = "quintic",
    steps: int = 5,
    stacked: bool = False,
    products: Products = "auto",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Orthogonalize the sign of the momentum, then divide by the root of a running second moment.

    o = the momentum of `muon`;  O = NS(sign(o)), without `sign` NS(o)
    "elements":  v <- beta2 v + (1 - beta2) O^2;  w = O / (sqrt(v) + eps);
                 u = 0.2 sqrt(R C) w / (||w|| + eps), so that RMS(u) = 0.2
    "norm":      s <- beta2 s + (1 - beta2) ||g||^2;  u = O ||o|| / (sqrt(s) + eps)

    second_moment: "elements" is AdaMuon, "norm" NAMO, with one number per matrix instead of v.
    method, steps, stacked, products, blocks, axis: as in `orthogonalize`.

    Shapes: two or more dimensions, R x C as in `orthogonalize`.
    Units: the result is dimensionless. lr as AdamW's for "elements", 0.001 to 0.02.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Si, Zhang and Shen 2025, https://arxiv.org/abs/2507.11005v3 (v1 had no sign; their code
        for Megatron drops v if nothing is distributed); NAMO, https://arxiv.org/abs/2602.17080.
    """
    view = matrices(update.shape[1:], stacked, blocks, axis)

    def orthogonalized(x: Tensor) -> Tensor:
        return orthogonal(x.sign() if sign else x, method, steps, NS_EPS, "none", products)

    def by_elements(x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        o = orthogonalized(x)
        after = lerp(before, o.square(), 1 - beta2)
        even = o / (after.sqrt() + eps)
        goal = 0.2 * (x.shape[-2] * x.shape[-1]) ** 0.5
        return even * (goal / (size_of(even) + eps)), after

    def by_norm(x: Tensor, before: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        after = lerp(before, size_of(g).square(), 1 - beta2)
        return orthogonalized(x) * (size_of(x) / (after.sqrt() + eps)), after

    if second_moment == "elements":
        return view.map(by_elements, update, square)
    return view.map(by_norm, update, square, more=(grad,))
