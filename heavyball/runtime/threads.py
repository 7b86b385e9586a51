"""Independent pieces of work side by side on the CPU, each on one thread.

A decomposition gains little from a second thread: two of them at once, each on one, take 0.65 to 0.75 of
the time of one after the other on two. Large products are better off with all threads.
"""

import contextlib
import functools
import heapq
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from heavyball.linalg.scratch import borrowed

Item = TypeVar("Item")
Result = TypeVar("Result")

# Work below so many operations is done before a thread has begun.
LEAST = 2**25
# How much of its threads' time an operation on all of them uses. Pieces side by side must lose less by
# waiting for the longest.
EFFICIENCY = 0.85

pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=pools.clear)


def each(
    fn: Callable[[Item], Result], items: Sequence[Item], costs: Sequence[float]
) -> list[Result]:
    """`[fn(item) for item in items]`, some of them side by side where that is faster.

    Which ones depends on the costs and the number of torch's threads alone, so that the same step
    always rounds the same way.

    costs: about how many operations each takes.
    """
    together = side_by_side(tuple(costs), torch.get_num_threads())
    if not together or _watched():
        return [fn(item) for item in items]
    enter, grad = borrowed(), torch.is_grad_enabled()

    def alone(item: Item) -> Result:
        with torch.set_grad_enabled(grad), enter():
            return fn(item)

    pool = _pool(torch.get_num_threads())
    if pool is None:
        found = _by_turns(alone, {index: items[index] for index in together})
    else:
        running = {index: pool.submit(alone, items[index]) for index in together}
        wait(running.values())  # so that an error finds no thread still at work
        found = {index: future.result() for index, future in running.items()}
    return [found[i] if i in found else fn(item) for i, item in enumerate(items)]


def _by_turns(fn: Callable[[Item], Result], items: Mapping[int, Item]) -> dict[int, Result]:
    """Compute without threads if none can be started: with one torch thread, to the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {index: fn(item) for index, item in items.items()}
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4096)
def side_by_side(costs: tuple[float, ...], threads: int) -> tuple[int, ...]:
    """Which pieces to work on side by side, the longest first: whoever is done takes the next.

    Left out are the longest of all, for which no other is a match: they have all threads, afterwards.
    """
    total = sum(costs)
    if threads < 2 or total < LEAST:
        return ()
    order = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    best, chosen = total / (threads * EFFICIENCY), 0
    for first in range(min(threads, len(order) - 1)):
        rest = sum(costs[i] for i in order[:first]) / (threads * EFFICIENCY)
        loads = [0.0] * threads
        for i in order[first:]:
            heapq.heapreplace(loads, loads[0] + costs[i])
        if rest + max(loads) < best:
            best, chosen = rest + max(loads), len(order) - first
    return tuple(order[len(order) - chosen :])


def _watched() -> bool:
    """Whether operations depend on what belongs to the caller's thread and would not be on others."""
    modes = _len_torch_function_stack() + _len_torch_dispatch_stack()
    return modes > 0 or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")


def _pool(size: int) -> ThreadPoolExecutor | None:
    """Started threads; None if they cannot be started."""
    with _lock:
        if size not in pools:
            ready = threading.Barrier(size)

            def begin() -> None:
                # asking first: a thread takes the number that was set last when torch first meets it
                torch.get_num_threads()
                torch.set_num_threads(1)
                with contextlib.suppress(threading.BrokenBarrierError):
                    ready.wait()

            pool = ThreadPoolExecutor(size, "heavyball", begin)
            try:
                wait([pool.submit(int) for _ in range(size)])
            except RuntimeError:  # the system has no more threads for us, or the interpreter ends
                ready.abort()
                pool.shutdown()
                return None
            finally:
                # threads that begin later, anybody's, have the number that was set last
                torch.set_num_threads(size)
            pools[size] = pool
        return pools[size]
