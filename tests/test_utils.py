"""`set_torch` changes what it says, says what it changed, and leaves determinism alone."""

import fresh
import pytest
import torch

import heavyball
from heavyball.utils import set_torch

SLOW = {"precision": "highest", "strategy": "auto", "benchmark": False, "exact": False}


def settings():
    return {
        "precision": torch.get_float32_matmul_precision(),
        "strategy": torch.backends.opt_einsum.strategy,
        "benchmark": torch.backends.cudnn.benchmark,
        "exact": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "threads": torch.get_num_threads(),
    }


def put(values):
    torch.set_float32_matmul_precision(values["precision"])
    torch.backends.opt_einsum.strategy = values["strategy"]
    torch.backends.cudnn.benchmark = values["benchmark"]
    torch.use_deterministic_algorithms(values["exact"])
    torch.backends.cudnn.deterministic = values.get("cudnn", False)


@pytest.fixture(autouse=True)
def _restored():
    before = settings()
    put(SLOW)
    yield
    put(before)
    assert settings() == before


def test_it_sets_what_it_documents_and_returns_what_it_changed():
    assert torch.backends.opt_einsum.is_available()
    assert set_torch() == {
        "float32_matmul_precision": ("highest", "high"),
        "opt_einsum.strategy": ("auto", "auto-hq"),
        "cudnn.benchmark": (False, True),
    }
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.opt_einsum.strategy == "auto-hq"
    assert torch.backends.cudnn.benchmark is True
    for name in ("float32_matmul_precision", "opt_einsum", "cudnn.benchmark"):
        assert name in set_torch.__doc__


def test_a_second_call_changes_nothing():
    set_torch()
    before = settings()
    assert set_torch() == {}
    assert settings() == before


def test_only_what_differs_is_returned():
    torch.set_float32_matmul_precision("high")
    assert "float32_matmul_precision" not in set_torch()
    torch.backends.cudnn.benchmark = False
    assert set_torch() == {"cudnn.benchmark": (False, True)}


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_value_before_is_the_users(precision):
    torch.set_float32_matmul_precision(precision)
    assert set_torch()["float32_matmul_precision"] == (precision, "high")


def test_determinism_that_was_asked_for_stays():
    for ask in (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: setattr(torch.backends.cudnn, "deterministic", True),
    ):
        put(SLOW)
        ask()
        before = settings()
        changed = set_torch()
        assert "cudnn.benchmark" not in changed
        assert torch.backends.cudnn.benchmark is False
        for name in ("exact", "cudnn"):
            assert settings()[name] == before[name]


def test_determinism_as_a_warning_counts_too():
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_torch()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark is False


def test_importing_the_library_changes_no_setting():
    """In a new process, so that nothing else has imported it."""
    code = (
        "import torch;"
        "read = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,"
        " torch.backends.opt_einsum.strategy, torch.get_num_threads(), torch.get_default_dtype());"
        "before = read(); import heavyball; assert read() == before, (before, read())"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_no_optimizer_depends_on_it():
    results = []
    for fast in (False, True):
        put(SLOW)
        if fast:
            set_torch()
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        opt = heavyball.FactoredAdamW([p], min_dim=2)
        for step in range(3):
            p.grad = torch.cos(p.detach() * (step + 1))
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)
