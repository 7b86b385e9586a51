"""What is remembered of operations on meta tensors is what torch infers."""

import pytest
import torch
from torch import Tensor

from heavyball.runtime import meta

aten = torch.ops.aten
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.int64)
# Every second column, transposed, a number, one row.
LAYOUTS = ((3, 4), (4, 1)), ((3, 4), (8, 2)), ((3, 4), (1, 3)), ((), ()), ((1, 4), (4, 1))


def tensors() -> list[Tensor]:
    return [
        torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        for shape, strides in LAYOUTS
        for dtype in DTYPES
    ]


def described(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_second_result_is_the_first(default: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(meta, "results", {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = 0
        for a in tensors():
            calls = [(aten.mul.Tensor, (a, b), {}) for b in tensors()]
            calls += [(aten.mul.Tensor, (a, number), {}) for number in (True, 1, 1.0)]
            calls += [(aten.sum.default, (a,), {}), (aten.sum.default, (a,), {"dtype": a.dtype})]
            calls += [(aten.sum.dim_IntList, (a, [0]), {}), (aten.sqrt.default, (a,), {})]
            for func, args, kwargs in calls:
                if a.ndim == 0 and func is aten.sum.dim_IntList:
                    continue
                expected = described(func(*args, **kwargs))
                assert described(meta.result_of(func, args, kwargs)) == expected
                assert described(meta.result_of(func, args, kwargs)) == expected
                found += 1
        assert 0 < len(meta.results) < found + 1
    finally:
        torch.set_default_dtype(before)


def test_an_operation_that_writes_is_run() -> None:
    for _ in range(2):
        a = torch.empty(3, device="meta")
        assert meta.result_of(aten.add_.Tensor, (a, 1.0), {}) is a


def test_an_operation_that_raises_raises_again() -> None:
    a, b = torch.empty(3, device="meta"), torch.empty(4, device="meta")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            meta.result_of(aten.add.Tensor, (a, b), {})
