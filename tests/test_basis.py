"""The bases of one parameter: whose turn it is, and what follows a refresh."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SETS
from heavyball.linalg import basis as B
from heavyball.linalg import eigenbasis as E
from heavyball.linalg.modes import rotate
from heavyball.linalg.schedule import Every
from heavyball.linalg.view import working_shape

OPTIONS = {"max_precond_dim": 2048, "merge_dims": True, "split": False, "precondition_1d": False}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["gpt", "convnet", "gpt-124M"])
def test_phases_spread_the_work_of_real_models(name: str) -> None:
    """A refresh costs n^3, and no step of an interval of ten has over a third of them all."""
    load = [0] * 10
    for place, shape in enumerate(SETS[name]()):
        for piece, n in enumerate(B.rotated_sizes(tuple(shape), OPTIONS)):
            for step in range(10):
                if n and Every(10).fires(10 + step, B.phase(place, piece)):
                    load[step] += n**3
    assert max(load) < sum(load) / 3
    assert sum(step > 0 for step in load) >= 8


def test_only_those_whose_turn_it_is_are_refreshed() -> None:
    grads = normal(3, 4, 6)
    gram = (grads @ grads.mT, None)
    basis = (torch.linalg.qr(normal(3, 4, 4, seed=1))[0], None)
    whole, orders = E.refreshed(gram[0], basis[0], "qr")
    new, found = B.refresh_pieces(gram, basis, "qr", lambda piece: [0, 2])
    for row in (0, 2):
        torch.testing.assert_close(new[0][row], whole[row], rtol=0, atol=1e-13)
        assert torch.equal(found[0][row], orders[row])
    assert torch.equal(new[0][1], basis[0][1])
    assert found[0][1].tolist() == [0, 1, 2, 3]
    assert new[1] is None
    same, none = B.refresh_pieces(gram, basis, "qr", lambda piece: [])
    assert same[0] is basis[0]
    assert none == (None, None)


def test_moments_of_blocks_follow_their_own_bases() -> None:
    working = working_shape((6, 4), "none", 4, True)
    x = normal(2, 6, 4)
    old = tuple(torch.linalg.qr(normal(2, n, n, seed=n))[0] for n in (4, 4, 2, 4))
    new = tuple(torch.linalg.qr(normal(2, n, n, seed=10 + n))[0] for n in (4, 4, 2, 4))
    orders = (torch.tensor([[1, 0, 3, 2]] * 2), None, torch.tensor([[1, 0], [0, 1]]), None)
    moved = B.carried(working, x, old, new, orders, "")
    for rows, left, after in ((slice(0, 4), old[0], new[0]), (slice(4, 6), old[2], new[2])):
        # the columns had no turn, so their basis is the old one whatever `new` says
        expected = rotate(rotate(x[:, rows], (left, None), back=True), (after, None))
        torch.testing.assert_close(moved[:, rows], expected, rtol=0, atol=1e-13)
    ordered = B.carried(working, x, old, new, orders, "sort")
    assert torch.equal(ordered[:, :4], x[:, [1, 0, 3, 2]])
    assert torch.equal(ordered[0, 4:], x[0, [5, 4]])
    assert torch.equal(ordered[1, 4:], x[1, 4:])
    squares = B.carried(working, x.square(), old, new, orders, "rotate")
    torch.testing.assert_close(squares.sum(1), x.square().sum(1), rtol=1e-12, atol=0)


def test_what_is_not_rotated() -> None:
    def sizes(shape: tuple, **options: object) -> tuple:
        return B.rotated_sizes(shape, {**OPTIONS, **options})

    assert sizes((4, 3)) == (4, 3)
    assert sizes((1, 3)) == (None, 3)
    assert sizes((4, 3), max_precond_dim=3) == (None, 3)
    assert sizes((4, 3), max_precond_dim=3, split=True) == (3, 3, None, 3)
    assert sizes((4,)) == (None,)
    assert sizes((4,), precondition_1d=True) == (4,)
    assert sizes((5,), precondition_1d=True, max_precond_dim=4) == (None,)
    assert sizes(()) == ()
