"""The Kronecker-factored preconditioner, against dense Kronecker products and golden values."""

import math

import pytest
import torch
from helpers import EPS, examples, grid, h_grads, summary
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from heavyball.linalg import kron, triangles

SHAPES = [(7,), (1,), (5, 3), (3, 1), (2, 3, 4), (3, 2, 2, 2), (2, 2, 3, 1, 2), (5, 6, 2, 2)]
LAYOUTS = [None, "one_diag", "all_diag", "one_triu"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=made)


def some_factors(shape: tuple[int, ...], mode: str | None, batch: int = 2) -> list[Tensor]:
    """Random factors whose diagonals are between 1 and 2."""
    found = []
    for axis, (size, full) in enumerate(
        zip(shape, kron.triangular_axes(shape, 99, 1, mode), strict=True)
    ):
        values = normal(batch, size, size, seed=axis).triu(1) * 0.3
        diagonal = 1 + normal(batch, size, seed=axis + 50).sigmoid()
        found.append(values + torch.diag_embed(diagonal) if full else diagonal)
    return found


def dense(factors: list[Tensor], member: int) -> Tensor:
    """Q_1 x ... x Q_n of one member of the batch, written out."""
    result = torch.ones(1, 1, dtype=torch.float64)
    for q in factors:
        result = torch.kron(result, q[member] if q.ndim == 3 else q[member].diag())
    return result


