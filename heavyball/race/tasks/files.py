"""Data files: read idx and text, download with a checksum, keep in the user's cache."""

import gzip
import hashlib
import math
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heavyball.race.errors import RaceError, one_line

LARGEST = 64 * 2**20
TIMEOUT = 30
UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Remote:
    """A file to download: its name in the cache, where it is, and its content's SHA-256."""

    name: str
    urls: tuple[str, ...]
    sha256: str


def cache() -> Path:
    """The folder for downloaded data: `heavyball` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heavyball"


def fetch(remote: Remote) -> Path:
    """The path of a downloaded file whose checksum was verified, now or from the cache.

    Errors: RaceError with every address and what went wrong there.
    """
    path = cache() / remote.name
    if path.is_file() and _digest(path.read_bytes()) == remote.sha256:
        return path
    failures = []
    for url in remote.urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                raw = response.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {one_line(error)}")
            continue
        if _digest(raw) == remote.sha256:
            write_atomically(path, raw)
            return path
        failures.append(f"{url}: checksum mismatch, expected SHA-256 {remote.sha256}")
    raise RaceError(
        f"{remote.name} could not be downloaded ({'; '.join(failures)}); "
        "give the folder that holds it with --data DIR"
    )


def content(path: Path) -> bytes:
    """What a file holds, unpacked if it is a gzip archive.

    Errors: RaceError if it cannot be read or is cut short.
    """
    try:
        return _unpacked(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise RaceError(f"{path} cannot be read: {one_line(error)}") from None


def _unpacked(raw: bytes) -> bytes:
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def _digest(raw: bytes) -> str | None:
    try:
        return hashlib.sha256(_unpacked(raw)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an idx file as a uint8 tensor.

    Errors: RaceError if the header is of another type or the length does not fit it.
    """
    raw = content(path)
    start = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(raw) < start:
        raise RaceError(f"{path} is no idx file of unsigned bytes with {dimensions} dimensions")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        size = f"{len(raw) - start} bytes, its header says {math.prod(shape)}"
        raise RaceError(f"{path} is cut short or damaged: it holds {size}")
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(shape)


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file that is either there in full or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; results are for whom the user's umask lets.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the new name of a file written too, where a folder can be opened for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
