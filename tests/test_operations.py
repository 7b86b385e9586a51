"""Every operation of the printers in C++ beside plain torch, on the values that matter."""

import dataclasses

import operations
import pytest
import torch

import heavyball
from heavyball.compiler.cpp.dialect import Cpp
from heavyball.compiler.cpp.printer import CHUNK, SMALL
from heavyball.compiler.frontend import ops
from heavyball.compiler.frontend.ops import TABLE
from heavyball.compiler.frontend.symbols import Var
from heavyball.compiler.triton.dialect import Triton

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


RULES = [operation for operation in TABLE if operation.rule is not None]


@pytest.mark.parametrize("operation", RULES, ids=lambda operation: operation.name)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_what_is_made_of_other_operations_is_what_torch_has(operation, dtype) -> None:
    x, y = operations.pairs(dtype, 4)
    direct = operations.case_of(operation)(x, y)
    made = operations.case_of(dataclasses.replace(operation, eager=operation.rule))(x, y)
    if made is not None:  # powers have a rule for some exponents
        f = torch.finfo(dtype)
        assert torch.allclose(
            made.to(dtype), direct.to(dtype), rtol=8 * f.eps, atol=8 * f.eps, equal_nan=True
        )


@pytest.mark.parametrize("dialect", [Cpp(), Triton()], ids=lambda dialect: dialect.language)
def test_an_operation_without_a_form_is_refused_by_name(dialect, monkeypatch) -> None:
    bare = dataclasses.replace(ops.OPERATIONS["exp"], cpp=None, triton=None)
    monkeypatch.setitem(ops.OPERATIONS, "exp", bare)
    made = ops.expression("exp", [Var("x", F32)], F32, "float")
    with pytest.raises(
        ops.NotPrintableError, match=f"the operation exp has no form in {dialect.language}"
    ):
        dialect.text(made, lambda v: str(v.index))


def test_a_chain_with_an_operation_without_a_form_runs_eagerly(monkeypatch) -> None:
    @heavyball.chainable.transform()
    def bent(update):
        return update.erf()

    bare = dataclasses.replace(ops.OPERATIONS["erf"], cpp=None)
    monkeypatch.setitem(ops.OPERATIONS, "erf", bare)
    param = torch.nn.Parameter(torch.zeros(3))
    opt = heavyball.chainable.ChainOpt([param], 1.0, bent, weight_decay=0.0)
    param.grad = torch.tensor([0.5, -1.0, 0.0])
    with pytest.warns(RuntimeWarning, match="the operation erf has no form in C\\+\\+"):
        opt.step()
    # values of the error function from its table
    torch.testing.assert_close(param.detach(), torch.tensor([-0.5204998778, 0.8427007929, 0.0]))


@pytest.mark.parametrize(("bound", "wanted"), [("min", [2.0, 2.0, 3.0]), ("max", [1.0, 2.0, 2.0])])
def test_a_bound_on_one_side_is_of_that_side(bound: str, wanted: list[float]) -> None:
    @heavyball.chainable.transform()
    def bounded(update):
        return getattr(torch, f"clamp_{bound}")(update, 2.0)

    param = torch.nn.Parameter(torch.zeros(3))
    opt = heavyball.chainable.ChainOpt([param], 1.0, bounded, weight_decay=0.0, compile=True)
    param.grad = torch.tensor([1.0, 2.0, 3.0])
    opt.step()
    assert (-param).tolist() == wanted
