"""The orthogonal factor of matrices: Newton-Schulz iterations, and the exact one from an SVD."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from heavyball.linalg.scratch import scratch

Products = Literal["auto", "full", "bfloat16"]
Normalize = Literal["frobenius", "aol"]
Row = tuple[float, float, float]
# The name of a table, or its rows.
Coefficients = str | tuple[Row, ...]

# One (a, b, c) per step; after the end the last is repeated. X <- a X + (b A + c A^2) X, A = X X^T.
TABLES: dict[str, tuple[Row, ...]] = {
    # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: steep at 0, so that five steps are
    # enough, and the singular values end in about [0.68, 1.13] rather than at 1.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # One row per step, as published with microsoft/dion.
    "quintic-5": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al. 2025, https://arxiv.org/abs/2505.16932: the best odd quintics one after the other for
    # singular values from 1e-3; the last is Newton-Schulz proper and converges to the polar factor.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    # Grishina, Smirnov and Rakhuba 2025, https://arxiv.org/abs/2506.10935.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # DeepSeek-V4's report: eight steep steps, and two that converge; made for 10 steps.
    "deepseekv4": (*8 * ((3.4445, -4.7750, 2.0315),), *2 * ((2.0, -1.5, 0.5),)),
    # https://arxiv.org/abs/2606.00371: without a fifth power, which saves the square of the Gram matrix.
    "cubic": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    # The records of modded-nanogpt's third track: slow at 0, exact at the end; made for 12 steps.
    "newton-schulz": ((2.0, -1.5, 0.5),),
}
# Polar Express as published shrinks every polynomial but the last by this, against rounding.
SAFETY = 1.01
# Up to so many steps one restart of the Gram form is enough, for every table.
FEW_STEPS = 5
# From this ratio of the sides on, the Gram form needs fewer operations.
ELONGATED = 2.5


@functools.lru_cache
def table(coefficients: Coefficients, steps: int) -> tuple[Row, ...]:
    """The (a, b, c) of each step."""
    rows = TABLES[coefficients] if isinstance(coefficients, str) else coefficients
    found = [rows[min(k, len(rows) - 1)] for k in range(steps)]
    if coefficients == "polar_express":
        last = len(rows) - 1
        found = [
            (a / SAFETY, b / SAFETY**3, c / SAFETY**5) if k < last else (a, b, c)
            for k, (a, b, c) in enumerate(found)
        ]
    return tuple(found)


def restarts(steps: int) -> tuple[int, ...]:
    """The default steps before which the Gram form restarts."""
    return (2,) if steps <= FEW_STEPS else tuple(range(2, steps, 2))


def newton_schulz(
    x: Tensor,
    coefficients: Coefficients = "quintic",
    steps: int = 5,
    eps: float | Tensor = 1e-7,
    scale: float = 1.0,
    products: Products = "full",
    restart: tuple[int, ...] | None = None,
    normalize: Normalize = "frobenius",
) -> Tensor:
    """Push the singular values of matrices towards 1, keeping their singular vectors.

    X_0 = x / (||x||_F + eps);  X_k+1 = a_k X_k + (b_k A + c_k A^2) X_k with A = X_k X_k^T;
    result = scale * X_steps.  A tall matrix is multiplied from the right, with A = X_k^T X_k.
    normalize="aol": X_0 = diag(s) x, s_i = max(sum_j |x x^T|_ij, eps)^(-1/2), of the shorter side.

    If the longer side is at least ELONGATED times the shorter, the same polynomials are applied to
    the Gram matrix A of the shorter side: with P_k = a I + b A + c A^2, A <- P A P and Q <- P Q, and
    the result is Q X. Squaring doubles the exponent of the condition number, and the rounding error
    grows with every step, so X <- Q X, A <- X X^T and Q <- I restart before some steps.

    restart: the steps, counted from 0, before which the Gram form restarts; None for (2,) up to five
        steps and for every second step of more: at a condition number of 1e5, float32 then stays
        within ten times the error of the products with X. () never restarts.
    products: "full" multiplies in the dtype of x; "bfloat16" in bfloat16, to which x is rounded first,
        as the authors do, which changes the result by up to 0.035 per entry; "auto" uses bfloat16 for
        float32 if the hardware supports it, else "full". bfloat16 is ten times faster on CUDA, and up to
        three times on a CPU with AMX, from 256 rows and columns on and unless the Gram form is cheaper.

    Shapes: (..., m, n); norms and products are per matrix.
    """
    if x.ndim > 3:
        flat = x.flatten(0, -3)
        options = coefficients, steps, eps, scale, products, restart, normalize
        return newton_schulz(flat, *options).reshape(x.shape)
    if x.ndim == 3 and len(x) == 1:  # products of matrices are faster than batched ones
        return newton_schulz(x[0], coefficients, steps, eps, scale, products, restart, normalize)[
            None
        ]
    rows = table(coefficients, steps)
    few = bool(rows) and in_bfloat16(x.shape, x.dtype, x.device, products)
    (unit,) = scratch("unit", x, x.shape)
    if few:
        (narrow,) = scratch("narrow", x.new_empty(0, dtype=torch.bfloat16), x.shape)
        x = unit.copy_(narrow.copy_(x))
    if normalize == "aol":
        norm = _almost_orthogonal(x, eps)
    else:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + eps
    if not rows:
        return x * (scale / norm)
    a, b, c = rows[-1]  # takes the scale, which saves a pass over the result
    rows = (*rows[:-1], (scale * a, scale * b, scale * c))
    torch.div(x, norm, out=unit)
    if few:
        return plain_form(narrow.copy_(unit), rows).to(x.dtype)  # squaring takes too many digits
    short, long = sorted(x.shape[-2:])
    if long >= ELONGATED * short:
        return _gram_form(unit, rows, restarts(len(rows)) if restart is None else restart)
    return plain_form(unit, rows, torch.empty_like(unit))


def _almost_orthogonal(x: Tensor, eps: float | Tensor) -> Tensor:
    """Scale the rows of the shorter side so that no singular value is above 1."""
    sums = _gram(x).abs().sum(-1, keepdim=True)
    size = sums.clamp(min=eps).sqrt()
    return size.mT if _is_tall(x) else size


def in_bfloat16(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, products: Products
) -> bool:
    """Whether the products of matrices (..., m, n) are computed in bfloat16.

    With "auto", if it is faster than float32, which depends on the machine and the sizes.
    """
    if products != "auto" or dtype != torch.float32:
        return products == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    short, long = sorted(shape[-2:])
    return device.type == "cpu" and short >= 256 and long < 8 * short and has_amx()


@functools.cache
def has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The Gram matrix of the shorter side, so that tall matrices need no transposition."""
    one, other = (x.mT, x) if _is_tall(x) else (x, x.mT)
    return torch.matmul(one, other, out=out)


