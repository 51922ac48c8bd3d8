"""The one error users see from this package."""

_LONGEST = 4000  # characters of a message: names inside a file may be longer


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line: which file or key, what is wrong, what is right."""

    def __init__(self, message: str) -> None:
        text = one_line(message[:_LONGEST])
        super().__init__(text if len(text) <= _LONGEST and len(message) <= _LONGEST else f"{text[:_LONGEST]}...")


def one_line(message: str) -> str:
    """The message with characters escaped that could break or forge a terminal line.

    Names from inside a file end up in messages.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
