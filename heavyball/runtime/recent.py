"""A dict of bounded size."""

import contextlib
from typing import Any


class Recent(dict[Any, Any]):
    """A dict that keeps only the entries that were added last."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > self._limit:
            with contextlib.suppress(RuntimeError):  # another thread has added one
                self.pop(next(iter(self)), None)
