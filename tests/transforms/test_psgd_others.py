"""PSGD-LRA, PSGD-PRO and Shampoo, against dense formulations."""

import math
from typing import Any

import pytest
import torch
from helpers import chain, gradients, parameters, starts, train, walk
from scipy.linalg import fractional_matrix_power
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.linalg import roots
from heavyball.transforms import psgd_lra as lra
from heavyball.transforms import psgd_pro as pro
from transforms.test_psgd import Draws


def normal(*shape: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=made)


# ---- low rank


def low_rank(seed: int, n: int = 7, r: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and d of one parameter, and its Q."""
    left, right = 0.4 * normal(1, n, r, seed=seed), 0.4 * normal(1, n, r, seed=seed + 1)
    return left, right, 0.5 + normal(1, n, 1, seed=seed + 2).sigmoid()


def dense_q(left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    n = diagonal.shape[1]
    return (torch.eye(n, dtype=torch.float64) + left[0] @ right[0].T) @ diagonal[0, :, 0].diag()


@pytest.mark.parametrize("turn_left", [True, False])
def test_low_rank_fit_is_that_of_the_dense_matrix(turn_left: bool) -> None:
    left, right, diagonal = low_rank(0)
    seen, noise = normal(1, 7, 1, seed=5), normal(1, 7, 1, seed=6)
    loads = tuple(torch.full((1, 1, 1), value, dtype=torch.float64) for value in (3.0, 900.0, 0.01))
    lr, beta = torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = lra.fitted(
        left, right, diagonal, loads, seen, noise, lr=lr, beta=beta, turn_left=turn_left
    )

    ratio = (right.norm() / left.norm()).sqrt()
    u, v, h, w = (left * ratio)[0], (right / ratio)[0], seen[0], noise[0]
    q, identity = dense_q(left, right, diagonal), torch.eye(7, dtype=torch.float64)
    inverse = torch.linalg.inv(q)
    a, b = q @ h, inverse.T @ w
    grown, shrunk = (q.T @ q @ h) * h, w * (inverse @ inverse.T @ w)
    old = [float(load) for load in loads]
    bound = float(grown.abs().max() + shrunk.abs().max())
    first = max(0.9 * old[0] + 0.1 * bound, bound)
    expected = diagonal[0] - lr / first * (grown - shrunk) * diagonal[0]
    torch.testing.assert_close(found[2][0], expected, rtol=1e-12, atol=1e-13)

    other, place = (v, 1) if turn_left else (u, 2)
    bound = sum(float(x.norm() * (other @ other.T @ x).norm()) for x in (a, b))
    load = max(0.9 * old[place] + 0.1 * bound, bound)
    middle = a @ a.T - b @ b.T
    if turn_left:
        u = u - lr / load * middle @ v @ (torch.eye(3, dtype=torch.float64) + v.T @ u)
    else:
        v = v - lr / load * (identity + v @ u.T) @ middle @ u
    torch.testing.assert_close(found[0][0], u, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[1][0], v, rtol=1e-12, atol=1e-13)
    got = [float(value) for value in found[3]]
    expected_loads = [first, load, old[2]] if turn_left else [first, old[1], load]
    assert got == pytest.approx(expected_loads, rel=1e-12)


def test_low_rank_update_is_p_times_what_came_in() -> None:
    x = normal(2, 3, 4)
    parts = [low_rank(10 * i, 12, 2) for i in (1, 2)]
    left, right, diagonal = (torch.cat(p) for p in zip(*parts, strict=True))
    zero = torch.zeros(2, dtype=torch.float64)
    draws = Draws()
    made = C.psgd_lra(preconditioner_update_probability=0.0)
    out, *states = made.update(
        x,
        left,
        right,
        diagonal[..., 0],
        *(zero,) * 3,
        grad=x,
        count=2,
        noise=draws,
        chance=draws.chance,
        **{**made.hyper, **made.options},
    )
    for member in range(2):
        q = dense_q(*(p[member, None] for p in (left, right, diagonal)))
        expected = (q.T @ q @ x[member].flatten()).reshape(3, 4)
        torch.testing.assert_close(out[member], expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(states[0], left)


def whitened(element: Any, steps: int = 500) -> tuple[float, float]:
    """The spread of the sizes of four entries before, and after `steps` fits to them."""
    sizes = torch.tensor([0.05, 0.3, 1.0, 4.0], dtype=torch.float64)
    param = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
    opt = C.ChainOpt([param], 1.0, element)
    made = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(steps):
        before = param.detach().clone()
        param.grad = sizes[:, None] * torch.randn(4, 2, dtype=torch.float64, generator=made)
        opt.step()
        squares.append((param.detach() - before).square().mean(1))
    root = torch.stack(squares[-200:]).mean(0).sqrt()
    assert (root > 0.3).all()
    assert (root < 3).all()
    return float(sizes.max() / sizes.min()), float(root.max() / root.min())


@pytest.mark.parametrize(
    "element",
    [
        C.psgd_kron(precond_lr=0.1, preconditioner_update_probability=1.0),
        C.psgd_lra(rank=3, precond_lr=0.15, preconditioner_update_probability=1.0),
        C.psgd_pro(precond_lr=0.1, preconditioner_update_probability=1.0),
        C.psgd_pro(precond_lr=0.1, preconditioner_update_probability=1.0, method="quad"),
    ],
    ids=["kron", "lra", "pro", "quad"],
)
def test_updates_become_white(element: Any) -> None:
    before, after = whitened(element)
    assert before == pytest.approx(80)
    assert after < 3.5


def test_low_rank_factors_are_drawn_at_the_first_step() -> None:
    params = parameters((40, 30), (40, 30))
    opt = C.ChainOpt(params, 0.1, C.psgd_lra(rank=5, preconditioner_update_probability=0.0))
    train(opt, [0])
    left, other = (opt.state[p]["psgd_lra.left"] for p in params)
    assert left.shape == (1200, 5)
    assert float(left.std()) == pytest.approx((1200 * 15) ** -0.5, rel=0.05)
    assert not torch.equal(left, other)
    assert not torch.equal(left, opt.state[params[0]]["psgd_lra.right"])
    kept = left.clone()
    train(opt, [1])
    assert torch.equal(left, kept)


# ---- square factors


def dense(factors: list[Tensor]) -> Tensor:
    result = torch.ones(1, 1, dtype=torch.float64)
    for q in factors:
        result = torch.kron(result, q[0].diag() if q.ndim == 2 else q[0])
    return result


def symmetric_bound(matrix: Tensor) -> Tensor:
    """The lower bound of a norm, as the specification writes it."""
    scaled = matrix / matrix.abs().max()
    x = scaled[:, scaled.square().sum(0).argmax()] @ scaled
    return matrix.abs().max() * (scaled @ (x / x.norm())).norm()


@pytest.mark.parametrize("method", ["procrustes", "quad"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (3, 5)])
def test_square_fit_is_that_of_the_dense_matrix(method: Any, shape: tuple[int, ...]) -> None:
    factors = [
        0.3 * normal(1, n, n, seed=n) + torch.eye(n, dtype=torch.float64)
        if n != 5
        else 1 + normal(1, 5).sigmoid()
        for n in shape
    ]
    loads = [torch.full((1, 1), value, dtype=torch.float64) for value in (1e-3, 900.0, 5.0)]
    loads = loads[: len(shape)]
    x = normal(1, *shape, seed=9)
    lr, beta = 0.3, 0.9
    new, new_loads = pro.fitted(factors, loads, x, lr=lr, beta=beta, method=method)
    q = dense(factors)
    white = (q.T @ q @ x.flatten()).reshape(shape)
    for axis, size in enumerate(shape):
        unfolded = white.movedim(axis, 0).reshape(size, -1)
        t, c = unfolded @ unfolded.T, x.numel() / size
        old = factors[axis][0]
        newest = (t.diag().max() if old.ndim == 1 else symmetric_bound(t)) + c
        load = max(0.9 * float(loads[axis]) + 0.1 * float(newest), float(newest))
        assert float(new_loads[axis]) == pytest.approx(load, rel=1e-12)
        if old.ndim == 1:
            change = t.diag() - c
            expected = old * (1 - lr / load * change)
            if method == "quad":
                expected = old * (1 - lr / (2 * load) * change) ** 2
        elif method == "quad":
            step = lr / (2 * load)
            once = old - step * (t @ old - c * old)
            twice = once - step * (once @ t - c * once)
            expected = (twice + twice.T) / 2
        else:
            moved = old - lr / load * (t @ old - c * old)
            turn = moved.T - moved
            turn = turn / symmetric_bound(turn)
            slope, curvature = (turn @ moved).trace(), (turn @ turn @ moved).trace()
            a = min(-slope / curvature, 0.125) if curvature < 0 else 0.125
            expected = moved + a * turn @ moved + a * a / 2 * turn @ turn @ moved
        torch.testing.assert_close(new[axis][0], expected, rtol=1e-11, atol=1e-12)


def test_turning_makes_a_factor_symmetric_and_keeps_what_it_stands_for() -> None:
    start = normal(2, 5, 5) + 3 * torch.eye(5, dtype=torch.float64)
    factor = start
    for _ in range(200):
        factor = pro.toward_symmetric(factor)
    before, after = ((q - q.mT).norm() / q.norm() for q in (start, factor))
    assert after < 0.02 * before
    singular = torch.linalg.svdvals
    torch.testing.assert_close(singular(factor), singular(start), rtol=1e-2, atol=0)
    symmetric = start + start.mT
    assert torch.equal(pro.toward_symmetric(symmetric), symmetric)


# ---- Shampoo


def unfold(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def power(matrix: Tensor, exponent: float) -> Tensor:
    return torch.from_numpy(fractional_matrix_power(matrix.numpy(), exponent).real)


@pytest.mark.parametrize("beta2", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 4)])
def test_shampoo_is_the_roots_of_sums_of_gradients(beta2: float, shape: tuple[int, ...]) -> None:
    grads = gradients(4, [shape])
    (start,) = starts([shape])
    path = walk(chain(C.shampoo(beta2=beta2, eps=0.01)), [start], grads)
    param, n = start, len(shape)
    for t, (found,) in enumerate(path):
        weights = [beta2 ** (t - j) for j in range(t + 1)]
        total = sum(weights) if beta2 < 1 else 1
        update = grads[t][0]
        for axis in range(n):
            matrix = sum(
                w * unfold(g, axis) @ unfold(g, axis).T
                for w, (g,) in zip(weights, grads, strict=False)
            )
            matrix = matrix / total + 0.01 * torch.eye(shape[axis], dtype=torch.float64)
            root = power(matrix, -1 / (2 * n))
            update = torch.tensordot(root, update, dims=([1], [axis])).movedim(0, axis)
        param = param - 0.1 * update
        torch.testing.assert_close(found, param, rtol=1e-10, atol=1e-11)


def test_first_step_of_shampoo_is_the_polar_factor() -> None:
    grad = normal(4, 4)
    ((found,),) = walk(chain(C.shampoo(eps=0.0), lr=1.0), [torch.zeros(4, 4).double()], [[grad]])
    u, _, vh = torch.linalg.svd(grad)
    torch.testing.assert_close(-found, u @ vh, rtol=1e-9, atol=1e-9)


def test_roots_are_made_anew_only_when_it_is_due() -> None:
    grads = gradients(7, [(4, 3)])
    params = starts([(4, 3)])
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, t: int) -> None:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        if state:
            seen.append(state["shampoo.roots.0"].clone())

    walk(chain(C.shampoo(precondition_frequency=3)), params, grads, look)
    changes = [t for t in range(1, len(seen)) if not torch.equal(seen[t], seen[t - 1])]
    # seen[0] is of step 1; those of steps 3 and 6 are at 2 and 5
    assert changes == [2, 5]


def test_axes_that_are_too_long_are_left_alone_or_cut() -> None:
    grads, begin = gradients(3, [(6, 3)]), starts([(6, 3)])
    alone = walk(chain(C.shampoo(eps=0.01, max_precond_dim=4)), begin, grads)
    param = begin[0]
    for t, (found,) in enumerate(alone):
        matrix = sum(g.T @ g for (g,) in grads[: t + 1]) + 0.01 * torch.eye(3, dtype=torch.float64)
        param = param - 0.1 * grads[t][0] @ power(matrix, -1 / 2)
        torch.testing.assert_close(found, param, rtol=1e-10, atol=1e-11)
    cut = walk(chain(C.shampoo(eps=0.01, max_precond_dim=4, split=True)), begin, grads)
    parts = walk(
        chain(C.shampoo(eps=0.01)),
        [begin[0][:4], begin[0][4:]],
        [[g[:4], g[4:]] for (g,) in grads],
    )
    for (found,), blocks in zip(cut, parts, strict=True):
        torch.testing.assert_close(found, torch.cat(blocks), rtol=1e-12, atol=1e-13)


def test_shampoo_preset_has_the_size_of_adam() -> None:
    params, others = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    before = [p.detach().clone() for p in params]
    ours = heavyball.Shampoo(params, 0.01)
    adam = heavyball.AdamW(others, 0.01, weight_decay=0.0)
    train(ours, range(3))
    train(adam, range(3))
    single = [
        heavyball.Shampoo(parameters((4, 3), (5,)), 0.01, grafting=kind)
        for kind in ("rmsprop", "sgd", None)
    ]
    paths = []
    for opt in single:
        train(opt, range(3))
        paths.append(torch.cat([p.detach().flatten() for p in opt.param_groups[0]["params"]]))
    assert len({float(path.sum()) for path in paths}) == 3
    # one step, so that the sizes can be compared
    params, others = ([torch.nn.Parameter(p.clone()) for p in before] for _ in range(2))
    train(heavyball.Shampoo(params, 0.01), [0])
    train(heavyball.AdamW(others, 0.01, weight_decay=0.0), [0])
    for p, q, start in zip(params, others, before, strict=True):
        assert (p - start).norm().item() == pytest.approx((q - start).norm().item(), rel=1e-5)
        assert not torch.allclose(p, q)


def test_wrong_grafting_raises() -> None:
    with pytest.raises(ValueError, match="grafting='lamb'"):
        heavyball.Shampoo(parameters((2, 2)), grafting="lamb")
    with pytest.raises(ValueError, match="start_preconditioning_step=3 needs grafting"):
        heavyball.Shampoo(parameters((2, 2)), grafting=None, start_preconditioning_step=3)


def test_shampoo_steps_as_the_grafted_optimizer_before_it_begins():
    params, others = parameters((4, 3)), parameters((4, 3))
    late = heavyball.Shampoo(params, 0.01, start_preconditioning_step=3)
    adam = heavyball.AdamW(others, 0.01, weight_decay=0.0)
    for step in range(3):
        train(late, [step])
        train(adam, [step])
        near = torch.allclose(params[0], others[0], rtol=0, atol=1e-6)
        assert near == (step < 2)


# ---- roots


@pytest.mark.parametrize("order", [2, 4, 6])
def test_inverse_root_undoes_its_matrix(order: int) -> None:
    root = normal(3, 5, 5)
    matrix = root @ root.mT
    found = roots.inverse_root(matrix, order, 0.1, matrix)
    product = torch.linalg.matrix_power(found, order) @ (
        matrix + 0.1 * torch.eye(5, dtype=torch.float64)
    )
    torch.testing.assert_close(product, torch.eye(5).double().expand(3, 5, 5), rtol=0, atol=1e-10)


def test_members_without_a_root_keep_what_they_had() -> None:
    good = torch.diag(torch.tensor([4.0, 16.0]))
    matrix = torch.stack([good, torch.full((2, 2), math.nan), torch.zeros(2, 2)])
    before = 7 * torch.ones(3, 2, 2)
    found = roots.inverse_root(matrix, 2, 0.0, before)
    torch.testing.assert_close(found[0], torch.diag(torch.tensor([0.5, 0.25])))
    assert torch.equal(found[1:], before[1:])


def test_a_decomposition_that_fails_is_tried_in_float64_and_then_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, tried = torch.linalg.eigh, []

    def fails(matrix: Tensor) -> Any:
        tried.append(matrix.dtype)
        if matrix.dtype in broken:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    matrix = torch.diag(torch.tensor([4.0, 16.0]))[None]
    broken = {torch.float32}
    found = roots.inverse_root(matrix, 2, 0.0, matrix)
    torch.testing.assert_close(found[0], torch.diag(torch.tensor([0.5, 0.25])))
    assert tried == [torch.float32, torch.float64]
    broken = {torch.float32, torch.float64}
    with pytest.warns(UserWarning, match="no convergence"):
        assert torch.equal(roots.inverse_root(matrix, 2, 0.0, matrix), matrix)
