"""Muon: momentum whose singular values are all made nearly 1."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction
from heavyball.core.transform import transform
from heavyball.core.whole import whole_transform
from heavyball.linalg.orthogonalize import Products, newton_schulz, polar_factor
from heavyball.numerics import lerp
from heavyball.state.declare import State, zeros

Method = Literal["quintic", "quintic-5", "polar_express", "svd"]
Scale = Literal["original", "match_rms_adamw", "none", "graft", "spectral"]


def needs_matrix(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    """Why a parameter of this shape has no singular values.

    Errors: ValueError for options that exclude each other.
    """
    if options.get("method") == "svd" and options.get("products") == "bfloat16":
        raise ValueError("method='svd' has no products to make in bfloat16: leave out products")
    _check_restart(options)
    if len(shape) >= 2:
        return None
    return (
        "needs a matrix, two dimensions or more; route the parameter to another chain: "
        "route(when(muon, min_ndim=2), otherwise=scale_by_adam)"
    )


def _check_restart(options: Mapping[str, Any]) -> None:
    restart = options.get("restart")
    if restart is None:
        return
    if not all(type(k) is int and k > 0 for k in restart):
        raise ValueError(
            f"restart={restart!r}: expected None or a tuple of steps, 1 for the second"
        )
    for name, value in (("method", "svd"), ("products", "bfloat16")):
        if options[name] == value:
            raise ValueError(
                f"restart={restart!r} has no effect with {name}={value!r}: leave it out"
            )


def as_matrices(update: Tensor, stacked: bool) -> Tensor:
    """A batch of matrices: kernels as (size0, rest), or the last two axes where they are stacked."""
    if stacked:
        return update.reshape(-1, *update.shape[-2:])
    return update.reshape(len(update), update.shape[1], -1)


def static_scale(scale: Scale, rows: int, columns: int) -> float:
    """The factor that depends on the shape alone; 1 where another is wanted."""
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return (rows / columns) ** 0.5 if scale == "spectral" else 1.0


def orthogonal(
    x: Tensor,
    method: Method,
    steps: int,
    eps: Tensor | float,
    scale: Scale = "none",
    products: Products = "auto",
    restart: tuple[int, ...] | None = None,
) -> Tensor:
    """The orthogonal factor of a batch of matrices, scaled."""
    factor = static_scale(scale, *x.shape[-2:])
    if method == "svd":
        result = polar_factor(x) * factor
    else:
        result = newton_schulz(x, method, steps, eps, factor, products, restart)
    if scale != "graft":
        return result
    size = torch.linalg.vector_norm(result, dim=(-2, -1), keepdim=True)
    wanted = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return result * (wanted / size.clamp(min=torch.finfo(x.dtype).tiny))


@whole_transform(requires=needs_matrix)
def orthogonalize(
    update: Tensor,
    *,
    method: Method = "quintic",
    steps: int = 5,
    eps: Live = 1e-7,
    scale: Scale = "none",
    stacked: bool = False,
    products: Products = "auto",
    restart: tuple[int, ...] | None = None,
) -> Tensor:
    """Push all singular values of a matrix to 1 and keep its singular vectors.

    u = U S V^T  ->  scale * U f(S) V^T;  "svd": f = 1;  else Newton-Schulz on u / (||u||_F + eps):
        X <- a X + (b A + c A^2) X, A = X X^T, `steps` times
    method: "quintic" ends with singular values in about [0.68, 1.13], "quintic-5" and
        "polar_express" closer to 1 (polar_express with 8 steps at 1).
    scale, for A rows and B columns: "original" sqrt(max(1, A/B)); "match_rms_adamw"
        0.2 sqrt(max(A, B)), the size of Adam's updates; "spectral" sqrt(A/B); "graft" ||u|| / ||O||.
    stacked: the parameter is a batch of matrices in its last two axes. Otherwise an n-d kernel is one
        matrix (size of axis 0, rest).
    products: "full" in the dtype of the mathematics; "bfloat16" as the authors, which puts an entry off
        by up to 0.035; "auto" is bfloat16 for float32 on devices with units for it, and on processors
        with AMX for large matrices, else "full".
    restart: the steps before which elongated matrices begin anew with the Gram matrix of what they
        have become, against the loss of digits; None for as many as float32 needs. See
        `heavyball.linalg.orthogonalize.newton_schulz`.

    Shapes: (m, n), or n-d as above. A zero matrix stays zero.
    Units: the result has none.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
        https://arxiv.org/abs/2502.16982; Amsel et al. 2025, https://arxiv.org/abs/2505.16932.
        Departure: 4-d kernels are scaled by the flattened shape, where the authors' code takes the
        last two axes.
    """
    x = as_matrices(update, stacked)
    return orthogonal(x, method, steps, eps, scale, products, restart).reshape(update.shape)


@transform(momentum_buffer=zeros, domains={"momentum": fraction})
def muon_momentum(
    update: Tensor, momentum_buffer: Tensor, *, momentum: Live = 0.95, nesterov: bool = True
) -> tuple[Tensor, Tensor]:
    """The momentum in front of Muon's products.

    b <- momentum b + (1 - momentum) g;  u = (1 - momentum) g + momentum b if nesterov, else b

    Shapes: all (*).
    Units: those of the gradient.
    Source: as `muon`. Departure from `exp_avg`: no bias correction.
    """
    buffer = lerp(momentum_buffer, update, 1 - momentum)
    return (lerp(update, buffer, momentum) if nesterov else buffer), buffer


@whole_transform(requires=needs_matrix, lead=muon_momentum)
def muon(
    update: Tensor,
    *,
    method: Method = "quintic",
    steps: int = 5,
    eps: Live = 1e-7,
    scale: Scale = "original",
    stacked: bool = False,
    products: Products = "auto",
    restart: tuple[int, ...] | None = None,
) -> Tensor:
    """Momentum, then all its singular values nearly 1.

    b <- momentum b + (1 - momentum) g;  o = (1 - momentum) g + momentum b if nesterov, else b
    u = scale * NS(o), as in `orthogonalize`

    Shapes: two or more dimensions, see `orthogonalize`.
    Units: the result has none: its spectral norm is about `scale`.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon.
    """
    x = as_matrices(update, stacked)
    return orthogonal(x, method, steps, eps, scale, products, restart).reshape(update.shape)


def _row_means(param: Tensor, options: Mapping[str, Any]) -> Tensor:
    shape = (*param.shape[:-1], 1) if options["stacked"] else (param.shape[0], 1)
    return torch.zeros(shape, dtype=param.dtype, device=param.device)


@whole_transform(
    requires=needs_matrix,
    lead=muon_momentum,
    row_square=State(_row_means, "a number per row", holds="square"),
)
def scale_by_normuon(
    update: Tensor,
    row_square: Tensor,
    *,
    beta2: Live = 0.95,
    method: Method = "quintic",
    steps: int = 5,
    eps: Live = 1e-7,
    row_eps: Live = 1e-10,
    scale: Scale = "original",
    stacked: bool = False,
    products: Products = "auto",
    restart: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Muon whose rows are brought to one size by their running mean squares.

    O = NS(o), with o the momentum of `muon`
    v <- beta2 v + (1 - beta2) mean of O^2 over the columns;  O' = O / (sqrt(v) + row_eps)
    u = scale * O' ||O|| / (||O'|| + row_eps)

    Shapes: two or more dimensions, see `orthogonalize`; v: one number per row.
    Units: the result has none.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Li et al. 2025, https://arxiv.org/abs/2510.05491.
    """
    x = as_matrices(update, stacked)
    o = orthogonal(x, method, steps, eps, "none", products, restart)
    before = row_square.reshape(*o.shape[:-1], 1)
    square = lerp(before, o.square().mean(-1, keepdim=True), 1 - beta2)
    evened = o / (square.sqrt() + row_eps)
    size = torch.linalg.vector_norm(o, dim=(-2, -1), keepdim=True)
    now = torch.linalg.vector_norm(evened, dim=(-2, -1), keepdim=True)
    result = evened * (static_scale(scale, *o.shape[-2:]) * size / (now + row_eps))
    if scale == "graft":
        wanted = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        result = result * (wanted / size.clamp(min=torch.finfo(x.dtype).tiny))
    return result.reshape(update.shape), square.reshape(row_square.shape)
