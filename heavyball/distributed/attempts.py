"""What a process computes between the exchanges of a step, each of which others wait for."""

import traceback
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


class Attempts:
    """Computes until something raises, and keeps that error until the step has ended.

    Others wait for what this process sends. So it goes on taking part: from the error on nothing is
    computed here, and zeros are sent in its place.

    alone: whether nobody waits for this process; errors are raised at once then. error: one of before.
    """

    def __init__(self, alone: bool, error: Exception | None = None):
        self._alone = alone
        self.error = error

    def __call__(self, fn: Callable[..., Found], *args: object) -> Found | None:
        """What a function returns; None where it raises, or something has raised before."""
        if self.error is not None:
            return None
        try:
            return fn(*args)
        except Exception as error:
            if self._alone:
                raise
            # what they hold may be all the memory there is
            traceback.clear_frames(error.__traceback__)
            self.error = error
            return None
