"""What processes must agree on before they exchange anything: plans, and state that is saved or loaded.

Each gathers a few numbers from all: whether one has an error, and digests of what must be the same. So
every process comes to the same decision, and what one of them refuses raises on all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from heavyball.distributed.shard import Group

# What an error calls something, and a text that must be the same on all processes.
Entry = tuple[str, str]


def compare(
    asked: Mapping[Group, Sequence[Entry]],
    devices: Mapping[Group, torch.device],
    words: tuple[str, str, str],
    error: Exception | None = None,
) -> None:
    """Refuse to go on where the processes of a group would not do the same, or one has an error.

    words: what is said where another process has an error, where the entries are not as many, and,
        behind its name, of the first that is another one.

    Errors: on every process: `error` where it is given, ValueError on the others.
    """
    groups = [group for group in asked if group.size > 1]
    texts = {group: [_digest(text) for _, text in asked[group]] for group in groups}
    failed, unlike = error is not None, list[Group]()
    for group in groups:
        own = [int(error is not None), len(texts[group]), _digest(repr(texts[group]))]
        rows = _gathered(group, devices[group], own)
        failed |= any(row[0] for row in rows)
        if not any(row[0] for row in rows) and any(row != rows[0] for row in rows):
            unlike.append(group)
    for group in groups if len(groups) > 1 else ():  # those of one group hear of the others
        failed |= any(row[0] for row in _gathered(group, devices[group], [int(failed)]))
    if error is not None:
        raise error
    found = [_first_unlike(g, devices[g], asked[g], texts[g], words) for g in unlike]
    if found:
        raise ValueError(found[0])
    if failed:
        raise ValueError(words[0])


def _first_unlike(
    group: Group,
    device: torch.device,
    entries: Sequence[Entry],
    digests: Sequence[int],
    words: tuple[str, str, str],
) -> str:
    """What is said of the first entry that is another one on some process."""
    counts = [row[0] for row in _gathered(group, device, [len(digests)])]
    if len(set(counts)) > 1:
        return words[1].format(size=group.size, here=len(digests))
    rows = _gathered(group, device, digests)
    number = next(i for i in range(len(digests)) if any(row[i] != rows[0][i] for row in rows))
    return f"{entries[number][0]} {words[2]}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _gathered(group: Group, device: torch.device, own: Sequence[int]) -> list[list[int]]:
    """The same numbers of every process, in the group's order."""
    numbers = torch.tensor(own, dtype=torch.int64, device=device)
    found = [torch.empty_like(numbers) for _ in range(group.size)]
    dist.all_gather(found, numbers, group=group.handle)
    return [row.tolist() for row in found]


class Ballot:
    """Where the processes of some groups agree several times, until one has an error.

    devices: the groups, each with a device that its processes can gather from.
    """

    def __init__(self, devices: Mapping[Group, torch.device], words: tuple[str, str, str]):
        self._devices, self._words = devices, words
        self.closed = False

    def vote(
        self, entries: Mapping[Group, Sequence[Entry]] | None = None, error: Exception | None = None
    ) -> None:
        """Agree on entries, and on going on; see `compare`."""
        asked = {group: (entries or {}).get(group, ()) for group in self._devices}
        try:
            compare(asked, self._devices, self._words, error)
        except Exception:
            self.closed = True
            raise


def form_of(state: Mapping[str, Any]) -> str:
    """What of a parameter's state decides which exchanges it takes to load it."""
    return repr([(key, _kind(state[key])) for key in sorted(state)])


def _kind(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value).__name__
    placed = ()
    if isinstance(value, DTensor):
        mesh = value.device_mesh.mesh
        placed = tuple(value.placements), tuple(mesh.shape), mesh.flatten().tolist()  # type: ignore[assignment]
    return tuple(value.shape), str(value.dtype), str(value.layout), placed
