"""Compiles C++ and keeps the result on disk, in a directory that only the user can write."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Harmless freedoms. Not -ffast-math: with gcc it sets flush-to-zero for the whole process as soon
    # as the library is loaded, and it drops the tests for NaN.
    "-fno-math-errno",
    "-fno-trapping-math",
)
LIMIT_BYTES = 256 * 2**20
DIGEST = 32


class ToolchainError(Exception):
    """No kernel can be had on this machine; the message says why."""


def cache_directory() -> Path:
    """`HEAVYBALL_CACHE`, or `heavyball` in the user's cache directory; made with mode 0700.

    Errors: ToolchainError if it cannot be written, or if another user could have written there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("HEAVYBALL_CACHE") or Path(base) / "heavyball")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ToolchainError(f"the cache directory {path} cannot be made: {error}") from None
    _check_private(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise ToolchainError(f"the cache directory {path} cannot be written")
    return path


def _check_private(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise ToolchainError(f"{path} is a link, expected a directory or file of the user's own")
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ToolchainError(
            f"{path} belongs to or can be written by another user, so it is not used"
        )


@functools.cache
def compiler() -> str:
    """The path of a C++ compiler: `CXX` if it is set, else the first of c++, g++ and clang++."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return os.path.realpath(found)
    raise ToolchainError(f"there is no C++ compiler ({wanted or 'c++, g++ or clang++'})")


@functools.cache
def _machine() -> str:
    """What a compiled kernel depends on besides its source: compiler, flags, processor."""
    found = os.stat(compiler())
    parts = [compiler(), str(found.st_mtime_ns), str(found.st_size), *FLAGS, platform.machine()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            if line.startswith(("model name", "flags", "Features")):
                parts.append(line)
    return "\n".join(parts)


def _path(source: str) -> Path:
    directory = cache_directory()
    key = hashlib.sha256(f"{_machine()}\n{source}".encode()).hexdigest()[:32]
    return directory / f"{key}.so"


def prepare(sources: Collection[str]) -> None:
    """Compile at the same time what is not on the disk. What fails is left for `load` to say so."""

    def make(source: str) -> None:
        with contextlib.suppress(ToolchainError):
            if not _intact(path := _path(source)):
                _build(source, path)

    if len(sources) > 1:
        with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
            list(pool.map(make, sources))


def load(source: str) -> ctypes.CDLL:
    """The compiled library of a source, from the disk if it is there undamaged.

    Errors: ToolchainError with the compiler's first line of complaint.
    """
    path = _path(source)
    if _intact(path):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _build(source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolchainError(f"the compiled kernel cannot be loaded: {error}") from None


def _intact(path: Path) -> bool:
    """Whether the file is there, is the user's, and ends in the digest of what stands before."""
    try:
        _check_private(path)
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _build(source: str, path: Path) -> None:
    # In a directory of its own and moved at the end, so that no other process sees half a file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        code, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        code.write_text(source)
        command = [compiler(), *FLAGS, "-o", str(library), str(code)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(f"{compiler()} did not run: {error}") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise ToolchainError(f"{compiler()} failed: {reason}")
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        library.chmod(0o700)
        os.replace(library, path)
    _trim(path.parent, keep=path)


def _trim(directory: Path, keep: Path) -> None:
    """Delete the kernels that were made longest ago while all together are over the bound."""
    found = []
    for path in directory.glob("*.so"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT_BYTES:
            return
        if path != keep:
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
