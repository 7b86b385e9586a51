"""What all tests have in common."""

import pytest

from heavyball.linalg import orthogonalize


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made in float32, whether or not the processor has units for bfloat16."""
    monkeypatch.setattr(orthogonalize, "_has_amx", lambda: False)
