"""One parameter's table, used again: what `plan.py` does with lists for a whole step, done for one.

A step inside `backward()` comes once for each parameter of a model, so it has to take little Python.
"""

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from heavyball import utils
from heavyball.compiler.run.plan import Plan
from heavyball.compiler.run.table import Table, entry, hyper_values, threads
from heavyball.compiler.triton import device as cuda
from heavyball.core.hyper import frozen


class Row:
    """A table of one row, and what must still hold for it to be used again."""

    def __init__(self, plan: Plan, table: Table, keys: tuple[str, ...]):
        job = plan.jobs[0]
        self._plan, self._table, self._keys = plan, table, keys
        self._param, self._group, self._held = plan.params[0], job.group, job.state
        self._tensors = [(k, t, t.data_ptr(), t.stride()) for k, t in job.state.items()]
        param = self._param
        self._kind = (param.dtype, param.device, param.shape, param.stride(), param.data_ptr())
        self._hyper = hyper_values(table.kernel, [self._group], {})
        self._numbers = (ctypes.c_double * self._hyper.numel()).from_address(self._hyper.data_ptr())
        self._arguments = table.arguments(self._hyper)
        self._fill()
        fixed = table.fixed
        assert fixed is not None
        self._cells = (ctypes.c_int64 * fixed.numel()).from_address(fixed.data_ptr())
        self._grad_dtype = job.grad.dtype if param.grad is None else param.grad.dtype

    @classmethod
    def of(cls, plan: Plan | None, keys: tuple[str, ...]) -> Self | None:
        """The row of a plan, where one kernel on the CPU is all that it has; else None."""
        if plan is None or len(plan.jobs) != 1 or plan.eager or plan.whole.waves:
            return None
        if len(plan.tables) != 1 or plan.shares:
            return None
        if plan.copies:  # whose addresses are good for one step
            return None
        if isinstance(plan.tables[0], cuda.DeviceTable) or plan.tables[0].grad_column is None:
            return None
        return cls(plan, plan.tables[0], keys)

    def again(self, state: Mapping[Tensor, Any], check: Callable[[], None]) -> bool:
        """Step as the last time, if everything is where it was then; else do nothing.

        state: the optimizer's. check: raises where a value of the group is wrong.
        """
        if utils.compile_mode is None or not self._stays(state):
            return False
        if self._differs() and not self._refill(check):
            return False
        address = self._param.grad.data_ptr()  # type: ignore[union-attr]
        if not address:
            return False
        table = self._table
        self._cells[table.grad_column] = address  # type: ignore[index]
        table.kernel.run(*self._arguments, threads(table.elements))
        torch.autograd.graph.increment_version(self._param)
        return True

    def _differs(self) -> bool:
        """Whether a value of the group may be another one than the kernel has."""
        try:
            return [self._group.get(key) for key in self._keys] != self._values
        except ValueError:  # of an array, which compares entry by entry
            return True

    def _stays(self, state: Mapping[Tensor, Any]) -> bool:
        param = self._param
        kind = (param.dtype, param.device, param.shape, param.stride(), param.data_ptr())
        if kind != self._kind or state.get(param) is not self._held:
            return False
        grad = param.grad
        if grad is None or type(grad) is not Tensor or grad.layout is not torch.strided:
            return False
        if grad.dtype is not self._grad_dtype or grad.device != kind[1]:
            return False
        if grad.shape != kind[2] or grad.stride() != kind[3] or grad.is_neg():
            return False
        held = self._held
        if len(held) != len(self._tensors):
            return False
        for key, tensor, place, strides in self._tensors:
            if held.get(key) is not tensor:
                return False
            if tensor.data_ptr() != place or tensor.stride() != strides:
                return False
        return True

    def _refill(self, check: Callable[[], None]) -> bool:
        check()
        plan = self._plan
        if plan.seeds != [self._group["seed"]] or plan.lazy != plan.wanted():
            return False
        self._fill()
        return True

    def _fill(self) -> None:
        """Note the values of the group, as they are and as the kernel reads them."""
        for place, (key, index) in enumerate(self._table.kernel.hypers):
            self._numbers[place] = entry(self._group[key], index)
        values = [self._group.get(key) for key in self._keys]
        # what may change in place is never taken to be as it was
        changing = any(isinstance(v, Tensor) or frozen(v) is not v for v in values)
        self._values = None if changing else values
