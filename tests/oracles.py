"""What the tests of the transforms share: the inputs of the golden values, a run that records, and
comparisons whose bounds are counted in roundings.

Golden values have ten significant digits, and the inputs that they belong to have names here:

E  p = [[1, -2], [3, 4]], gradient at step t: cos(t (2i + j) + 0.5)
M  p[i, j] = sin(1 + 6i + j), 8 x 6, gradient cos(t (6i + j) + 0.5)
H  p as M, gradient sin(1 + 0.37 (6i + j + 7 (t - 1))^2)

All of them are float64, and their gradients do not depend on the parameter.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from heavyball import chainable as C
from heavyball import utils
from heavyball.core.transform import Transform, transform
from heavyball.state.declare import zeros

EPS = 2.0**-53  # the unit roundoff of float64
SHAPES = ((), (5,), (3, 4), (2, 3, 2, 2))
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
Path = list[list[Tensor]]


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Run chains as written, without kernels, in a module that imports this."""
    before = getattr(utils, "compile_mode", None)
    utils.compile_mode = None
    yield
    utils.compile_mode = before


def examples(count: int) -> settings:
    """Hypothesis without a clock, a database or a random seed: every run is the same."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ---- inputs


def grid(rows: int, cols: int, width: int) -> Tensor:
    """`width` i + j."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    return width * i + torch.arange(cols, dtype=torch.float64)


def e_start() -> Tensor:
    return torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)


def e_grads(steps: int) -> list[Tensor]:
    return [torch.cos(t * grid(2, 2, 2) + 0.5) for t in range(1, steps + 1)]


def m_start() -> Tensor:
    return torch.sin(1 + grid(8, 6, 6))


def m_grads(steps: int) -> list[Tensor]:
    return [torch.cos(t * grid(8, 6, 6) + 0.5) for t in range(1, steps + 1)]


def h_grads(steps: int) -> list[Tensor]:
    return [torch.sin(1 + 0.37 * (grid(8, 6, 6) + 7 * (t - 1)) ** 2) for t in range(1, steps + 1)]


def summary(p: Tensor) -> Tensor:
    """What the golden values give of a matrix: p[0, 0], p[3, 2], the last, sum, sum of squares."""
    return torch.stack([p[0, 0], p[3, 2], p[-1, -1], p.sum(), p.square().sum()])


def starts(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    """Random float64 parameters."""
    made = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(shape, dtype=torch.float64, generator=made) for shape in shapes]


def gradients(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, least: float = 0.0
) -> list[list[Tensor]]:
    """Random float64 gradients per step and parameter, whose size changes from step to step.

    least: no entry is smaller than that times the size of its step.
    """
    made = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...], size: float) -> Tensor:
        draw = torch.randn(shape, dtype=torch.float64, generator=made)
        return size * (draw + least * draw.sign())

    sizes = (1.0, 3.0, 0.3, 1.5)
    return [[one(shape, sizes[t % 4]) for shape in shapes] for t in range(steps)]


