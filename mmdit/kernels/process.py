"""Settings of the whole process, changed for a while."""

from collections.abc import Callable
from threading import Lock
from typing import Any


class Switch:
    """A setting that some need changed while they compute; used as a context, by any number of threads at once.

    The first to come changes it, the last to leave puts back what was there.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> None:
        """value: what it is to be meanwhile."""
        self._read, self._write, self._value = read, write, value
        self._lock, self._users, self._before = Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(self._value)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._write(self._before)
