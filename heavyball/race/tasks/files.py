"""Data files: read idx and text, download with a checksum, keep in the user's cache."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import secrets
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from heavyball.errors import RaceError, one_line

# Bytes of a file of data, unpacked: MNIST's images are 47 million.
LARGEST = 64 * 2**20
PACKED = b"\x1f\x8b"  # how a gzip archive begins
TIMEOUT = 30
UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Remote:
    """A file to download: its name in the cache, where it is, and its content's SHA-256."""

    name: str
    urls: tuple[str, ...]
    sha256: str


def cache() -> Path:
    """The folder for downloaded data: `heavyball` in `$XDG_CACHE_HOME` or `~/.cache`.

    Errors: RaceError where there is no such folder, since nobody is at home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heavyball"
    except RuntimeError as error:
        raise RaceError(f"no folder for data: {one_line(error)}; set XDG_CACHE_HOME") from None


def fetch(remote: Remote) -> Path:
    """The path of a downloaded file whose checksum was verified, now or from the cache.

    Errors: RaceError with every address and what went wrong there.
    """
    path = cache() / remote.name
    if path.is_file() and _digest(path) == remote.sha256:
        return path
    failures = []
    for url in remote.urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                raw = response.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {one_line(error)}")
            continue
        if _digest_of(raw) == remote.sha256:
            write_atomically(path, raw)
            return path
        failures.append(f"{url}: checksum mismatch, expected SHA-256 {remote.sha256}")
    raise RaceError(
        f"{remote.name} could not be downloaded ({'; '.join(failures)}); "
        "give the folder that holds it with --data DIR"
    )


def content(path: Path, most: int = LARGEST) -> bytes:
    """What a file holds, unpacked if it is a gzip archive.

    Errors: RaceError if it cannot be read, is cut short, or holds more than `most` bytes.
    """
    try:
        with _opened(path) as file:
            raw = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RaceError(f"{path} cannot be read: {one_line(error)}") from None
    if len(raw) > most:
        raise RaceError(
            f"{path} holds more than the {most:,} bytes that are expected of it at most"
        )
    return raw


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, unpacked as far as it is read."""
    with path.open("rb") as file:
        packed = file.read(2) == PACKED
        file.seek(0)
        with gzip.open(file) if packed else contextlib.nullcontext(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(content(path)).hexdigest()
    except RaceError:
        return None


def _digest_of(raw: bytes) -> str | None:
    """That of what was downloaded, unpacked if it is packed."""
    file: Any = gzip.GzipFile(fileobj=io.BytesIO(raw)) if raw[:2] == PACKED else io.BytesIO(raw)
    try:
        return hashlib.sha256(file.read(LARGEST + 1)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an idx file as a uint8 tensor.

    Errors: RaceError if the header is of another type, the length does not fit it, or it says more
        than `LARGEST`. No more is unpacked than the header says.
    """
    start = 4 + 4 * dimensions
    try:
        with _opened(path) as file:
            header = file.read(start)
    except (OSError, EOFError, zlib.error) as error:
        raise RaceError(f"{path} cannot be read: {one_line(error)}") from None
    if header[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(header) < start:
        raise RaceError(f"{path} is not an idx file of unsigned bytes with {dimensions} dimensions")
    shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, start, 4)]
    size = math.prod(shape)
    if max(*shape, size) > LARGEST:
        sizes = " x ".join(map(str, shape))
        raise RaceError(f"{path}: its header says {sizes} bytes, expected {LARGEST:,} at most")
    raw = content(path, start + size)
    if len(raw) != start + size:
        found = f"{len(raw) - start} bytes, its header says {size}"
        raise RaceError(f"{path} is cut short or damaged: it holds {found}")
    if not size:
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(shape)


def check_folder(folder: Path) -> None:
    """Make a folder, and see that a file can be made in it.

    Errors: RaceError naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = _temporary(folder / "check")
        os.close(handle)
        os.unlink(name)
    except (OSError, ValueError) as error:
        raise RaceError(f"{folder} cannot be written: {one_line(error)}") from None


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file that is either there in full or as it was before.

    Errors: RaceError if it cannot be written, with the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        raise RaceError(f"{path} cannot be written: {one_line(error)}") from None


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, open for writing, with the rights that the user's umask leaves."""
    name = str(path.with_name(f".{path.name}.{secrets.token_hex(6)}"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(name, flags, 0o666), name


def _sync_folder(folder: Path) -> None:
    """Have the new name of a file written too, where a folder can be opened for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
