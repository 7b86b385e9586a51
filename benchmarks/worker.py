"""Measures one optimizer in a process of its own: a request in JSON comes in, an answer goes out.

It imports nothing of this package: where the other libraries are installed, `heavyball` is another.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A tensor of at most so many elements stays in one core's cache between two passes.
CACHED = 65_536
FALLBACK = "without a compiled kernel"


class Run:
    """Parameters with gradients, and the optimizer that steps them."""

    def __init__(
        self,
        build: Callable[..., Any],
        shapes: Sequence[Sequence[int]],
        dtype: str,
        device: str = "cpu",
    ):
        generator = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        self.device = device
        self.params, self.grads = [], []
        for shape in shapes:
            values = 0.02 * torch.randn(*shape, generator=generator)
            self.params.append(torch.nn.Parameter(values.to(device, kind)))
            self.grads.append(torch.randn(*shape, generator=generator).to(device, kind))
        self.give_gradients()
        self.optimizer = build(self.params)
        # the schedule-free ones of other libraries may only step in training mode
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def give_gradients(self) -> None:
        """Set the gradients again, since some optimizers take them away in their step."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def step(self) -> None:
        self.optimizer.step()

    def seconds(self) -> float:
        """How long a step takes, from an idle device to an idle device."""
        return timed(self.step, self.device)

    def probe(self) -> list[Tensor]:
        """A few elements of every parameter."""
        return [p.detach().flatten()[:8].clone() for p in self.params]


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds until a function is done, and the device with it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def builder(target: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """What builds the optimizer from parameters.

    arguments: `group` is for the one parameter group, `model` asks for a module in place of a list.
    """
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    rest = {key: value for key, value in arguments.items() if key not in ("group", "model")}
    if arguments.get("model"):
        return lambda params: function(module_of(params), **rest)
    if "group" not in arguments:
        return lambda params: function(params, **rest)
    return lambda params: function([{"params": params, **arguments["group"]}], **rest)


def module_of(params: Iterable[Tensor]) -> torch.nn.Module:
    """A module of these parameters, with names that say nothing."""
    made = torch.nn.Module()
    for number, param in enumerate(params):
        made.register_parameter(f"p{number}", param)  # type: ignore[arg-type]
    return made


def fused_adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The reference."""
    return torch.optim.AdamW(params, fused=True)


def alternate(runs: Sequence[Run], steps: int, warmup: int) -> list[list[float]]:
    """Seconds of each step of each run; they step by turns, without garbage collection."""
    times: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup + steps):
            for run, found in zip(runs, times, strict=True):
                run.give_gradients()
                found.append(run.seconds())
    finally:
        gc.enable()
    return [found[warmup:] for found in times]


def stream(size: int, repeats: int, device: str) -> list[float]:
    """Bytes per second of `a += s b` on two float32 vectors of `size` elements, for each repeat.

    It reads two streams and writes one of them back, as an optimizer does with what it updates, so
    no cache line is fetched only to be overwritten, which the bytes would not tell.
    """
    a, b = torch.zeros(size, device=device), torch.ones(size, device=device)
    a.add_(b, alpha=0.5)
    times = [timed(lambda: a.add_(b, alpha=0.5), device) for _ in range(repeats)]
    return [3 * 4 * size / seconds for seconds in times]


def traffic(
    params: Iterable[Tensor],
    states: Mapping[Tensor, Mapping[str, Any]],
    again: Sequence[str] = (),
    over_all: Sequence[str] = (),
    cached: int = CACHED,
) -> dict[str, int]:
    """Bytes that a step must move: `once`, and `passes` with what has to be read again.

    once: the parameter read and written, the gradient read, every state tensor read and written.
    again, over_all: names of tensors, see `benchmarks.cases.Case`.
    """
    once = extra = 0
    for param in params:
        held = {k.rsplit(".", 1)[-1]: t for k, t in states[param].items() if isinstance(t, Tensor)}
        assert param.grad is not None
        once += 2 * _bytes(param) + _bytes(param.grad) + 2 * sum(map(_bytes, held.values()))
        held |= {"grad": param.grad, "param": param}
        names = [*over_all, *(again if param.numel() > cached else ())]
        extra += sum(_bytes(held[name]) for name in names if name in held)
    return {"once": once, "passes": once + extra}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def pace(
    build: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    dtype: str,
    *,
    steps: int,
    warmup: int,
    stream_size: int,
    again: Sequence[str] | None = None,
    over_all: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Times of the reference and of the optimizer, by turns, with the bandwidth before and after."""
    repeats = max(3, min(steps, 20))
    speeds = stream(stream_size, repeats, device)
    reference, run = (Run(b, shapes, dtype, device) for b in (fused_adamw, build))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        times = alternate([reference, run], steps, warmup)
    answer = {
        "reference": times[0],
        "times": times[1],
        "notes": [str(w.message) for w in caught if FALLBACK in str(w.message)],
    }
    if again is not None:
        # a device walks over all tensors before it begins the next pass
        cached = 0 if device == "cuda" else CACHED
        answer["traffic"] = traffic(run.params, run.optimizer.state, again, over_all, cached)
    _check(run)
    return {**answer, "stream": speeds + stream(stream_size, repeats, device)}


def _check(run: Run) -> None:
    """Refuse a time in which nothing was done."""
    before = run.probe()
    run.give_gradients()
    run.step()
    if not all(bool(t.isfinite().all()) for t in run.probe()):
        raise RuntimeError("the parameters are not finite after the measured steps")
    if all(torch.equal(a, b) for a, b in zip(before, run.probe(), strict=True)):
        raise RuntimeError("a step changes nothing")


def first(
    build: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str, device: str = "cpu"
) -> dict[str, Any]:
    """Seconds of the first step."""
    return {"seconds": Run(build, shapes, dtype, device).seconds()}


def memory(
    build: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str, device: str = "cpu"
) -> dict[str, Any]:
    """The most bytes that a later step has resident beyond those held before it; None if not known.

    The kernel's high-water mark counts all memory, whoever allocates it. It is reset before the
    step; the process must have been started with malloc returning freed memory at once.
    """
    run = Run(build, shapes, dtype, device)
    for _ in range(3):
        run.step()
    try:
        return {"bytes": max(_growth(run) for _ in range(5))}
    except OSError:
        return {"bytes": None}


def _growth(run: Run) -> int:
    run.give_gradients()
    if run.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run.step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Products(TorchDispatchMode):
    """Notes every matrix product that runs inside, with operands of its own to do it again."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv")

    def __init__(self) -> None:
        super().__init__()
        self.again: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            held = [torch.rand_like(a) if isinstance(a, Tensor) else a for a in args]
            plain = {k: v for k, v in (kwargs or {}).items() if k != "out"}
            function = func.overloadpacket.default
            self.again.append(lambda: function(*held, **plain))
        return func(*args, **(kwargs or {}))


class Turns:
    """An optimizer that steps when it is asked to, by turns with one in another process."""

    def __init__(
        self, build: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str, device: str
    ):
        self.run = Run(build, shapes, dtype, device)
        self._products = Products()

    def step(self) -> dict[str, Any]:
        """Seconds of a step on new gradients."""
        self._renew()
        return {"seconds": self.run.seconds()}

    def _renew(self) -> None:
        # a factor that is fitted to one constant gradient would become singular
        for grad in self.run.grads:
            grad.normal_()
        self.run.give_gradients()

    def note(self) -> dict[str, Any]:
        """Take a step and remember its matrix products."""
        self._renew()
        with self._products:
            self.run.step()
        return {"products": len(self._products.again)}

    def products(self) -> dict[str, Any]:
        """Seconds of the products that were noted, and of nothing else."""

        def all_products() -> None:
            for product in self._products.again:
                product()

        return {"seconds": timed(all_products, self.run.device)}

    def memory(self) -> dict[str, Any]:
        """The most bytes that a step has resident beyond those held before it."""
        self._renew()
        try:
            return {"bytes": _growth(self.run)}
        except OSError:
            return {"bytes": None}

    def state(self) -> dict[str, Any]:
        """Bytes of all tensors in the optimizer's state, each memory counted once."""
        found: dict[int, int] = {}
        todo: list[Any] = [*self.run.optimizer.state.values(), self.run.optimizer.param_groups]
        own = {p.untyped_storage().data_ptr() for p in self.run.params + self.run.grads}
        while todo:
            item = todo.pop()
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                if storage.data_ptr() not in own:
                    found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(item, Mapping):
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
        return {"bytes": sum(found.values())}


def turns(
    build: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Answer one request per line of the standard input, until there is none."""
    partner = Turns(build, shapes, dtype, device)
    yield {}
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        yield getattr(partner, line.strip())()


TASKS: dict[str, Callable[..., Any]] = {
    "pace": pace,
    "first": first,
    "memory": memory,
    "turns": turns,
}


def answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Do what a request says, see `benchmarks.measure`."""
    torch.set_num_threads(request.pop("threads"))
    task, target = TASKS[request.pop("task")], request.pop("target")
    build = builder(target, request.pop("arguments"))
    library = request.pop("library")
    if request.pop("eager", False):
        importlib.import_module("heavyball.utils").compile_mode = None  # type: ignore[attr-defined]
    found = task(build, **request)
    version = (
        getattr(importlib.import_module(library), "__version__", "")
        if library in ("torch", "heavyball")  # as imported, whatever was installed
        else importlib.metadata.version(library.lower())
    )
    named = {"library": version, "torch": torch.__version__}
    for part in [found] if isinstance(found, Mapping) else found:
        yield {**part, **named}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    # other libraries print; an answer is a line of its own, the last one if there is only one
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for found in answers(request):
            print("\n" + json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