def unfold(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


@pytest.mark.parametrize("mode", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_solves_are_those_of_the_dense_matrix(
    shape: tuple[int, ...], mode: str | None
) -> None:
    factors, x = some_factors(shape, mode), normal(2, *shape, seed=9)
    found = {
        "apply": kron.apply(x, factors),
        "transpose": kron.apply(x, factors, transpose=True),
        "both": kron.precondition(x, factors),
        "cached": kron.precondition_with(x, kron.squares(factors)),
        "solve": kron.solve_transposed(x, factors),
    }
    for member in range(2):
        q, flat = dense(factors, member), x[member].flatten()
        expected = {"apply": q @ flat, "transpose": q.T @ flat, "both": q.T @ q @ flat}
        expected |= {"cached": expected["both"], "solve": torch.linalg.inv(q).T @ flat}
        for name, value in expected.items():
            got = found[name][member].flatten()
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", [5, 255, 256, 300])
def test_products_by_blocks_are_those_of_the_whole_triangle(size: int) -> None:
    factor, x = normal(2, size, size).triu(), normal(2, size, 3, seed=1)
    bound = 8 * size * EPS * float(factor.abs().amax()) ** 2
    for got, expected in (
        (triangles.triangular_product(factor, x), factor @ x),
        (triangles.transposed_product(factor, x), factor.mT @ x),
        (triangles.triangular_product(factor, x.mT.contiguous().mT), factor @ x),
        (triangles.times_triangle(x.mT, factor), x.mT @ factor),
        (triangles.times_transposed(x.mT, factor), x.mT @ factor.mT),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def reference_fit(factors: list[Tensor], x: Tensor, noise: Tensor, lr: float) -> list[Tensor]:
    """One fit of one tensor, through dense Kronecker products and unfoldings."""
    whole = dense(factors, 0)
    seen = x + math.sqrt(2.0**-23) * x.abs().mean() * noise
    image = (whole @ seen.flatten()).reshape(x.shape)
    inverse = (torch.linalg.inv(whole).T @ noise.flatten()).reshape(x.shape)
    new = []
    for axis, factor in enumerate(factors):
        a, b = unfold(image, axis), unfold(inverse, axis)
        one, two = a @ a.T, b @ b.T
        if factor.ndim == 2:
            one, two = one.diag(), two.diag()
            new.append(factor - lr * (one - two) * factor / (one + two).max())
            continue
        total = one + two
        scaled = total / total.abs().max()
        y = scaled[:, scaled.square().sum(0).argmax()]
        y = y @ scaled
        bound = total.abs().max() * (scaled @ (y / y.norm())).norm()
        new.append(factor - lr * ((one - two).triu() @ factor[0]) / bound)
    return new


@pytest.mark.parametrize("mode", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fit_is_that_of_the_dense_formulation(shape: tuple[int, ...], mode: str | None) -> None:
    factors, x, noise = some_factors(shape, mode, 3), normal(3, *shape), normal(3, *shape, seed=1)
    found = kron.fitted(factors, x, noise, 0.1)
    for member in range(3):
        own = [q[member, None] for q in factors]
        for got, expected in zip(
            found, reference_fit(own, x[member], noise[member], 0.1), strict=True
        ):
            torch.testing.assert_close(got[member, None], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(300, 9), (300, 400)])
@pytest.mark.parametrize("scale", [1.0, 1e100])
def test_fit_by_blocks_is_that_of_whole_matrices(shape: tuple[int, int], scale: float) -> None:
    """Through matrices as they are: the Kronecker product of such factors would not fit in memory."""
    q = [normal(2, n, n, seed=n).triu() / n**0.5 + torch.eye(n, dtype=torch.float64) for n in shape]
    x, noise = normal(2, *shape) * scale, normal(2, *shape, seed=1)
    found = kron.fitted(q, x, noise, 0.1)
    a = q[0] @ kron.damped(x, noise) @ q[1].mT
    # by substitution: the LU of MKL fails in large matrices once the number of threads was set
    eyes = [torch.eye(n, dtype=torch.float64) for n in shape]
    rows_of, others_of = (
        torch.linalg.solve_triangular(one, eye, upper=True)
        for one, eye in zip(q, eyes, strict=True)
    )
    b = rows_of.mT @ noise @ others_of
    for got, factor, rows, others in zip(found, q, (a, a.mT), (b, b.mT), strict=True):
        one, two = rows @ rows.mT, others @ others.mT
        step = 0.1 * (one - two).triu() @ factor / kron.norm_lower_bound(one + two)
        torch.testing.assert_close(got, factor - step, rtol=1e-9, atol=1e-9)
        assert torch.equal(got, got.triu())


def test_golden_values_of_three_fits() -> None:
    factors = [torch.eye(n, dtype=torch.float64)[None] for n in (8, 6)]
    golden = [
        (0.7848488755, -0.8586000517, 0.9017991657, 11.06409463, 24.49999529),
        (0.267415643, 0.5052921039, -0.6413082397, 8.590586125, 22.3391685),
        (-0.8394115876, 0.9366821778, 0.8936863855, 11.57563409, 23.96432528),
    ]
    for t, (grad, expected) in enumerate(zip(h_grads(3), golden, strict=True)):
        noise = torch.cos(2 + 0.61 * (grid(8, 6, 6) + 5 * t) ** 2)
        factors = kron.fitted(factors, grad[None], noise[None], 0.1)
        got = summary(kron.precondition(grad[None], factors)[0])
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64), rtol=6e-10, atol=6e-11
        )
    first, second = factors[0][0], factors[1][0]
    digits = {"rtol": 6e-10, "atol": 1e-11}
    expected = torch.tensor(
        [0.980388546, 0.9843425974, 0.9692941442, 0.9869955784]
        + [1.014728015, 0.9731151168, 0.9880923408, 0.9901952621],
        dtype=torch.float64,
    )
    torch.testing.assert_close(first.diag(), expected, **digits)
    expected = torch.tensor(
        [0.9764698327, 0.9925956665, 0.9699640215, 0.9835149704, 0.9788556843, 0.9825654149],
        dtype=torch.float64,
    )
    torch.testing.assert_close(second.diag(), expected, **digits)
    got = torch.stack([first[0, 1], first[2, 5], second[0, 1], second[3, 5]])
    expected = torch.tensor(
        [-0.01501911872, 0.03986182459, 0.04094578408, -0.04320144751], dtype=torch.float64
    )
    torch.testing.assert_close(got, expected, **digits)


def test_fitting_whitens() -> None:
    """After many fits P x has a covariance near the identity, although that of x is far from it."""
    made = torch.Generator().manual_seed(0)
    left = torch.diag(torch.tensor([0.1, 0.4, 1.0, 2.0], dtype=torch.float64)) + 0.1 * normal(4, 4)
    factors = [torch.eye(n, dtype=torch.float64)[None] for n in (4, 3)]
    for t in range(1200):
        x, noise = torch.randn(2, 1, 4, 3, dtype=torch.float64, generator=made)
        factors = kron.fitted(factors, left @ x, noise, 0.3 / (1 + t / 300))
    rows, columns = (square[0] for square in kron.squares(factors))
    covariance = torch.kron(rows @ left @ left.T @ rows, columns @ columns)
    before, after = torch.linalg.eigvalsh(left @ left.T), torch.linalg.eigvalsh(covariance)
    assert before[-1] > 150 * before[0]
    assert 0.4 < after[0] < after[-1] < 2


def test_damping_makes_a_new_tensor() -> None:
    x, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    before = x.clone()
    kron.fitted([torch.eye(n, dtype=torch.float64).expand(2, n, n) for n in (3, 4)], x, noise, 0.1)
    assert torch.equal(x, before)
    got = kron.damped(x, noise) - x
    expected = noise * math.sqrt(2.0**-23) * x.abs().mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


# ---- the bound


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([1e-150, 1.0, 1e150]))
@examples(60)
def test_bound_is_below_the_norm_and_not_far(size: int, seed: int, scale: float) -> None:
    root = normal(1, size, size, seed=seed)
    matrix = (root @ root.mT) * scale
    got = float(kron.norm_lower_bound(matrix))
    norm = float(torch.linalg.matrix_norm(matrix / scale, 2)) * scale
    assert norm / math.sqrt(size) * (1 - 1e-12) <= got <= norm * (1 + 1e-12)


