"""centralize against pytorch_optimizer and its definition."""

import pytest
import torch
from helpers import EPS, SHAPES, close, gradients, updates
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient

from heavyball import chainable as C

ALL = (*SHAPES, (4, 3, 2), (2, 3, 2, 2, 2), (1, 5), (5, 1))


@pytest.mark.parametrize("shape", ALL)
def test_it_is_pytorch_optimizers(shape: tuple[int, ...]) -> None:
    for (grad,) in gradients(3, [shape]):
        theirs = grad.clone()
        centralize_gradient(theirs)
        # a mean of fewer than 30 numbers below 15
        close(updates([C.centralize], [grad])[0], theirs, atol=30 * EPS * 15)


@pytest.mark.parametrize("shape", [s for s in ALL if len(s) > 1])
def test_every_unit_gets_the_mean_zero_and_keeps_its_differences(shape: tuple[int, ...]) -> None:
    for (grad,) in gradients(3, [shape]):
        (ours,) = updates([C.centralize], [grad])
        for unit, before in zip(ours, grad, strict=True):
            assert abs(unit.sum().item()) <= 2 * unit.numel() ** 2 * EPS * 15
            shift = before.flatten() - unit.flatten()
            close(shift, shift[0].expand_as(shift), atol=4 * EPS * 30)


def test_vectors_and_numbers_pass() -> None:
    for shape in ((), (7,)):
        ((grad,),) = gradients(1, [shape])
        assert torch.equal(updates([C.centralize], [grad])[0], grad)
