"""Muon: momentum whose singular values are all made nearly 1."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Live, fraction, is_real
from heavyball.core.transform import transform
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices, matrices_of, per_row
from heavyball.linalg.orthogonalize import (
    Normalize,
    Products,
    in_bfloat16,
    newton_schulz,
    polar_factor,
)
from heavyball.numerics import lerp
from heavyball.state.declare import zeros

Method = (
    Literal[
        "quintic",
        "quintic-5",
        "polar_express",
        "svd",
        "cans",
        "deepseekv4",
        "cubic",
        "newton-schulz",
    ]
    | tuple
)
Scale = Literal["original", "match_rms_adamw", "none", "graft", "spectral", "spectral_conv"]

# Options that say nothing to the exact factor, with the values that ask for nothing.
OF_PRODUCTS = {"restart": None, "normalize": "frobenius"}


def needs_matrix(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    """Why a parameter of this shape has no singular values.

    Errors: ValueError for options that exclude each other.
    """
    _check_method(options)
    if len(shape) >= 2:
        return wrong_blocks(shape, options)
    return (
        "needs a matrix, two dimensions or more; route the parameter to another chain: "
        "route(when(muon, min_ndim=2), otherwise=scale_by_adam)"
    )


def wrong_blocks(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    """Why a tensor cannot be cut into the blocks that are asked for."""
    try:
        matrices_of(shape, options)
    except ValueError as error:
        return str(error)
    return None


def _check_method(options: Mapping[str, Any]) -> None:
    method, restart = options.get("method"), options.get("restart")
    if isinstance(method, tuple) and not (method and all(map(_is_row, method))):
        raise ValueError(f"method={method!r}: expected a name or a tuple of (a, b, c)")
    if restart is not None and not all(type(k) is int and k > 0 for k in restart):
        raise ValueError(
            f"restart={restart!r}: expected None or a tuple of steps, 1 for the second"
        )
    if method == "svd" and options.get("products") == "bfloat16":
        raise ValueError("method='svd' has no products to make in bfloat16: leave out products")
    for name, plain in OF_PRODUCTS.items():
        value = options.get(name, plain)
        if method == "svd" and value != plain:
            raise ValueError(f"{name}={value!r} has no effect with method='svd': leave it out")
    if restart is not None and options.get("products") == "bfloat16":
        raise ValueError(
            f"restart={restart!r} has no effect with products='bfloat16': leave it out"
        )


def _is_row(row: Any) -> bool:
    return isinstance(row, tuple) and len(row) == 3 and all(map(is_real, row))


def static_scale(scale: Scale, rows: int, columns: int, kernel: int = 1) -> float:
    """The factor that depends on the shape alone; 1 where another is wanted.

    kernel: the number of elements of a convolution's kernel, by which the columns are more.
    """
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    if scale == "spectral_conv":
        return (rows * kernel / columns) ** 0.5 / kernel
    return (rows / columns) ** 0.5 if scale == "spectral" else 1.0


def kernel_of(shape: Sequence[int], stacked: bool) -> int:
    """How many elements the kernel of a convolution has, 1 for a matrix; `shape` without a batch."""
    return 1 if stacked else math.prod(shape[2:])


def orthogonal(
    x: Tensor,
    method: Method,
    steps: int,
    eps: Tensor | float,
    scale: Scale = "none",
    products: Products = "auto",
    restart: tuple[int, ...] | None = None,
    normalize: Normalize = "frobenius",
    kernel: int = 1,
) -> Tensor:
    """The orthogonal factor of a batch of matrices, scaled."""
    rows, columns = x.shape[-2:]
    factor = static_scale(scale, rows, columns, kernel)
    if method == "svd":
        result = polar_factor(x) * factor
    else:
        result = newton_schulz(x, method, steps, eps, factor, products, restart, normalize)
    if scale != "graft":
        return result
    return result * (size_of(x) / size_of(result).clamp(min=torch.finfo(x.dtype).tiny))


def of_products(
    shape: torch.Size, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> torch.dtype | None:
    """The dtype to which a parameter's matrices are rounded for products, if that is not their own.

    It is None too where the matrices are needed as they are besides.
    """
    if options["method"] == "svd" or not options["steps"] or options["scale"] == "graft":
        return None
    view, products = matrices_of(shape, options), options["products"]
    rounded = all(in_bfloat16(size, dtype, device, products) for size in view.sizes)
    return torch.bfloat16 if rounded else None


def rounds_both(*given: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What `rounds` says of a transform whose result is that of the products."""
    dtype = of_products(*given)
    return dtype, dtype


