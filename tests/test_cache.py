"""The cache of kernels: whatever fails, a step ends with the right numbers."""

import builtins
import contextlib
import ctypes
import errno
import gc
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import heavyball
from heavyball.compiler.cpp import toolchain
from heavyball.compiler.run import engine
from heavyball.runtime import threads

C = heavyball.chainable
REAL = " ".join(toolchain.compiler())

# Compiles a source once, and copies the library from then on.
COPYING = """#!/bin/sh
for word in "$@"; do
  [ "$before" = -o ] && out="$word"
  case "$word" in *.cpp) code="$word";; esac
  before="$word"
done
kept="{store}/$(cksum < "$code" | tr ' ' -)"
[ -e "$kept" ] || {real} "$@" -o "$kept" && cp "$kept" "$out"
"""


def source(number: int) -> str:
    return f'extern "C" int answer() {{ return {number}; }}'


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a process that knows no kernel."""
    path = tmp_path / "cache"
    monkeypatch.setenv("HEAVYBALL_CACHE", str(path))
    engine.forget_kernels()
    yield path
    engine.forget_kernels()


@pytest.fixture(scope="module")
def copying(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("copying")
    return tool(folder, COPYING.format(store=folder, real=REAL))


def tool(folder: Path, text: str, name: str = "tool") -> str:
    path = folder / name
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def stepped(compile="auto", steps: int = 1) -> torch.Tensor:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    opt = heavyball.AdamW([p], lr=0.1, compile=compile)
    for step in range(steps):
        p.grad = torch.linspace(1, 2, 6) - step
        opt.step()
    return p.detach()


def assert_steps(expected: str | None) -> None:
    """The right numbers, with one warning that names the cause; and compile=True raises it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.testing.assert_close(stepped(steps=2), stepped(False, steps=2))
    texts = [str(w.message) for w in found]
    if expected is None:
        assert not texts
        stepped(True)
        return
    assert len(texts) == 1
    assert expected in texts[0]
    with pytest.raises(RuntimeError, match="compile=True") as raised:
        stepped(True)
    assert expected in str(raised.value)


# ---- every call fails once


class Faults:
    """Lets the n-th call that the toolchain makes of the system fail."""

    PLACES = (
        *((os, name) for name in ("mkdir", "lstat", "stat", "replace", "unlink", "rmdir", "chmod")),
        *((os, name) for name in ("scandir", "listdir", "access", "open", "killpg")),
        *((builtins, "open"), (io, "open"), (tempfile, "mkdtemp"), (subprocess, "Popen")),
        *((shutil, "which"), (ctypes, "CDLL"), (threading.Thread, "start")),
    )

    def __init__(self, monkeypatch, error: BaseException):
        self.error, self.left = error, 0
        for place, name in self.PLACES:
            if hasattr(place, name):
                monkeypatch.setattr(place, name, self.failing(getattr(place, name)))

    def failing(self, real):
        def call(*args, **kwargs):
            if self.left > 0 and self.asked_by_the_toolchain():
                self.left -= 1
                if self.left == 0:
                    raise self.error
            return real(*args, **kwargs)

        return call

    @staticmethod
    def asked_by_the_toolchain() -> bool:
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename != toolchain.__file__:
            frame = frame.f_back
        return frame is not None


@pytest.mark.parametrize(
    ("error", "mode", "chain", "every"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "auto", (C.sign,), 1),
        (OSError(errno.EACCES, "Permission denied"), True, (C.clip_by_global_norm, C.sign), 3),
        (MemoryError(), "auto", (C.sign,), 2),
    ],
    ids=["no space", "compile=True", "no memory"],
)
def test_any_fault_leaves_a_step_with_the_right_numbers(
    monkeypatch, cache, copying, error, mode, chain, every
) -> None:
    def step(mode) -> torch.Tensor:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        p.grad = torch.linspace(1, 2, 6)
        C.ChainOpt([p], 0.1, *chain, compile=mode).step()
        return p.detach()

    monkeypatch.setenv("CXX", copying)
    right = step(False)
    torch.testing.assert_close(step(True), right)
    with monkeypatch.context() as patch:
        faults = Faults(patch, error)
        for number in range(1, 1000, every):
            shutil.rmtree(cache, ignore_errors=True)
            engine.forget_kernels()
            faults.left = number
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                with contextlib.suppress(RuntimeError if mode is True else ()):
                    torch.testing.assert_close(step(mode), right)
            assert len(found) <= 1
            if faults.left > 0:
                break
            if number % 4 == 0:  # in the same cache, as by the next process
                engine.forget_kernels()
                torch.testing.assert_close(step(True), right)
    assert number > 20


