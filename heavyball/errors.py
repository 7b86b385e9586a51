"""Errors, shared parts of their messages, and warnings that point at the user's line."""

import difflib
import sys
import threading
import warnings
from collections.abc import Iterable
from types import FrameType

# Packages whose lines a user has not written: this one, and what calls it on a user's behalf.
INNER = frozenset(
    {
        "heavyball",
        "torch",
        "contextlib",
        "functools",
        "threading",
        "concurrent",
        "importlib",
        "typing_extensions",  # around what torch has deprecated
    }
)
# How many names a message lists.
MOST_NAMES = 60


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


# What a constructor or a step raises on a bad value, an unknown name or a shape it refuses.
REFUSALS = (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError)


class RaceError(ValueError):
    """A request that cannot be fulfilled; the message says what and why."""


class ChainError(RaceError):
    """Text that is not a valid chain or optimizer."""


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks, or its type where it has no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def shown(value: object, length: int = 60) -> str:
    """A value in an error message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        text = f"{type(value).__name__} with too many digits"
    return text if len(text) <= length else text[:length] + "..."


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest known ones, or all known ones."""
    known = sorted(known)
    lower = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name[:80].lower(), lower, n=3, cutoff=0.5)
    if close:
        return f"no {kind} {shown(name)}; nearest: {', '.join(lower[c] for c in close)}"
    return f"no {kind} {shown(name)}; known: {_listed(known)}"


def _listed(names: list[str]) -> str:
    """Names in one line, the first of them where they are many."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "none") + more


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names, and the nearest one."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        lower = {text.lower(): text for text in known}
        close = [lower[t] for t in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"known: {_listed(known)}{hint}"


def no_attribute(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error for a name that a module does not have, with the nearest of those that it has."""
    if name.startswith("__"):  # asked for by Python and by tools, not by people
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    return AttributeError(f"{module} has no {name!r}; {nearest(name, known)}")
