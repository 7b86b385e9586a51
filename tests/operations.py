"""Every operation that the printers know, as a function of two tensors, and the values that matter.

`check` compares what a kernel makes of them with plain torch, for all elements, numbers per tensor,
rows and columns. `test_operations.py` does it in C++, `kernels_on_triton.py` in Triton.
"""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import heavyball
from heavyball.compiler.frontend.ops import TABLE, Operation
from heavyball.numerics import measures

C = heavyball.chainable


def case_of(operation: Operation) -> Callable[[Tensor, Tensor], Tensor]:
    """An operation of the table as a function of two tensors: its numbers and conditions are theirs."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        conditions = [x > y] if operation.takes.count("b") == 1 else [x > 0, y > 0]
        given = {"n": iter((x, y, y)), "b": iter(conditions)}
        return operation.eager(*(next(given[kind]) for kind in operation.takes))

    return run


# By the names of the table, so that a new operation is tested by being there.
CASES = {operation.name: case_of(operation) for operation in TABLE}
# Other ways to the same operations: with constants, of truth values, with a number of the tensor.
MORE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root": lambda x, y: x**0.5,
    "cube": lambda x, y: x**3,
    "power of two": lambda x, y: 2.0**x,
    "one less": lambda x, y: 1 - x,
    "one over": lambda x, y: 1 / x,
    "clamp": lambda x, y: x.clamp(-1.5, 1.5),
    "remainder of a constant": lambda x, y: x % 3,
    "not a number": lambda x, y: torch.logical_not(x),
    "both numbers": torch.logical_and,
    "either number": torch.logical_or,
    "product of conditions": lambda x, y: (x > 0) * (y > 0),
    "sum of conditions": lambda x, y: (x > 0) + (y > 0),
    "number times condition": lambda x, y: x.clamp(-1, 1) * (y > 0),
    "condition where": lambda x, y: torch.where(x > 0, y > 0, x > y),
    "condition equal": lambda x, y: (x > 0) == (y > 0),
    "larger condition": lambda x, y: torch.maximum(x > 0, y > 0),
    "constant where": lambda x, y: torch.where(x > y, float("-inf"), y),
}
# Sums from one level to another; by the dimensions that go (None: all of them).
SUMS: dict[str, Callable[[Tensor, list[int] | None], Tensor]] = {
    "sum": lambda x, axes: x.sum(axes, keepdim=True),
    "mean": lambda x, axes: x.mean(axes, keepdim=True),
    "square": lambda x, axes: measures.norm(x, axes and tuple(axes)),
    "count": lambda x, axes: (x > 0).to(x.dtype).sum(axes, keepdim=True),
}
WHOLE_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(),
    "any": lambda x: (x > 1.5).any(),
    "all": lambda x: (x > -1.5).all(),
    "share": lambda x: (x > 0).to(x.dtype).mean(),
}

LEVELS = ("elements", "numbers", "rows", "columns")


def special(dtype: torch.dtype) -> list[float]:
    """Zeros of both signs, edges of the dtype, and what lies between."""
    f = torch.finfo(dtype)
    positive = [0.0, f.smallest_normal / 4, f.tiny, 1e-20, 0.3, 0.5, 1.0, 1.5, 2.5, 3.0]
    positive += [20.0, 90.0, 1e10, 1e30, f.max, float("inf")]
    return [*positive, *(-x for x in positive), float("nan")]


def pairs(dtype: torch.dtype, shifts: int) -> tuple[Tensor, Tensor]:
    """Every special value beside itself and `shifts` others."""
    x = torch.tensor(special(dtype), dtype=dtype)
    rolls = [x.roll(5 * k) for k in range(shifts)]
    return x.repeat(shifts), torch.cat(rolls)


def as_transform(results: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> C.Transform:
    """A transform that keeps every result of its update and its parameter in a state."""
    probe = results(torch.ones(2, 2), torch.ones(2, 2))

    def keep(update: Tensor, *_: Tensor, param: Tensor, raw_grad: Tensor) -> tuple[Tensor, ...]:
        found = results(raw_grad, param)
        like = torch.zeros_like(update, dtype=torch.bool)
        numbers = (r.to(update.dtype) for r in found.values())
        return update, *(torch.where(like, update, r) for r in numbers)

    positional, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = {f"r{n}": C.zeros for n in range(len(probe))}
    arguments = [inspect.Parameter(n, positional) for n in ("update", *names)]
    arguments += [inspect.Parameter(n, named) for n in ("param", "raw_grad")]
    keep.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    return C.transform(**names)(keep)


def at_level(level: str) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Every case of what is there of each level: elements, or sums of them."""

    def results(update: Tensor, param: Tensor) -> dict[str, Tensor]:
        def summed(x: Tensor) -> Tensor:
            if level == "elements":
                return x
            if level == "numbers":
                return x.sum(dtype=torch.float64)
            return x.sum(1 if level == "rows" else 0, keepdim=True)

        x, y = summed(update), summed(param)
        return {name: f(x, y) for name, f in (CASES | MORE).items()}

    return results