# ---- faults of each kind


def directory_in_its_place(cache: Path) -> None:
    for kernel in cache.glob("*.so"):
        kernel.unlink()
        kernel.mkdir()
        (kernel / "inside").touch()


def pipe_in_its_place(cache: Path) -> None:
    for kernel in cache.glob("*.so"):
        kernel.unlink()
        os.mkfifo(kernel)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(directory_in_its_place, "no kernel can be kept"), (pipe_in_its_place, None)],
    ids=["directory", "pipe"],
)
def test_something_else_in_the_place_of_a_kernel(monkeypatch, cache, copying, change, expected):
    monkeypatch.setenv("CXX", copying)
    stepped(True)
    change(cache)
    engine.forget_kernels()
    assert_steps(expected)


COMPILERS = {
    "writes nothing": ("exit 0", "wrote no library"),
    "is killed": ("kill -9 $$", "exit code -9"),
    "is not UTF-8": ("printf 'error \\377\\376' >&2; exit 1", "error"),
    "deletes the cache": ('rm -rf "$HEAVYBALL_CACHE"; exit 1', "kept"),
    "is not a library": ('for w; do [ "$o" = -o ] && echo no > "$w"; o="$w"; done', "loaded"),
    "is no program": ("#!/no/such/shell", "did not run"),
    "hangs": ("sleep 1000 & wait", "did not end within 0.3 s"),
    "leaves a server": ("sleep 2 & echo error: busy; exit 1", "busy"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_a_compiler_that_does_not_do_its_work(monkeypatch, cache, tmp_path, kind: str) -> None:
    text, expected = COMPILERS[kind]
    monkeypatch.setattr(toolchain, "LIMIT_SECONDS", 0.3 if kind == "hangs" else 60)
    monkeypatch.setenv("CXX", tool(tmp_path, text))
    began = time.monotonic()
    assert_steps(expected)
    assert time.monotonic() - began < 60
    assert not cache.exists() or not list(cache.iterdir())


def test_a_library_without_the_function_is_not_kept(monkeypatch, cache, copying) -> None:
    monkeypatch.setenv("CXX", copying)
    with pytest.raises(toolchain.ToolchainError, match="no function run"):
        toolchain.load(source(1), "run")
    assert not list(cache.iterdir())


def no_home(monkeypatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HEAVYBALL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    pwd = pytest.importorskip("pwd", reason="Windows has no user database")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])


def file_for_a_directory(monkeypatch) -> None:
    path = Path(os.environ["HEAVYBALL_CACHE"])
    path.touch()
    monkeypatch.setenv("HEAVYBALL_CACHE", str(path / "inside"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (no_home, "HEAVYBALL_CACHE"),
        (file_for_a_directory, "cannot be made"),
        (lambda patch: patch.setenv("CXX", "no-such-compiler"), "no-such-compiler"),
        (lambda patch: patch.setenv("CXX", "g++ '-m64"), "CXX"),
    ],
    ids=["no home", "file", "no compiler", "quote"],
)
def test_no_place_or_no_compiler(monkeypatch, cache, change, expected: str) -> None:
    change(monkeypatch)
    assert_steps(expected)


def test_a_compiler_that_fails_is_asked_once_for_a_source(monkeypatch, cache, tmp_path) -> None:
    log = tmp_path / "log"
    text = f'for w; do case "$w" in *.cpp) cksum < "$w" >> {log};; esac; done; exit 1'
    monkeypatch.setenv("CXX", tool(tmp_path, text))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for fused in (False, True):
            params = [torch.nn.Parameter(torch.ones(n, n + 1)) for n in range(2, 8)]
            params += [torch.nn.Parameter(torch.ones(5))]
            # a user's function, which optimizers do not share
            opt = C.ChainOpt(params, 0.1, C.apply(lambda u: u * 2), C.scale_by_adam)
            if fused:
                heavyball.fuse_backward(opt)
            for _ in range(2):
                sum(p.sum() for p in params).backward()
                opt.step()
                opt.zero_grad()
    runs = log.read_text().splitlines()
    assert len(runs) == len(set(runs))
    assert len(found) == 2  # one for each optimizer, whose functions are not the same


# ---- what the compiler is called, and which flags it has


def test_the_compiler_is_called_by_the_name_it_was_found_by(monkeypatch, cache, tmp_path) -> None:
    looks = f'case "${{0##*/}}" in c++) exec {REAL} "$@";; esac\n'
    looks += f'case "$1" in c++) shift; exec {REAL} "$@";; esac; exit 1'
    program = Path(tool(tmp_path, looks, "compiler cache"))
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "c++"
    link.symlink_to(program)
    commands = (str(link), f"{link} -m64 -O1", f"{shlex.quote(str(program))} c++", f"{REAL} '-O2'")
    for number, command in enumerate(commands):
        monkeypatch.setenv("CXX", command)
        assert toolchain.load(source(number), "answer").answer() == number
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", f"{link.parent}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.compiler() == (str(link),)


def test_flags_that_a_compiler_does_not_know_are_left_out(monkeypatch, cache, tmp_path) -> None:
    refused = "-fopenmp|-march=native|-fno-math-errno"
    log = tmp_path / "log"
    text = f'echo "$*" >> {log}\nfor w; do case "$w" in {refused}) echo "error: $w" >&2; exit 1;;'
    monkeypatch.setenv("CXX", tool(tmp_path, f'{text}\nesac; done; exec {REAL} "$@"'))
    assert toolchain.load(source(1), "answer").answer() == 1
    first = len(log.read_text().splitlines())
    assert toolchain.load(source(2), "answer").answer() == 2
    runs = log.read_text().splitlines()
    assert len(runs) == first + 1  # they are found out once
    assert "-O3" in runs[-1]
    assert "-fno-trapping-math" in runs[-1]


def test_a_compiler_without_openmp_has_kernels_all_the_same(monkeypatch, cache, tmp_path) -> None:
    """As on macOS: no flag for it, and no header."""
    text = (
        'for w; do case "$w" in -fopenmp*) echo "error: unsupported option $w" >&2; exit 1;;\n'
        '*.cpp) grep -q "omp.h" "$w" && { echo "error: omp.h not found" >&2; exit 1; };;\n'
        f'esac; done; exec {REAL} "$@"'
    )
    monkeypatch.setenv("CXX", f"{tool(tmp_path, text)} -O1")
    assert_steps(None)


def test_options_of_the_user_go_before_ours(monkeypatch, cache, tmp_path) -> None:
    log = tmp_path / "log"
    program = tool(tmp_path, f'echo "$*" >> {log}; exec {REAL} "$@"')
    monkeypatch.setenv("CXX", f"{program} -O1 -march=x86-64")
    with contextlib.suppress(toolchain.ToolchainError):  # another processor
        toolchain.load(source(1))
    run = log.read_text().splitlines()[0].split()
    assert "-O1" in run
    assert not {"-O3", "-march=native"} & {*run}


# ---- the directory


def test_a_kernel_at_the_place_of_another_is_never_run(cache) -> None:
    for number in (1, 2):
        toolchain.load(source(number))
    one, two = cache.glob("*.so")
    contents = one.read_bytes(), two.read_bytes()
    for path, content in ((one, contents[1]), (two, contents[0])):
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o700)
    for number in (1, 2):
        assert toolchain.load(source(number)).answer() == number


