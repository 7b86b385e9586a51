"""Whether everything that a step reads and writes is still where it was in the step before.

A step of many small tensors takes a few milliseconds, and asking each of its tensors for its address,
dtype, shape and strides in Python takes one. So one call of a compiled function asks for them all,
through the functions that every tensor type offers by the DLPack standard.
"""

import array
import ctypes
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler import toolchain

SOURCE = """\
#include <cstdint>

// What DLPack says of a tensor, version 1.
struct Described {
    void* data;
    int32_t device, index, axes;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;
};
typedef int (*Describe)(void*, Described*);

// Write down (`compare` = 0) or compare how tensors lie in memory: four numbers and two for each axis.
// Addresses are part of it for the first `fixed` tensors; those of the others go to `moved`.
// Returns how many tensors are as they were, -1 with a Python exception where there is no tensor.
extern "C" int64_t watch(Describe describe, void* const* objects, int64_t fixed, int64_t count,
                         int64_t* seen, int64_t* moved, int compare) {
    for (int64_t i = 0; i < count; ++i) {
        Described t;
        if (describe(objects[i], &t)) return -1;
        int64_t address = (int64_t)t.data + (int64_t)t.offset;
        if (i >= fixed) {
            moved[i - fixed] = address;
            address = 0;
        }
        const int64_t device = (int64_t)t.device << 32 | (uint32_t)t.index;
        const int64_t kind = (int64_t)t.code << 32 | t.bits << 16 | t.lanes;
        const int64_t head[4] = {address, device, kind, t.axes};
        int64_t changes = 0;
        for (int k = 0; k < 4; ++k) {
            if (compare) changes |= seen[k] ^ head[k];
            else seen[k] = head[k];
        }
        if (changes) return i;  // with another number of axes, the numbers below belong to others
        seen += 4;
        for (int k = 0; k < t.axes; ++k) {
            if (compare) changes |= (seen[2 * k] ^ t.shape[k]) | (seen[2 * k + 1] ^ t.strides[k]);
            else seen[2 * k] = t.shape[k], seen[2 * k + 1] = t.strides[k];
        }
        if (changes) return i;
        seen += 2 * t.axes;
    }
    return count;
}
"""
MAJOR = 1  # of the DLPack standard that SOURCE follows
DESCRIBE = 5  # the place of the describing function in DLPack's table, in words


@functools.cache
def native() -> Callable[..., int] | None:
    """The compiled function for torch's tensors; None where there is no compiler or no DLPack."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    place = get(capsule, b"dlpack_exchange_api")
    describe = (ctypes.c_void_p * (DESCRIBE + 1)).from_address(place)[DESCRIBE]
    if ctypes.c_uint32.from_address(place).value != MAJOR or not describe:
        return None
    try:
        library = toolchain.load(SOURCE)
    except toolchain.ToolchainError:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    # a PYFUNCTYPE keeps the interpreter's lock, which Python objects need, and hands on its exceptions
    kind = ctypes.PYFUNCTYPE(size, pointer, pointer, size, size, pointer, pointer, ctypes.c_int)
    return functools.partial(kind(("watch", library)), describe)


class Layouts:
    """How tensors lie in memory: those that must not move, and the dtypes and strides of others.

    The others, the gradients of a step, are not kept alive.
    """

    def __init__(self, fixed: list[Tensor], moving: list[Tensor]):
        self._fixed = fixed
        self._addresses = [t.data_ptr() for t in fixed]
        self._kinds = list(map(_kind, chain(fixed, moving)))
        self._moved = torch.empty(len(moving), dtype=torch.int64)
        self._objects = array.array("q", map(id, fixed))
        self._seen: Tensor | None = None

    def addresses(self, moving: list[Any]) -> Tensor | None:
        """Where the moving ones are now; None if anything but that has changed.

        The answer is filled anew by the next call.
        """
        run = native()
        if run is None or self._seen is None:
            if not self._compare_plainly(moving):
                return None
            if run is not None:
                self._seen = torch.empty(
                    sum(4 + 2 * len(k[2]) for k in self._kinds), dtype=torch.int64
                )
                self._run(run, moving, compare=False)
            return self._moved
        try:
            same = self._run(run, moving, compare=True) == len(self._kinds)
        except (RuntimeError, BufferError, TypeError):  # no tensor, or not a dense one
            return None
        return self._moved if same else None

    def _run(self, run: Callable[..., int], moving: list[Any], compare: bool) -> int:
        objects = self._objects + array.array("q", map(id, moving))
        seen, moved = self._seen.data_ptr(), self._moved.data_ptr()  # type: ignore[union-attr]
        count = len(self._fixed)
        return run(objects.buffer_info()[0], count, len(objects), seen, moved, compare)

    def _compare_plainly(self, moving: list[Any]) -> bool:
        try:
            kinds = list(map(_kind, chain(self._fixed, moving)))
        except (AttributeError, RuntimeError):  # no tensor, or none with strides
            return False
        if kinds != self._kinds or [t.data_ptr() for t in self._fixed] != self._addresses:
            return False
        self._moved.copy_(torch.tensor([t.data_ptr() for t in moving], dtype=torch.int64))
        return True


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class Snapshot:
    """The tensors of an optimizer in one step: its parameters, which have gradients, and their state."""

    def __init__(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]):
        self._groups = list(groups)
        self._members = [len(group["params"]) for group in groups]
        self._params = [p for group in groups for p in group["params"]]
        self.stepped = [p for p in self._params if p.grad is not None]
        self._idle = [p for p in self._params if p.grad is None]
        self._owners = [p for p in self.stepped if state.get(p)]  # all but those without elements
        self._held = [state[p] for p in self._owners]
        self._keys, self._sizes = list(chain.from_iterable(self._held)), list(map(len, self._held))
        self._tensors = list(_values(self._held))
        gradients: list[Tensor] = [p.grad for p in self.stepped]  # type: ignore[misc]
        self._layouts = Layouts(self.stepped + self._tensors, gradients)

    def gradients(self) -> list[Tensor]:
        """The present gradients of the parameters that had one."""
        return [p.grad for p in self.stepped]  # type: ignore[misc]

    def addresses(
        self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
    ) -> Tensor | None:
        """The gradients' addresses; None if there are other tensors now, or others in layout."""
        if not _identical(groups, self._groups) or any(p.grad is not None for p in self._idle):
            return None
        if [len(group["params"]) for group in groups] != self._members:
            return None  # a parameter may have gone to the next group
        if not _identical([p for group in groups for p in group["params"]], self._params):
            return None
        if not all(map(operator.is_, map(state.get, self._owners), self._held)):
            return None
        if list(chain.from_iterable(self._held)) != self._keys:
            return None
        if list(map(len, self._held)) != self._sizes:
            return None
        if not all(map(operator.is_, _values(self._held), self._tensors)):
            return None
        return self._layouts.addresses(self.gradients())


def _values(held: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    return chain.from_iterable(map(dict.values, held))


def _identical(found: Any, remembered: list[Any]) -> bool:
    """Whether these are the same objects; tensors may not be asked whether they are equal."""
    return len(found) == len(remembered) and all(map(operator.is_, found, remembered))
