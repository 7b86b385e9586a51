"""Runs functions in several processes that find each other on this machine, with a limit of time.

Processes are forked, so they need no import of their own. A process that raises, hangs or dies ends the
others, and the test that has asked for them fails with what it said.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # each process would import it after the fork, with the first DTensor
import torch.distributed as dist
from torch import Tensor

LIMIT = 600.0


class ProcessError(AssertionError):
    """A process raised, hung or died."""


def run(world: int, fn: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """What `fn(rank, *args)` returns on each of `world` processes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        begun = []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, world, folder, sender, fn, args), daemon=True
            )
            process.start()
            sender.close()
            begun.append((process, receiver))
        try:
            return _collected(begun, limit)
        finally:
            for process, _ in begun:
                process.kill()
                process.join()


def _collected(begun: list[tuple[Any, Any]], limit: float) -> list[Any]:
    end, found = time.monotonic() + limit, dict[int, Any]()
    while len(found) < len(begun):
        for rank, (process, receiver) in enumerate(begun):
            if rank in found:
                continue
            try:
                ready = receiver.poll(0.01)
                state, value = _unpacked(receiver.recv_bytes()) if ready else ("", None)
            except EOFError:
                process.join(5)
                raise ProcessError(f"process {rank} died, exit code {process.exitcode}") from None
            if state == "raised":
                raise ProcessError(f"process {rank} raised\n{value}")
            if state:
                found[rank] = value
        if time.monotonic() > end:
            late = sorted(set(range(len(begun))) - found.keys())
            raise ProcessError(f"processes {late} were not done after {limit} seconds")
    return [found[rank] for rank in range(len(begun))]


def _packed(value: Any) -> bytes:
    """A value with its tensors; sent as they are, those would be memory of a process that has ended."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(given: bytes) -> Any:
    return torch.load(io.BytesIO(given), weights_only=False)


def _work(rank: int, world: int, folder: str, sender: Any, fn: Any, args: tuple) -> None:
    gc.freeze()  # what was forked along need not be looked through again and again, nor copied
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        said = "done", fn(rank, *args)
    except BaseException:
        said = "raised", traceback.format_exc()
    try:
        sender.send_bytes(_packed(said))
    finally:
        sender.close()
        os._exit(0)  # what was forked along is not this process's to tidy up


# What a collective was, of how many elements, bytes that left this process, and of how many processes.
Collective = tuple[str, int, int]


@contextlib.contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Notes the collectives of this process: their names, elements, and the bytes sent to others."""
    found: list[Collective] = []
    before = {
        name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather")
    }

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(("all_reduce", tensor.numel(), tensor.nbytes))
        return before["all_reduce"](tensor, *args, **kwargs)

    def all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(("all_gather", tensor.numel(), tensor.nbytes))
        return before["all_gather"](tensors, tensor, *args, **kwargs)

    def all_to_all_single(
        output: Tensor, given: Tensor, received: Any = None, sent: Any = None, **kwargs: Any
    ) -> Any:
        # how much each process sends and gets differs; that there is an exchange does not
        found.append(("all_to_all_single", -1, given.nbytes))
        return before["all_to_all_single"](output, given, received, sent, **kwargs)

    made = {
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "all_to_all_single": all_to_all_single,
    }
    try:
        for name, wrapper in made.items():
            setattr(dist, name, wrapper)
        yield found
    finally:
        for name, original in before.items():
            setattr(dist, name, original)


def order(found: list[Collective]) -> list[tuple[str, int]]:
    """What must be the same on all processes."""
    return [(name, elements) for name, elements, _ in found]
