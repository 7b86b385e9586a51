"""What was written into parameters since they were noted, by torch's counts and by some elements."""

import array
import ctypes
import operator
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from heavyball.distributed import local

# Elements of each parameter, spread over it. Weights that were loaded differ in all of them; after a row
# was set to zero, or a clamp, some are as they were.
PLACES = 4
WORDS = 1 + PLACES
PLAIN = {Tensor, torch.nn.Parameter}
_version_of = operator.attrgetter("_version")


class Writes:
    """Some parameters as they are when they are noted.

    torch counts what is written into a tensor, but not what goes through its `data`, so a few elements
    of those on the host are compared too. On a device that would have to be waited for. The count of a
    parameter made of a part of a buffer is that of the whole buffer, so only elements are compared.
    """

    def __init__(self, params: Iterable[Tensor]):
        self._params = list(dict.fromkeys(params))
        self._places = {p: place for place, p in enumerate(self._params)}
        self._parts = {p for p in self._params if _is_part(p)}
        self._versions: list[int | None] = []
        self._found = array.array("Q")
        self.note()

    def are_of(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, in their order."""
        return len(params) == len(self._params) and all(map(operator.is_, params, self._params))

    def note(self, param: Tensor | None = None) -> None:
        """Note all of them anew, or one of them or another."""
        if param is None:
            held = _held(self._params)
            self._versions, self._found = _versions(held), _sampled(held)
            return
        place = self._places.setdefault(param, len(self._places))
        if place == len(self._params):
            self._params.append(param)
            if _is_part(param):
                self._parts.add(param)
        held = _held((param,))
        self._versions[place : place + 1] = _versions(held)
        self._found[WORDS * place : WORDS * (place + 1)] = _sampled(held)

    def changed(self, only: Tensor | None = None) -> set[Tensor]:
        """Those that somebody has written since."""
        if only is not None and only not in self._places:
            return set()
        first, end = 0, len(self._params)
        if only is not None:
            first = self._places[only]
            end = first + 1
        params = self._params[first:end]
        held = _held(params)
        known, before = self._versions[first:end], self._found[WORDS * first : WORDS * end]
        counted, found = _versions(held), _sampled(held, before)
        changed = set[Tensor]()
        if counted != known:
            rows = zip(params, counted, known, strict=True)
            changed |= {p for p, one, other in rows if one != other} - self._parts
        if found.tobytes() != before.tobytes():  # arrays make a number of each word to compare them
            pairs = zip(params, _rows(found), _rows(before), strict=True)
            changed |= {p for p, one, other in pairs if _differ(one, other)}
        return changed


def _held(params: Sequence[Tensor]) -> Sequence[Tensor]:
    """What this process has of some parameters."""
    return params if PLAIN.issuperset(map(type, params)) else [local(p) for p in params]


def _is_part(param: Tensor) -> bool:
    """Whether a parameter is a part of a larger buffer, which a shard with a count of its own may be."""
    if local(param) is not param:
        return False
    try:
        return param.untyped_storage().nbytes() > param.nbytes
    except RuntimeError:  # no memory of its own
        return False


def _versions(held: Sequence[Tensor]) -> list[int | None]:
    try:
        return list(map(_version_of, held))
    except RuntimeError:  # torch does not count writes of inference tensors
        return [None if p.is_inference() else p._version for p in held]


def version(param: Tensor) -> int | None:
    """How often a parameter was written; None where torch does not count that."""
    return _versions(_held((param,)))[0]


def _rows(found: "array.array[int]") -> Iterable[Sequence[int]]:
    return zip(*[iter(found)] * WORDS, strict=True)


def _differ(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether all elements are others, where the two can be compared."""
    same_kind = one[0] == other[0] != 0
    return same_kind and all(a != b for a, b in zip(one[1:], other[1:], strict=True))


def _sampled(held: Sequence[Tensor], known: "array.array[int] | None" = None) -> "array.array[int]":
    """The elements of some tensors as words, see `SOURCE` of `compiler/run/watch.py`.

    known: what they were; where one element still is, the others are not read.
    """
    found = array.array("Q", bytes(8 * WORDS * len(held)))
    # without kernels nothing of the compiler is imported
    watch = sys.modules.get("heavyball.compiler.run.watch")
    run = watch.sampler() if watch is not None else None
    if run is not None:
        objects = array.array("q", map(id, held))
        try:
            before = None if known is None else known.buffer_info()[0]
            run(objects.buffer_info()[0], len(held), PLACES, before, found.buffer_info()[0])
            return found
        except (RuntimeError, BufferError, TypeError):  # some are no dense tensors
            pass
    for number, p in enumerate(held):
        found[WORDS * number : WORDS * (number + 1)] = _read(p)
    return found


def _read(p: Tensor) -> "array.array[int]":
    """The same of one tensor, without a compiler."""
    found = array.array("Q", bytes(8 * WORDS))
    if type(p) not in PLAIN or p.device.type != "cpu" or not p.numel():
        return found
    if p.layout is not torch.strided or not p.data_ptr():
        return found
    first, size, elements = p.data_ptr(), p.element_size(), p.numel()
    # the kinds of numbers that DLPack knows, as the kernel has them
    kind = 4 if p.dtype is torch.bfloat16 else 2
    found[0] = elements << 16 | kind << 8 | 8 * size
    for n in range(PLACES):
        rest, place = elements * (2 * n + 1) // (2 * PLACES), 0
        for length, stride in zip(reversed(p.shape), reversed(p.stride()), strict=True):
            place += rest % length * stride
            rest //= length
        word = ctypes.string_at(first + place * size, size)
        found[1 + n] = int.from_bytes(word[:8], sys.byteorder)
    return found
