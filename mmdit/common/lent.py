"""Attributes that an object has of its own for a while, in the place of its class's or of others."""

from collections.abc import Callable
from typing import Any


def lend(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put an attribute on an object; returns what takes it away, and puts back the one that it had of its own."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value

    def back() -> None:
        if had:
            own[name] = before
        else:
            del own[name]

    return back
