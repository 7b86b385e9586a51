"""Whether everything that a step reads and writes is still where it was in the step before.

A step of many small tensors takes a few milliseconds, and asking each of its tensors for its address,
dtype, shape and strides in Python takes one. So one call of a compiled function asks for them all,
through the functions that every tensor type offers by the DLPack standard.
"""

import array
import ctypes
import functools
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.cpp import toolchain
from heavyball.numerics import host
from heavyball.runtime.state import SHOWN

SOURCE = """\
#include <cstdint>
#include <cstring>

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

static bool has_elements(const Described& t) {
    for (int k = 0; k < t.axes; ++k)
        if (!t.shape[k]) return false;
    return true;
}

// Write down (`compare` = 0) or compare how tensors lie in memory: four numbers and two for each axis.
// Addresses are part of it for the first `fixed` tensors; those of the others go to `moved`.
// Returns how many tensors are as they were and have memory for their elements, -1 with a Python
// exception where there is no tensor.
extern "C" int64_t watch(Describe describe, void* const* objects, int64_t fixed, int64_t count,
                         int64_t* seen, int64_t* moved, int compare) {
    for (int64_t i = 0; i < count; ++i) {
        Described t;
        if (describe(objects[i], &t)) return -1;
        if (!t.data && has_elements(t)) return i;
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

// The bits of `places` elements of each tensor, spread over it, behind a number that differs where they
// cannot be compared; 0 where they cannot be read. Behind an element that is as in `known`, if that is
// given, the others are taken from there: memory is slow. Returns -1 with a Python exception.
extern "C" int64_t sample(Describe describe, void* const* objects, int64_t count, int64_t places,
                          const uint64_t* known, uint64_t* found) {
    for (int64_t i = 0; i < count; ++i, found += 1 + places) {
        Described t;
        if (describe(objects[i], &t)) return -1;
        int64_t elements = 1, dense = 1;
        for (int k = t.axes - 1; k >= 0; --k) {
            dense &= t.shape[k] == 1 || t.strides[k] == elements;
            elements *= t.shape[k];
        }
        const int64_t bytes = t.bits * t.lanes / 8;
        std::memset(found, 0, (1 + places) * sizeof(*found));
        if (t.device != 1 || !t.data || !elements || bytes < 1 || bytes > 8) continue;
        found[0] = (uint64_t)elements << 16 | t.code << 8 | t.bits;
        for (int64_t n = 0; n < places; ++n) {
            int64_t rest = elements * (2 * n + 1) / (2 * places), place = dense ? rest : 0;
            for (int k = dense ? -1 : t.axes - 1; k >= 0; --k) {
                place += rest % t.shape[k] * t.strides[k];
                rest /= t.shape[k];
            }
            std::memcpy(found + 1 + n, (const char*)t.data + t.offset + place * bytes, bytes);
            if (!known) continue;
            const uint64_t* before = known + i * (1 + places);
            if (found[0] == before[0] && found[1 + n] == before[1 + n]) {
                std::memcpy(found + 1, before + 1, places * sizeof(*found));
                break;
            }
        }
    }
    return count;
}
"""
MAJOR = 1  # of the DLPack standard that SOURCE follows
DESCRIBE = 5  # the place of the describing function in DLPack's table, in words


def native() -> Callable[..., int] | None:
    """`watch` for torch's tensors; None where there is no compiler or no DLPack."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return _native("watch", (pointer, size, size, pointer, pointer, ctypes.c_int))


def sampler() -> Callable[..., int] | None:
    """`sample`, in the same way."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return _native("sample", (pointer, size, size, pointer, pointer))


@functools.cache
def _native(name: str, takes: tuple[Any, ...]) -> Callable[..., int] | None:
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
        library = toolchain.load(SOURCE, name)
    except toolchain.ToolchainError:
        return None
    # a PYFUNCTYPE keeps the interpreter's lock, which Python objects need, and hands on its exceptions
    kind = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, *takes)
    return functools.partial(kind((name, library)), describe)


def forget() -> None:
    """Look for a compiler again."""
    _native.cache_clear()