def plain_form(x: Tensor, rows: tuple[Row, ...], out: Tensor | None = None) -> Tensor:
    """Overwrites x; the result is in `out`, or in memory that the next call uses again."""
    square = (*x.shape[:-2], *2 * (min(x.shape[-2:]),))
    gram, step, other = scratch("newton_schulz", x, square, square, x.shape)
    for k, (a, b, c) in enumerate(rows):
        _gram(x, gram)
        _polynomial(gram, b, c, step)
        target = out if out is not None and k == len(rows) - 1 else other
        one, two = (x, step) if _is_tall(x) else (step, x)
        x, other = _add(x, one, two, a, 1.0, target), x
    return x


def _gram_form(x: Tensor, rows: tuple[Row, ...], restart: tuple[int, ...]) -> Tensor:
    gram, product = _gram(x), None
    for k, (a, b, c) in enumerate(rows):
        if k in restart and product is not None:
            x, product = _times(product, x), None
            gram = _gram(x)
        step = _polynomial(gram, b, c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else step @ product
        if k + 1 < len(rows) and k + 1 not in restart:
            gram = step @ gram @ step
    assert product is not None
    return _times(product, x)


def _times(product: Tensor, x: Tensor) -> Tensor:
    """Polynomials of one matrix commute, so a tall matrix is multiplied from the right."""
    return x @ product if _is_tall(x) else product @ x


def _polynomial(gram: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """b A + c A^2; without a square where there is none."""
    if c == 0:
        return torch.mul(gram, b, out=out)
    return _add(gram, gram, gram, b, c, out)


def _add(
    base: Tensor, one: Tensor, other: Tensor, alpha: float, beta: float, out: Tensor | None = None
) -> Tensor:
    """alpha * base + beta * one @ other, of matrices or batches of them."""
    add = torch.addmm if base.ndim == 2 else torch.baddbmm
    return add(base, one, other, beta=alpha, alpha=beta, out=out)


def polar_factor(x: Tensor) -> Tensor:
    """U V^T of the thin singular value decomposition x = U S V^T; zero for a zero matrix.

    A matrix with an entry that is not finite gives NaN, as Newton-Schulz does.
    """
    finite = torch.isfinite(x).all(-1, keepdim=True).all(-2, keepdim=True)
    usable = torch.where(finite, x, 0.0)
    try:
        u, s, vh = torch.linalg.svd(usable, full_matrices=False)
    except torch.linalg.LinAlgError:  # more digits help an iteration that does not converge
        u, s, vh = (t.to(x.dtype) for t in torch.linalg.svd(usable.double(), full_matrices=False))
    zero = s[..., :1, None] == 0
    return torch.where(finite, torch.where(zero, 0.0, u @ vh), torch.nan)
