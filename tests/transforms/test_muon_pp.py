"""The adaptive orthogonalization of prodigy-plus-schedule-free, alone."""

import pytest
import torch
from helpers import eager  # noqa: F401
from torch import nn

from heavyball import chainable as C


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    param = nn.Parameter(torch.zeros_like(matrix))
    param.grad = matrix
    C.ChainOpt([param], 1.0, C.adaptive_orthogonalize).step()
    return -param.detach()


@pytest.mark.parametrize("flip", [False, True])
def test_a_small_matrix_gives_a_small_result(flip: bool) -> None:
    matrix = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, 4.0, -2.0, 1.0]], dtype=torch.float64)
    matrix = matrix.T.contiguous() if flip else matrix
    large, small = orthogonalized(matrix), orthogonalized(1e-3 * matrix)
    # <u, O> is above 1 for the one and 1e-3 <matrix, O> for the other, O being the same
    assert (matrix * large).sum() > 1
    torch.testing.assert_close(small, 1e-3 * (matrix * large).sum() * large, rtol=2e-4, atol=0)
    # six steps of the quintic leave singular values around 1
    values = torch.linalg.svdvals(large)
    assert 0.6 < values.min() <= values.max() < 1.3
