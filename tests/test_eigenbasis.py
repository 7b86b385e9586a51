"""Bases of eigenvectors and what is carried between them, against dense float64 formulations."""

import string
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from heavyball.linalg import eigenbasis as E
from heavyball.linalg.modes import product, rotate, update_gram

WAYS = ("qr", "newtonschulz", "svd", "eigh")
# a few hundred roundings of numbers near 1
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(normal(batch, n, n, seed=seed))[0].to(dtype)


def with_spectrum(values: Tensor, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Matrices with these eigenvalues, and their eigenvectors in the order of `values`."""
    vectors = orthogonal(batch, len(values), seed)
    return vectors * values @ vectors.mT, vectors


def off_diagonal(matrix: Tensor, basis: Tensor) -> float:
    rotated = basis.mT @ matrix @ basis
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    return float(rest.norm() / rotated.norm())


def assert_orthogonal(basis: Tensor) -> None:
    error = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)
    assert error.abs().max() < CLOSE[basis.dtype]


# ---- modes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5), (2, 3, 4, 3, 2)])
def test_a_rotation_is_the_contraction_with_one_matrix_per_axis(batch: int, shape: tuple) -> None:
    x = normal(batch, *shape)
    for missing in range(-1, len(shape)):
        bases: list[Tensor | None] = [normal(batch, n, n, seed=n) for n in shape]
        if missing >= 0:
            bases[missing] = None
        for back in (False, True):
            expected = []
            for b in range(batch):
                out = x[b]
                for axis, basis in enumerate(bases):
                    if basis is not None:
                        matrix = basis[b] if back else basis[b].T
                        out = torch.tensordot(matrix, out, ([1], [axis])).movedim(0, axis)
                expected.append(out)
            found = rotate(x, bases, back)
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5), (2, 3, 4, 3, 2)])
def test_a_gram_matrix_is_that_of_the_unfolding(batch: int, shape: tuple) -> None:
    x = normal(batch, *shape)
    letters = string.ascii_lowercase[: len(shape)]
    for axis, n in enumerate(shape):
        start = normal(batch, n, n, seed=1)
        other = letters[:axis] + "z" + letters[axis + 1 :]
        full = torch.einsum(f"A{letters},A{other}->A{letters[axis]}z", x, x)
        expected = 0.9 * start + 0.1 * full
        found = update_gram(x, axis, start, 0.9)
        assert found is start
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(600, 7), (512, 300), (5, 515)])
def test_a_large_gram_matrix_made_of_panels_is_the_whole_product(shape: tuple) -> None:
    x = normal(2, *shape)
    for axis, n in enumerate(shape):
        start = normal(2, n, n, seed=1)
        start = start + start.mT
        matrix = x if axis == 0 else x.mT
        expected = 0.9 * start + 0.1 * matrix @ matrix.mT
        found = update_gram(x, axis, start, 0.9)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_large_matrices_one_by_one_are_the_batched_product() -> None:
    a, b = normal(2, 257, 300), normal(2, 300, 256)
    torch.testing.assert_close(product(a, b), torch.bmm(a, b), rtol=1e-12, atol=1e-11)


# ---- bases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_come_by_descending_eigenvalue(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 0.5, 9.0, 1.0], dtype=torch.float64)
    matrix, vectors = with_spectrum(values, batch=2)
    basis = E.eigenbasis(matrix.to(dtype))
    assert_orthogonal(basis)
    expected = vectors[..., values.argsort(descending=True)].to(dtype)
    overlaps = (basis * expected).sum(-2).abs()
    assert (overlaps - 1).abs().max() < CLOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_refreshing_often_leads_to_the_eigenvectors(way: str, dtype: torch.dtype) -> None:
    values = 2.0 ** -torch.arange(12, dtype=torch.float64)
    matrix, vectors = with_spectrum(values, batch=3)
    matrix, basis = matrix.to(dtype), orthogonal(3, 12, seed=7, dtype=dtype)
    for _ in range(1 if way in ("svd", "eigh") else 60):
        basis, _ = E.refreshed(matrix, basis, way)  # type: ignore[arg-type]
        assert_orthogonal(basis)
    overlaps = (basis * vectors.to(dtype)).sum(-2).abs()
    # the smallest eigenvalue is known to an error of the largest times the rounding: 2^11 of them
    assert (overlaps - 1).abs().max() < 100 * CLOSE[dtype]


def test_one_power_iteration_is_the_qr_of_the_sorted_image() -> None:
    matrix, _ = with_spectrum(torch.linspace(1, 9, 7, dtype=torch.float64), batch=2)
    old = orthogonal(2, 7, seed=3)
    basis, order = E.refreshed(matrix, old, "qr")
    for b in range(2):
        sizes = torch.stack([q @ matrix[b] @ q for q in old[b].T])
        expected = sizes.argsort(descending=True)
        assert torch.equal(order[b], expected)
        factor = torch.linalg.qr(matrix[b] @ old[b][:, expected]).Q
        torch.testing.assert_close(basis[b], factor, rtol=0, atol=1e-12)


def test_newton_schulz_takes_the_step_of_qr_where_it_is_small() -> None:
    values = torch.linspace(9, 1, 6, dtype=torch.float64)
    matrix, vectors = with_spectrum(values)
    turn = normal(6, 6, seed=5)
    for size in (1e-2, 1e-3):
        old = vectors @ torch.linalg.matrix_exp(size * (turn - turn.T))
        by_qr, _ = E.refreshed(matrix, old, "qr")
        signs = (by_qr * old).sum(-2, keepdim=True).sign()  # those of QR are arbitrary
        by_products, _ = E.refreshed(matrix, old, "newtonschulz")
        step = (by_qr * signs - old).abs().max()
        assert 0 < (by_products - by_qr * signs).abs().max() < 30 * size * step


@pytest.mark.parametrize("way", WAYS)
def test_a_refresh_lowers_what_is_off_the_diagonal(way: str) -> None:
    for seed in range(5):
        g = normal(4, 20, 30, seed=seed)
        matrix = g @ g.mT
        basis = orthogonal(4, 20, seed=seed + 10)
        before = off_diagonal(matrix, basis)
        for _ in range(8):
            basis, _ = E.refreshed(matrix, basis, way)  # type: ignore[arg-type]
        assert off_diagonal(matrix, basis) < 0.6 * before


def test_the_polar_factor_of_the_image_would_not_move_the_basis() -> None:
    matrix, _ = with_spectrum(torch.linspace(9, 1, 6, dtype=torch.float64))
    old = orthogonal(1, 6, seed=3)
    u, _, vh = torch.linalg.svd(matrix @ old)
    torch.testing.assert_close(u @ vh, old, rtol=0, atol=1e-12)
    # with V in the place of V^T it would be no factor of it at all
    assert (u @ vh.mT - old).abs().max() > 0.1
    assert off_diagonal(matrix, E.refreshed(matrix, old, "svd")[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_hard_matrices_give_orthogonal_bases(way: str, dtype: torch.dtype) -> None:
    spread = torch.logspace(0, -12, 16, dtype=torch.float64)
    rows = normal(16, 3)
    hard = {
        "zero": torch.zeros(16, 16, dtype=torch.float64),
        "rank 3": rows @ rows.T,
        "condition 1e12": with_spectrum(spread)[0][0],
        "identity": torch.eye(16, dtype=torch.float64),
        "large": 1e30 * with_spectrum(spread)[0][0],
        "small": 1e-30 * with_spectrum(spread)[0][0],
    }
    matrix = torch.stack(list(hard.values())).to(dtype)
    basis = E.eigenbasis(matrix)
    assert_orthogonal(basis)
    for _ in range(20):
        basis, order = E.refreshed(matrix, basis, way)  # type: ignore[arg-type]
        assert_orthogonal(basis)
        assert torch.equal(order.sort(-1)[0], torch.arange(16).expand(6, 16))


@pytest.mark.parametrize("way", WAYS)
def test_the_scale_of_a_matrix_does_not_matter(way: str) -> None:
    matrix = with_spectrum(torch.linspace(9, 1, 6, dtype=torch.float64))[0].float()
    old = orthogonal(1, 6, seed=3, dtype=torch.float32)
    expected, order = E.refreshed(matrix, old, way)  # type: ignore[arg-type]
    for power in (-60, 110):  # the squares of 2^110 are not finite in float32
        basis, same = E.refreshed(2.0**power * matrix, old, way)  # type: ignore[arg-type]
        assert torch.equal(same, order)
        torch.testing.assert_close(basis, expected, rtol=0, atol=CLOSE[torch.float32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_that_is_not_finite_is_never_used(way: str, bad: float) -> None:
    matrix, _ = with_spectrum(torch.linspace(9, 1, 6, dtype=torch.float64), batch=3)
    clean = matrix.clone()
    matrix[1, 2, 3] = bad
    old = orthogonal(3, 6, seed=3)
    basis, order = E.refreshed(matrix, old, way)  # type: ignore[arg-type]
    assert torch.equal(basis[1], old[1])
    assert order[1].tolist() == list(range(6))
    others, _ = E.refreshed(clean, old, way)  # type: ignore[arg-type]
    for b in (0, 2):
        torch.testing.assert_close(basis[b], others[b], rtol=0, atol=1e-12)
    assert torch.equal(E.eigenbasis(matrix)[1], torch.eye(6, dtype=torch.float64))


def failing(working: tuple[torch.dtype, ...], calls: list) -> Any:
    real = torch.linalg.eigh

    def eigh(x: Tensor) -> Any:
        calls.append((x.dtype, len(x)))
        if x.dtype not in working or (x.diagonal(dim1=-2, dim2=-1) == 13.0).any():
            raise torch.linalg.LinAlgError("did not converge")
        return real(x)

    return eigh


def test_a_decomposition_is_tried_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(torch.linspace(9, 1, 6, dtype=torch.float64))[0].float()
    expected = E.eigenbasis(matrix)
    calls: list = []
    monkeypatch.setattr(torch.linalg, "eigh", failing((torch.float64,), calls))
    found = E.eigenbasis(matrix)
    assert calls == [(torch.float32, 1), (torch.float64, 1)]
    assert found.dtype == torch.float32
    signs = (found * expected).sum(-2, keepdim=True).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=2e-5)


def test_a_decomposition_that_fails_keeps_the_old_basis_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, _ = with_spectrum(torch.linspace(9, 1, 6, dtype=torch.float64), batch=3)
    old = orthogonal(3, 6, seed=3)
    expected, _ = E.refreshed(matrix, old, "eigh")
    matrix[1] = 13.0 * torch.eye(6)
    E.report_once.cache_clear()
    monkeypatch.setattr(torch.linalg, "eigh", failing((torch.float32, torch.float64), []))
    with pytest.warns(RuntimeWarning, match="eigh did not converge .* old basis is kept"):
        basis, order = E.refreshed(matrix, old, "eigh")
    # one matrix that fails costs the others nothing
    for b in (0, 2):
        torch.testing.assert_close(basis[b], expected[b], rtol=0, atol=1e-12)
    assert torch.equal(basis[1], old[1].gather(-1, order[1].expand(6, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        E.refreshed(matrix, old, "eigh")


# ---- what is carried over


@pytest.mark.parametrize("batch", [1, 3])
def test_carrying_is_exact_and_reordering_follows_the_columns(batch: int) -> None:
    x = normal(batch, 4, 5)
    old = [orthogonal(batch, 4, 1), orthogonal(batch, 5, 2)]
    new = [orthogonal(batch, 4, 3), None]
    moved = E.carry(rotate(x, [old[0], None]), [old[0], None], new)
    torch.testing.assert_close(moved, rotate(x, new), rtol=0, atol=1e-13)
    order = torch.stack([torch.randperm(4) for _ in range(batch)])
    other = torch.stack([torch.randperm(5) for _ in range(batch)])
    for b in range(batch):
        found = E.reorder(x, [order, other])[b]
        assert torch.equal(found, x[b][order[b]][:, other[b]])
        assert torch.equal(E.reorder(x, [None, other])[b], x[b][:, other[b]])
    sorted_bases = [
        q.gather(-1, o[:, None].expand_as(q)) for q, o in zip(old, (order, other), strict=True)
    ]
    torch.testing.assert_close(
        E.reorder(rotate(x, old), [order, other]), rotate(x, sorted_bases), rtol=0, atol=1e-13
    )


def test_squares_are_carried_by_squared_overlaps() -> None:
    square = normal(2, 4, 5).square()
    old = [orthogonal(2, 4, 1), orthogonal(2, 5, 2)]
    new = [orthogonal(2, 4, 3), orthogonal(2, 5, 4)]
    found = E.carry_square(square, old, new)
    # the mean of the squares of what has these mean squares and no correlation, term by term
    for b in range(2):
        for i in range(4):
            for j in range(5):
                left = (old[0][b].T @ new[0][b])[:, i].square()
                right = (old[1][b].T @ new[1][b])[:, j].square()
                expected = (left[:, None] * square[b] * right).sum()
                torch.testing.assert_close(found[b, i, j], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum((1, 2)), square.sum((1, 2)), rtol=1e-12, atol=0)
    assert (found >= 0).all()
    torch.testing.assert_close(E.carry_square(square, old, old), square, rtol=1e-12, atol=1e-14)