class Layouts:
    """The memory layout of tensors: addresses that must not change, dtypes and strides.

    The others, the gradients of a step, are not kept alive.
    """

    def __init__(self, fixed: list[Tensor], moving: list[Tensor]):
        self._fixed = fixed
        self._addresses = [t.data_ptr() for t in fixed]
        self._kinds = list(map(_kind, chain(fixed, moving)))
        self._moved = torch.empty(len(moving), dtype=torch.int64, device="cpu")
        self._objects = array.array("q", map(id, fixed))
        self._seen: Tensor | None = None

    def addresses(self, moving: list[Any]) -> Tensor | None:
        """Where the moving ones are now; None if anything but that has changed.

        The next call overwrites the answer.
        """
        run = native()
        if run is None or self._seen is None:
            if not self._compare_plainly(moving):
                return None
            if run is not None:
                self._seen = torch.empty(
                    sum(4 + 2 * len(k[2]) for k in self._kinds), dtype=torch.int64, device="cpu"
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
            moved = [t.data_ptr() for t in moving]
        except (AttributeError, RuntimeError):  # no tensor, or none with strides or memory
            return False
        if kinds != self._kinds or [t.data_ptr() for t in self._fixed] != self._addresses:
            return False
        if any(t.numel() and not address for t, address in zip(moving, moved, strict=True)):
            return False
        self._moved.copy_(torch.tensor(moved, dtype=torch.int64, device="cpu"))
        return True


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class Snapshot:
    """The tensors of an optimizer in one step: its parameters, which have gradients, and their state.

    `attributes` are the optimizer's own, `vars(optimizer)`: "state", and how often it was shown.
    """

    def __init__(self, groups: list[dict[str, Any]], attributes: Mapping[str, Any]):
        self._groups = list(groups)
        self._members = [len(group["params"]) for group in groups]
        self._params = [p for group in groups for p in group["params"]]
        self.stepped = [p for p in self._params if p.grad is not None]
        self._idle = [p for p in self._params if p.grad is None]
        gradients: list[Tensor] = [p.grad for p in self.stepped]  # type: ignore[misc]
        self._layouts = Layouts(self.stepped, gradients)
        self._kept = Kept(self.stepped, attributes)

    @property
    def sealed(self) -> bool:
        """Whether nobody can have changed the state, so that it is not looked at."""
        return self._kept.sealed

    def gradients(self) -> list[Tensor]:
        """The present gradients of the parameters that had one."""
        return [p.grad for p in self.stepped]  # type: ignore[misc]

    def addresses(
        self, groups: list[dict[str, Any]], attributes: Mapping[str, Any]
    ) -> Tensor | None:
        """The gradients' addresses; None if there are other tensors now, or others in layout."""
        if not _identical(groups, self._groups) or any(p.grad is not None for p in self._idle):
            return None
        if [len(group["params"]) for group in groups] != self._members:
            return None  # a parameter may have gone to the next group
        if not _identical([p for group in groups for p in group["params"]], self._params):
            return None
        return self._layouts.addresses(self.gradients()) if self._kept.holds(attributes) else None


# What `sys.getrefcount` says of an object that stands in a list, and of one that is an attribute.
LISTED = next(map(sys.getrefcount, [object()]))
OWNED = next(map(sys.getrefcount, map(operator.itemgetter(""), [{"": object()}])))
MOST_WAITING = 64


class Kept:
    """The state of some parameters, which is looked at only while somebody else could change it.

    Most of a step's tensors are state, and touching each of them costs the time of several misses of
    the cache. State can be reached through the optimizer's `state`, which counts who asks for it, or by
    a reference from earlier. As long as nobody has asked and there are no such references, it is as it
    was.
    """

    def __init__(self, params: list[Tensor], attributes: Mapping[str, Any]):
        self._state = attributes["state"]
        self._owners = [p for p in params if self._state.get(p)]  # all but those without elements
        self._held = [self._state[p] for p in self._owners]
        self._keys, self._sizes = list(chain.from_iterable(self._held)), list(map(len, self._held))
        self._values = list(_values(self._held))
        # others may keep what they like beside it; without them it is one list, see `_alone`
        dense = [t for t in self._values if isinstance(t, Tensor) and t.layout is torch.strided]
        self._tensors = self._values if len(dense) == len(self._values) else dense
        del dense
        self._layouts = Layouts(self._tensors, [])
        self._shown = attributes.get(SHOWN, 0)
        self.sealed = False
        self._waiting = self._wait = 1

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the state is unchanged and in the same memory."""
        unseen = attributes.get(SHOWN, 0) == self._shown and attributes["state"] is self._state
        if self.sealed and unseen:
            return True
        self._shown, self.sealed = attributes.get(SHOWN, 0), False
        if not self._same(attributes) or (not unseen and any(map(_is_no_count, self._held))):
            return False
        # looking for references costs more than a comparison, so ever more rarely if there are some
        self._waiting = self._waiting - 1 if unseen else self._wait
        if self._waiting <= 0:
            self.sealed = self._alone(attributes)
            self._wait = 1 if self.sealed else min(2 * self._wait, MOST_WAITING)
            self._waiting = self._wait
        return True

    def _same(self, attributes: Mapping[str, Any]) -> bool:
        get = attributes["state"].get
        if not all(map(operator.is_, map(get, self._owners), self._held)):
            return False
        if list(chain.from_iterable(self._held)) != self._keys:
            return False
        if list(map(len, self._held)) != self._sizes:
            return False
        if not all(map(operator.is_, _values(self._held), self._values)):
            return False
        return self._layouts.addresses([]) is not None

    def _alone(self, attributes: Mapping[str, Any]) -> bool:
        """Whether nobody but the optimizer has a reference to its state, nor to the memory of it."""
        count, uses = sys.getrefcount, getattr(torch._C, "_storage_Use_Count", None)
        if uses is None:
            return False
        # one more is ours; then those of the mapping and of the job, and that of the dict
        if next(map(count, map(operator.itemgetter("state"), [attributes]))) > OWNED + 1:
            return False
        if any(n > LISTED + 2 for n in map(count, self._held)):
            return False
        if any(n > LISTED + 1 for n in map(count, self._tensors)):
            return False
        if any(map(weakref.getweakrefcount, self._tensors)):
            return False
        # the memory is held by the tensor alone, as that of a tensor which nobody else can know
        other = torch.zeros(1, device="cpu")
        memory = [t.untyped_storage() for t in (other, *self._tensors)]
        references = list(map(count, memory))
        holders = [uses(m._cdata) for m in memory]
        return max(references) == references[0] and max(holders) == holders[0]


def _is_no_count(state: Mapping[str, Any]) -> bool:
    """Whether the steps of a parameter were set to what they cannot be; a device is not waited for."""
    step = state.get("step")
    return isinstance(step, Tensor) and host.on_host(step) and not step.item() >= 0


def _values(held: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    return chain.from_iterable(map(dict.values, held))


def _identical(found: Any, remembered: list[Any]) -> bool:
    """Whether these are the same objects; tensors may not be asked whether they are equal."""
    return len(found) == len(remembered) and all(map(operator.is_, found, remembered))
