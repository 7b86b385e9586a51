"""What a program sets for itself changes no step: default device and dtype, inference mode."""

import ast
import contextlib
import copy
import functools
import itertools
import pathlib

import pytest
import torch
from helpers import CASES, KINDS, STORED, Case, averages, differences, parameters, snapshot
from torch.utils import _device

import heavyball

CPU = torch.device("cpu")


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def all_of(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


SURROUNDINGS = {
    "float64, inference": lambda: all_of(
        default_device("meta"), default_dtype(torch.float64), torch.inference_mode()
    ),
    "bfloat16": lambda: all_of(torch.device("meta"), default_dtype(torch.bfloat16)),
}


def gradients(params, step: int) -> None:
    for p in params:
        place = torch.arange(p.numel(), dtype=torch.float64, device=p.device).reshape(p.shape)
        p.grad = torch.cos(place * (step + 1) + step).to(p.dtype)


def life(case: Case, compile: object, dtype: torch.dtype, context) -> list:
    """All that an optimizer does, inside the context: what the weights and the state are after it."""
    first = [p.detach() for p in parameters(dtype=dtype)]
    with context():
        params = [torch.nn.Parameter(p.clone()) for p in first]
        lr = torch.tensor(0.01, dtype=torch.float64, device=CPU)
        opt = case(params, lr=lr, compile=compile)
        opt.init_state()
        ends = []
        for step in range(2):
            gradients(params, step)
            opt.step()
        ends.append(snapshot(opt))
        if averages(opt):
            opt.eval()
            ends.append(snapshot(opt))
            opt.train()
        saved = copy.deepcopy(opt.state_dict())
        opt = case(params, lr=0.01, compile=compile)
        opt.load_state_dict(saved)
        for step in range(2, 4):
            gradients(params, step)
            opt.step()
        ends.append(snapshot(opt))
    return ends


@functools.cache
def plain_life(case: Case, compile: object, dtype: torch.dtype) -> list:
    return life(case, compile, dtype, contextlib.nullcontext)


KERNELS = [(case, name, "auto") for case in (*KINDS, *STORED) for name in SURROUNDINGS]
EAGER = [*zip((*CASES, *STORED), itertools.cycle(SURROUNDINGS), itertools.repeat(False))]


@pytest.mark.parametrize(("case", "name", "compile"), KERNELS + EAGER, ids=str)
def test_a_step_is_the_same_in_any_surroundings(case: Case, name: str, compile: object) -> None:
    dtype = torch.bfloat16 if case.name == "storage param" else torch.float32
    want = plain_life(case, compile, dtype)
    found = life(case, compile, dtype, SURROUNDINGS[name])
    assert not any(itertools.starmap(differences, zip(found, want, strict=True)))


@pytest.mark.parametrize("compile", ["auto", False])
@pytest.mark.parametrize(
    "name", ["AdamW", "SFAdamW", "FactoredAdamW", "SOAP", "PSGDKron", "Prodigy"]
)
def test_what_inference_mode_has_made_can_be_used_when_it_has_ended(name: str, compile) -> None:
    ends = []
    for context in (contextlib.nullcontext, torch.inference_mode):
        params = parameters()
        with context():
            opt = heavyball.PRESETS[name](params, lr=0.01, compile=compile)
        for step in range(4):
            with context() if step % 2 == 0 else contextlib.nullcontext():
                gradients(params, step)
                opt.step()
        with context():
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        gradients(params, 4)
        opt.step()
        ends.append(snapshot(opt))
    assert not differences(*ends)


def factory_calls(path: pathlib.Path):
    """The calls of torch's functions that make a tensor where no device is said."""
    names = {f.__name__ for f in _device._device_constructors()}
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in names
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and not {"device", None} & {keyword.arg for keyword in node.keywords}
        ):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


def test_every_tensor_is_made_on_a_device_that_is_said() -> None:
    """So a default device changes nothing, on any machine."""
    package = pathlib.Path(heavyball.__file__).parent
    library = [path for path in package.rglob("*.py") if "race" not in path.parts]
    assert len(library) > 80
    assert not list(itertools.chain.from_iterable(map(factory_calls, library)))


def test_a_call_without_a_device_is_found(tmp_path: pathlib.Path) -> None:
    source = (
        "def f(x):\n    return torch.zeros(3), torch.tensor([1], device=x.device), x.zeros(2)\n"
    )
    (tmp_path / "a.py").write_text(source)
    assert list(factory_calls(tmp_path / "a.py")) == ["a.py:2 torch.zeros(3)"]
