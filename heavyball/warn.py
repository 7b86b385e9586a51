"""Warnings, shown at the line of the user's that led to them."""

import sys
import threading
import warnings
from types import FrameType

# Packages whose lines a user has not written: this one, and what calls it on a user's behalf.
INNER = frozenset({"heavyball", "torch", "contextlib", "functools", "threading", "concurrent"})


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the nearest line outside this package and torch, however deep the call is.

    The hooks of `backward()` may run on a thread of torch's own. The line is then where the main
    thread waits for it.
    """
    own = sys._getframe(1)
    frame = _outside(own)
    if frame is None:
        main = threading.main_thread().ident
        frame = _outside(sys._current_frames().get(main or 0)) or own
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _outside(frame: FrameType | None) -> FrameType | None:
    while frame is not None and _root(frame) in INNER:
        frame = frame.f_back
    return frame


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
