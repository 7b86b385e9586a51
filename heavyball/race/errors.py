"""The errors that the command `heavyball` shows as one paragraph instead of a traceback."""

import difflib
from collections.abc import Iterable

# What a constructor or a step raises on a bad value, an unknown name or a shape it refuses.
REFUSALS = (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError)


class RaceError(ValueError):
    """Something that the user asked for cannot be done; the message says what and why."""


class ChainError(RaceError):
    """A text that is not a chain, or not an optimizer with arguments."""


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks, or its type where it has no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def shown(value: object, length: int = 60) -> str:
    """A value in an error message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= length else text[:length] + "..."


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name nobody knows, with the nearest known ones, or all of them."""
    known = sorted(known)
    lower = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name[:80].lower(), lower, n=3, cutoff=0.5)
    hint = "nearest" if close else "known"
    return f"no {kind} {shown(name)}; {hint}: {', '.join([lower[c] for c in close] or known) or 'none'}"