def test_a_relative_directory_stays_where_it_was_first_used(monkeypatch, cache, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEAVYBALL_CACHE", f"./{tmp_path.name}")
    for number in (1, 2):
        assert toolchain.load(source(number)).answer() == number
        monkeypatch.chdir(tmp_path / "other")
    assert len(list((tmp_path / tmp_path.name).glob("*.so"))) == 2


def test_a_directory_that_cannot_be_written_is_read(monkeypatch, cache) -> None:
    toolchain.load(source(1))
    read_only = OSError(errno.EROFS, "Read-only file system")

    def fail(*args, **kwargs):
        raise read_only

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    monkeypatch.setattr(os, "access", lambda path, mode, **kwargs: not mode & os.W_OK)
    assert toolchain.load(source(1)).answer() == 1
    with pytest.raises(toolchain.ToolchainError, match="cannot be written: Read-only"):
        toolchain.load(source(2))


def test_folders_that_killed_compilers_left_are_deleted(cache) -> None:
    toolchain.load(source(1))
    for name, age in (("left", 40 * 86400), ("running", 60)):
        folder = cache / f"build-{name}"
        folder.mkdir()
        (folder / "kernel.cpp").touch()
        for path in (folder / "kernel.cpp", folder):
            os.utime(path, (time.time() - age,) * 2)
    toolchain.load(source(2))
    assert [path.name for path in cache.glob("build-*")] == ["build-running"]


# ---- other processes and threads


def loaded_in_processes(numbers: list[int], count: int) -> list[int]:
    """Load libraries in several processes at once; the exit code of each."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                found = [toolchain.load(source(n), "answer").answer() for n in numbers]
                os._exit(0 if found == numbers else 1)
            os._exit(2)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def logging(tmp_path: Path, before: str = "") -> tuple[str, Path]:
    """A compiler that notes its calls."""
    log = tmp_path / "log"
    return tool(tmp_path, f'echo "$*" >> {log}; {before} exec {REAL} "$@"'), log


def test_one_process_compiles_what_several_want(monkeypatch, cache, tmp_path) -> None:
    command, log = logging(tmp_path, "sleep 0.2;")
    monkeypatch.setenv("CXX", command)
    assert loaded_in_processes([0, 1], 3) == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("kind", ["a disk without locks", "no locks"])
def test_each_process_compiles_where_files_cannot_be_locked(monkeypatch, cache, kind: str) -> None:
    def fail(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if kind == "no locks":
        monkeypatch.setattr(toolchain, "fcntl", None)
    else:
        monkeypatch.setattr(toolchain.fcntl, "flock", fail)
    assert loaded_in_processes([0, 1], 3) == [0, 0, 0]
    assert len(list(cache.iterdir())) == 2


def test_a_process_that_was_killed_while_compiling_holds_up_no_other(
    monkeypatch, cache, tmp_path
) -> None:
    command, log = logging(
        tmp_path, f"[ -e {tmp_path}/first ] || {{ : > {tmp_path}/first; sleep 60; }};"
    )
    monkeypatch.setenv("CXX", command)
    child = os.fork()
    if child == 0:
        toolchain.load(source(3))
        os._exit(0)
    while not (tmp_path / "first").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert toolchain.load(source(3)).answer() == 3
    assert len(log.read_text().splitlines()) == 2


def test_a_process_that_does_not_end_is_not_waited_for(monkeypatch, cache) -> None:
    toolchain.load(source(1))
    (kept,) = cache.glob("*.so")
    kept.unlink()
    folder = cache / f"build-{kept.stem}"
    folder.mkdir()
    file = os.open(folder, os.O_RDONLY)
    toolchain.fcntl.flock(file, toolchain.fcntl.LOCK_EX)
    monkeypatch.setattr(toolchain, "WAIT_SECONDS", 0.05)
    try:
        assert toolchain.load(source(1), "answer").answer() == 1
    finally:
        os.close(file)
    assert kept.exists()


def test_one_thread_compiles_what_several_want(monkeypatch, cache, tmp_path) -> None:
    command, log = logging(tmp_path)
    monkeypatch.setenv("CXX", command)
    found = []
    at_once = threading.Barrier(3)

    def load() -> None:
        at_once.wait()
        found.append(toolchain.load(source(7), "answer").answer())

    running = [threading.Thread(target=load) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert found == [7, 7, 7]
    assert len(log.read_text().splitlines()) == 1


def no_thread(self) -> None:
    raise RuntimeError("can't start new thread")


def test_without_threads_kernels_are_compiled_one_after_the_other(monkeypatch, cache) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    toolchain.prepare([source(1), source(2)])
    assert toolchain.load(source(2)).answer() == 2


@pytest.mark.parametrize("allowed", [0, 1])
def test_without_threads_work_is_done_by_turns_to_the_same_bits(monkeypatch, allowed: int) -> None:
    before, real = torch.get_num_threads(), threading.Thread.start
    items = [torch.randn(300, 300) for _ in range(4)]
    torch.set_num_threads(3)
    try:
        want = threads.each(torch.linalg.qr, items, [2.0**26] * 4)
        started = []

        def start(self) -> None:
            started.append(self)
            if len(started) > allowed:
                no_thread(self)
            real(self)

        monkeypatch.setattr(threading.Thread, "start", start)
        monkeypatch.setattr(threads, "pools", {})
        found = threads.each(torch.linalg.qr, items, [2.0**26] * 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert started
    for one, other in zip(want, found, strict=True):
        assert torch.equal(one.Q, other.Q)
        assert torch.equal(one.R, other.R)


# ---- functions of optimizers that are gone


class Large:
    """What a function closes over."""

    def __call__(self, n: int) -> float:
        return 0.5

    def interval(self, step: int) -> float:
        return 2.0

    def fires(self, step: int, phase: float = 0.0) -> bool:
        return step % 2 == 0

    def total(self, step: int) -> int:
        return step // 2


def doubled(large: Large, holder: list):
    """Refers to the optimizer too, which refers to the function."""
    return lambda update: update * (2.0 if large and holder is not None else 1.0)


def own(large: Large, holder: list):
    def kept(*, vectors, squares):
        return (vectors, squares) if large else None

    @C.whole_transform(after=kept, due=lambda count: bool(large))
    def whole_of_own(update):
        return update * (2.0 if large else 1.0)

    return whole_of_own


BUILDERS = {
    "apply": lambda x, h: (C.apply(doubled(x, h)), C.scale_by_adam),
    "behind SOAP": lambda x, h: (C.soap_precond(C.scale_by_adam), C.apply(doubled(x, h))),
    "before a sum": lambda x, h: (C.apply(doubled(x, h)), C.clip_by_global_norm(max_norm=1.0)),
    "route": lambda x, h: (C.route(C.when(C.apply(doubled(x, h)), ndim=2), otherwise=C.sign),),
    "whole": lambda x, h: (own(x, h), C.cautious),
    "probability": lambda x, h: (C.psgd_kron(preconditioner_update_probability=x),),
    "schedule": lambda x, h: (C.soap_precond(C.scale_by_adam, precond_scheduler=x),),
    "not printable": lambda x, h: (C.apply(lambda u: u.cumsum(0) if x else u),),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", BUILDERS)
def test_functions_of_optimizers_that_are_gone_are_freed(kind: str) -> None:
    def use(how) -> weakref.ref:
        large, holder = Large(), []
        params = [torch.nn.Parameter(torch.rand(4, 3)), torch.nn.Parameter(torch.rand(3))]
        chain = BUILDERS[kind](large, holder)
        opt = C.ChainOpt(params, 0.1, *chain, compile="auto" if how == "fused" else how)
        holder.append(opt)
        if how == "fused":
            heavyball.fuse_backward(opt)
        for _ in range(3):
            sum((p * p).sum() for p in params).backward()
            opt.step()
            opt.zero_grad()
        return weakref.ref(large)

    # sums over all parameters cannot be fused
    ways = ("auto", False) if kind == "before a sum" else ("auto", False, "fused")
    kept = {how: use(how) for how in ways}
    gc.collect()
    assert not [how for how, large in kept.items() if large() is not None]
