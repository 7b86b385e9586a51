"""Random chains and presets on random tensors, every way to step compared with every other.

`make fuzz` runs it for minutes (`python tests/fuzz.py --seconds 300 --seed 0`), `test_fuzz.py` for
seconds. What it finds is shrunk and printed as a program. A seed names its cases for good.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import math
import os
import random
import signal
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import anywhere
from torch import Tensor

import heavyball
from heavyball import chainable as C

SIZES = (0, 1, 3, 7, 64, 257)
LAYOUTS = ("plain", "transposed", "sliced", "channels_last")
DTYPES = ("float32", "float64", "bfloat16", "float16")
GRADS = ("normal", "normal", "normal", "zeros", "tiny", "huge", "missing")
# Elements of all tensors of a case: the time of a case is spent on steps, not on large matrices.
MOST = 40_000
FORMATS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": "float16"},
    {"storage_dtype": "8bit"},
    {"storage_dtype": "4bit"},
    {"storage_dtype": "rank1"},
    {"ecc": "bf16+8"},
    {"ecc": "fp16+16"},
)
PARAM_FORMATS = {"bfloat16": ("bf16+8", "bf16+16"), "float16": ("fp16+8", "fp16+16")}
NAMESPACE = {"C": C, "anywhere": anywhere, "heavyball": heavyball, "inf": math.inf}


@dataclass(frozen=True)
class Of:
    """One parameter: its shape, its layout and that of its gradients."""

    shape: tuple[int, ...]
    layout: str = "plain"
    grad_layout: str = "plain"


@dataclass(frozen=True)
class Case:
    """An optimizer, its parameters, and the gradients of each step; `check` says what is compared.

    elements: a chain as Python expressions, or one preset by its name. grads: for each step the kind of
    gradient; in a step of "missing" every other parameter has none.
    """

    elements: tuple[str, ...]
    tensors: tuple[Of, ...]
    check: str
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()
    grads: tuple[str, ...] = ("normal", "normal")
    seed: int = 0

    @property
    def preset(self) -> type | None:
        return heavyball.PRESETS.get(self.elements[0]) if len(self.elements) == 1 else None

    def build(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        options = {**dict(self.options), **options}
        if self.preset is not None:
            return self.preset(params, **options)
        chain = [eval(text, NAMESPACE) for text in self.elements]
        return C.ChainOpt(params, 0.01, *chain, **options)


# ---- tensors


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return values.mT.contiguous().mT if values.ndim > 1 else values
    if layout == "sliced" and values.ndim:
        room = torch.zeros(*values.shape[:-1], 2 * values.shape[-1] + 1, dtype=values.dtype)
        return room[..., : values.shape[-1]].copy_(values)
    if layout == "channels_last" and values.ndim == 4:
        return values.to(memory_format=torch.channels_last)
    return values


def parameters(case: Case) -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    found = []
    for t in case.tensors:
        values = torch.randn(t.shape, generator=made, dtype=torch.float64).to(dtype)
        found.append(torch.nn.Parameter(laid_out(values, t.layout)))
    return found


def gradients(case: Case, step: int) -> list[Tensor | None]:
    made = torch.Generator().manual_seed(1000 * case.seed + step + 1)
    kind, dtype = case.grads[step], getattr(torch, case.dtype)
    factor = {"zeros": 0.0, "tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    largest = torch.finfo(dtype).max
    found: list[Tensor | None] = []
    for place, t in enumerate(case.tensors):
        values = factor * torch.randn(t.shape, generator=made, dtype=torch.float64)
        values = values.clamp(-largest, largest).to(dtype)
        if kind == "nan" and values.numel():
            values.view(-1)[-1] = math.nan
        missing = kind == "missing" and (place + step) % 2 == 0
        found.append(None if missing else laid_out(values, t.grad_layout))
    return found


# ---- ways to step


Run = tuple[list[torch.nn.Parameter], Any]


def begin(case: Case, **options: Any) -> Run:
    params = parameters(case)
    return params, case.build(params, **options)


def go(case: Case, run: Run, steps: range | None = None, way: str = "step") -> Run:
    params, opt = run
    for step in range(len(case.grads)) if steps is None else steps:
        found = gradients(case, step)
        if way == "backward":
            terms = [(p * g).sum() for p, g in zip(params, found, strict=True) if g is not None]
            if terms:
                torch.stack(terms).sum().backward()
        else:
            for p, g in zip(params, found, strict=True):
                p.grad = g
                if way == "step_parameter":
                    opt.step_parameter(p)
        if way != "step_parameter":
            opt.step()
        opt.zero_grad()
    return run


def saved(run: Run, make: Callable[[], Run]) -> Run:
    """Weights and optimizer through a file, into new ones."""
    params, opt = run
    file = io.BytesIO()
    torch.save(([p.detach() for p in params], opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    new, other = make()
    with torch.no_grad():
        for p, w in zip(new, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(state)
    return new, other


# ---- comparisons: each says what is wrong, or None


def exactly(one: Run, other: Run) -> str | None:
    """Every bit of weights and state."""
    for place, (p, q) in enumerate(zip(one[0], other[0], strict=True)):
        a, b = (
            {"param": x.detach(), **o.state.get(x, {})} for x, o in ((p, one[1]), (q, other[1]))
        )
        if a.keys() != b.keys():
            return f"parameter {place} has {sorted(a)} and {sorted(b)}"
        for key in a:
            if a[key].dtype != b[key].dtype or a[key].shape != b[key].shape:
                return f"{key} of parameter {place} has another kind"
            if not torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)):
                return f"{key} of parameter {place}: {_far(a[key], b[key])}"
    return None


# How far the weights may be apart, in units of the largest weight. Four steps, each of some hundred
# roundings, and what divides by a difference of nearly equal numbers makes up to 1e4 of one. A
# fault shows in the size of a step, 0.01 and more.
NEAR = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}


def nearly(case: Case, one: Run, other: Run) -> str | None:
    """The weights but for rounding; one in a thousand may differ, where a sign or mask decides."""
    formats = {"storage_dtype", "ecc"} & dict(case.options).keys()
    bound = max(NEAR[case.dtype], 0.02 if formats else 0.0)
    for place, (p, q) in enumerate(zip(one[0], other[0], strict=True)):
        a, b = p.detach().double(), q.detach().double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"parameter {place} is finite in one only"
        scale = max(1.0, *(x.nan_to_num(0).abs().max().item() for x in (a, b) if x.numel()), 1.0)
        wrong = (a - b).nan_to_num(0).abs() > bound * scale
        if wrong.sum() > a.numel() // 1000:
            return f"parameter {place}: {_far(a, b)}"
    return None


def _far(a: Tensor, b: Tensor) -> str:
    distance = (a.double() - b.double()).abs().nan_to_num(math.inf)
    return (
        f"{int((distance > 0).sum())} of {a.numel()} entries differ, by up to {distance.max():.3g}"
    )


def finite(case: Case, run: Run) -> str | None:
    gated = any("skip_not_finite" in e for e in case.elements)
    bad = "nan" in case.grads and not gated
    wrong = [i for i, p in enumerate(run[0]) if not p.isfinite().all()]
    return f"parameters {wrong} are not finite" if wrong and not bad else None


def compiled(case: Case) -> str | None:
    kernels = go(case, begin(case))
    return finite(case, kernels) or nearly(case, go(case, begin(case, compile=False)), kernels)


def foreach(case: Case) -> str | None:
    one, other = (go(case, begin(case, compile=False, foreach=f)) for f in (None, False))
    return nearly(case, one, other)


def in_backward(case: Case) -> str | None:
    plain = case.build(parameters(case))
    if plain.chain.total_keys:
        return None
    fused = begin(case)
    heavyball.fuse_backward(fused[1])
    return exactly_or_nearly(case, go(case, begin(case)), go(case, fused, way="backward"))


def one_by_one(case: Case) -> str | None:
    run = begin(case)
    if run[1].chain.total_keys:
        return None
    return exactly_or_nearly(case, go(case, run), go(case, begin(case), way="step_parameter"))


def exactly_or_nearly(case: Case, one: Run, other: Run) -> str | None:
    """Bit for bit, but for the two cases of docs/fused_backward.md, where sums round otherwise.

    Products of equal shapes are stacked, and sums along the axes of a parameter that is not contiguous
    have a kernel in a step of all parameters alone.
    """
    wrong = exactly(one, other)
    if wrong is not None and (any(t.whole for t in _leaves(one[1])) or _is_eager(other)):
        return nearly(case, one, other)
    return wrong


def _is_eager(run: Run) -> bool:
    params, opt = run
    for p in params:
        p.grad = torch.zeros_like(p)
    return "rows or columns of a parameter that is not contiguous" in str(opt.plan())


def _leaves(opt: Any) -> Iterator[Any]:
    for program in opt.registry.programs().values():
        yield from (node.transform for node in program.flat)


def resumed(case: Case) -> str | None:
    half = len(case.grads) // 2
    first, rest = range(half), range(half, len(case.grads))
    again = saved(go(case, begin(case), first), lambda: begin(case))
    return exactly(go(case, begin(case)), go(case, again, rest))


def copied(case: Case) -> str | None:
    half = len(case.grads) // 2
    first, rest = range(half), range(half, len(case.grads))
    original = go(case, begin(case), first)
    again = copy.deepcopy(original)
    whole = go(case, original, rest)
    return exactly(whole, go(case, again, rest))


def planned(case: Case) -> str | None:
    params, opt = begin(case)
    plan = heavyball.memory_plan(parameters(case), case.build)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    wanted, found = plan.state_bytes, opt.state_bytes()
    return None if wanted == found else f"{wanted} bytes planned, {found} held"


CHECKS = {
    "compiled": compiled,
    "foreach": foreach,
    "fused backward": in_backward,
    "step_parameter": one_by_one,
    "resumed": resumed,
    "deepcopy": copied,
    "memory plan": planned,
}


# What has little to do with kernels.
PLAIN = ("resumed", "deepcopy", "memory plan", "step_parameter")


REFUSED = "refused"
LIMIT = 60  # seconds for a case


class RefusedError(Exception):
    """The case asks for what the library refuses when an optimizer is made."""


def failure(case: Case) -> str | None:
    """What is wrong with a case, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.build(parameters(case))
        except (ValueError, TypeError) as error:
            raise RefusedError(str(error)) from None
        try:
            return CHECKS[case.check](case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def in_child(case: Case) -> str | None:
    """The same in a process of its own, so that one which crashes is told like any other."""
    if not hasattr(os, "fork"):
        return failure(case)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)  # what has spoilt its memory may wait for ever
        try:
            found = repr(failure(case))
        except RefusedError:
            found = REFUSED
        os.write(write, found.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    if status or not found:
        return f"the process ended with status {status}"
    if found == REFUSED:
        raise RefusedError
    return None if found == "None" else found


# ---- random cases


def _option(name: str, t: Any, draw: random.Random) -> Any:
    """Another value of a fixed option, or None."""
    annotation, default = t.annotations.get(name), t.options[name]
    if typing.get_origin(annotation) is typing.Literal:
        return draw.choice(typing.get_args(annotation))
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return draw.choice([1, 2, 3])
    return None


def _number(name: str, t: Any, draw: random.Random) -> Any:
    value, domain = t.hyper[name], t.domain(name)
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    new = draw.choice([0.0, value / 2, value * 2, 0.5])
    if name.endswith("eps") and not new:
        return None  # a gradient of zeros over it is NaN, as the docs say, and a NaN does not load
    return new if new in domain else None


def element(name: str, draw: random.Random) -> str:
    """A transform of the catalogue, a third of the time with an option or two of its own."""
    t, given = C.TRANSFORMS[name], {}
    for _ in range(draw.choice([0, 1, 1, 2])):
        names = [*t.options, *t.hyper]
        if names:
            picked = draw.choice(names)
            make = _option if picked in t.options else _number
            if (value := make(picked, t, draw)) is not None:
                given[picked] = value
    text = f"C.{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
    return f"anywhere({text})" if t.rules.requires is not None else text


# Parts of a chain in the order in which they make sense.
ORDER = ("rate", "transform", "decay", "writer", "post", "observer")
# What has to be built by other means, or gives what is not continuous and so cannot be compared.
LEFT_OUT = {
    "apply",
    "looksam",
    "momo",
    "momo_adam",
    "polyak_rate",
    "sam",
    "asam",
    "to_eigenbasis",
    "from_eigenbasis",
}


def chain(draw: random.Random) -> tuple[str, ...]:
    while True:
        count = draw.randint(1, 4)
        names = draw.sample([n for n in C.TRANSFORMS if n not in LEFT_OUT], count)
        names.sort(key=lambda n: ORDER.index(C.TRANSFORMS[n].kind))
        if draw.random() < 0.1:
            names.insert(0, "skip_not_finite")
        found = tuple(element(n, draw) for n in names)
        if draw.random() < 0.1:
            found = (f"C.soap_precond({found[0]})", *found[1:])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Case(found, (Of((3, 3)),), "compiled").build([torch.nn.Parameter(torch.ones(3, 3))])
        except (ValueError, TypeError):
            continue
        return found


def shape(draw: random.Random, most: int) -> tuple[int, ...]:
    while True:
        found = tuple(draw.choice(SIZES) for _ in range(draw.choice([0, 1, 2, 2, 2, 3, 4, 5])))
        if math.prod(found) <= most:
            return found


def cases(seed: int) -> Iterator[Case]:
    """The cases of a seed, without end."""
    draw = random.Random(seed)
    while True:
        preset = draw.random() < 0.4
        elements = (draw.choice(list(heavyball.PRESETS)),) if preset else chain(draw)
        dtype = draw.choice(DTYPES)
        options = dict(draw.choice(FORMATS))
        if dtype in PARAM_FORMATS and draw.random() < 0.4:
            options["param_ecc"] = draw.choice(PARAM_FORMATS[dtype])
        if draw.random() < 0.2:
            options["warmup_steps"] = 2
        check = draw.choice(list(CHECKS))
        if check in PLAIN and draw.random() < 0.7:
            options["compile"] = False  # a kernel takes longer than all else
        count = draw.randint(1, 4)
        tensors = [
            Of(shape(draw, MOST // count), draw.choice(LAYOUTS), draw.choice(LAYOUTS))
            for _ in range(count)
        ]
        if draw.random() < 0.3:  # of equal shapes, which are stacked
            tensors += [replace(tensors[0], layout="plain")] * draw.randint(1, 2)
        kinds = GRADS + (("nan",) if "C.skip_not_finite()" in elements else ())
        yield Case(
            elements,
            tuple(tensors),
            check,
            dtype,
            tuple(options.items()),
            tuple(draw.choice(kinds) for _ in range(draw.randint(2, 4))),
            draw.randrange(1000),
        )


# ---- what is found


def smaller(case: Case) -> Iterator[Case]:
    """Cases with something left out, the largest parts first."""
    for name in ("elements", "tensors", "grads", "options"):
        parts = getattr(case, name)
        least = 0 if name == "options" else 1
        if len(parts) > least:
            for i in range(len(parts)):
                yield replace(case, **{name: parts[:i] + parts[i + 1 :]})
    for i, text in enumerate(case.elements):
        bare = text[: text.index("(")] + "()" if text.startswith("C.") else text
        if bare != text:
            yield replace(case, elements=(*case.elements[:i], bare, *case.elements[i + 1 :]))
    for i, kind in enumerate(case.grads):
        if kind != "normal":
            yield replace(case, grads=(*case.grads[:i], "normal", *case.grads[i + 1 :]))
    for i, t in enumerate(case.tensors):
        plainer = [replace(t, layout="plain"), replace(t, grad_layout="plain")]
        for axis, n in enumerate(t.shape):
            plainer.append(replace(t, shape=t.shape[:axis] + t.shape[axis + 1 :]))
            below = [s for s in SIZES if 0 < s < n][-1:]
            plainer += [replace(t, shape=(*t.shape[:axis], s, *t.shape[axis + 1 :])) for s in below]
        for new in plainer:
            if new != t:
                yield replace(case, tensors=(*case.tensors[:i], new, *case.tensors[i + 1 :]))
    if case.dtype != "float32":
        yield replace(case, dtype="float32")


Tell = Callable[[Case], str | None]


def shrunk(case: Case, tell: Tell = failure, seconds: float = 60) -> Case:
    """The smallest case that can be reached from this one, one change at a time, and still fails."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for other in smaller(case):
            try:
                wrong = tell(other)
            except RefusedError:
                continue
            if wrong is not None:
                case = other
                break
        else:
            break
    return case


def program(case: Case) -> str:
    """Runs the case again; in tests/, where `fuzz` can be imported."""
    fields = dataclasses.fields(Case)
    given = [f"    {f.name}={getattr(case, f.name)!r}," for f in fields]
    return "\n".join(
        ["from fuzz import Case, Of, failure", "case = Case(", *given, ")", "print(failure(case))"]
    )


def fuzz(
    seed: int, seconds: float, most: int | None = None, tell: Tell = failure
) -> Iterator[tuple[Case, str | None]]:
    """The first cases of a seed that are not refused, and what is wrong with each, or None."""
    end = time.monotonic() + seconds
    for case in itertools.islice(cases(seed), most):
        if time.monotonic() > end:
            return
        with contextlib.suppress(RefusedError):
            yield case, tell(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first failure"
    )
    given = parser.parse_args()
    tried = found = 0
    for case, wrong in fuzz(given.seed, given.seconds, tell=in_child):
        tried += 1
        if wrong is None:
            continue
        found += 1
        print(f"# as drawn: {wrong}\n{program(case)}\n", flush=True)
        least = shrunk(case, in_child)
        print(f"# {in_child(least)}\n{program(least)}\n", flush=True)
        if not given.keep_going:
            break
    print(f"{found} of {tried} cases fail, seed {given.seed}")
    raise SystemExit(found > 0)


if __name__ == "__main__":
    main()
