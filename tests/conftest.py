"""What all tests have in common."""

import gc
import os
import zlib
from collections import defaultdict

import pytest
import torch

from heavyball.linalg import orthogonalize

if not torch.cuda.is_available():
    # torch.manual_seed prints the stack of each call, and keeps it for devices that may still come
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are made in float32, whether or not the processor has units for bfloat16."""
    monkeypatch.setattr(orthogonalize, "has_amx", lambda: False)


# Tests of many kernels or runs in a process of their own come first, so that both workers end together.
LONGEST = ("test_in_the_interpreter", "test_a_run_goes_on_in_a_new_process", "test_one_then_two")
# `make test` runs so many cases of a test that goes over all presets or transforms, and a tenth of
# them where there are more; which ones differs from test to test, so that each preset meets some of all.
# `make test-all`, and pytest called by hand, run every case.
CASES = 2
QUICK = os.environ.get("HEAVYBALL_TESTS") == "quick"
# Here every case costs next to nothing, or is another promise.
WHOLE = {
    "parse",
    "public",
    "validation",
    "transform",
    "declarations",
    "docs",
    "race_hostile",
    "view",
    # each engine, mistake and refusal is one of its own
    "engines",
    "mistakes",
    "refusals",
    "one_alone",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if QUICK and (left := _beyond(items)):
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def pytest_collection_finish() -> None:
    # modules and thousands of items stay, so no collection needs to look at them again
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def _beyond(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases that are left to `make test-all`."""
    cases = defaultdict(list)
    for item in items:
        if item.path.stem.removeprefix("test_") not in WHOLE:
            cases[item.nodeid.partition("[")[0]].append(item)
    found = []
    for several in cases.values():
        several.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        found += several[max(CASES, len(several) // 10) :]
    return found
