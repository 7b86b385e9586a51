"""sign, and Signum as the chain exp_avg | sign."""

import pytest
import torch
from helpers import EPS, SHAPES, close, gradients, prefixes, updates, weighted_mean

from heavyball import chainable as C


def test_zero_has_the_sign_zero() -> None:
    grad = torch.tensor([-2.0, -0.0, 0.0, 1e-300, 5.0], dtype=torch.float64)
    assert updates([C.sign], [grad])[0].tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_graft_keeps_the_norm(shape: tuple[int, ...]) -> None:
    for (grad,) in gradients(4, [shape], least=0.1):
        grad.flatten()[1:2] = 0.0
        (ours,) = updates([C.sign(graft=True)], [grad])
        assert torch.equal(ours.sign(), grad.sign())
        # all entries that are not zero have one size, and its square times their number is ||g||^2
        size = (grad.square().sum() / (grad != 0).sum()).sqrt()
        close(ours, grad.sign() * size, rtol=8 * EPS, atol=0.0)


def test_graft_of_zero_is_zero() -> None:
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(updates([C.sign(graft=True)], [zero])[0], zero)


def test_signum_is_the_sign_of_the_weighted_mean() -> None:
    grads = [g for (g,) in gradients(10, [(20,)])]
    ours = updates([C.exp_avg(beta=0.9), C.sign], grads)
    for update, past in zip(ours, prefixes(grads), strict=True):
        assert torch.equal(update, weighted_mean(past, 0.9).sign())
