"""Runs programs in new processes that have torch and nothing of the library.

A new interpreter would import torch, which takes seconds; these processes are forked from one that has
imported torch alone.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 600.0


def run(
    program: str,
    *words: Any,
    env: Mapping[str, str] | None = None,
    cwd: Any = None,
    warned: Sequence[tuple[str, type[Warning]]] = (),
) -> subprocess.CompletedProcess[str]:
    """What `python -c program *words` does: its exit code, and what it printed.

    env: the whole environment. warned: pairs (action, category) of filters, as `-W` gives.
    """
    started = start(program, *words, env=env, cwd=cwd, warned=warned)
    return started()


def start(
    program: str,
    *words: Any,
    env: Mapping[str, str] | None = None,
    cwd: Any = None,
    warned: Sequence[tuple[str, type[Warning]]] = (),
) -> Any:
    """The same, begun: a function that waits for the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    folder = tempfile.TemporaryDirectory()
    texts = [Path(folder.name) / name for name in ("out", "err")]
    given = dict(os.environ if env is None else env), str(cwd or Path.cwd()), warned
    process = context.Process(target=_become, args=(program, list(map(str, words)), *given, texts))
    process.start()

    def ended() -> subprocess.CompletedProcess[str]:
        with folder:
            process.join(LIMIT)
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"not done after {LIMIT} seconds: {program}")
            out, err = (path.read_text() for path in texts)
        return subprocess.CompletedProcess(program, process.exitcode, out, err)

    return ended


def _become(
    program: str,
    words: list[str],
    env: dict[str, str],
    cwd: str,
    warned: Sequence[tuple[str, type[Warning]]],
    texts: list[Path],
) -> None:
    for number, path in enumerate(texts, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c", *words]
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    warnings.resetwarnings()
    for action, category in warned:
        warnings.simplefilter(action, category)  # type: ignore[arg-type]
    code = 0
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