def test_bound_of_zero_is_zero() -> None:
    assert kron.norm_lower_bound(torch.zeros(2, 3, 3)).flatten().tolist() == [0, 0]


# ---- what cannot be used


@pytest.mark.parametrize("mode", [None, "all_diag"])
def test_zero_or_bad_members_keep_their_factors(mode: str | None) -> None:
    factors = some_factors((4, 3), mode, 4)
    x = normal(4, 4, 3)
    x[1] = 0
    x[2, 0, 0] = torch.nan
    noise = normal(4, 4, 3, seed=1)
    found = kron.fitted(factors, x, noise, 0.1)
    for new, old in zip(found, factors, strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(new, old, strict=True)]
        assert changed == [True, False, False, True]
    alone = kron.fitted([q[3:] for q in factors], x[3:], noise[3:], 0.1)
    for together, one in zip(found, alone, strict=True):
        torch.testing.assert_close(together[3:], one, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_and_rank_deficient_inputs_keep_factors_finite(dtype: torch.dtype) -> None:
    scales = torch.logspace(-12, 0, 6, dtype=torch.float64)
    x = (scales[:, None] * normal(6, 5)).to(dtype)[None]
    rank_one = torch.outer(normal(6), normal(5, seed=1)).to(dtype)[None]
    for value in (x, rank_one, x * 1e-18, x * 1e15):
        factors = [torch.eye(n, dtype=dtype)[None] for n in (6, 5)]
        for t in range(300):
            factors = kron.fitted(factors, value, normal(1, 6, 5, seed=t).to(dtype), 0.1)
        out = kron.precondition(value, factors)
        assert all(q.isfinite().all() and (q[0].diag() > 0).all() for q in factors)
        assert out.isfinite().all()


# ---- balance


@pytest.mark.parametrize("mode", LAYOUTS)
def test_balancing_changes_the_factors_but_not_their_product(mode: str | None) -> None:
    factors = some_factors((4, 3, 2), mode)
    factors[0], factors[1] = factors[0] * 1e4, factors[1] * 1e-3
    found = kron.balanced(factors)
    sizes = torch.stack([q.flatten(1).abs().amax(1) for q in found])
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes), rtol=1e-12, atol=0)
    for member in range(2):
        torch.testing.assert_close(
            dense(found, member), dense(factors, member), rtol=1e-12, atol=1e-15
        )


# ---- which axes


@pytest.mark.parametrize(
    ("shape", "mode", "expected"),
    [
        ((3, 5), None, "TT"),
        ((3, 1), None, "TD"),
        ((3, 50), None, "TD"),
        ((5,), None, "D"),
        ((1,), "one_diag", "D"),
        ((), None, ""),
        ((3, 5, 4), "one_diag", "TDT"),
        ((5, 3, 5), "one_diag", "TTD"),
        ((5, 3, 5), "smart_one_diag", "TTT"),
        ((5, 3, 4), "smart_one_diag", "DTT"),
        ((3, 5), "all_diag", "DD"),
        ((3, 5, 3), "one_triu", "TDD"),
        ((1, 5, 3), "one_triu", "DDT"),
    ],
)
def test_which_axes_are_triangular(shape: tuple, mode: str | None, expected: str) -> None:
    found = kron.triangular_axes(shape, 40, 2, mode)
    assert "".join("DT"[full] for full in found) == expected


def test_min_ndim_decides_about_vectors() -> None:
    assert kron.triangular_axes((5,), 40, 1, None) == (True,)
    assert kron.triangular_axes((5, 4), 40, 3, None) == (False, False)


# ---- lines


@pytest.mark.parametrize("size", [1, 2, 3, 17, 300])
def test_line_is_the_triangle_row_after_row(size: int) -> None:
    matrix = normal(2, size, size).triu()
    line = triangles.to_line(matrix)
    rows, columns = torch.triu_indices(size, size)
    assert torch.equal(line, matrix[:, rows, columns])
    assert torch.equal(triangles.from_line(line), matrix)
    # what devices other than the CPU do
    assert torch.equal(triangles.gathered(line, size), matrix)
    assert line.shape == (2, triangles.line_length(size))


def test_line_of_a_wrong_length_raises() -> None:
    assert [triangles.line_size(n * (n + 1) // 2) for n in (0, 1, 2, 1000, 40_000)] == [
        *(0, 1, 2, 1000, 40_000)
    ]
    for wrong in (2, 4, 5, 7, 500_501):
        with pytest.raises(ValueError, match=str(wrong)):
            triangles.line_size(wrong)
