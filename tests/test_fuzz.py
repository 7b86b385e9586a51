"""The first cases of the fuzzer, and that it finds and shrinks what is wrong."""

import fuzz
import pytest
import torch

from heavyball import chainable as C

CASES = 8


def test_the_first_cases_pass() -> None:
    found = [fuzz.program(case) for case, wrong in fuzz.fuzz(0, 600, CASES) if wrong is not None]
    assert not found, "\n\n".join(found)


def test_the_cases_of_a_seed_are_the_same() -> None:
    first, second = (
        [case for _, case in zip(range(9), fuzz.cases(3), strict=False)] for _ in range(2)
    )
    assert first == second


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform with a memory of its own, which no copy has: whatever stands around it goes."""

    @C.transform(mean=C.zeros)
    def forgetful(update: torch.Tensor, mean: torch.Tensor) -> tuple:
        calls.append(1)
        return update + len(calls), mean

    calls: list[int] = []
    monkeypatch.setitem(fuzz.NAMESPACE, "forgetful", forgetful)
    of = fuzz.Of((3, 2), "transposed", "sliced")
    elements = ("C.exp_avg()", "forgetful")
    case = fuzz.Case(
        elements,
        (of, of),
        "deepcopy",
        options=(("compile", False),),
        grads=("zeros", "normal"),
    )
    assert fuzz.failure(case) is not None
    least = fuzz.shrunk(case)
    assert least.elements == ("forgetful",)
    assert least.tensors == (fuzz.Of(()),)
    assert "forgetful" in fuzz.program(least)
