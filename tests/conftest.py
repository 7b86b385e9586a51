"""What all tests have in common."""

import pytest

from heavyball.linalg import orthogonalize


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made in float32, whether or not the processor has units for bfloat16."""
    monkeypatch.setattr(orthogonalize, "has_amx", lambda: False)


# Tests of many kernels or runs in a process of their own come first, so that both workers end together.
LONGEST = ("test_in_the_interpreter", "test_a_run_goes_on_in_a_new_process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
