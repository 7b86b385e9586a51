"""Every operation of the printers in C++ beside plain torch, on the values that matter."""

import operations
import pytest
import torch

from heavyball.compiler.cpp.printer import CHUNK, SMALL

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64
# numbers of a tensor are float64 in any kernel; a large kernel takes seconds to compile
LEVELS = (("elements", F32), ("elements", F64), ("numbers", F32), ("rows", F32), ("columns", F64))


@pytest.mark.parametrize(("level", "dtype"), LEVELS)
def test_every_operation(level: str, dtype: torch.dtype) -> None:
    operations.check(level, dtype, CPU, filler=SMALL + CHUNK // 2, shifts=4)


@pytest.mark.parametrize("of", [operations.of_all, operations.of_axes])
@pytest.mark.parametrize("shape", [(7, 5), (5, CHUNK + 9)])
def test_every_sum(of, shape: tuple) -> None:
    operations.check_sums(of, shape, CPU)


def test_every_operation_has_a_case() -> None:
    assert {*operations.CASES, *operations.SUMS} >= operations.operations()