def of_one(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """A sequence of gradients as that of an optimizer with one parameter."""
    return [[g] for g in grads]


# ---- running


def chain(*transforms: object, lr: float = 0.1, **options: object) -> Make:
    """How to make our optimizer, for `walk`."""
    return lambda params: C.ChainOpt(params, lr, *transforms, **options)


def anywhere(element: Transform) -> object:
    """A transform for the shapes that it takes; the update passes for others."""
    requires, options = element.requires, element.options
    if requires is None:
        return element
    fits = C.when(element, predicate=lambda name, param: requires(param.shape, options) is None)
    return C.route(fits, otherwise=())


def walk(
    make: Make,
    begin: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    before: Callable[[torch.optim.Optimizer, int], None] | None = None,
) -> Path:
    """Step an optimizer through given gradients; the parameters after every step."""
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    path = []
    for t, step in enumerate(grads, start=1):
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        if before is not None:
            before(optimizer, t)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def set_lr(rates: Sequence[float]) -> Callable[[torch.optim.Optimizer, int], None]:
    """For `walk`: the learning rate of every step."""

    def before(optimizer: torch.optim.Optimizer, t: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rates[t - 1]

    return before


def updates(
    elements: Sequence[object],
    grads: Sequence[Tensor],
    start: Tensor | None = None,
    lr: float = 0.1,
    rates: Sequence[float] | None = None,
) -> list[Tensor]:
    """What comes out of `elements` at every step, taken right before the write."""
    param = torch.nn.Parameter((torch.zeros_like(grads[0]) if start is None else start).clone())
    optimizer = C.ChainOpt([param], lr, *elements, reveal)
    seen = []
    for t, g in enumerate(grads, start=1):
        param.grad = g.clone()
        if rates is not None:
            set_lr(rates)(optimizer, t)
        optimizer.step()
        seen.append(optimizer.state[param]["reveal"].clone())
    return seen


def states(
    elements: Sequence[object], grads: Sequence[Tensor], start: Tensor | None = None
) -> dict[str, Tensor]:
    """The state of one parameter after the gradients."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer = C.ChainOpt([param], 0.1, *elements)
    for g in grads:
        param.grad = g.clone()
        optimizer.step()
    return dict(optimizer.state[param])


@contextlib.contextmanager
def double_default() -> Iterator[None]:
    """torch keeps some scalars of its optimizers in the default dtype: NAdam its product of mu."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# ---- transforms for tests


@transform(reveal=zeros)
def reveal(update: Tensor, reveal: Tensor) -> tuple[Tensor, Tensor]:
    """u itself, kept as state for a test to look at."""
    return update, update


@transform()
def param_as_update(update: Tensor, *, param: Tensor) -> Tensor:
    """p in place of u, so that a test can choose the update and the gradient."""
    return param


@transform(provides=("scheduled_beta2",))
def fixed_beta2(update: Tensor, *, beta2: float = 0.99) -> tuple[Tensor, Tensor]:
    """Second moments without any bias correction: u itself, and a schedule that never changes."""
    return update, torch.as_tensor(beta2, dtype=torch.float64)


# ---- other formulations


def weighted_mean(xs: Sequence[Tensor], beta: float) -> Tensor:
    """sum_i beta^(t-i) x_i / sum_i beta^(t-i), as two explicit sums."""
    weights = [beta ** (len(xs) - i) if len(xs) > i else 1.0 for i in range(1, len(xs) + 1)]
    return sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights)


def decayed_sum(xs: Sequence[Tensor], beta: float) -> Tensor:
    """sum_i beta^(t-i) x_i."""
    return sum(beta ** (len(xs) - i) * x for i, x in enumerate(xs, start=1))


def prefixes(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """[x_1], [x_1, x_2], ..."""
    return [list(xs[:t]) for t in range(1, len(xs) + 1)]


# The denominators made of an unbiased second moment v, with bias = 1 - beta2^t. The last is
# sqrt(bias) / (sqrt(bias v) + eps) of the end of section 2 of the Adam paper.
ROOTS = {
    "outside": lambda v, eps, bias: v.sqrt() + eps,
    "maximum": lambda v, eps, bias: v.sqrt().clamp(min=eps),
    "inside": lambda v, eps, bias: (v + eps**2).sqrt(),
    "biased": lambda v, eps, bias: ((bias * v).sqrt() + eps) / bias**0.5,
}


# ---- comparing


def close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0) -> None:
    """assert_close with bounds that the caller has derived."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def bound(
    steps: int, *, lr: float = 0.1, update: float = 10.0, param: float = 10.0, beta: float = 0.0
) -> float:
    """How far two float64 evaluations of the same recurrence may be apart after `steps`.

    An update is made with fewer than 40 roundings and is not larger than `update`. Where it divides
    by 1 - beta^t, one rounding of the power counts 1 / (1 - beta) times at most. The write takes
    fewer than 4 roundings of numbers up to `param`. The gradients do not depend on the parameter,
    so that errors add up and do not grow.
    """
    return steps * EPS * (40 * lr * update / (1 - beta) + 4 * param)


def same_path(actual: Path, expected: Path, atol: float, rtol: float = 0.0) -> None:
    """Every parameter agrees after every step."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, atol=atol, rtol=rtol)


def moves(path: Path, begin: Sequence[Tensor]) -> bool:
    """Whether every parameter changes at every step: two that stand still would agree as well."""
    return all(
        not torch.equal(a, b)
        for old, new in pairwise([list(begin), *path])
        for a, b in zip(old, new, strict=True)
    )


def golden(text: str) -> list[Tensor]:
    """Lists of numbers separated by |, as printed with ten significant digits."""
    parts = [re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", part) for part in text.split("|")]
    return [torch.tensor([float(x) for x in part], dtype=torch.float64) for part in parts]


def matches_golden(actual: Sequence[Tensor], text: str, roundings: float = 5e-15) -> None:
    """Half a unit in the tenth digit; `roundings` for entries near 0 that are differences of larger
    numbers (a parameter of size 4 carries 4.4e-16 per step)."""
    expected = golden(text)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        close(a.flatten(), b, rtol=5e-10, atol=roundings)


def golden_path(
    make: Make, steps: int, before: Callable[[torch.optim.Optimizer, int], None] | None = None
) -> list[Tensor]:
    """The parameter of input E after every step."""
    return [p for (p,) in walk(make, [e_start()], of_one(e_grads(steps)), before)]