def rounds_update(*given: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What `rounds` says of a transform that goes on with the result of the products."""
    return of_products(*given), None


def size_of(x: Tensor) -> Tensor:
    """The Frobenius norm of every matrix of a batch."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


@whole_transform(requires=needs_matrix, rounds=rounds_both)
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
    normalize: Normalize = "frobenius",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> Tensor:
    """Orthogonalize a matrix: push all singular values to 1, keep the singular vectors.

    u = U S V^T  ->  scale * U f(S) V^T;  "svd": f = 1;  else Newton-Schulz on u / (||u||_F + eps):
        X <- a X + (b A + c A^2) X, A = X X^T, `steps` times
    method: "quintic" ends with singular values in about [0.68, 1.13], "quintic-5", "cans" and
        "polar_express" closer to 1 (polar_express with 8 steps at 1), "cubic" in [0.77, 1.3] for less
        work; "deepseekv4" is designed for 10 steps and "newton-schulz" for 12, both ending at 1.
        Or a tuple of (a, b, c) for each step; the last one is repeated.
    normalize: the initial scaling; "aol" scales the rows of the shorter side by their sums in A, which
        starts closer to the result but rotates the singular vectors.
    scale, for A rows and B columns: "original" sqrt(max(1, A/B)); "match_rms_adamw"
        0.2 sqrt(max(A, B)), the size of Adam's updates; "spectral" sqrt(A/B); "spectral_conv" for a
        kernel of k elements sqrt(A/(B/k))/k; "graft" ||u|| / ||O||.
    stacked: the parameter is a batch of matrices in its last two axes. Otherwise an n-d kernel is one
        matrix (size of axis 0, rest).
    blocks: split axis 0 (the rows), or with axis=1 the columns, into separate matrices. h: h equal ones,
        such as heads; (n_1, .., n_k): of these sizes, such as a fused q, k and v; ("interleaved",
        groups, (n_1, .., n_k)): matrix i consists of the i-th part of each group, the layout of
        fused q, k and v with grouped heads; {"*.qkv.weight": any of these}: by parameter name.
    products: "full" uses the dtype of the computation; "bfloat16", as the authors do, changes entries by
        up to 0.035; "auto" uses bfloat16 for float32 on devices with hardware for it, and for large
        matrices on processors with AMX, else "full".
    restart: the steps before which elongated matrices recompute their Gram matrix, to limit the loss of
        precision; None for as many as float32 needs. See
        `heavyball.linalg.orthogonalize.newton_schulz`.

    Shapes: (m, n), or n-d as above. A zero matrix stays zero.
    Units: the result is dimensionless.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
        https://arxiv.org/abs/2502.16982; Amsel et al. 2025, https://arxiv.org/abs/2505.16932.
        Departure: 4-d kernels are scaled by the flattened shape, where the authors' code takes the
        last two axes.
    """
    shape = update.shape[1:]
    options = method, steps, eps, scale, products, restart, normalize, kernel_of(shape, stacked)
    view = matrices(shape, stacked, blocks, axis)
    return view.map(lambda x: orthogonal(x, *options), update)


@transform(momentum_buffer=zeros, domains={"momentum": fraction})
def muon_momentum(
    update: Tensor, momentum_buffer: Tensor, *, momentum: Live = 0.95, nesterov: bool = True
) -> tuple[Tensor, Tensor]:
    """The momentum of Muon, before orthogonalization.

    b <- momentum b + (1 - momentum) g;  u = (1 - momentum) g + momentum b if nesterov, else b

    Shapes: all (*).
    Units: those of the gradient.
    Source: as `muon`. Departure from `exp_avg`: no bias correction.
    """
    buffer = lerp(momentum_buffer, update, 1 - momentum)
    return (lerp(update, buffer, momentum) if nesterov else buffer), buffer


@whole_transform(requires=needs_matrix, lead=muon_momentum, rounds=rounds_both)
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
    normalize: Normalize = "frobenius",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> Tensor:
    """Orthogonalized momentum: all singular values are nearly 1.

    b <- momentum b + (1 - momentum) g;  o = (1 - momentum) g + momentum b if nesterov, else b
    u = scale * NS(o), as in `orthogonalize`

    Shapes: two or more dimensions, see `orthogonalize`.
    Units: the result is dimensionless: its spectral norm is about `scale`.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon.
    """
    shape = update.shape[1:]
    options = method, steps, eps, scale, products, restart, normalize, kernel_of(shape, stacked)
    view = matrices(shape, stacked, blocks, axis)
    return view.map(lambda x: orthogonal(x, *options), update)


@whole_transform(
    requires=needs_matrix,
    lead=muon_momentum,
    rounds=rounds_update,
    row_square=per_row("square"),
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
    normalize: Normalize = "frobenius",
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Muon with rows normalized by their running mean squares.

    O = NS(o), with o the momentum of `muon`
    v <- beta2 v + (1 - beta2) mean of O^2 over the columns;  O' = O / (sqrt(v) + row_eps)
    u = scale * O' ||O|| / (||O'|| + row_eps)

    Shapes: two or more dimensions, see `orthogonalize`; v: one number per row.
    Units: the result is dimensionless.
    Errors: ValueError for a parameter of fewer than two dimensions.
    Source: Li et al. 2025, https://arxiv.org/abs/2510.05491.
    """
    shape = update.shape[1:]
    none: Scale = "none"
    options = method, steps, eps, none, products, restart, normalize
    kernel = kernel_of(shape, stacked)

    def evened(x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        o = orthogonal(x, *options)
        square = lerp(before, o.square().mean(-1, keepdim=True), 1 - beta2)
        even = o / (square.sqrt() + row_eps)
        size, now = size_of(o), size_of(even)
        factor = static_scale(scale, o.shape[-2], o.shape[-1], kernel)
        result = even * (factor * size / (now + row_eps))
        if scale == "graft":
            result = result * (size_of(x) / size.clamp(min=torch.finfo(x.dtype).tiny))
        return result, square

    return matrices(shape, stacked, blocks, axis).map(evened, update, row_square)
