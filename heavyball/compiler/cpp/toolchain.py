"""Compiles C++ and keeps the result on disk, in a directory that only the user can write.

Whatever fails here is a ToolchainError: a step has the eager path, so no fault of a disk or a compiler
may end it. A source that failed is not tried again in the process.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from heavyball.runtime.recent import Recent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Newer standards bring a <cmath> that takes a third of the time of a small kernel.
NEEDED = ("-std=c++14", "-fPIC", "-shared")
# Left out where the compiler or its linker does not know them.
WANTED = (
    "-O3",
    "-march=native",
    "-fopenmp",
    # Harmless freedoms. Not -ffast-math: with gcc it sets flush-to-zero for the whole process as soon
    # as the library is loaded, and it drops the tests for NaN.
    "-fno-math-errno",
    "-fno-trapping-math",
)
LIMIT_BYTES = 256 * 2**20
LIMIT_SECONDS = 120.0
# Longer than that no process waits for another one to build a kernel: it may have been stopped.
WAIT_SECONDS = 20.0
# A folder that no compiler has written to for so many seconds was left by a killed process.
STALE_SECONDS = 3600.0
DIGEST = 32
BUILD = "build-"  # how the names of such folders begin
Command = tuple[str, ...]


class ToolchainError(Exception):
    """Kernels are not available on this machine; the message says why.

    cause: the message without what differs from source to source.
    """

    def __init__(self, message: str, cause: str | None = None):
        super().__init__(message)
        self.cause = cause or message


# Why a kernel could not be built, by its path; compilers that ran into the time limit; and the flags of
# those that do not know all of them.
_failed: dict[Path, tuple[str, str]] = Recent(4096)
_hung: set[Command] = set()
_known_flags: dict[Command, Command] = {}
# One thread at a time builds a kernel, or asks which flags a compiler knows.
_locks: dict[object, threading.Lock] = {}
if hasattr(os, "register_at_fork"):  # a thread that holds one is not there in a child process
    os.register_at_fork(after_in_child=_locks.clear)


def forget() -> None:
    """Try again what failed in this process, as after a compiler was installed."""
    for known in (_failed, _hung, _known_flags):
        known.clear()


def load(source: str, name: str | None = None) -> ctypes.CDLL:
    """The compiled library of a source, from the disk if it is there undamaged.

    name: a function that it must have.

    Errors: ToolchainError, whatever fails; with the compiler's first line of complaint.
    """
    return _load(source, name, threading.Event())


def prepare(sources: Collection[str], name: str | None = None) -> None:
    """Compile in parallel what is not on the disk; `load` reports failures."""
    if len(sources) < 2:
        return
    stop = threading.Event()

    def make(source: str) -> None:
        with contextlib.suppress(ToolchainError):
            _load(source, name, stop)

    pool = None
    try:
        pool = ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1))
        for future in [pool.submit(make, source) for source in sources]:
            future.result()
    except Exception:  # no thread can be started, for one; `load` compiles one after the other
        pass
    except BaseException:
        stop.set()
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _load(source: str, name: str | None, stop: threading.Event) -> ctypes.CDLL:
    try:
        path = _path(source)
        with _alone(path):
            if path in _failed:
                raise ToolchainError(*_failed[path])
            if library := _kept(path, name):
                return library
            try:
                with _claimed(path, stop) as waited:
                    # what another process has made meanwhile
                    return (waited and _kept(path, name)) or _build(source, path, name, stop)
            except Exception as error:
                if not stop.is_set():
                    _failed[path] = str(_plain(error)), _plain(error).cause
                raise
    except Exception as error:
        raise _plain(error) from None


def _kept(path: Path, name: str | None) -> ctypes.CDLL | None:
    """The library at a path, if it is undamaged and can be loaded."""
    if _intact(path):
        with contextlib.suppress(OSError):
            return _opened(path, name)
    return None


def _plain(error: Exception) -> ToolchainError:
    if isinstance(error, ToolchainError):
        return error
    return ToolchainError(f"{type(error).__name__}: {error}", type(error).__name__)


@contextlib.contextmanager
def _alone(what: object) -> Iterator[None]:
    with _locks.setdefault(what, threading.Lock()):
        try:
            yield
        finally:
            _locks.pop(what, None)


@contextlib.contextmanager
def _claimed(path: Path, stop: threading.Event) -> Iterator[bool]:
    """Only one process builds a kernel; gives whether another one did before.

    Several of a run need the same kernels in the same step. Where files cannot be locked, or the other
    process does not end, each builds its own.
    """
    folder = path.with_name(f"{BUILD}{path.stem}")
    file = None
    try:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                folder.mkdir(mode=0o700, exist_ok=True)
                file = os.open(folder, os.O_RDONLY)
        waited = file is not None and _locked(file, stop)
        yield waited
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open too
            os.close(file)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(file: int, stop: threading.Event) -> bool:
    """Wait for the lock of a file, but not for a process that was stopped; whether another had it."""
    end, waited = time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            waited = True
        except OSError:  # a disk without locks
            return False
        if stop.wait(0.01):
            raise ToolchainError("compiling was stopped")
        if time.monotonic() > end:
            return waited


# ---- the directory


def cache_directory() -> Path:
    """`HEAVYBALL_CACHE`, or `heavyball` in the user's cache directory; made with mode 0700.

    A relative path is taken from the working directory at its first use. The directory may be one that
    cannot be written: what is in it can be used.

    Errors: ToolchainError if there is none, or if another user could have written there.
    """
    wanted = os.environ.get("HEAVYBALL_CACHE")
    if not wanted:
        wanted = os.path.join(os.environ.get("XDG_CACHE_HOME") or _home_cache(), "heavyball")
    path = _absolute(wanted)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ToolchainError(f"the cache directory {path} cannot be made: {error}") from None
    _check_private(path)
    return path


def _home_cache() -> Path:
    try:
        return Path.home() / ".cache"
    except (RuntimeError, KeyError):
        raise ToolchainError(
            "there is no home directory for cached kernels: set HEAVYBALL_CACHE"
        ) from None


@functools.lru_cache(maxsize=64)
def _absolute(path: str) -> Path:
    return Path(path).absolute()


def _check_private(path: Path) -> os.stat_result:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise ToolchainError(f"{path} is a link, expected a directory or file of the user's own")
    if not hasattr(os, "getuid"):  # Windows, whose directories of a user are private
        return found
    own = found.st_uid == os.getuid()
    # what root has put into a machine's or a container's image, and the user cannot write
    given = found.st_uid == 0 and not os.access(path, os.W_OK)
    if not (own or given) or found.st_mode & 0o022:
        raise ToolchainError(
            f"{path} belongs to or can be written by another user, so it is not used"
        )
    return found


def _path(source: str) -> Path:
    directory = cache_directory()
    key = hashlib.sha256(f"{_machine(compiler())}\n{source}".encode()).hexdigest()[:32]
    return directory / f"{key}.so"


def _digest(path: Path, content: bytes) -> bytes:
    """Of a kernel and its name: one kernel at the place of another is not whole."""
    return hashlib.sha256(path.name.encode() + content).digest()


def _intact(path: Path) -> bool:
    """Whether the file exists, belongs to the user, and ends with the digest of its content."""
    try:
        if not stat.S_ISREG(_check_private(path).st_mode):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    return _digest(path, content[:-DIGEST]) == content[-DIGEST:]


def _clean(directory: Path, keep: Path) -> None:
    """Delete what killed processes left, and the oldest kernels while all are over the bound."""
    now = keep.lstat().st_mtime  # by the clock of the disk, which may be another machine's
    for path in directory.glob(f"{BUILD}*"):
        if _last_touched(path) < now - STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    found = []
    for path in directory.glob("*.so"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT_BYTES:
            return
        if path != keep:
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _last_touched(folder: Path) -> float:
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # another process has just deleted it
        return math.inf


# ---- the compiler


def compiler() -> Command:
    """The command of a C++ compiler: `CXX` if it is set, else the first of c++, g++ and clang++.

    `CXX` is a program or, as in make, words: "ccache g++ -m64". A link is not followed, because a
    compiler cache looks at the name by which it is called.

    Errors: ToolchainError if there is none.
    """
    return _found(os.environ.get("CXX", "").strip(), os.environ.get("PATH"))


@functools.lru_cache(maxsize=64)
def _found(wanted: str, path: str | None) -> Command:
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        # a path with spaces is one word
        words = [name] if shutil.which(name, path=path) else _words(name)
        found = shutil.which(words[0], path=path) if words else None
        if found:
            return os.path.abspath(found), *words[1:]
    raise ToolchainError(f"there is no C++ compiler ({wanted or 'c++, g++ or clang++'})")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, posix=os.name != "nt")
    except ValueError as error:
        raise ToolchainError(f"CXX={command!r}: {error}") from None


@functools.lru_cache(maxsize=64)
def _machine(command: Command) -> str:
    """What a compiled kernel depends on besides its source: compiler, flags, processor."""
    parts = [*command, *NEEDED, *WANTED, platform.machine()]
    for word in command:
        if program := shutil.which(word):
            found = os.stat(program)
            parts += [str(found.st_mtime_ns), str(found.st_size)]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        for line in text.split("\n\n")[0].splitlines():
            if line.startswith(("model name", "flags", "Features")):
                parts.append(line)
    return "\n".join(parts)


def _all_flags(command: Command) -> Command:
    """All but those for which the command has an option of its own, as -O2 or -march=x86-64."""
    own = {_option(word) for word in command[1:]}
    return tuple(flag for flag in (*NEEDED, *WANTED) if _option(flag) not in own)


def _option(word: str) -> str:
    return "-O" if word.startswith("-O") else word.partition("=")[0]


@dataclass(frozen=True)
class _Build:
    """A kernel in the making, in a folder of its own."""

    command: Command
    folder: Path
    path: Path  # where it will be
    stop: threading.Event

    def compiled(self, source: str, name: str | None) -> tuple[Path, ctypes.CDLL]:
        """Compile with all flags, and if that fails once more without those that are not known."""
        flags = _known_flags.get(self.command, _all_flags(self.command))
        try:
            return self._attempt(source, flags, name)
        except ToolchainError:
            known = self._flags()
            if known == flags:
                raise
            return self._attempt(source, known, name)

    def _flags(self) -> Command:
        """The flags that the compiler knows, found out with small programs; all if it compiles none."""
        with _alone(self.command):
            if self.command not in _known_flags:
                flags = _all_flags(self.command)
                needed = tuple(f for f in flags if f not in WANTED)
                if not self._passes(flags) and self._passes(needed):
                    wanted = [f for f in flags if f in WANTED and self._passes((*needed, f))]
                    flags = (*needed, *wanted)
                if not self.stop.is_set():
                    _known_flags[self.command] = flags
                return flags
            return _known_flags[self.command]

    def _passes(self, flags: Command) -> bool:
        probe = f'// {" ".join(flags)}\nextern "C" int probe() {{ return 0; }}\n'
        try:
            self._attempt(probe, flags, "probe")
        except ToolchainError:
            return False
        return True

    def _attempt(self, source: str, flags: Command, name: str | None) -> tuple[Path, ctypes.CDLL]:
        """Compile and load; only libraries that were loaded and have the function are cached."""
        # each library has a name of its own, since the loader knows those that it has by their names
        label = hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:8]
        code, made = self.folder / f"{label}.cpp", self.folder / f"{label}.so"
        code.write_text(source, encoding="utf-8")
        self._run([*self.command, *flags, "-o", str(made), str(code)])
        try:
            content = made.read_bytes()
        except FileNotFoundError:
            raise self._error("wrote no library") from None
        made.write_bytes(content + _digest(self.path, content))
        made.chmod(0o700)
        try:
            return made, _opened(made, name)
        except OSError as error:
            raise self._error(f"compiled what cannot be loaded: {error}") from None

    def _run(self, command: list[str]) -> None:
        if self.command in _hung:
            raise self._error(f"did not end within {LIMIT_SECONDS:g} s")
        # not through a pipe, which a server that the compiler starts would keep open
        with open(self.folder / "messages", "wb+") as messages:
            code = self._ended(command, messages)
            if code is None:
                _hung.add(self.command)
                raise self._error(f"did not end within {LIMIT_SECONDS:g} s")
            messages.seek(0)
            text = messages.read(2**16).decode(errors="replace")
        if code:
            lines = text.strip().splitlines() or [f"no message, exit code {code}"]
            raise self._error(f"failed: {next((x for x in lines if 'error' in x), lines[0])}")

    def _ended(self, command: list[str], messages: IO[bytes]) -> int | None:
        """The exit code of a compiler, None if it ran into the time limit."""
        end = time.monotonic() + LIMIT_SECONDS
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
            )
        except OSError as error:
            raise self._error(f"did not run: {error.strerror or error}") from None
        try:
            while (code := process.poll()) is None and time.monotonic() < end:
                if self.stop.wait(0.005):
                    raise self._error("was stopped")
            return code
        finally:
            if process.returncode is None:
                _kill(process)

    def _error(self, what: str) -> ToolchainError:
        shown = shlex.join(self.command)
        cause, _, _ = what.partition(":")
        return ToolchainError(
            f"{shown} {what}".replace(f"{self.folder}{os.sep}", ""), f"{shown} {cause}"
        )


def _build(source: str, path: Path, name: str | None, stop: threading.Event) -> ctypes.CDLL:
    # Aside and moved at the end, so that no other process sees half a file.
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=BUILD))
    except OSError as error:
        raise ToolchainError(
            f"the cache directory {path.parent} cannot be written: {error.strerror or error}"
        ) from None
    try:
        made, library = _Build(compiler(), folder, path, stop).compiled(source, name)
        os.replace(made, path)
    except OSError as error:
        cause = f"no kernel can be kept in {path.parent}"
        raise ToolchainError(f"{cause}: {error}", cause) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(Exception):  # the kernel is there
        _clean(path.parent, keep=path)
    return library


def _opened(path: Path, name: str | None) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if name is not None and not hasattr(library, name):
        raise OSError(f"it has no function {name}")
    return library


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a compiler and what it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