def of_all(update: Tensor, param: Tensor) -> dict[str, Tensor]:
    """Every sum over all elements, for a walk over flat memory."""
    found = {name: f(update, None) for name, f in SUMS.items()}
    return found | {name: f(update) for name, f in WHOLE_SUMS.items()}


def of_axes(update: Tensor, param: Tensor) -> dict[str, Tensor]:
    """The same, and every sum along the rows and along the columns, for a walk over rows."""
    found = {
        f"{name} of {axes}": f(update, axes) for name, f in SUMS.items() for axes in ([0], [1])
    }
    return found | of_all(update, param)


def tensors_of(level: str, dtype: torch.dtype, filler: int, shifts: int) -> list[tuple]:
    """Update and parameter of each tensor of a test.

    filler: how many elements more a tensor has, for the values to lie in several chunks.
    """
    x, y = pairs(dtype, shifts)
    if level == "elements":
        long = [torch.cat((v, torch.full((filler,), 0.25, dtype=dtype), v)) for v in (x, y)]
        return [(x, y), tuple(long)]
    if level == "numbers":
        # a zero beside each value, so that the sum is the value
        return [
            tuple(torch.stack((v, 0 * v.nan_to_num())) for v in p) for p in zip(x, y, strict=True)
        ]
    wide = [torch.stack((v, torch.zeros_like(v)), 1 if level == "rows" else 0) for v in (x, y)]
    return [tuple(wide)]


def found_by(transform: C.Transform, tensors: list, compiled: bool, device: torch.device) -> list:
    """The states that one step leaves, a tuple for each tensor."""
    params = [torch.nn.Parameter(y.clone().to(device)) for _, y in tensors]
    opt = C.ChainOpt(params, 0.0, transform, compile=compiled)
    for p, (x, _) in zip(params, tensors, strict=True):
        p.grad = x.clone().to(device)
    opt.step()
    return [[t.cpu() for key, t in opt.state[p].items() if t.shape == p.shape] for p in params]


def differences(
    results: Callable[[Tensor, Tensor], dict[str, Tensor]],
    tensors: list,
    device: torch.device,
) -> Iterator[str]:
    """What a kernel makes otherwise than plain torch, by the name of the case."""
    transform = as_transform(results)
    names = list(results(torch.ones(2, 2), torch.ones(2, 2)))
    eager, kernel = (found_by(transform, tensors, c, device) for c in (False, True))
    for (x, y), wanted, found in zip(tensors, eager, kernel, strict=True):
        assert len(names) == len(wanted) == len(found)
        f = torch.finfo(x.dtype)
        for name, a, b in zip(names, wanted, found, strict=True):
            # functions of the C library and torch's own are within two roundings of the value; sums of
            # n elements within n, and here all but a handful of their terms are alike
            near = torch.isclose(b, a, rtol=16 * f.eps, atol=f.smallest_normal, equal_nan=True)
            if name in ("square of [0]", "square of [1]"):
                # sums along an axis are kept in the dtype, so a norm is at most the root of the largest
                near |= a > f.max**0.5
            if name.startswith("remainder"):
                # torch's has NaN where the quotient is not finite
                near |= a.isnan() & ~(x / y).isfinite()
            if name == "lerp":
                # an end point that cancels: roundings of the ends count, not of what is left
                near |= (a - b).abs() <= 4 * f.eps * torch.maximum(x.abs(), y.abs())
            if (wrong := ~near).any():
                i = tuple(wrong.nonzero()[0].tolist())
                yield f"{name}: {b[i]} for {a[i]} at {i} of {tuple(x.shape)}, {x[i]}, {y[i]}"


def check(level: str, dtype: torch.dtype, device: torch.device, filler: int, shifts: int) -> None:
    tensors = tensors_of(level, dtype, filler, shifts)
    found = list(differences(at_level(level), tensors, device))
    assert not found, "\n".join(found)


def check_sums(
    of: Callable[[Tensor, Tensor], dict[str, Tensor]], shape: tuple[int, int], device: torch.device
) -> None:
    """Sums, and a largest entry in the first, the last and a middle place."""
    rows, columns = shape
    made = torch.Generator().manual_seed(0)
    # all of one sign and so far from 0 that a 0 among them would be the largest
    base = -3 - torch.rand(shape, generator=made, dtype=torch.float64)
    edges = [] if rows * columns > 1000 else [float("nan"), float("inf"), float("-inf"), 1e30]
    tensors = []
    for place, value in enumerate([-2.0, -2.0, -2.0, *edges]):
        x = base.clone()
        x[place % 3 * (rows - 1) // 2, place % 3 * (columns - 1) // 2] = value
        tensors.append((x.float(), torch.zeros(shape)))
    found = list(differences(of, tensors, device))
    assert not found, "\n".join(found)
