"""LATHER, against its definition in float64, and as SOAP in a basis that stands still."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Wrong, chain, gradients, mutant, parameters, snapshot, starts, walk
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.linalg import basis as basis_module
from heavyball.linalg import eigenbasis, kron
from heavyball.runtime import serve as whole
from heavyball.transforms import lather
from transforms.test_psgd import wave

LR, BETAS, EPS, PRECOND_LR = 0.03, (0.8, 0.9), 1e-6, 0.2
ALWAYS = {"preconditioner_update_probability": 1.0, "precond_lr": PRECOND_LR}


def waves(self: Any, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """What stands in for noise, in `Noise.__call__`: other numbers for every shape and step."""
    return wave(shape[1:], self._group[0].count - 1).expand(shape)


# ---- the definition


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    return torch.tensordot(matrix, x, ([1], [axis])).movedim(0, axis)


def every(x: Tensor, matrices: list[Tensor]) -> Tensor:
    for axis, matrix in enumerate(matrices):
        x = along(x, axis, matrix)
    return x


def unfolded(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def fitted(factors: list[Tensor], full: list[bool], g: Tensor, t: int) -> list[Tensor]:
    """PSGD's step of every factor; a diagonal one is a matrix too."""
    v = wave(tuple(g.shape), t)
    image = every(g + math.sqrt(2**-23) * g.abs().mean() * v, factors)
    inverse = every(v, [torch.linalg.inv(q).T for q in factors])
    new = []
    for axis, q in enumerate(factors):
        one, two = (unfolded(x, axis) @ unfolded(x, axis).T for x in (image, inverse))
        if full[axis]:
            bound = kron.norm_lower_bound((one + two)[None])[0]
            new.append(q - PRECOND_LR * (one - two).triu() @ q / bound)
        else:
            d1, d2 = one.diagonal(), two.diagonal()
            new.append(q - PRECOND_LR * torch.diag((d1 - d2) / (d1 + d2).amax()) @ q)
    return new


def followed(q: Tensor, old: Tensor) -> Tensor:
    new = torch.linalg.qr(q.T @ (q @ old)).Q
    new = new[:, (q @ new).norm(dim=0).argsort(descending=True)]
    return new * torch.where((old * new).sum(0) < 0, -1.0, 1.0)


def defined(p: Tensor, grads: list[Tensor], full: list[bool]) -> Iterator[Tensor]:
    """The parameter after every step."""
    factors = [torch.eye(n, dtype=torch.float64) for n in p.shape]
    bases: list[Tensor] = []
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads):
        if t == 0:
            factors = fitted(factors, full, g, t)
            values = [torch.linalg.eigh(q.T @ q)[1].flip(-1) for q in factors]
            bases = [
                b if f else torch.eye(len(b), dtype=torch.float64)
                for b, f in zip(values, full, strict=True)
            ]
            yield p
            continue
        y = every(g, [b.T for b in bases])
        m, v = BETAS[0] * m + (1 - BETAS[0]) * y, BETAS[1] * v + (1 - BETAS[1]) * y * y
        u = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        p = p - LR * every(u, bases)
        factors = fitted(factors, full, g, t)
        new = [followed(q, b) if f else b for q, b, f in zip(factors, bases, full, strict=True)]
        m = every(m, [after.T @ before for before, after in zip(bases, new, strict=True)])
        bases = new
        yield p


def element(**options: Any) -> Any:
    return C.lather_precond(C.scale_by_adam(betas=BETAS, eps=EPS), **ALWAYS, **options)


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], list[bool]]] = {
    "matrix": ((5, 4), {}, [True, True]),
    "a diagonal": ((5, 3), {"max_size_triangular": 3}, [False, True]),
    "one diagonal by mode": ((4, 5), {"memory_save_mode": "one_diag"}, [True, False]),
    "no line": ((4, 3), {"store_triu_as_line": False}, [True, True]),
    "vector": ((6,), {}, [False]),
    "triangular vector": ((6,), {"min_ndim_triangular": 1}, [True]),
    "cube": ((3, 2, 4), {}, [True, True, True]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_definition(name: str) -> None:
    shape, options, full = CASES[name]
    (begin,), grads = starts([shape]), [g for (g,) in gradients(7, [shape])]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whole.Noise, "__call__", waves)
        path = walk(chain(element(**options), lr=LR), [begin], [[g] for g in grads])
    for (ours,), expected in zip(path, defined(begin, grads, full), strict=True):
        # some ten matrix products and factorizations of condition below 1e3, of values near 1
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_with_factors_that_stand_still_it_is_soap_in_their_basis() -> None:
    shape = (5, 4)
    begin, grads = starts([shape]), gradients(6, [shape])
    rule = C.scale_by_adam(betas=BETAS, eps=EPS)
    ours = C.ChainOpt(
        [torch.nn.Parameter(begin[0].clone())],
        LR,
        C.lather_precond(rule, preconditioner_update_probability=0.0, precond_lr=PRECOND_LR),
    )
    theirs = C.ChainOpt(
        [torch.nn.Parameter(begin[0].clone())],
        LR,
        C.soap_precond(rule, precondition_frequency=1000),
    )
    (p,), (q,) = (opt.param_groups[0]["params"] for opt in (ours, theirs))
    for t, (g,) in enumerate(grads):
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        if t == 0:
            first = {k: v.clone() for k, v in ours.state[p].items() if ".basis." in k}
            assert len(first) == 2
            for axis in range(2):
                mine = ours.state[p][f"to_psgd_basis.basis.{axis}"]
                theirs.state[q][f"to_eigenbasis.basis.{axis}"].copy_(mine)
                # the first fit has moved the factors, and so the basis
                assert not torch.equal(mine.abs(), mine.abs().round())
        assert torch.equal(p, q)
    assert not torch.equal(p, begin[0])
    for key, value in first.items():
        assert torch.equal(ours.state[p][key], value)


def test_the_first_gradient_only_fits() -> None:
    params = parameters((4, 3), (5,))
    opt = heavyball.LATHER(params, lr=0.1, weight_decay=0.1, preconditioner_update_probability=0.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p) * torch.arange(1.0, 1 + p.shape[-1])
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not torch.equal(opt.state[params[0]]["to_psgd_basis.factors.0"], torch.zeros(10))
    assert not opt.state[params[0]]["scale_by_adam.exp_avg"].any()
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_basis_becomes_that_of_eigenvectors() -> None:
    made = torch.Generator().manual_seed(1)
    factor = torch.randn(3, 6, 6, dtype=torch.float64, generator=made).triu() + torch.eye(6)
    basis = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    for scale in (1.0, 1e200, 1e-200):  # whose squares no float64 holds
        now = basis
        for _ in range(400):
            now = eigenbasis.followed(scale * factor, now)
        gram = now.mT @ factor.mT @ factor @ now
        values = gram.diagonal(dim1=-2, dim2=-1)
        assert (gram - torch.diag_embed(values)).abs().max() < 1e-6 * values.amax()
        assert (values.diff(dim=-1) < 0).all()
        after = eigenbasis.followed(scale * factor, now)
        torch.testing.assert_close(after, now, rtol=0, atol=1e-6)  # the signs stay


def test_a_factor_that_is_not_finite_leaves_its_basis_alone() -> None:
    factor = torch.diag(torch.tensor([1.0, 2.0, 3.0])).expand(2, 3, 3).clone()
    factor[0, 0, 1] = torch.nan
    basis = torch.linalg.qr(torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))).Q
    new = eigenbasis.followed(factor, basis)
    assert torch.equal(new[0], basis[0])
    assert not torch.equal(new[1], basis[1])
    torch.testing.assert_close(new[1].mT @ new[1], torch.eye(3))


@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
def test_a_step_without_a_fit_changes_neither_factors_nor_bases(q_dtype: str) -> None:
    params = parameters((4, 3))
    opt = heavyball.LATHER(
        params, q_dtype=q_dtype, preconditioner_update_probability=lambda n: float(n == 2)
    )
    shots = []
    for t in range(5):
        params[0].grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(t))
        opt.step()
        shots.append({k: v for k, v in snapshot(opt).items() if "to_psgd_basis" in k})
    for before, after, fits in zip(shots, shots[1:], (False, True, False, False), strict=False):
        changed = [k for k in before if not torch.equal(before[k], after[k])]
        assert len(changed) == (len(before) if fits else 0)
    assert shots[0]["0.to_psgd_basis.factors.0"].dtype == getattr(torch, q_dtype)


def test_beta_is_the_first_of_the_betas() -> None:
    opts = [
        heavyball.LATHER(parameters((3, 2)), **options)
        for options in ({"beta": 0.7}, {"betas": (0.7, 0.999)})
    ]
    assert opts[0].param_groups[0]["betas"] == opts[1].param_groups[0]["betas"] == (0.7, 0.999)
    with pytest.raises(ValueError, match="momentum_into_precond_update"):
        heavyball.LATHER(parameters((3, 2)), momentum_into_precond_update=False)


# ---- planted mistakes

DEFINITION: tuple[Callable[[], object], ...] = (lambda: test_it_is_its_definition("matrix"),)


@mutant("to_psgd_basis", *DEFINITION, test_the_first_gradient_only_fits)
def a_first_gradient_that_steps(right: Wrong) -> Wrong:
    def wrong(*states: Any, count: int, **kw: Any) -> tuple:
        return right(*right(*states, count=1, **kw)[:3] if count == 1 else states, count=2, **kw)

    return wrong


@mutant("to_psgd_basis", *DEFINITION)
def factors_that_are_fitted_once(right: Wrong) -> Wrong:
    def wrong(u: Any, factors: Any, *rest: Any, count: int, **kw: Any) -> tuple:
        update, new, *more = right(u, factors, *rest, count=count, **kw)
        return update, new if count == 1 else factors, *more

    return wrong


def test_a_moment_left_in_the_old_basis_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "carry", lambda x, old, new: x)
    with pytest.raises(AssertionError):
        test_it_is_its_definition("matrix")


def test_an_order_and_signs_that_are_not_kept_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = eigenbasis.followed
    monkeypatch.setattr(lather, "followed", lambda q, b: torch.linalg.qr(q.mT @ (q @ b)).Q)
    with pytest.raises(AssertionError):
        test_it_is_its_definition("matrix")
    monkeypatch.setattr(eigenbasis, "followed", lambda q, b: -right(q, b))
    with pytest.raises(AssertionError):
        test_a_basis_becomes_that_of_eigenvectors()
